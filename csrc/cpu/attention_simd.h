// Vectors for CPU attention, written once over GCC/Clang vector extensions and, where the compiler cannot see it, intrinsics.
//
// The macro ATTNKIT_ISA names the namespace, so the builds of one header for several instruction sets never share a symbol.
// Every function here is inlined or of internal linkage for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ATTNKIT_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define ATTNKIT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ATTNKIT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace attnkit {
namespace ATTNKIT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kColumnVectors = 4;  // vectors of output columns in a P.V register block
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kColumnVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kColumnVectors = 2;
#endif
constexpr int kColumns = kLanes * kColumnVectors;

template <int L> struct Vec;
#define ATTNKIT_VEC(N)                                                                     \
  template <> struct Vec<N> {                                                              \
    typedef float f __attribute__((vector_size(4 * N)));                                   \
    typedef int32_t i __attribute__((vector_size(4 * N)));                                 \
    typedef uint32_t u __attribute__((vector_size(4 * N)));                                \
    typedef uint16_t h __attribute__((vector_size(2 * N)));                                \
    typedef int8_t b __attribute__((vector_size(N)));                                      \
    typedef float f_mem __attribute__((vector_size(4 * N), aligned(4), may_alias));        \
    typedef uint32_t u_mem __attribute__((vector_size(4 * N), aligned(4), may_alias));     \
    typedef uint16_t h_mem __attribute__((vector_size(2 * N), aligned(2), may_alias));     \
    typedef int8_t b_mem __attribute__((vector_size(N), aligned(1), may_alias));           \
  };
ATTNKIT_VEC(4)
#if defined(__AVX2__)
ATTNKIT_VEC(8)
#endif
#if defined(__AVX512F__)
ATTNKIT_VEC(16)
#endif
#undef ATTNKIT_VEC

template <int L> using F = typename Vec<L>::f;
template <int L> using I = typename Vec<L>::i;
template <int L> using U = typename Vec<L>::u;

template <int L> ATTNKIT_INLINE F<L> load(const float* p) { return *(const typename Vec<L>::f_mem*)p; }
template <int L> ATTNKIT_INLINE void store(float* p, F<L> x) { *(typename Vec<L>::f_mem*)p = x; }
template <int L> ATTNKIT_INLINE U<L> load_u(const uint32_t* p) { return *(const typename Vec<L>::u_mem*)p; }
template <int L> ATTNKIT_INLINE void store_u(uint32_t* p, U<L> x) { *(typename Vec<L>::u_mem*)p = x; }
template <int L> ATTNKIT_INLINE F<L> splat(float x) { return x - F<L>{}; }
template <int L> ATTNKIT_INLINE U<L> splat_u(uint32_t x) { return U<L>{} + x; }
// A NaN in either loses: the running maximum stays a number, and the NaN comes back through expv.
template <int L> ATTNKIT_INLINE F<L> vmax(F<L> top, F<L> x) { return x > top ? x : top; }
template <int L> ATTNKIT_INLINE F<L> vabs(F<L> x) { return (F<L>)((U<L>)x & 0x7fffffffu); }

// 2^f for f in [-0.5, 0.5], exactly 1 at 0. Degree 5: 1.1e-7 relative; 6: 2e-8, before rounding.
template <int L, int Degree> ATTNKIT_INLINE F<L> exp2_poly(F<L> f) {
  F<L> p;
  if (Degree == 6) {
    p = f * 0.00015353361959569156f + 0.0013398875016719103f;
    p = p * f + 0.00961843691766262f;
    p = p * f + 0.055503323674201965f;
    p = p * f + 0.24022647738456726f;
    p = p * f + 0.6931471824645996f;
  } else {
    p = f * 0.001326472614891827f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
  }
  return p * f + 1.0f;
}

constexpr float kLog2E = 1.4426950408889634f;

// e^x for x <= 0 (or NaN, which stays): exactly 1 at 0, exactly 0 at -inf. The fraction is taken with one fused rounding.
template <int L, int Degree> ATTNKIT_INLINE F<L> expv(F<L> x) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m512 at = _mm512_max_ps(_mm512_set1_ps(-140.0f), (__m512)x);  // the second operand where one is NaN
    const __m512 n = _mm512_roundscale_ps(at * kLog2E, 8);
    return (F<L>)_mm512_scalef_ps((__m512)exp2_poly<L, Degree>((F<L>)_mm512_fmsub_ps(at, _mm512_set1_ps(kLog2E), n)), n);
  }
  if constexpr (L == 8) {
    const __m256 at = _mm256_max_ps(_mm256_set1_ps(-140.0f), (__m256)x);
    const __m256 n = _mm256_roundscale_ps(at * kLog2E, 8);
    return (F<L>)_mm256_scalef_ps((__m256)exp2_poly<L, Degree>((F<L>)_mm256_fmsub_ps(at, _mm256_set1_ps(kLog2E), n)), n);
  }
#endif
  const F<L> magic = splat<L>(12582912.0f);  // 1.5 * 2^23: its sum holds the rounded number in the low bits
  const F<L> z = x * kLog2E + magic;
  const F<L> p = exp2_poly<L, Degree>(x * kLog2E - (z - magic));
  const F<L> scaled = (F<L>)((U<L>)p + ((U<L>)z << 23));
  const F<L> small = x < -87.0f ? F<L>{} : scaled;
  return x == x ? small : x;
}

// tanh as in Cephes: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
template <int L> ATTNKIT_INLINE F<L> tanhv(F<L> x) {
  const F<L> a = vabs<L>(x), y = x * x;
  F<L> p = y * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * y - 5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y - 3.33332819422e-1f;
  p = p * y * x + x;
  const F<L> e = expv<L, 6>(a * -2.0f);  // e^(-2a)
  const F<L> far = (1.0f - e) / (1.0f + e);
  const F<L> big = (F<L>)((U<L>)far | ((U<L>)x & 0x80000000u));
  return a < 0.625f ? p : (x == x ? big : x);
}

// ---- numbers in memory -> float

// Widening by intrinsics where they exist: compilers take __builtin_convertvector apart byte by byte.
template <int L> ATTNKIT_INLINE U<L> widen_u16(const void* p) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (U<L>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) return (U<L>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
  return __builtin_convertvector(*(const typename Vec<L>::h_mem*)p, U<L>);
}

template <int L> ATTNKIT_INLINE I<L> widen_i8(const void* p) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (I<L>)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) return (I<L>)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
  return __builtin_convertvector(*(const typename Vec<L>::b_mem*)p, I<L>);
}

template <int L> ATTNKIT_INLINE F<L> from_bf16(const void* p) {
  return (F<L>)(widen_u16<L>(p) << 16);
}

template <int L> ATTNKIT_INLINE F<L> from_f16(const void* p) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (F<L>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (F<L>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  const U<L> x = widen_u16<L>(p);
  const U<L> mag = x & 0x7fffu;
  const F<L> sub = __builtin_convertvector((I<L>)mag, F<L>)*5.9604644775390625e-8f;  // 2^-24
  const U<L> normal = (mag << 13) + (112u << 23);
  const U<L> special = (mag << 13) + (224u << 23);
  const U<L> bits = (I<L>)mag < 0x400 ? (U<L>)sub : ((I<L>)mag >= 0x7c00 ? special : normal);
  return (F<L>)(bits | ((x & 0x8000u) << 16));
}

template <int L> ATTNKIT_INLINE F<L> from_i8(const void* p) {
  return __builtin_convertvector(widen_i8<L>(p), F<L>);
}

template <int L> ATTNKIT_INLINE F<L> from_e4m3(const void* p) {
  const U<L> x = (U<L>)widen_i8<L>(p);
  const U<L> mag = x & 0x7fu;
  const F<L> sub = __builtin_convertvector((I<L>)mag, F<L>)*0.001953125f;  // 2^-9
  const U<L> normal = (mag << 20) + (120u << 23);
  const U<L> bits = (I<L>)mag < 8 ? (U<L>)sub : ((I<L>)mag == 0x7f ? splat_u<L>(0x7fc00000u) : normal);
  return (F<L>)(bits | (x & 0x80000000u));
}

template <int L, DType T> ATTNKIT_INLINE F<L> to_float(const char* p) {
  if constexpr (T == DType::f32) return load<L>((const float*)p);
  if constexpr (T == DType::bf16) return from_bf16<L>(p);
  if constexpr (T == DType::f16) return from_f16<L>(p);
  if constexpr (T == DType::i8) return from_i8<L>(p);
  if constexpr (T == DType::e4m3) return from_e4m3<L>(p);
}

constexpr int size_of(DType t) { return t == DType::f32 ? 4 : (t == DType::bf16 || t == DType::f16 ? 2 : 1); }

// n numbers, n a multiple of 8, to float.
template <DType T> ATTNKIT_INLINE void row_to_float(const char* from, float* to, int64_t n) {
  constexpr int size = size_of(T), half = kLanes > 8 ? 8 : kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<kLanes>(to + i, to_float<kLanes, T>(from + i * size));
  for (; i < n; i += half) store<half>(to + i, to_float<half, T>(from + i * size));
}

// ---- float -> numbers in memory; rounding to nearest, ties to even

ATTNKIT_INLINE uint16_t bf16_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

ATTNKIT_INLINE uint16_t f16_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00;
  if (u >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above
  if (u < 0x38800000u) {                       // below 2^-14: let the adder round at 2^-24
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return uint16_t(sign | (u - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1);
  return uint16_t(sign | ((u - (112u << 23)) >> 13));
}

ATTNKIT_INLINE void store_scaled(const float* from, float scale, char* to, DType type, int64_t n) {
  if (type == DType::f32) {
    for (int64_t i = 0; i < n; i++) ((float*)to)[i] = from[i] * scale;
  } else if (type == DType::bf16) {
    uint16_t* h = (uint16_t*)to;
    for (int64_t i = 0; i < n; i++) {  // written without branches for the vectoriser
      uint32_t u;
      const float x = from[i] * scale;
      memcpy(&u, &x, 4);
      const uint32_t even = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
      h[i] = uint16_t(x == x ? even : 0x7fc0u);
    }
  } else {
    uint16_t* h = (uint16_t*)to;
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(h + i), _mm256_cvtps_ph((__m256)(load<8>(from + i) * scale), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) h[i] = f16_bits(from[i] * scale);
  }
}

}  // namespace ATTNKIT_ISA
}  // namespace attnkit
