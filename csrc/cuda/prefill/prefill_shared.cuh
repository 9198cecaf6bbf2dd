// The shared memory of a CTA that does prefill: rings of tiles, and the items that its warps hand to one another.
#pragma once
#include "prefill_items.cuh"

namespace attnkit {

constexpr int kBarrierBytes = 384, kWorkBytes = 256, kLineBytes = kMostSequences * 6 + 16;
// Bytes that stand before and beside the tiles; outputs are staged in OutColumns columns of all rows.
template <int Rows, int OutColumns>
constexpr int kFixedBytes = 1024 + kBarrierBytes + kWorkBytes + kLineBytes + Rows * OutColumns * 2 + 112;

// What a Shape says besides its sizes: Fillers, the warps that make a stage of Q, K or V full (one where TMA does), and
// Followers, the warps that follow the items beside the consumers. RawStages of RawBytes are there where tiles arrive in
// 8 bits and are Widened (prefill_q8_sm90.cuh).
template <class Shape>
struct PrefillShared {
  u32 q, k, v;  // shared-space addresses, 1024-byte aligned
  u32 ring;     // [RawStages, RawBytes], likewise
  u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, raw_full, raw_empty, work_full, work_empty;
  u32 nearly_done;  // an item's last blocks are reached: the next one may be taken
  u32 staged;       // where outputs stand before they are written
  Tile* work;       // [kItems]
  int* last;        // [Consumers]: did this warpgroup arrive last
  float* unit;      // [2, Rows] where Widened: what a row's scores are times
  int* line;        // WorkLine's
  u16* whose;

  ATTNKIT_DEVICE explicit PrefillShared(char* raw) {
    const u32 base = (smem_address(raw) + 1023) & ~1023u;
    char* generic = raw + (base - smem_address(raw));
    q = base;
    k = q + Shape::QStages * Shape::QBytes;
    v = k + Shape::Stages * Shape::KBytes;
    ring = v + Shape::Stages * Shape::VBytes;
    const u32 rest = ring + Shape::RawStages * Shape::RawBytes;
    q_full = rest, q_empty = rest + 16, work_full = rest + 32, work_empty = rest + 64;
    k_full = rest + 96, k_empty = k_full + 8 * Shape::Stages;
    v_full = k_empty + 8 * Shape::Stages, v_empty = v_full + 8 * Shape::Stages;
    raw_full = v_empty + 8 * Shape::Stages, raw_empty = raw_full + 8 * Shape::RawStages;
    nearly_done = raw_empty + 8 * Shape::RawStages;
    static_assert(96 + 32 * Shape::Stages + 16 * Shape::RawStages + 8 <= kBarrierBytes, "barriers");
    static_assert(kItems * sizeof(Tile) + 16 <= kWorkBytes, "work");
    generic += rest - base + kBarrierBytes;
    work = reinterpret_cast<Tile*>(generic);
    last = reinterpret_cast<int*>(generic + kItems * sizeof(Tile));
    line = reinterpret_cast<int*>(generic + kWorkBytes);
    whose = reinterpret_cast<u16*>(generic + kWorkBytes + kMostSequences * 4 + 16);
    staged = (rest + kBarrierBytes + kWorkBytes + kLineBytes + 127) & ~127;
    unit = reinterpret_cast<float*>(generic + (staged + Shape::Rows * Shape::OutColumns * 2 - rest - kBarrierBytes));
  }

  ATTNKIT_DEVICE void init_barriers() const {
    constexpr int warps = 4 * Shape::Consumers;
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(q_full + 8 * i, Shape::Fillers), mbarrier_init(q_empty + 8 * i, warps);
    }
    for (int i = 0; i < kItems; ++i) {
      mbarrier_init(work_full + 8 * i, 1), mbarrier_init(work_empty + 8 * i, warps + Shape::Followers);
    }
    for (int i = 0; i < Shape::Stages; ++i) {
      mbarrier_init(k_full + 8 * i, Shape::Fillers), mbarrier_init(k_empty + 8 * i, warps);
      mbarrier_init(v_full + 8 * i, Shape::Fillers), mbarrier_init(v_empty + 8 * i, warps);
    }
    for (int i = 0; i < Shape::RawStages; ++i) {
      mbarrier_init(raw_full + 8 * i, 1), mbarrier_init(raw_empty + 8 * i, Shape::Fillers);
    }
    mbarrier_init(nearly_done, 1);
    mbarrier_init_fence();
  }
};

}  // namespace attnkit
