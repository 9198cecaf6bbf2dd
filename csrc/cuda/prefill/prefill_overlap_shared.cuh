// The shared memory of a CTA that does prefill: rings of tiles, and the items that its warps hand to one another.
#pragma once
#include "prefill_items.cuh"

namespace attnkit {

constexpr int kLoaders = 3;  // warps that load K and V

template <class Shape>
struct PrefillShared {
  u32 q, k, v;  // shared-space addresses, 1024-byte aligned
  u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty;
  u32 nearly_done;                  // an item's last blocks are reached: the next one may be taken
  Tile* work;   // [kItems]
  int* last;    // [Consumers]: did this warpgroup arrive last
  u32 staged;   // where outputs stand before they are written
  int* line;    // WorkLine's
  u16* whose;

  ATTNKIT_DEVICE explicit PrefillShared(char* raw) {
    const u32 base = (smem_address(raw) + 1023) & ~1023u;
    char* generic = raw + (base - smem_address(raw));
    q = base;
    k = q + Shape::QStages * Shape::QBytes;
    v = k + Shape::Stages * Shape::KBytes;
    const u32 rest = v + Shape::Stages * Shape::VBytes;
    q_full = rest, q_empty = rest + 16, work_full = rest + 32, work_empty = rest + 64;
    k_full = rest + 96, k_empty = k_full + 8 * Shape::Stages;
    v_full = k_empty + 8 * Shape::Stages, v_empty = v_full + 8 * Shape::Stages;
    nearly_done = rest + 376;
    static_assert(96 + 32 * Shape::Stages <= 376, "barriers");
    generic += rest - base;
    work = reinterpret_cast<Tile*>(generic + 384);
    last = reinterpret_cast<int*>(generic + 384 + kItems * sizeof(Tile));
    static_assert(kItems * sizeof(Tile) + 16 <= 256, "work");
    line = reinterpret_cast<int*>(generic + 640);
    whose = reinterpret_cast<u16*>(generic + 640 + kMostSequences * 4 + 16);
    staged = rest + ((640 + Shape::LineBytes + 127) & ~127);
  }

  ATTNKIT_DEVICE void init_barriers() const {
    constexpr int warps = 4 * Shape::Consumers;
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(q_full + 8 * i, 1), mbarrier_init(q_empty + 8 * i, warps);
    }
    for (int i = 0; i < kItems; ++i) {
      mbarrier_init(work_full + 8 * i, 1), mbarrier_init(work_empty + 8 * i, warps + kLoaders);
    }
    for (int i = 0; i < Shape::Stages; ++i) {
      mbarrier_init(k_full + 8 * i, 1), mbarrier_init(k_empty + 8 * i, warps);
      mbarrier_init(v_full + 8 * i, 1), mbarrier_init(v_empty + 8 * i, warps);
    }
    mbarrier_init(nearly_done, 1);
    mbarrier_init_fence();
  }
};

ATTNKIT_DEVICE uint4 load_shared_16(u32 from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
  return x;
}

}  // namespace attnkit
