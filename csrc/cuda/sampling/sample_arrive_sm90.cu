// One build of the kernel for top-p without top-k; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_arrive_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kArriveThreads, 1)
    attnkit_sample_arrive(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_arrive<ATTNKIT_TYPE, ATTNKIT_PENALISED != 0>(params);
}
