// One build of the kernel for rows that filters hold back; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_cut_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kSampleThreads, ATTNKIT_CTAS)
    attnkit_sample_cut(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_cut<ATTNKIT_TYPE>(params);
}
