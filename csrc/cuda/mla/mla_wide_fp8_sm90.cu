// One build of the wide latent decode over an fp8 cache; attnkit/backends/cuda/builds/mla_wide_fp8.py names it by macros.
#include "mla_wide_fp8_sm90.cuh"

using Shape = attnkit::MlaWideFp8Shape<ATTNKIT_CTAS>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1)
    attnkit_mla_decode_wide_fp8(const __grid_constant__ attnkit::MlaWideParams params) {
  attnkit::mla_wide_fp8<Shape>(params);
}
