// Rounding to e4m3 as everyone here does it: halves to even, clamped to +-448, NaN kept.
#pragma once
#include "convert.cuh"

namespace attnkit {

ATTNKIT_DEVICE u32 pack_e4m3(float lo, float hi) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(hi), "f"(lo));
  return pair;
}

}  // namespace attnkit
