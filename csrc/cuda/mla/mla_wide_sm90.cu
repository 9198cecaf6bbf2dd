// One build of the wide latent decode; attnkit/backends/cuda/builds/mla_wide.py names the shape by macros.
#include "mla_wide_sm90.cuh"

using Shape = attnkit::MlaWideShape<ATTNKIT_BF16 != 0, ATTNKIT_CTAS>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1)
    attnkit_mla_decode_wide(const __grid_constant__ attnkit::MlaWideParams params) {
  attnkit::mla_wide<Shape>(params);
}
