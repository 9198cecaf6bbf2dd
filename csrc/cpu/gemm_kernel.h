// The CPU kernels of w8a8_gemm, quantize_per_token and its fused forms, built once an instruction set (the macro ATTNKIT_ISA
// names the namespace). A build gives two micro kernels, for int8 and for e4m3:
//
//   MR, NR             largest register tile: MR rows of a by NR rows of w
//   Elem, Right, Acc   elements of packed a and of converted w; sums: float, or uint32_t (may wrap on the way to an int32)
//   kStep, kBlockK     rows are padded to multiples of kStep; a tile runs over at most kBlockK elements
//   kDirectRows        with at most so many rows of a, tiles read w as it lies: conversion would not pay
//   convert(w, n, to)  one row of w as tiles want it, zeros up to a multiple of kStep
//   tile<mr, direct>(a, a_stride, w, w_stride_in_bytes, k, acc [mr][NR], ahead)   stores the products over k elements
//
// Both operands are read along K, so weights need no packing beforehand: a tile of dot products is summed lane by
// lane and reduced once at its end. A block of K keeps NR rows of w in the L1 cache while the rows of a pass by.
#pragma once

#include "convert.h"
#include "gemm.h"

namespace attnkit::cpu::ATTNKIT_ISA {

// Register tiles are arrays: their loops must unroll before the compiler decides what lives in memory.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define ATTNKIT_INLINE static inline __attribute__((always_inline))

// ---------------------------------------------------------------- rows of 16-bit and float values

template <class T>
ATTNKIT_INLINE void widen(const T* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

template <class T>
ATTNKIT_INLINE void narrow(const float* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) from_float(x[i], out + i);
}

#if defined(__F16C__)
ATTNKIT_INLINE void widen(const f16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) out[i] = to_float(x[i]);
}

ATTNKIT_INLINE void narrow(const float* x, int64_t n, f16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
  for (; i < n; ++i) from_float(x[i], out + i);
}
#endif

static void widen_any(const void* x, int dtype, int64_t n, float* out) {
  if (dtype == kFloat32) std::memcpy(out, x, size_t(n) * 4);
  if (dtype == kBFloat16) widen(static_cast<const bf16_t*>(x), n, out);
  if (dtype == kFloat16) widen(static_cast<const f16_t*>(x), n, out);
}

static void narrow_any(const float* x, int64_t n, void* out, int dtype) {
  if (dtype == kFloat32) std::memcpy(out, x, size_t(n) * 4);
  if (dtype == kBFloat16) narrow(x, n, static_cast<bf16_t*>(out));
  if (dtype == kFloat16) narrow(x, n, static_cast<f16_t*>(out));
}

// ---------------------------------------------------------------- quantisation

template <bool divide>
ATTNKIT_INLINE void quantise(const float* x, int64_t n, float scale, void* out, int out_type) {
  int8_t* o8 = static_cast<int8_t*>(out);
  uint8_t* of = static_cast<uint8_t*>(out);
  if (out_type == kInt8)
    for (int64_t i = 0; i < n; ++i) o8[i] = quantise_int8(divide ? x[i] / scale : x[i]);
  else
    for (int64_t i = 0; i < n; ++i) of[i] = quantise_e4m3(divide ? x[i] / scale : x[i]);
}

static void quantise_row(const void* x, int dtype, int64_t K, void* out, int out_type, float* scale, float* wide) {
  const float* row = static_cast<const float*>(x);
  if (dtype != kFloat32) {
    widen_any(x, dtype, K, wide);
    row = wide;
  }
  // Magnitudes order as their bits do, and a NaN's bits are above infinity's: so a NaN wins, as torch's amax has it.
  uint32_t top = 0;
  for (int64_t i = 0; i < K; ++i) {
    uint32_t u = bits_of(row[i]) & 0x7fffffffu;
    top = u > top ? u : top;
  }
  float s = float_of(top) / (out_type == kInt8 ? 127.0f : 448.0f);
  s = s == 0.0f ? 1.0f : s;
  quantise<true>(row, K, s, out, out_type);
  *scale = s;
}

static void rms_norm_row(const void* x, void* residual, int dtype, const float* weight, int64_t K, float eps, float* wide) {
  widen_any(x, dtype, K, wide);
  if (residual) {
    const int64_t size = dtype == kFloat32 ? 4 : 2;
    float other[256];
    for (int64_t i = 0; i < K; i += 256) {
      const int64_t n = K - i < 256 ? K - i : 256;
      char* at = static_cast<char*>(residual) + i * size;
      widen_any(at, dtype, n, other);
      for (int64_t j = 0; j < n; ++j) wide[i + j] += other[j];
      narrow_any(wide + i, n, at, dtype);
      widen_any(at, dtype, n, wide + i);
    }
  }
  constexpr int64_t kLanes = 16;
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= K; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += wide[i + l] * wide[i + l];
  for (; i < K; ++i) lane[i % kLanes] += wide[i] * wide[i];
  float sum = 0.0f;
  for (int64_t l = 0; l < kLanes; ++l) sum += lane[l];
  const float inverse = 1.0f / __builtin_sqrtf(sum / float(K) + eps);
  for (int64_t k = 0; k < K; ++k) wide[k] = wide[k] * inverse * weight[k];
}

// Within two units in the last place, for x up to 88; a smaller result than e^-87 counts as that. Free of branches.
ATTNKIT_INLINE float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const uint32_t power = bits_of(n + (12582912.0f + 127.0f)) << 23;  // 2^n: the sum's low bits are n + 127
  return y * float_of(power);
}

static void silu_mul_row(const void* x, int dtype, int64_t K, float* wide) {
  widen_any(x, dtype, 2 * K, wide);
  for (int64_t k = 0; k < K; ++k) wide[k] = wide[k] / (1.0f + exp_of(-wide[k])) * wide[K + k];
}

static void store_row(const void* x, int dtype, int64_t n, void* out, int out_type, const float* scale) {
  float wide[256];
  const char* in = static_cast<const char*>(x);
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t m = n - i < 256 ? n - i : 256;
    widen_any(in + i * size, dtype, m, wide);
    void* to = static_cast<char*>(out) + i;
    if (scale)
      quantise<true>(wide, m, *scale, to, out_type);
    else
      quantise<false>(wide, m, 1.0f, to, out_type);
  }
}

static void merge_row(const void* a, const void* b, int dtype, int64_t n, float wa, float wb, void* out) {
  float x[256], y[256];
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t m = n - i < 256 ? n - i : 256;
    widen_any(static_cast<const char*>(a) + i * size, dtype, m, x);
    widen_any(static_cast<const char*>(b) + i * size, dtype, m, y);
    for (int64_t j = 0; j < m; ++j) x[j] = (wa != 0.0f ? x[j] * wa : 0.0f) + (wb != 0.0f ? y[j] * wb : 0.0f);
    narrow_any(x, m, static_cast<char*>(out) + i * size, dtype);
  }
}

// ---------------------------------------------------------------- product

// Memory that is wanted soon: the next rows of w, brought nearer while a tile computes. NR rows `stride` apart for a
// direct tile (there are few a panel), two for another; a tile without such a wish names a row it reads anyway.
struct Ahead {
  const char* at;
  int64_t stride;
};

template <class Micro, bool direct>
ATTNKIT_INLINE void tile_of(int mr, const typename Micro::Elem* a, int64_t sa, const char* w, int64_t sw, int64_t k,
                            typename Micro::Acc* acc, Ahead ahead) {
  switch (mr) {
    case 1: return Micro::template tile<1, direct>(a, sa, w, sw, k, acc, ahead);
    case 2: return Micro::template tile<2, direct>(a, sa, w, sw, k, acc, ahead);
    case 3: return Micro::template tile<3, direct>(a, sa, w, sw, k, acc, ahead);
    case 4: if constexpr (Micro::MR >= 4) return Micro::template tile<4, direct>(a, sa, w, sw, k, acc, ahead); break;
    case 5: if constexpr (Micro::MR >= 5) return Micro::template tile<5, direct>(a, sa, w, sw, k, acc, ahead); break;
    case 6: if constexpr (Micro::MR >= 6) return Micro::template tile<6, direct>(a, sa, w, sw, k, acc, ahead); break;
  }
}

// acc [rows][kBlockN] gets the sums over K of rows [m0, m1) and columns [n0, n1).
template <class Micro, bool direct>
ATTNKIT_INLINE void products(const GemmCall& c, int64_t m0, int64_t m1, int64_t n0, int64_t n1, typename Micro::Acc* acc,
                             char* buffer) {
  using Elem = typename Micro::Elem;
  using Right = typename Micro::Right;
  using Acc = typename Micro::Acc;
  constexpr int NR = Micro::NR;
  const Elem* a = reinterpret_cast<const Elem*>(c.packed + m0 * c.row_bytes);
  const int64_t sa = c.row_bytes / int64_t(sizeof(Elem)), rows = m1 - m0;
  const int64_t tiles = (rows + Micro::MR - 1) / Micro::MR;
  // Exact sums may be cut anywhere, so direct tiles take all of K; float sums are cut alike for every M.
  constexpr bool exact = Acc(0.5f) == Acc(0);
  const int64_t blocks = direct && exact ? 1 : (c.K + Micro::kBlockK - 1) / Micro::kBlockK;
  const int64_t block = (c.K / (blocks > 0 ? blocks : 1) / Micro::kStep + 1) * Micro::kStep;
  Acc part[Micro::MR * NR];
  for (int64_t k0 = 0; k0 < c.K; k0 += block) {
    const int64_t k = c.K - k0 < block ? c.K - k0 : block;
    for (int64_t n = n0; n < n1; n += NR) {
      const int64_t nr = n1 - n < NR ? n1 - n : NR;
      const char* w = reinterpret_cast<const char*>(c.w) + n * c.ldw + k0;
      int64_t sw = c.ldw;
      if constexpr (!direct) {
        sw = ((k + Micro::kStep - 1) / Micro::kStep * Micro::kStep * int64_t(sizeof(Right)) + 63) / 64 * 64 + 64;
        for (int64_t j = 0; j < nr; ++j)
          Micro::convert(reinterpret_cast<const int8_t*>(w) + j * c.ldw, k, reinterpret_cast<Right*>(buffer + j * sw));
      }
      const char* next = n + 2 * NR <= n1 ? w + NR * c.ldw : nullptr;
      if constexpr (!direct) w = buffer;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i0 = rows * t / tiles;
        const int mr = int(rows * (t + 1) / tiles - i0);
        const Ahead ahead = next && t < (direct ? 1 : 2) ? Ahead{next + 2 * t * c.ldw, c.ldw} : Ahead{w, 0};
        // A tile that is not full runs column by column: its sums are formed as in a full one.
        for (int64_t j = 0; j < nr; j += nr == NR ? NR : 1) {
          tile_of<Micro, direct>(mr, a + i0 * sa + k0, sa, w + j * sw, nr == NR ? sw : 0, k, part, ahead);
          for (int64_t i = 0; i < mr; ++i)
            for (int64_t l = 0; l < (nr == NR ? NR : 1); ++l) acc[(i0 + i) * kBlockN + n - n0 + j + l] += part[i * NR + l];
        }
      }
    }
  }
}

ATTNKIT_INLINE float value_of(uint32_t sum) { return static_cast<float>(static_cast<int32_t>(sum)); }
ATTNKIT_INLINE float value_of(float sum) { return sum; }

template <class Acc>
ATTNKIT_INLINE void epilogue(const GemmCall& c, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const Acc* acc) {
  const int64_t n = n1 - n0;
  float scale[kBlockN], bias[kBlockN], row[kBlockN];
  for (int64_t j = 0; j < n; ++j) scale[j] = c.w_scale[(n0 + j) * c.w_scale_stride];
  if (c.bias) widen_any(static_cast<const char*>(c.bias) + n0 * (c.bias_type == kFloat32 ? 4 : 2), c.bias_type, n, bias);
  for (int64_t m = m0; m < m1; ++m) {
    const float s = c.a_scale[m * c.a_scale_stride];
    const Acc* from = acc + (m - m0) * kBlockN;
    if (c.bias)
      for (int64_t j = 0; j < n; ++j) row[j] = value_of(from[j]) * s * scale[j] + bias[j];
    else
      for (int64_t j = 0; j < n; ++j) row[j] = value_of(from[j]) * s * scale[j];
    narrow_any(row, n, static_cast<char*>(c.out) + (m * c.ldo + n0) * (c.out_type == kFloat32 ? 4 : 2), c.out_type);
  }
}

template <class Micro>
ATTNKIT_INLINE void block_of(const GemmCall& c, int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch) {
  using Acc = typename Micro::Acc;
  Acc* acc = reinterpret_cast<Acc*>(scratch);
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t j = 0; j < n1 - n0; ++j) acc[(m - m0) * kBlockN + j] = c.start ? Acc(c.start[m]) : Acc(0);
  char* buffer = scratch + kBlockM * kBlockN * 4;
  if constexpr (Micro::kDirectRows > 0) {
    if (m1 - m0 <= Micro::kDirectRows) {
      products<Micro, true>(c, m0, m1, n0, n1, acc, buffer);
      return epilogue(c, m0, m1, n0, n1, acc);
    }
  }
  products<Micro, false>(c, m0, m1, n0, n1, acc, buffer);
  epilogue(c, m0, m1, n0, n1, acc);
}

template <class Int8, class E4m3>
struct Gemm {
  static int64_t packed_row_bytes(int kind, int64_t K) {
    const int64_t step = kind == kInt8 ? Int8::kStep : E4m3::kStep;
    const int64_t size = kind == kInt8 ? sizeof(typename Int8::Elem) : sizeof(typename E4m3::Elem);
    // An odd number of cache lines a row: rows that are a power of two apart would share sets.
    return (((K + step - 1) / step * step * size + 63) / 64 | 1) * 64;
  }
  static void pack_row(const GemmCall& c, int64_t m) {
    char* to = c.packed + m * c.row_bytes;
    std::memset(to, 0, size_t(c.row_bytes));
    if (c.kind == kInt8)
      c.start[m] = Int8::pack(c.a + m * c.lda, c.K, reinterpret_cast<typename Int8::Elem*>(to));
    else
      E4m3::convert(c.a + m * c.lda, c.K, reinterpret_cast<typename E4m3::Elem*>(to));
  }
  static void block(const GemmCall& c, int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch) {
    if (c.kind == kInt8)
      block_of<Int8>(c, m0, m1, n0, n1, scratch);
    else
      block_of<E4m3>(c, m0, m1, n0, n1, scratch);
  }
  static constexpr GemmOps ops{packed_row_bytes, pack_row, block, quantise_row, rms_norm_row, silu_mul_row, store_row, merge_row};
};

}  // namespace attnkit::cpu::ATTNKIT_ISA
