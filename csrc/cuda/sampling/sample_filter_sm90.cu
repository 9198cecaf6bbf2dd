// One build of the kernel for rows without a short top-k; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_filter_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kSampleThreads, ATTNKIT_CTAS)
    attnkit_sample_filter(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_filter<ATTNKIT_TYPE>(params);
}
