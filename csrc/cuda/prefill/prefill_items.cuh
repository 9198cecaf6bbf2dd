// How items of work go from the warp that finds them to those that work on them, and the place in a ring.
#pragma once
#include "prefill_schedule.cuh"

namespace attnkit {

constexpr int kItems = 3;  // on their way

template <class Shape>
struct PrefillShared;  // the kernel's own

// A ring's place: which stage, and the parity its barrier waits for.
template <int Stages>
struct Ring {
  int stage = 0;
  u32 parity = 0;
  ATTNKIT_DEVICE void next() {
    if constexpr (Stages == 2) {  // by fewer instructions
      stage ^= 1;
      parity ^= stage ^ 1;
    } else if (++stage == Stages) {
      stage = 0, parity ^= 1;
    }
  }
};

// Items as they go from the warp that finds them to those that work on them. They stay in shared memory while they
// are worked on: registers are short everywhere.
template <class Shape>
struct Items {
  const PrefillShared<Shape>& s;
  Ring<kItems> now;

  ATTNKIT_DEVICE Tile& operator*() const { return s.work[now.stage]; }
  ATTNKIT_DEVICE void wait() const { mbarrier_wait(s.work_full + 8 * now.stage, now.parity); }
  ATTNKIT_DEVICE void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(s.work_empty + 8 * now.stage);
    now.next();
  }

  // The item after this one, waited for.
  ATTNKIT_DEVICE const Tile& following() const {
    Ring<kItems> next = now;
    next.next();
    mbarrier_wait(s.work_full + 8 * next.stage, next.parity);
    return s.work[next.stage];
  }

  // The first producer warp's side.
  template <class Line>
  ATTNKIT_DEVICE bool find(const Line& line, int index) {
    mbarrier_wait(s.work_empty + 8 * now.stage, now.parity ^ 1);
    Tile t{};
    const bool more = line.find(index, t);
    if (threadIdx.x % 32 == 0) {
      **this = t;
      mbarrier_arrive(s.work_full + 8 * now.stage);
    }
    __syncwarp();
    return more;
  }
};

}  // namespace attnkit
