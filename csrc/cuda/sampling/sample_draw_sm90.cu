// One build of the kernel for greedy and plain temperature sampling; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_draw_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kSampleThreads, ATTNKIT_CTAS)
    attnkit_sample_draw(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_draw<ATTNKIT_TYPE, ATTNKIT_PENALISED != 0, ATTNKIT_GREEDY != 0>(params);
}
