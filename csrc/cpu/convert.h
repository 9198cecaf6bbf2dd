// Scalar conversions between float and the storage types, written without branches so that loops over
// them vectorise. Everything is static: each translation unit keeps its own copy, built for its own ISA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace attnkit::cpu {

// What a pointer handed over as an integer points to; the Python side passes these numbers.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kE4M3 = 4 };

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct bf16_t {
  uint16_t u;
};
struct f16_t {
  uint16_t u;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16_t x) { return float_of(static_cast<uint32_t>(x.u) << 16); }

static inline float to_float(f16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.u);
#else
  // Exponent and mantissa moved into place, then the bias corrected by a product, which also serves subnormals.
  uint32_t sign = static_cast<uint32_t>(x.u & 0x8000u) << 16, rest = x.u & 0x7fffu;
  uint32_t finite = bits_of(float_of(rest << 13) * 0x1p112f), special = 0x7f800000u | (rest << 13);
  return float_of(sign | (rest >= 0x7c00u ? special : finite));
#endif
}

static inline void from_float(float x, float* out) { *out = x; }

static inline void from_float(float x, bf16_t* out) {  // half to even; a NaN stays one
  uint32_t u = bits_of(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = (u >> 16) | 0x40u;
  out->u = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static inline void from_float(float x, f16_t* out) {
#if defined(__F16C__)
  out->u = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t small = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);  // the adder rounds at 2^-24
  uint32_t r = a < 0x38800000u ? small : normal;
  r = a >= 0x477ff000u ? 0x7c00u : r;
  r = a > 0x7f800000u ? 0x7e00u : r;
  out->u = static_cast<uint16_t>(sign | r);
#endif
}

// x / scale rounded half to even and clamped to +-127. The sum with 1.5 * 2^23 leaves the integer in the
// low mantissa bits; clamping first gives the same integer. NaN becomes 0.
static inline int8_t quantise_int8(float x) {
  x = x > 127.0f ? 127.0f : x;
  x = x < -127.0f ? -127.0f : x;
  uint32_t u = bits_of(x + 12582912.0f);
  return static_cast<int8_t>(x == x ? u & 0xffu : 0u);
}

// Clamped to +-448, rounded half to even; NaN becomes e4m3's NaN.
static inline uint8_t quantise_e4m3(float x) {
  x = x > 448.0f ? 448.0f : x;
  x = x < -448.0f ? -448.0f : x;
  uint32_t u = bits_of(x), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
  uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
  uint32_t small = bits_of(float_of(a) + 16384.0f) - bits_of(16384.0f);  // the adder rounds at 2^-9
  uint32_t r = a < 0x3c800000u ? small : normal;
  r = a > 0x7f800000u ? 0x7fu : r;
  return static_cast<uint8_t>(sign | r);
}

static inline float e4m3_to_float(uint8_t b) {
  uint32_t sign = static_cast<uint32_t>(b & 0x80u) << 24, rest = b & 0x7fu;
  uint32_t r = rest == 0x7fu ? 0x7fc00000u : bits_of(float_of(rest << 20) * 0x1p120f);
  return float_of(sign | r);
}

}  // namespace attnkit::cpu
