// Element types as the kernels see them: pairs packed in 32 bits, 8-bit values widened to f16.
#pragma once
#include "ptx_sm90.cuh"

namespace attnkit {

enum Type : int { kBf16 = 0, kF16 = 1, kE4m3 = 2, kInt8 = 3, kF32 = 4 };

ATTNKIT_DEVICE u32 pack_bf16(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

ATTNKIT_DEVICE u32 pack_f16(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

template <bool Bf16>
ATTNKIT_DEVICE u32 pack(float lo, float hi) {
  return Bf16 ? pack_bf16(lo, hi) : pack_f16(lo, hi);
}

ATTNKIT_DEVICE float f16_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// The two halves of a packed pair.
ATTNKIT_DEVICE float2 unpack(u32 x, bool bf16) {
  float2 r;
  if (bf16) {
    r.x = __uint_as_float(x << 16);
    r.y = __uint_as_float(x & 0xffff0000u);
  } else {
    r.x = f16_to_float(static_cast<u16>(x));
    r.y = f16_to_float(static_cast<u16>(x >> 16));
  }
  return r;
}

ATTNKIT_DEVICE u32 e4m3x2_to_f16x2(u16 x) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(x));
  return r;
}

ATTNKIT_DEVICE u32 subtract_f16x2(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Four bytes to two f16 pairs: bytes (First, Second) and (Third, Fourth). An int8 x becomes the f16 whose
// bits are 0x6400 | (x + 128), which is 1152 + x exactly; e4m3 has an instruction.
template <int KvType, u32 First, u32 Second, u32 Third, u32 Fourth>
ATTNKIT_DEVICE void widen(u32 x, u32& lo, u32& hi) {
  if constexpr (KvType == kInt8) {
    x ^= 0x80808080u;
    lo = subtract_f16x2(__byte_perm(x, 0x64646464u, First | 0x40 | Second << 8 | 0x4000), 0x64806480u);
    hi = subtract_f16x2(__byte_perm(x, 0x64646464u, Third | 0x40 | Fourth << 8 | 0x4000), 0x64806480u);
  } else {
    u32 ordered = __byte_perm(x, 0, First | Second << 4 | Third << 8 | Fourth << 12);
    lo = e4m3x2_to_f16x2(static_cast<u16>(ordered));
    hi = e4m3x2_to_f16x2(static_cast<u16>(ordered >> 16));
  }
}

}  // namespace attnkit
