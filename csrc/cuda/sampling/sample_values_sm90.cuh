// A counter for each value that bf16 has from a bound on: what lies below it, and what lies beyond all counters, have one together.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

// Where the bound is at least kNear, values are as close as their bits say, from it on. Else they are from minus infinity on, but for
// those nearer to zero than kNear, which have two places (of either sign) for all of them.
struct Values {
  static constexpr u32 kPlaces = 4096, kRest = kPlaces - 1;
  static constexpr u32 kNearBits = 0x3b80;         // of 2^-8
  static constexpr float kNear = 0.00390625f;
  static constexpr float kMostBound = 4294967296.0f;  // negative values' bits are as far away as counters reach then

  bool positive;
  u32 less;  // minus the bound's bits, twice

  ATTNKIT_DEVICE Values() {}
  // Not above ``bound``, which is a number of at most kMostBound.
  ATTNKIT_DEVICE explicit Values(float bound) : positive(bound >= kNear) {
    const u32 whole = __float_as_uint(bound), cut = whole >> 16;
    u32 from = cut;
    if (!positive) {
      const u32 down = bound < 0.0f && (whole & 0xffffu) != 0 ? cut + 1 : cut;
      from = ordered(down | down << 16) & 0xffffu;
      if (from == 0) from = 0xffffu;  // zeros of either sign are equals
    }
    const u32 minus = (0u - from) & 0xffffu;
    less = minus << 16 | minus;
  }

  // Two values' order as signed numbers, those near to zero as one of each sign.
  ATTNKIT_DEVICE static u32 ordered(u32 two) {
    constexpr u32 kLess = 0x10000u - (kNearBits - 1);
    u32 r;
    asm("{\n.reg .b32 size, sign;\n"
        "add.s16x2 size, %1, %2;\n"
        "max.s16x2 size, size, %3;\n"
        "prmt.b32 sign, %4, 0, 0xbb99;\n"
        "xor.b32 %0, size, sign;\n}"
        : "=r"(r) : "r"(two & 0x7fff7fffu), "r"(kLess << 16 | kLess), "r"(0), "r"(two));
    return r;
  }

  // The places of two tokens.
  template <bool Positive>
  ATTNKIT_DEVICE u32 places(u32 two) const {
    u32 r;
    asm("{\n.reg .b32 from;\nadd.u16x2 from, %1, %2;\nmin.u16x2 %0, from, %3;\n}"
        : "=r"(r) : "r"(Positive ? two : ordered(two)), "r"(less), "r"(kRest << 16 | kRest));
    return r;
  }
  ATTNKIT_DEVICE u32 place(u32 bits) const { return (positive ? places<true>(bits) : places<false>(bits)) & 0xffffu; }

  ATTNKIT_DEVICE u32 first() const { return (0u - less) & 0xffffu; }
  // The value that a place is for; 0 for both that are near to it.
  ATTNKIT_DEVICE float value(u32 place) const {
    const u32 key = first() + place;
    if (positive) return __uint_as_float(key << 16);
    const int order = static_cast<short>(key);
    const u32 size = order < 0 ? ~order : order;
    return __uint_as_float(size == 0 ? 0u : (size + kNearBits - 1) << 16 | (order < 0 ? 0x80000000u : 0u));
  }
  // The place of what is near to zero and not negative, or kRest: the place before it is for what is negative.
  ATTNKIT_DEVICE u32 near_zero() const {
    const u32 at = less & 0xffffu;
    return positive || at > kRest ? kRest : at;
  }
  // Whether a place is one of those two.
  ATTNKIT_DEVICE bool vague(u32 place) const {
    const u32 near = near_zero();
    return near != kRest && (place == near || place + 1 == near);
  }
};

}  // namespace attnkit::sampling
