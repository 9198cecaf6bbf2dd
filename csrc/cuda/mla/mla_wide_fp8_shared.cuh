// What the warps of the wide latent decode over an fp8 cache share: sizes, shared memory and its barriers.
#pragma once
#include "mla_wide_shared.cuh"

namespace attnkit {

// As MlaWideShape, but tiles go through the ring in halves, by columns: a unit has planes 0, 1, 4 and 5 of an entry or 2, 3,
// 6 and 7, so that each adder reads two planes of either. Five units are what fits beside the part of q that is not in
// registers, which is larger here: the warps that widen need registers, too.
template <int Ctas_>
struct MlaWideFp8Shape {
  static constexpr bool Bf16 = true;
  static constexpr int Ctas = Ctas_;
  static constexpr int C = 512, R = 64, Rows = 64, T = 64, Stages = 2;  // entries under way: rope planes, barriers
  static constexpr int Planes = C / 64, PlaneBytes = T * 128;
  static constexpr int Parts = 2, UnitPlanes = Planes / Parts, UnitBytes = UnitPlanes * PlaneBytes, Units = 5;
  // Steps of 16 columns: whose q is in registers; of a unit. What is left of q begins with plane QFirst in the products' order.
  static constexpr int Held = Ctas > 1 ? 16 : 20, UnitSteps = UnitPlanes * 4;
  static constexpr int QFirst = Held / 4, QBytes = (Planes + 1 - QFirst) * PlaneBytes;
  static constexpr int ScaleAt = C, RopeAt = C + 16, TokenBytes = RopeAt + 2 * R;
  static constexpr int Each = T / Ctas / 4, Batches = Each / 8;  // tokens of a tile that one of the four warps widens; eights
  static constexpr int RawBytes = 4 * 512, ScaleBytes = 2 * Each * 16;  // of a warp: fetched ahead
  static constexpr int Threads = 512;
  static constexpr int SharedBytes = Units * UnitBytes + 2 * PlaneBytes + QBytes + 4 * (RawBytes + ScaleBytes) + 1024 + 256;
  static constexpr int ScorerRegisters = Ctas > 1 ? 128 : 144, AdderRegisters = 160, ConverterRegisters = Ctas > 1 ? 64 : 48;

  // The plane of an entry that is plane i of its unit ``unit``.
  ATTNKIT_DEVICE static constexpr int plane(int unit, int i) { return (i >> 1) * 4 + unit * 2 + (i & 1); }
};

template <int Ctas>
struct MlaWideShared<MlaWideFp8Shape<Ctas>> {
  using Shape = MlaWideFp8Shape<Ctas>;
  static constexpr int Stages = Shape::Stages, Units = Shape::Units, StateInts = sizeof(MlaWalker::State) / 4;
  u32 ring, rope, q, raw;                  // [Units, UnitPlanes, 64, 128], [2, 64, 128], QBytes, [4, RawBytes + ScaleBytes]
  u32 full, rope_full, scored, go, empty;  // barriers: [Units], [2], [Stages], [Stages], [Units]
  u32 read;                                // barrier: the scorer's warps are done with a tile's rope plane
  MlaPiece* pieces;                        // [4]
  signed char* decay;                      // [2, 64]: what sums of earlier tiles shrink by, as a power of two
  float2* totals;                          // [64]: a piece's (maximum, sum), with its last tile
  int* flags;                              // [2]
  int* states;                             // [4, StateInts]: of the converter's walkers
  float* spare;                            // for MlaMeeting, in place of q, when the last tile has its scores

  ATTNKIT_DEVICE explicit MlaWideShared(char* memory) {
    ring = smem_address(memory);
    rope = ring + Units * Shape::UnitBytes;
    q = rope + 2 * Shape::PlaneBytes;
    raw = q + Shape::QBytes;
    char* rest = memory + Units * Shape::UnitBytes + 2 * Shape::PlaneBytes + Shape::QBytes;
    spare = reinterpret_cast<float*>(rest - Shape::QBytes);
    rest += 4 * (Shape::RawBytes + Shape::ScaleBytes);
    full = smem_address(rest), rope_full = full + 8 * Units;
    scored = rope_full + 16, go = scored + 8 * Stages, empty = go + 8 * Stages, read = empty + 8 * Units;
    pieces = reinterpret_cast<MlaPiece*>(rest + 144);
    flags = reinterpret_cast<int*>(rest + 288);
    decay = reinterpret_cast<signed char*>(rest + 320);
    totals = reinterpret_cast<float2*>(rest + 448);
    states = reinterpret_cast<int*>(rest + 1024);
    static_assert(8 * (2 * Units + 2 * Stages + 3) <= 144 && 4 * sizeof(MlaPiece) <= 144, "small things");
    static_assert(16 * StateInts <= 256, "walkers");
  }

  // A unit is full when each of the four warps that widen has arrived, and what other CTAs write has.
  ATTNKIT_DEVICE void init_barriers() const {
    for (int i = 0; i < Units; ++i) {
      mbarrier_init(full + 8 * i, 4);
      mbarrier_init(empty + 8 * i, 8 * Ctas);
    }
    for (int i = 0; i < Stages; ++i) {
      mbarrier_init(rope_full + 8 * i, 4);
      mbarrier_init(scored + 8 * i, 4);
      mbarrier_init(go + 8 * i, 4);
    }
    mbarrier_init(read, 4);
    mbarrier_init_fence();
  }
};

// Where an entry's two units lie in the ring, and the parities that their barriers wait for.
template <int Units>
struct MlaUnits {
  int slot = 0;
  u32 round = 0;
  ATTNKIT_DEVICE int of(int unit) const { return slot + unit == Units ? 0 : slot + unit; }
  ATTNKIT_DEVICE u32 parity(int unit) const { return slot + unit == Units ? round ^ 1 : round; }
  ATTNKIT_DEVICE void next() {
    slot += 2;
    if (slot >= Units) slot -= Units, round ^= 1;
  }
};

}  // namespace attnkit
