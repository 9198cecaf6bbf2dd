// One build of the W8A8 kernel for up to 128 tokens; attnkit/backends/cuda/builds/gemm_skinny.py names the shape by macros.
#include "gemm_skinny_sm90.cuh"

using Shape = attnkit::SkinnyShape<ATTNKIT_INT8 != 0, ATTNKIT_BN, ATTNKIT_PLANES, ATTNKIT_TALL != 0>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, Shape::PerSm)
    attnkit_w8a8_gemm_skinny(const __grid_constant__ attnkit::SkinnyParams params) {
  attnkit::skinny_gemm<Shape>(params);
}
