// What gemm.cpp and its instruction-set builds share: the description of one call and the table of functions.
#pragma once

#include <cstdint>

namespace attnkit::cpu {

// out [M, N] = (a [M, K] . w [N, K]^T) * a_scale * w_scale + bias; a and w both int8 or both e4m3.
struct GemmCall {
  int kind, out_type, bias_type;  // DType; bias_type counts only with a bias
  int64_t M, N, K, lda, ldw, ldo;  // row strides in elements
  const int8_t* a;
  const int8_t* w;
  const float* a_scale;  // [M], or [1] with stride 0
  const float* w_scale;
  int64_t a_scale_stride, w_scale_stride;
  const void* bias;  // [N] or null
  void* out;
  // a repacked by pack_row: M rows of row_bytes, zero beyond K; and for int8 what the accumulators start from.
  char* packed;
  int64_t row_bytes;
  uint32_t* start;  // [M], or null: from zero
};

constexpr int64_t kBlockM = 84;   // rows of a that stay in the L2 cache while rows of w pass by
constexpr int64_t kBlockN = 64;    // rows of w in one task, at most
constexpr int64_t kGemmScratch = kBlockM * kBlockN * 4 + (64 << 10);  // accumulators, and converted rows of w

struct GemmOps {
  int64_t (*packed_row_bytes)(int kind, int64_t K);
  void (*pack_row)(const GemmCall& call, int64_t m);
  // Rows [m0, m1) x columns [n0, n1), at most kBlockM x kBlockN; scratch holds kGemmScratch bytes, 64-byte aligned.
  void (*block)(const GemmCall& call, int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch);
  // One row: largest magnitude, then quantised values and the scale. `wide` holds K floats.
  void (*quantise_row)(const void* x, int dtype, int64_t K, void* out, int out_type, float* scale, float* wide);
  // One row before it is quantised, as K floats in `wide`. The norm of x, or of residual + x, which is then the residual.
  void (*rms_norm_row)(const void* x, void* residual, int dtype, const float* weight, int64_t K, float eps, float* wide);
  // silu of the first K values times the next K; `wide` holds 2 K floats.
  void (*silu_mul_row)(const void* x, int dtype, int64_t K, float* wide);
  // n values divided by scale (a null scale: by nothing) into int8 or e4m3, for the KV cache.
  void (*store_row)(const void* x, int dtype, int64_t n, void* out, int out_type, const float* scale);
  // One row of merge_states: wa * a + wb * b, where a weight of 0 silences its part whatever that holds.
  void (*merge_row)(const void* a, const void* b, int dtype, int64_t n, float wa, float wb, void* out);
};

extern const GemmOps gemm_scalar, gemm_avx2, gemm_avx512, gemm_avx512_bf16;
const GemmOps& gemm_ops(int isa);  // -1: the best this machine has

}  // namespace attnkit::cpu
