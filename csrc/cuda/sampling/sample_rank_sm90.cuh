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

// A CTA calls f(candidate, how many of n precede it, their mass) in one thread for each. Few of them take several threads each.
// In loops, rolled up: what runs once is bound by the fetching of instructions.
template <class F>
ATTNKIT_DEVICE void rank_all(const Candidate* candidates, int n, F&& f) {
  const int log = n <= kSampleThreads / 8 ? 3 : n <= kSampleThreads / 4 ? 2 : n <= kSampleThreads / 2 ? 1 : 0, step = 1 << log;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) >> log; i < ((n + kSampleThreads - 1) & -kSampleThreads); i += kSampleThreads) {
    const Candidate mine = candidates[min(i, n - 1)];
    u32 before = 0;
    u64 mass = 0;
#pragma unroll 2
    for (int j = static_cast<int>(threadIdx.x) & (step - 1); j < n; j += step) {
      const ulonglong2 q = *reinterpret_cast<const ulonglong2*>(&candidates[j]);
      if (q.x > mine.key) mass += q.y, ++before;
    }
#pragma unroll 1
    for (int other = 1; other < step; other *= 2) {
      before += __shfl_xor_sync(0xffffffffu, before, other);
      mass += __shfl_xor_sync(0xffffffffu, mass, other);
    }
    if (i < n && (threadIdx.x & (step - 1)) == 0) f(mine, before, mass);
    if (log != 0) break;
  }
}

}  // namespace attnkit::sampling
