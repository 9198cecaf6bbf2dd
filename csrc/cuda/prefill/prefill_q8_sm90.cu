// One build of the prefill kernel for 8-bit caches; attnkit/backends/cuda/prefill.py names the shape by macros.
#include "prefill_q8_sm90.cuh"

using Shape = attnkit::PrefillQ8Shape<ATTNKIT_D, ATTNKIT_DV, ATTNKIT_BF16 != 0, ATTNKIT_KV, ATTNKIT_STAGES, ATTNKIT_RAW>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1)
    attnkit_paged_prefill_q8(const __grid_constant__ attnkit::PrefillParams params) {
  attnkit::prefill_q8<Shape>(params);
}
