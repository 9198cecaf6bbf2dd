// One build of the short latent decode; attnkit/backends/cuda/builds/mla_short.py names the shape by macros.
#include "mla_short_sm90.cuh"

using Shape = attnkit::MlaShortShape<ATTNKIT_CTAS, ATTNKIT_FP8 != 0>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1)
    attnkit_mla_decode_short(const __grid_constant__ attnkit::MlaWideParams params) {
  attnkit::mla_short<Shape>(params);
}
