// One build of the W8A8 kernel for more than a few rows; attnkit/backends/cuda/builds/gemm.py names the shape by macros.
#include "gemm_sm90.cuh"

using Shape = attnkit::GemmShape<ATTNKIT_INT8 != 0, ATTNKIT_CONSUMERS, ATTNKIT_BN, ATTNKIT_STAGES, ATTNKIT_TURNS != 0, ATTNKIT_PARTS>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1) attnkit_w8a8_gemm(const __grid_constant__ attnkit::GemmParams params) {
  attnkit::gemm<Shape>(params);
}
