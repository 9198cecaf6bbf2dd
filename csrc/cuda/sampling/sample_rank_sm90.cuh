// Few tokens are ranked by comparing all pairs.
#pragma once
#include "sample_row_sm90.cuh"

namespace attnkit::sampling {

// Larger keys come earlier in the order. Masses are integers, so that no order of adding shows.
struct alignas(16) Candidate {
  u64 key, mass;
  ATTNKIT_DEVICE float logit() const { return order_value(static_cast<u32>(key >> 32)); }
  ATTNKIT_DEVICE int id() const { return best_id(key); }
};

// A thread's candidate, if it is the one that has it: how many precede it, and their mass.
struct Ranked {
  Candidate own;
  bool is;
  u32 before = 0;
  u64 heavier = 0;
};

// ``Lanes`` neighbours count together for one candidate.
template <int Lanes>
ATTNKIT_DEVICE void rank_one(const Candidate* candidates, int n, Ranked& r) {
#pragma unroll 4
  for (int j = static_cast<int>(threadIdx.x) % Lanes; j < n; j += Lanes) {
    const ulonglong2 q = *reinterpret_cast<const ulonglong2*>(&candidates[j]);
    if (q.x > r.own.key) r.heavier += q.y, ++r.before;
  }
#pragma unroll
  for (int step = 1; step < Lanes; step *= 2) {
    r.before += __shfl_xor_sync(0xffffffffu, r.before, step);
    r.heavier += __shfl_xor_sync(0xffffffffu, r.heavier, step);
  }
}

// All of a CTA's threads, of which there are as many as candidates at the least.
template <int Threads>
ATTNKIT_DEVICE Ranked rank_candidates(const Candidate* candidates, int n) {
  const int log = n <= Threads / 8 ? 3 : n <= Threads / 4 ? 2 : n <= Threads / 2 ? 1 : 0;
  const int i = static_cast<int>(threadIdx.x) >> log;
  Ranked r{candidates[min(i, n - 1)], i < n && (threadIdx.x & ((1 << log) - 1)) == 0};
  if (log == 3) {
    rank_one<8>(candidates, n, r);
  } else if (log == 2) {
    rank_one<4>(candidates, n, r);
  } else if (log == 1) {
    rank_one<2>(candidates, n, r);
  } else {
    rank_one<1>(candidates, n, r);
  }
  return r;
}

}  // namespace attnkit::sampling
