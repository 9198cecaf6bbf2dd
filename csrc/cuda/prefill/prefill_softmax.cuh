// What happens to a block of scores in registers: cap, mask, maximum, exponentials, sums.
//
// A thread of a warpgroup holds two rows of 64 (rows lane / 4 and lane / 4 + 8 of its warp's 16); scores[4 i + 2 r + e] is
// row r's column 8 i + 2 (lane % 4) + e.
#pragma once
#include "../common/convert.cuh"

namespace attnkit {

// tanh(u) / u as a polynomial of u * u, for |u| up to 0.5: u times it is 5.3e-6 off at most.
constexpr float kTanhReach = 0.5f;
constexpr float kTanh0 = 0.9999248300f, kTanh1 = -0.3308550459f, kTanh2 = 0.1125413552f;
constexpr float kMostFlatCap = 60.f;

// Softcap: a raw score s becomes the logit softcap * tanh(s * scale / softcap), in units of log2 here.
struct Cap {
  float reach;  // raw scores up to here go by the polynomial
  float c0, c1, c2;
  float inner, outer;
  bool flat;  // logits are so small that weights need no maximum: exp(60) times a million is far from overflow

  // wide_range: weights are bf16.
  ATTNKIT_DEVICE Cap(float scale, float softcap, bool wide_range) {
    const float u = scale / softcap, u2 = u * u, unit = scale * kLog2e;
    reach = kTanhReach / u;
    c0 = kTanh0 * unit, c1 = kTanh1 * unit * u2, c2 = kTanh2 * unit * u2 * u2;
    inner = 2.0f * kLog2e * u, outer = softcap * kLog2e;
    flat = wide_range && softcap <= kMostFlatCap;
  }

  // Of the first N scores of a thread. A warp goes by the polynomial where all its scores are small; rows that see no keys
  // (high = 0) have no say.
  template <int N, int Held>
  ATTNKIT_DEVICE bool small(const float (&scores)[Held], const int (&high)[2]) const {
    float most[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < N; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(scores[i]));
    return !__any_sync(~0u, fmaxf(high[0] ? most[0] : 0.f, high[1] ? most[1] : 0.f) > reach);
  }

  ATTNKIT_DEVICE float of_small(float s) const {
    const float t = s * s;
    return s * fmaf(fmaf(c2, t, c1), t, c0);
  }

  ATTNKIT_DEVICE float of_any(float s) const { return outer - 2.0f * outer * reciprocal(1.0f + exp2_fast(s * inner)); }

  template <int N, int Held>
  ATTNKIT_DEVICE void apply(float (&scores)[Held], bool small) const {
    if (small) {
#pragma unroll
      for (int i = 0; i < N; ++i) scores[i] = of_small(scores[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) scores[i] = of_any(scores[i]);
    }
  }
};

// N: how many of a thread's scores count. First: nothing has been summed yet.
struct Rows {
  float top[2], sum[2];  // the maximum that sums and outputs are relative to (a raw score), this thread's part of the sum
  int low[2], high[2];   // keys the rows see: [low, high)

  ATTNKIT_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = negative_infinity(), sum[r] = 0.f;
  }

  template <int N, int Held>
  ATTNKIT_DEVICE void mask_high(float (&scores)[Held], int first_key, float with) const {
    const int column = first_key + threadIdx.x % 4 * 2, end[2] = {high[0] - column, high[1] - column};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i / 4 * 8 + i % 2 >= end[i / 2 % 2]) scores[i] = with;
    }
  }

  template <int N, int Held>
  ATTNKIT_DEVICE void mask_low(float (&scores)[Held], int first_key, float with) const {
    const int column = first_key + threadIdx.x % 4 * 2, begin[2] = {low[0] - column, low[1] - column};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i / 4 * 8 + i % 2 < begin[i / 2 % 2]) scores[i] = with;
    }
  }

  // Weights relative to 2^0 of what ``logit`` (in log2) makes of the scores.
  template <int N, bool First, int Held, class Logit>
  ATTNKIT_DEVICE void weigh_flat(float (&scores)[Held], const Logit& logit) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = First ? 0.f : sum[r], other = 0.f;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        float& x = scores[4 * i + 2 * r];
        float& y = scores[4 * i + 2 * r + 1];
        x = exp2_fast(logit(x));
        y = exp2_fast(logit(y));
        total += x;
        other += y;
      }
      sum[r] = total + other;
      top[r] = 0.f;
    }
  }

  // The rows' maxima (factor[r] times a score is a logit in log2). One that grows by less than 2^8 leaves top as it is:
  // weights stay below 256 and the final division makes up for it. Returns whether anything in the warp has to shrink, by decay.
  template <int N, bool First, int Held>
  ATTNKIT_DEVICE bool lift(const float (&scores)[Held], const float (&factor)[2], float (&decay)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
      for (int i = 1; i < N / 4; ++i) most = fmaxf(most, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      decay[r] = 1.f;
      if constexpr (First) {
        top[r] = most;
      } else if ((most - top[r]) * factor[r] > 8.f) {
        decay[r] = exp2_fast((top[r] - most) * factor[r]);
        top[r] = most;
      }
    }
    if constexpr (First) return false;
    return __any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f);
  }

  // scores -> exp2((scores - top) * factor), in place.
  template <int N, bool First, int Held>
  ATTNKIT_DEVICE void weigh(float (&scores)[Held], const float (&factor)[2], const float (&decay)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = top[r] == negative_infinity() ? 0.0f : top[r] * factor[r];
      float total = 0.f, other = 0.f;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        float& x = scores[4 * i + 2 * r];
        float& y = scores[4 * i + 2 * r + 1];
        x = exp2_fast(fmaf(x, factor[r], -base));
        y = exp2_fast(fmaf(y, factor[r], -base));
        total += x;
        other += y;
      }
      sum[r] = First ? total + other : fmaf(sum[r], decay[r], total + other);
    }
  }
};

}  // namespace attnkit
