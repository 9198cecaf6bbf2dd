// What the wide latent decode's warps share: sizes, shared memory and its barriers, the ring.
#pragma once
#include "mla_wide_combine.cuh"
#include "wgmma_mla_sm90.cuh"

namespace attnkit {

template <bool Bf16_, int Ctas_>
struct MlaWideShape {
  static constexpr bool Bf16 = Bf16_;
  static constexpr int Ctas = Ctas_;  // of a cluster: 64 rows each
  static constexpr int C = 512, R = 64, Rows = 64, T = 64, Stages = 3;
  static constexpr int Planes = C / 64, PlaneBytes = T * 128, StageBytes = Planes * PlaneBytes;
  static constexpr int Parts = 2, PartPlanes = Planes / Parts;  // the latent planes of a tile arrive in two parts
  static constexpr int Held = 27, StepBytes = Rows * 32;        // steps of 16 columns whose q is in registers
  static constexpr int QBytes = StepBytes + 2 * PlaneBytes;     // what is left of q: a step, a plane, the rope plane
  static constexpr int Threads = 512;
  static constexpr int Gap = 960;
  static constexpr int SharedBytes = Stages * StageBytes + 2 * PlaneBytes + QBytes + 1024;
  static constexpr int ScorerRegisters = 168, AdderRegisters = 160, ProducerRegisters = 24;
};

// What a ring's place holds besides tiles: q of a piece, the sums of the piece before it where it takes them over (for
// one adder, then for the other), the end.
enum MlaEntry : int { kMlaQ = -1, kMlaSums = -2, kMlaEnd = -3 };

template <class Shape>
struct MlaWideShared {
  static constexpr int Stages = Shape::Stages, Parts = Shape::Parts;
  u32 ring, rope, q;                       // [Stages, Planes, 64, 128], [2, 64, 128], QBytes
  u32 full, rope_full, scored, go, empty;  // barriers: [Stages, Parts], [2], [Stages] each
  u32 read;                                // barrier: the scorer's warps are done with a tile's rope plane
  MlaPiece* pieces;                        // [4]
  signed char* decay;                      // [2, 64]: what sums of earlier tiles shrink by, as a power of two
  float2* totals;                          // [64]: a piece's (maximum, sum), with its last tile
  int* flags;                              // [2]
  float* spare;                            // [2, 1056]: in place of q, when the last tile has its scores

  ATTNKIT_DEVICE explicit MlaWideShared(char* raw) {
    ring = smem_address(raw);
    rope = ring + Stages * Shape::StageBytes;
    q = rope + 2 * Shape::PlaneBytes;
    char* rest = raw + Stages * Shape::StageBytes + 2 * Shape::PlaneBytes + Shape::QBytes;
    full = smem_address(rest), rope_full = full + 8 * Stages * Parts;
    scored = rope_full + 16, go = scored + 8 * Stages, empty = go + 8 * Stages, read = empty + 8 * Stages;
    pieces = reinterpret_cast<MlaPiece*>(rest + 144);
    flags = reinterpret_cast<int*>(rest + 288);
    decay = reinterpret_cast<signed char*>(rest + 320);
    totals = reinterpret_cast<float2*>(rest + 448);
    spare = reinterpret_cast<float*>(rest - Shape::QBytes);
    static_assert(8 * (Stages * (Parts + 3) + 3) <= 144 && 4 * sizeof(MlaPiece) <= 144, "small things");
  }

  ATTNKIT_DEVICE void init_barriers() const {
    for (int i = 0; i < Stages * Parts + 2; ++i) mbarrier_init(full + 8 * i, 1);
    for (int i = 0; i < Stages; ++i) {
      mbarrier_init(scored + 8 * i, 4);
      mbarrier_init(go + 8 * i, 4);
      mbarrier_init(empty + 8 * i, 8 * Shape::Ctas);
    }
    mbarrier_init(read, 4);
    mbarrier_init_fence();
  }
};

// Instructions that are never executed, where ``never`` is false and the compiler does not know. The loops of scorer, adders
// and producers run at the same time, and compete where they lie at the same places modulo 32 KB: that costs up to 4%.
template <int Count>
ATTNKIT_DEVICE void code_gap(bool never) {
  if (!never) return;
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("nanosleep.u32 0;");
}

// A descriptor that is made where it is used: hoisted out of a loop, those of all its products would take registers
// that the sums need. The leading offset is that of operands read transposed; others have no use for it.
ATTNKIT_DEVICE u64 mla_operand(u32 address) {
  u32 low = (address & 0x3ffff) >> 4 | 8192 >> 4 << 16;
  asm volatile("" : "+r"(low));
  return static_cast<u64>(0x40000000u | 1024 >> 4) << 32 | low;
}

// A place in the ring: which stage, and the parity that its barriers wait for. Everything goes through the ring in the
// same order for every warp: for each piece its q, then its tiles.
template <int Stages>
struct MlaRing {
  int stage = 0, entry = 0;
  u32 parity = 0;
  ATTNKIT_DEVICE int rope() const { return entry & 1; }
  ATTNKIT_DEVICE u32 rope_parity() const { return entry >> 1 & 1; }
  ATTNKIT_DEVICE void next() {
    ++entry;
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

}  // namespace attnkit
