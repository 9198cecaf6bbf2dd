// One build of the kernel for top-k, top-p and min-p; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_list_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kSampleThreads, ATTNKIT_CTAS)
    attnkit_sample_filter(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_filter<ATTNKIT_TYPE, ATTNKIT_PENALISED != 0>(params);
}
