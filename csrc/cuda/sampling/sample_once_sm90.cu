// One build of the kernel that draws rows of any top-k in one launch, or is the second of two; attnkit/backends/cuda/sampling.py names it
// by macros.
#include "sample_once_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kTopkThreads, 1)
    attnkit_sample_once(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_once<ATTNKIT_TYPE, ATTNKIT_PENALISED != 0, ATTNKIT_GIVEN != 0>(params);
}
