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
// The same by one term less, up to 0.25: 6.4e-5 of it off at most.
constexpr float kTanhNear = 0.25f;
constexpr float kTanhNear0 = 0.9999366300f, kTanhNear1 = -0.3251846000f;
constexpr float kMostFlatCap = 60.f;
constexpr float kMostLow = 8192.f;  // of a thread's weights of a block and row: f16 holds each of them

// Softcap: a raw score s becomes the logit softcap * tanh(s * scale / softcap), in units of log2 here.
struct Cap {
  float reach;  // raw scores up to here go by the polynomial
  float near4;  // scores whose fourth powers sum up to this go by the shorter one
  float c0, c1, c2, n0, n1;
  float inner, outer;
  bool flat;  // logits are so small that weights need no maximum: exp(60) times a million is far from overflow

  // wide_range: weights are bf16.
  ATTNKIT_DEVICE Cap(float scale, float softcap, bool wide_range) {
    const float u = scale / softcap, u2 = u * u, unit = scale * kLog2e;
    reach = kTanhReach / u;
    n0 = kTanhNear0 * unit, n1 = kTanhNear1 * unit * u2;
    const float near = kTanhNear / u;
    near4 = near * near * near * near;
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

// N: how many of a thread's scores count.
struct Rows {
  float top[2], sum[2];  // the maximum that sums and outputs are relative to (a raw score), this thread's part of the sum
  int low[2], high[2];   // keys the rows see: [low, high)

  ATTNKIT_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = negative_infinity(), sum[r] = 0.f;
  }

  // All rows of the warp that see keys have a maximum. Rows that see none (a tile's last ones may be another sequence's
  // queries) have no say in what happens to the others.
  ATTNKIT_DEVICE bool known() const {
    return __all_sync(~0u, (!high[0] || top[0] > negative_infinity()) && (!high[1] || top[1] > negative_infinity()));
  }

  template <int N, int From = 0, int Held>
  ATTNKIT_DEVICE void mask_high(float (&scores)[Held], int first_key, float with) const {
    const int column = first_key + threadIdx.x % 4 * 2, end[2] = {high[0] - column, high[1] - column};
#pragma unroll
    for (int i = From; i < N; ++i) {
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

  // Logits in log2 to weights relative to 2^0.
  template <int N, int Held>
  ATTNKIT_DEVICE void weigh_flat(float (&scores)[Held]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r], other = 0.f;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        total += scores[4 * i + 2 * r] = exp2_fast(scores[4 * i + 2 * r]);
        other += scores[4 * i + 2 * r + 1] = exp2_fast(scores[4 * i + 2 * r + 1]);
      }
      sum[r] = total + other;
      top[r] = 0.f;
    }
  }

  // The same of raw scores (times unit) by the short polynomial. False (and nothing summed) where one may be too large for
  // it: the sum of their fourth powers shows it.
  template <int N, int Held>
  ATTNKIT_DEVICE bool weigh_near(float (&scores)[Held], const Cap& cap, const float (&unit)[2]) {
    float total[2], large = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float n0 = cap.n0 * unit[r], n1 = cap.n1 * unit[r] * unit[r] * unit[r];
      float even = 0.f, odd = 0.f, fourth = 0.f, fourth_odd = 0.f;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        float& x = scores[4 * i + 2 * r];
        float& y = scores[4 * i + 2 * r + 1];
        const float x2 = x * x, y2 = y * y;
        fourth = fmaf(x2, x2, fourth);
        fourth_odd = fmaf(y2, y2, fourth_odd);
        even += x = exp2_fast(x * fmaf(n1, x2, n0));
        odd += y = exp2_fast(y * fmaf(n1, y2, n0));
      }
      total[r] = even + odd;
      if (high[r]) large = fmaf(fourth + fourth_odd, unit[r] * unit[r] * unit[r] * unit[r], large);
    }
    if (__any_sync(~0u, !(large <= cap.near4))) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += total[r], top[r] = 0.f;
    return true;
  }

  // Weights relative to the maxima so far, in place. False (and nothing summed) where one may have grown too far: a thread's
  // sums show it, so no maximum is looked for.
  template <int N, int Held>
  ATTNKIT_DEVICE bool weigh_low(float (&scores)[Held], const float (&factor)[2]) {
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = top[r] * factor[r];
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        float& x = scores[4 * i + 2 * r];
        float& y = scores[4 * i + 2 * r + 1];
        x = exp2_fast(fmaf(x, factor[r], -base));
        y = exp2_fast(fmaf(y, factor[r], -base));
        even += x;
        odd += y;
      }
      total[r] = even + odd;
    }
    if (__any_sync(~0u, (high[0] && !(total[0] <= kMostLow)) || (high[1] && !(total[1] <= kMostLow)))) return false;
    sum[0] += total[0];
    sum[1] += total[1];
    return true;
  }

  // The rows' maxima (factor[r] times a score is a logit in log2). One that grows by less than 2^8 leaves top as it is:
  // weights stay below 256 and the final division makes up for it. Returns whether anything in the warp has to shrink, by decay.
  template <int N, int Held>
  ATTNKIT_DEVICE bool lift(const float (&scores)[Held], const float (&factor)[2], float (&decay)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
      for (int i = 1; i < N / 4; ++i) most = fmaxf(most, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      decay[r] = 1.f;
      if ((most - top[r]) * factor[r] > 8.f) {
        decay[r] = exp2_fast((top[r] - most) * factor[r]);
        top[r] = most;
      }
    }
    return __any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f);
  }

  // scores -> exp2((scores - top) * factor), in place.
  template <int N, int Held>
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
      sum[r] = fmaf(sum[r], decay[r], total + other);
    }
  }
};

}  // namespace attnkit
