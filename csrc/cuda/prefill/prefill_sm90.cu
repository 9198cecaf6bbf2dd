// One build of the prefill kernel; attnkit/backends/cuda/prefill.py names the shape by macros.
#include "prefill_sm90.cuh"

using Shape = attnkit::PrefillShape<ATTNKIT_D, ATTNKIT_DV, ATTNKIT_BF16 != 0, ATTNKIT_CONSUMERS, ATTNKIT_BN, ATTNKIT_STAGES>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1)
    attnkit_paged_prefill(const __grid_constant__ attnkit::PrefillParams params) {
  attnkit::prefill<Shape>(params);
}
