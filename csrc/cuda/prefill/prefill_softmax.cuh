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
  float near2;  // scores whose squares come up to this go by the shorter one
  float c0, c1, c2, n0, n1;
  float inner, outer;
  bool flat;  // logits are so small that weights need no maximum: exp(60) times a million is far from overflow

  // wide_range: weights are bf16.
  ATTNKIT_DEVICE Cap(float scale, float softcap, bool wide_range) {
    const float u = scale / softcap, u2 = u * u, unit = scale * kLog2e;
    reach = kTanhReach / u;
    n0 = kTanhNear0 * unit, n1 = kTanhNear1 * unit * u2;
    near2 = kTanhNear / u * (kTanhNear / u);
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

// N: how many of a thread's scores count. Widened: weights are made one row after the other, not side by side: ptxas makes
// faster code of that behind widened tiles, and slower code for 16-bit keys. Paced: heads of 64, which keep MUFU as busy as the
// tensor cores.
template <bool Widened, bool Paced>
struct Rows {
  static constexpr bool Beside = !Widened;
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

  // All rows of the warp have scores that are logits in log2, and weights relative to 2^0.
  ATTNKIT_DEVICE bool level(const float (&factor)[2]) const {
    bool all = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) all = all && (!high[r] || (top[r] == 0.f && factor[r] == 1.f));
    return __all_sync(~0u, all);
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

  // scores -> 2^logit(score, row, which of the row), in place, and each row's sum; neighbours are added to each other first.
  template <int N, int Held, class Logit>
  static ATTNKIT_DEVICE void raise(float (&scores)[Held], float (&total)[2], const Logit& logit) {
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      const int i = Beside ? n / 2 : n % (N / 4), r = Beside ? n % 2 : n / (N / 4);
      float& x = scores[4 * i + 2 * r];
      float& y = scores[4 * i + 2 * r + 1];
      x = exp2_fast(logit(x, r, 2 * i));
      y = exp2_fast(logit(y, r, 2 * i + 1));
      total[r] = i == 0 ? x + y : total[r] + (x + y);
    }
  }

  // Logits in log2 to weights relative to 2^0.
  template <int N, int Held>
  ATTNKIT_DEVICE void weigh_flat(float (&scores)[Held]) {
    float total[2];
    raise<N>(scores, total, [](float logit, int, int) { return logit; });
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += total[r], top[r] = 0.f;
  }

  // Of raw scores, by the short polynomial. False (and nothing summed) where one is too large for it.
  template <int N, int Held>
  ATTNKIT_DEVICE bool weigh_near(float (&scores)[Held], const Cap& cap) {
    float even[2], odd[2];
    int square[2] = {0, 0};  // the largest, as bits: floats of one sign are ordered like integers
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& x = scores[4 * i + 2 * r];
        float& y = scores[4 * i + 2 * r + 1];
        const float x2 = x * x, y2 = y * y;
        square[r] = max(max(square[r], __float_as_int(x2)), __float_as_int(y2));  // one instruction
        x = exp2_fast(x * fmaf(cap.n1, x2, cap.n0));
        even[r] = i == 0 ? x : even[r] + x;
        y = exp2_fast(y * fmaf(cap.n1, y2, cap.n0));
        odd[r] = i == 0 ? y : odd[r] + y;
      }
    }
    const float total[2] = {even[0] + odd[0], even[1] + odd[1]}, most[2] = {__int_as_float(square[0]), __int_as_float(square[1])};
    asm volatile("" ::"f"(total[0]), "f"(total[1]));  // not behind the question, where nothing stands beside them
    bool near = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) near = near && (!high[r] || most[r] <= cap.near2);
    if (!__all_sync(~0u, near)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += total[r], top[r] = 0.f;
    return true;
  }

  // Weights relative to the maxima so far, in place. False (and nothing summed) where one may have grown too far: a thread's
  // sums show it, so no maximum is looked for.
  template <int N, int Held>
  ATTNKIT_DEVICE bool weigh_low(float (&scores)[Held], const float (&factor)[2]) {
    float base[2] = {-top[0] * factor[0], -top[1] * factor[1]}, total[2];
    raise<N>(scores, total, [&](float x, int r, int i) {
      // ptxas would put most of these first, and MUFU would be idle meanwhile: eight wait for a weight of the eight before
      if (Paced && i % 8 == 0 && i > 0) base[r] = fmaf(scores[2 * (i - 8) + 2 * r], 0.f, base[r]);
      return fmaf(x, factor[r], base[r]);
    });
    return add(total);
  }

  // The same where scores are logits in log2, relative to 0.
  template <int N, int Held>
  ATTNKIT_DEVICE bool weigh_level(float (&scores)[Held]) {
    float total[2];
    raise<N>(scores, total, [](float logit, int, int) { return logit; });
    return add(total);
  }

  ATTNKIT_DEVICE bool add(const float (&total)[2]) {
    if (__any_sync(~0u, ((high[0] != 0) & !(total[0] <= kMostLow)) | ((high[1] != 0) & !(total[1] <= kMostLow)))) return false;
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
        if (Widened && factor[r] == 1.f && most >= -4.f && most <= 8.f) most = 0.f;  // near enough, and nothing is to subtract
        decay[r] = exp2_fast((top[r] - most) * factor[r]);
        top[r] = most;
      }
    }
    return __any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f);
  }

  // scores -> exp2((scores - top) * factor), in place.
  template <int N, int Held>
  ATTNKIT_DEVICE void weigh(float (&scores)[Held], const float (&factor)[2], const float (&decay)[2]) {
    float base[2], total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = top[r] == negative_infinity() ? 0.0f : top[r] * factor[r];
    raise<N>(scores, total, [&](float x, int r, int) { return fmaf(x, factor[r], -base[r]); });
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = fmaf(sum[r], decay[r], total[r]);
  }
};

}  // namespace attnkit
