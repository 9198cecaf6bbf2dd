// Absorbed latent decode (MLA) for many query rows: more than 32 (heads x query tokens) of a sequence read one latent
// row a token. Bound by the tensor cores: 8.9 MFLOP for 64 rows and 64 keys, 2176 cycles of one multiprocessor.
//
// A CTA has 64 query rows and walks over tiles of 64 keys in a ring of three. Four warpgroups:
//  - the scorer holds most of q in registers, so that its products read little but the keys from shared memory; with q
//    read from there too, 64 x 64 products would take all of its bandwidth. It leaves its weights, rounded, in the
//    tile's rope plane, which nobody reads any more.
//  - two adders have the 64 x 512 output, 256 columns each, and multiply the weights with the same tile read
//    transposed.
//  - a producer brings the tiles by TMA. The two CTAs of a cluster have different rows of the same sequence; each loads
//    half a tile, and both get both halves.
// The products take turns: the adders' for tile j start when the scorer's for tile j + 1 have been issued, and then run
// while the scorer takes the exponentials of tile j + 1. So the tensor cores always have a product to go on with.
//
// Registers and shared memory are both full: 168 + 2 x 160 + 24 registers a thread of each warpgroup, all 227 KB.
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
  MlaPiece* pieces;                        // [4]
  signed char* decay;                      // [2, 64]: what sums of earlier tiles shrink by, as a power of two
  float2* totals;                          // [64]: a piece's (maximum, sum), with its last tile
  int* flags;                              // [2]

  ATTNKIT_DEVICE explicit MlaWideShared(char* raw) {
    ring = smem_address(raw);
    rope = ring + Stages * Shape::StageBytes;
    q = rope + 2 * Shape::PlaneBytes;
    char* rest = raw + Stages * Shape::StageBytes + 2 * Shape::PlaneBytes + Shape::QBytes;
    full = smem_address(rest), rope_full = full + 8 * Stages * Parts;
    scored = rope_full + 16, go = scored + 8 * Stages, empty = go + 8 * Stages;
    pieces = reinterpret_cast<MlaPiece*>(rest + 144);
    flags = reinterpret_cast<int*>(rest + 288);
    decay = reinterpret_cast<signed char*>(rest + 320);
    totals = reinterpret_cast<float2*>(rest + 448);
    static_assert(8 * (Stages * (Parts + 3) + 2) <= 144 && 4 * sizeof(MlaPiece) <= 144, "small things");
  }

  ATTNKIT_DEVICE void init_barriers() const {
    for (int i = 0; i < Stages * Parts + 2; ++i) mbarrier_init(full + 8 * i, 1);
    for (int i = 0; i < Stages; ++i) {
      mbarrier_init(scored + 8 * i, 4);
      mbarrier_init(go + 8 * i, 4);
      mbarrier_init(empty + 8 * i, 8 * Shape::Ctas);
    }
    mbarrier_init_fence();
  }
};

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

// Four warps, two latent planes each, and each finds out for itself what is next. The rope plane of an entry is loaded
// one entry after its latent planes, as there are two rope planes only; it is brought to L2 before.
template <class Shape>
struct MlaWideProducer {
  static constexpr int T = Shape::T, Ctas = Shape::Ctas, Each = 2;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int row0, warp;
  MlaRing<Shape::Stages> ring;
  int late_what, late_b, late_length, late_pages;  // the entry before

  ATTNKIT_DEVICE static int lane() { return threadIdx.x & 31; }
  ATTNKIT_DEVICE static int rank() { return Ctas > 1 ? cluster_rank() : 0; }
  ATTNKIT_DEVICE int boxes() const { return (T >> p.box_shift) / Ctas; }  // of a tile that this CTA loads

  // Planes [first, first + count) of a tile, this CTA's share of them; ``planes`` are what the barrier waits for.
  template <int Count>
  ATTNKIT_DEVICE void load_tile(u32 to, u32 full, int first, bool says, int planes, int tile, int length, int pages) const {
    const u64 policy = evict_first_policy();
    const int shift = p.box_shift, mine = boxes(), box0 = rank() * mine;
    const int valid = max(0, min((length - tile * T + (1 << shift) - 1) >> shift, T >> shift)), end = min(mine, valid - box0);
    if (says && elect_one()) mbarrier_arrive_expect(full, valid * (planes * 128) << shift);
#pragma unroll 1
    for (int box = 0; box < end; ++box) {
      const int page = __shfl_sync(~0u, pages, box), slot = (tile * T + ((box0 + box) << shift)) & ((1 << p.page_shift) - 1);
      if (elect_one()) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
          const u32 place = to + i * Shape::PlaneBytes + (128 * (box0 + box) << shift);
          if constexpr (Ctas > 1) {
            tma_load_3d_multicast(place, &p.kv_map, full, (first + i) * 64, slot, page, (1 << Ctas) - 1, policy);
          } else {
            tma_load_3d(place, &p.kv_map, full, (first + i) * 64, slot, page, policy);
          }
        }
      }
    }
  }

  template <int Count>
  ATTNKIT_DEVICE void load_q(u32 to, u32 full, int first, bool says, int planes, int b) const {
    if (!elect_one()) return;
    const int token = row0 / p.q_heads, head = row0 - token * p.q_heads;
    if (says) mbarrier_arrive_expect(full, planes * Shape::PlaneBytes);
#pragma unroll
    for (int i = 0; i < Count; ++i) tma_load_4d(to + i * Shape::PlaneBytes, &p.q_map, full, (first + i) * 64, head, token, b);
  }

  ATTNKIT_DEVICE void load_sums(u32 to, u32 full, bool says, int cell) const {
    if (!elect_one()) return;
    const MlaPartials partials(p, Ctas);
    while (read_acquire(partials.arrived(cell)) == 0) {
    }
    fence_async();
    if (says) mbarrier_arrive_expect(full, Shape::PartPlanes * Shape::PlaneBytes);
    bulk_load(to, partials.values(2 * cell) + warp * (Each * Shape::PlaneBytes / 16), Each * Shape::PlaneBytes, full);
  }

  // What ``what`` is: a tile or one of MlaEntry; of sequence b, or kMlaSums: of cell b.
  ATTNKIT_DEVICE void load(int what, int b, int length, int pages) {
    const u32 to = s.ring + ring.stage * Shape::StageBytes + warp * (Each * Shape::PlaneBytes);
    const u32 full = s.full + 8 * (Shape::Parts * ring.stage + warp / 2);
    const bool says = warp % 2 == 0;
    if (what >= 0) {
      load_tile<Each>(to, full, Each * warp, says, Shape::PartPlanes, what, length, pages);
    } else if (what == kMlaQ) {
      load_q<Each>(to, full, Each * warp, says, Shape::PartPlanes, b);
    } else if (what == kMlaSums) {
      load_sums(to, full, says, b);
    } else if (says && elect_one()) {
      mbarrier_arrive(full);
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void load_rope(int rope, int what, int b, int length, int pages) const {
    const u32 to = s.rope + rope * Shape::PlaneBytes, full = s.rope_full + 8 * rope;
    if (what >= 0) {
      load_tile<1>(to, full, Shape::Planes, true, 1, what, length, pages);
    } else if (what == kMlaQ) {
      load_q<1>(to, full, Shape::Planes, true, 1, b);
    } else if (elect_one()) {
      mbarrier_arrive(full);
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void fetch_rope(int tile, int length, int pages) const {
    const int mine = boxes(), slot0 = tile * T + (rank() * mine << p.box_shift);
    if (lane() < mine && slot0 + (lane() << p.box_shift) < length) {
      tma_prefetch_3d(&p.kv_map, Shape::C, (slot0 + (lane() << p.box_shift)) & ((1 << p.page_shift) - 1), pages);
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE int page_of(int b, int tile, int length) const {
    const int mine = boxes(), token = tile * T + ((rank() * mine + lane()) << p.box_shift);
    return lane() < mine && token < length ? p.pages[b * p.pages_b + (token >> p.page_shift)] : 0;
  }

  // Entry k's latent planes and entry k - 1's rope plane take the places of entry k - 3.
  ATTNKIT_DEVICE void enter(int what, int b, int length, int pages) {
    mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
    if (warp == 0 && ring.entry > 0) load_rope(ring.rope() ^ 1, late_what, late_b, late_length, late_pages);
    load(what, b, length, pages);
    if (warp == 0 && what >= 0) fetch_rope(what, length, pages);
    late_what = what, late_b = b, late_length = length, late_pages = pages;
    ring.next();
  }

  ATTNKIT_DEVICE void run(MlaWalker& walker) {
    MlaPiece piece;
#pragma unroll 1
    for (int n = 0;; n = (n + 1) & 3) {
      const bool more = walker.next(piece);
      if (!more) piece.tiles = 0;
      if (warp == 0 && lane() == 0) s.pieces[n] = piece;  // four places: who reads them is less than four pieces behind
      __syncwarp();
      if (!more) break;
      enter(kMlaQ, piece.b, 0, 0);
      int page = page_of(piece.b, piece.tile, piece.length);
#pragma unroll 1
      for (int tile = piece.tile; tile < piece.tile + piece.tiles; ++tile) {
        const int ahead = page_of(piece.b, tile + 1, piece.length);
        enter(tile, piece.b, piece.length, page);
        page = ahead;
      }
      if (piece.takes_over()) {
        const int cell = (piece.first * p.row_blocks * Ctas + row0 / Shape::Rows) * 2;
        enter(kMlaSums, cell, 0, 0);
        enter(kMlaSums, cell + 1, 0, 0);
      }
    }
    enter(kMlaEnd, 0, 0, 0);
  }
};

template <class Shape>
struct MlaWideScorer {
  static constexpr int T = Shape::T, Parts = Shape::Parts;
  static constexpr float kAhead = 8.0f;
  static constexpr int Held = Shape::Held, Steps = (Shape::C + Shape::R) / 16;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int lane, warp;
  MlaRing<Shape::Stages> ring;
  u32 q[4 * Held];
  float scores[T / 2];
  float top[2], sum[2];  // the power of two that weights are relative to; this thread's part of the sum
  int row0;              // the CTA's first query row

  ATTNKIT_DEVICE void arrive(u32 barrier) const {
    if (lane == 0) mbarrier_arrive(barrier + 8 * ring.stage);
  }

  // Where lane l's row of four 8 x 8 matrices lies: 16 rows of this warp, 16 columns from 16 ``step`` on of a plane.
  ATTNKIT_DEVICE u32 matrix_row(u32 plane, int step) const {
    const int row = warp * 16 + lane % 16, unit = 2 * step + lane / 16;
    return plane + row * 128 + ((unit ^ (row & 7)) << 4);
  }

  ATTNKIT_DEVICE void wait_part(int part) const { mbarrier_wait(s.full + 8 * (Parts * ring.stage + part), ring.parity); }
  ATTNKIT_DEVICE void wait_rope() const { mbarrier_wait(s.rope_full + 8 * ring.rope(), ring.rope_parity()); }

  ATTNKIT_DEVICE void load_q() {
    const u32 from = s.ring + ring.stage * Shape::StageBytes;
#pragma unroll
    for (int step = 0; step < Held; ++step) {
      if (step == 16) wait_part(1);
      load_matrix_x4(reinterpret_cast<u32(&)[4]>(q[4 * step]), matrix_row(from + step / 4 * Shape::PlaneBytes, step % 4));
    }
    wait_rope();
    // Each warp copies its own 16 rows of what is left; its products with the old ones are done. The one step lies in
    // blocks of 8 rows and 8 columns, the planes as they came.
#pragma unroll
    for (int step = Held; step < Steps; ++step) {
      const u32 plane = step < 32 ? from + step / 4 * Shape::PlaneBytes : s.rope + ring.rope() * Shape::PlaneBytes;
      const u32 to = step == Held ? s.q + lane / 16 * 1024 + (warp * 16 + lane % 16) * 16
                                  : matrix_row(s.q + Shape::StepBytes + (step - 28) / 4 * Shape::PlaneBytes, step % 4);
      u32 r[4];
      load_matrix_x4(r, matrix_row(plane, step % 4));
      store_matrix_x4(to, r[0], r[1], r[2], r[3]);
    }
    fence_async_shared();
    named_barrier(1, 128);
  }

  // ``held``: a stage that the adders may begin with when this has been issued, or before if there is a wait in it.
  ATTNKIT_DEVICE void multiply(int held) {
    const u64 keys = mla_operand(s.ring + ring.stage * Shape::StageBytes), rope = mla_operand(s.rope + ring.rope() * Shape::PlaneBytes);
    const u64 rest = mla_operand(s.q + Shape::StepBytes);
    const u64 lone = static_cast<u64>((s.q & 0x3ffff) >> 4 | 1024 >> 4 << 16) | static_cast<u64>(128 >> 4) << 32;
    constexpr int Plane = Shape::PlaneBytes / 16;
    wgmma_hold(scores);
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
      if (step == 0) wait_part(0);
      if (step == 16) wait_part(1);
      if (step == 32 && held >= 0 && !mbarrier_test(s.rope_full + 8 * ring.rope(), ring.rope_parity())) let_go(held), held = -1;
      if (step == 32) wait_rope();
      if (step % 16 == 0) wgmma_fence();
      const u64 b = step < 32 ? keys + step / 4 * Plane + step % 4 * 2 : rope + step % 4 * 2;
      if (step < Held) {
        wgmma_rs<Shape::Bf16>(scores, q + 4 * step, b, step > 0);
      } else if (step == Held) {
        wgmma_ss<Shape::Bf16>(scores, lone, b, 1);
      } else {
        wgmma_ss<Shape::Bf16>(scores, rest + (step - 28) / 4 * Plane + step % 4 * 2, b, 1);
      }
    }
    wgmma_commit();
    if (held >= 0) let_go(held);
  }

  ATTNKIT_DEVICE void mask(const MlaPiece& piece, int tile) {
    const int column = tile * T + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = min((row0 + warp * 16 + lane / 4 + 8 * r) / p.H, p.Q - 1);
      const int at = piece.length - p.Q + token, low = p.window > 0 ? at - p.window : -1;
#pragma unroll
      for (int i = 0; i < T / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = column + 8 * i + e;
          if (key > at || key <= low) scores[4 * i + 2 * r + e] = negative_infinity();
        }
      }
    }
  }

  ATTNKIT_DEVICE void cap() {
    const float inner = 2.0f * kLog2e * p.scale / p.softcap, outer = p.softcap;
#pragma unroll
    for (int i = 0; i < T / 2; ++i) scores[i] = outer - 2.0f * outer * reciprocal(1.0f + exp2_fast(scores[i] * inner));
  }

  // Moves what weights are relative to, to the maximum at first and then by whole powers of two.
  ATTNKIT_DEVICE void move(float (&most)[2], float factor, float (&decay)[2]) {
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      const float other0 = __shfl_xor_sync(~0u, most[0], d), other1 = __shfl_xor_sync(~0u, most[1], d);
      most[0] = fmaxf(most[0], other0), most[1] = fmaxf(most[1], other1);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float high = most[r] == negative_infinity() ? most[r] : most[r] * factor;
      if (top[r] == negative_infinity()) {
        top[r] = high;
      } else if (high > top[r] + kAhead) {
        const float up = ceilf(high - top[r]);
        decay[r] = -up;
        top[r] += up;
        sum[r] *= exp2_fast(-up);
      }
    }
  }

  // Scores to weights. What they are relative to follows the maximum only when it is more than 2^8 behind: then outputs
  // rarely have to be rescaled, which is exact, and most tiles need no maximum over all their columns.
  ATTNKIT_DEVICE void weigh(float factor, float (&decay)[2]) {
    float most[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* x = scores + 2 * r;
      float even = fmaxf(x[0], x[1]), odd = fmaxf(x[4], x[5]);
#pragma unroll
      for (int i = 2; i < T / 8; i += 2) {
        even = fmaxf(even, fmaxf(x[4 * i], x[4 * i + 1]));
        odd = fmaxf(odd, fmaxf(x[4 * i + 4], x[4 * i + 5]));
      }
      most[r] = fmaxf(even, odd);
      decay[r] = 0.0f;
    }
    if (__any_sync(~0u, most[0] * factor > top[0] + kAhead || most[1] * factor > top[1] + kAhead)) move(most, factor, decay);
    const float base[2] = {top[0] == negative_infinity() ? 0.0f : top[0], top[1] == negative_infinity() ? 0.0f : top[1]};
    float total[2][2] = {};
#pragma unroll
    for (int i = 0; i < T / 2; ++i) {
      const int r = i / 2 % 2;
      scores[i] = exp2_fast(fmaf(scores[i], factor, -base[r]));
      total[r][i % 2] += scores[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += total[r][0] + total[r][1];
  }

  ATTNKIT_DEVICE void hand_over(const float (&decay)[2]) const {
    const u32 plane = s.rope + ring.rope() * Shape::PlaneBytes;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const float* x = scores + 8 * step;
      store_matrix_x4(matrix_row(plane, step), pack<Shape::Bf16>(x[0], x[1]), pack<Shape::Bf16>(x[2], x[3]),
                      pack<Shape::Bf16>(x[4], x[5]), pack<Shape::Bf16>(x[6], x[7]));
    }
    if (lane % 4 == 0) {
      signed char* to = s.decay + ring.rope() * 64 + warp * 16 + lane / 4;
      to[0] = static_cast<signed char>(fmaxf(decay[0], -127.0f)), to[8] = static_cast<signed char>(fmaxf(decay[1], -127.0f));
    }
  }

  ATTNKIT_DEVICE void tell_totals() const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (lane % 4 == 0) s.totals[warp * 16 + lane / 4 + 8 * r] = make_float2(top[r], total);
    }
  }

  // Lets the adders begin with the tile before this one.
  ATTNKIT_DEVICE void let_go(int stage) const {
    if (lane == 0) mbarrier_arrive(s.go + 8 * stage);
  }

  // One tile, the ``last`` of its piece or not. ``held``: the stage of a tile that the adders may not yet begin with.
  template <bool Capped, bool Masked>
  ATTNKIT_DEVICE void step(const MlaPiece& piece, int tile, bool last, int& held) {
    const float factor = Capped ? kLog2e : p.scale * kLog2e;
    if (held >= 0 && !mbarrier_test(s.full + 8 * Parts * ring.stage, ring.parity)) {
      let_go(held);  // nothing to issue yet: no reason to make them wait
      held = -1;
    }
    multiply(held);
    wgmma_wait<0>();
    wgmma_hold(scores);
    float decay[2];
    if constexpr (Capped) cap();
    if constexpr (Masked) mask(piece, tile);
    weigh(factor, decay);
    named_barrier(1, 128);  // all four warps have read the rope plane that the weights are written to
    hand_over(decay);
    if (last) tell_totals();
    fence_async_shared();
    __syncwarp();
    arrive(s.scored);
    held = ring.stage;
    ring.next();
  }

  template <bool Capped>
  ATTNKIT_DEVICE void run() {
#pragma unroll
    for (int i = 0; i < T / 2; ++i) scores[i] = 0.0f;
#pragma unroll 1
    for (int n = 0;; n = (n + 1) & 3) {
      wait_part(0);
      const MlaPiece& piece = s.pieces[n];
      if (piece.tiles == 0) break;
      load_q();
      arrive(s.scored);
      arrive(s.go);
      ring.next();
      top[0] = top[1] = negative_infinity();
      sum[0] = sum[1] = 0.0f;
      int held = -1, tile = piece.tile;
      // Tiles that all rows see all of: those in between.
      const int end = tile + piece.tiles, full_end = Capped ? 0 : min(max(piece.length - p.Q + 1, 0) / T, end);
      const int full_begin = p.window > 0 ? (max(piece.length - 1 - p.window, -1) + T) / T : 0;
#pragma unroll 1
      for (; tile < min(full_begin, end); ++tile) step<Capped, true>(piece, tile, tile == end - 1, held);
#pragma unroll 1
      for (; tile < full_end; ++tile) step<Capped, false>(piece, tile, tile == end - 1, held);
#pragma unroll 1
      for (; tile < end; ++tile) step<Capped, true>(piece, tile, tile == end - 1, held);
      let_go(held);
      for (int sums = piece.takes_over() ? 2 : 0; sums > 0; --sums) {
        wait_part(0);
        arrive(s.scored);
        arrive(s.go);
        ring.next();
      }
    }
    arrive(s.scored);
  }
};

template <class Shape>
struct MlaWideAdder {
  static constexpr int T = Shape::T, Parts = Shape::Parts, Ctas = Shape::Ctas;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int row0;  // the CTA's first query row
  MlaRing<Shape::Stages> ring;
  float out[2][64];  // 128 columns each: a product of 256 needs more registers than a kernel of 512 threads starts with

  ATTNKIT_DEVICE float& at(int i) { return out[i / 64][i % 64]; }

  // Asked for where they are used, not kept: registers hold sums.
  ATTNKIT_DEVICE static int half() { return (threadIdx.x >> 7) - 1; }  // which 256 columns
  ATTNKIT_DEVICE static int thread() { return threadIdx.x & 127; }
  ATTNKIT_DEVICE static int lane() { return threadIdx.x & 31; }
  ATTNKIT_DEVICE static int row() { return (threadIdx.x >> 5 & 3) * 16 + lane() / 4; }  // and 8 below

  ATTNKIT_DEVICE u32 stage() const { return s.ring + ring.stage * Shape::StageBytes; }

  ATTNKIT_DEVICE void release() {
    __syncwarp();
    if (lane() < Ctas) mbarrier_arrive_cluster(cluster_address(s.empty + 8 * ring.stage, lane()));
    ring.next();
  }

  // Slots outside the sequence may hold NaN, and zero times NaN is NaN: their rows become zero.
  ATTNKIT_DEVICE void clear_outside(int low, int high) const {
    for (int i = thread(); i < T * 8; i += 128) {
      const int key = i / 8;
      if (key >= low && key < high) continue;
#pragma unroll
      for (int plane = 0; plane < 4; ++plane) store_shared_zeros(stage() + (4 * half() + plane) * Shape::PlaneBytes + i * 16);
    }
    fence_async_shared();
    named_barrier(2 + half(), 128);
  }

  ATTNKIT_DEVICE void rescale() {
    const signed char* decay = s.decay + ring.rope() * 64 + row();
    const int down0 = decay[0], down1 = decay[8];
    if (!__any_sync(~0u, down0 | down1)) return;
    const float by0 = exp2_fast(static_cast<float>(down0)), by1 = exp2_fast(static_cast<float>(down1));
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
      at(i) *= by0, at(i + 1) *= by0, at(i + 2) *= by1, at(i + 3) *= by1;
    }
  }

  ATTNKIT_DEVICE void multiply() {
    const u64 weights = mla_operand(s.rope + ring.rope() * Shape::PlaneBytes), values = mla_operand(stage() + 4 * half() * Shape::PlaneBytes);
    constexpr int Second = 2 * Shape::PlaneBytes / 16;
    wgmma_hold(out[0]);
    wgmma_hold(out[1]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < T / 16; ++step) {
      wgmma_ss_transposed<Shape::Bf16>(out[0], weights + step * 2, values + step * 128, 1);
      wgmma_ss_transposed<Shape::Bf16>(out[1], weights + step * 2, values + Second + step * 128, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(out[0]);
    wgmma_hold(out[1]);
  }

  // Four threads hold a row's columns two by two; they trade so that each stores 16 bytes in one piece.
  ATTNKIT_DEVICE void store_row(char* row, int r, float by) {
    const int me = lane() % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      u32 own[4], got[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] = pack<Shape::Bf16>(at(16 * i + 4 * j + 2 * r) * by, at(16 * i + 4 * j + 2 * r + 1) * by);
      // Round k: with the thread k away. What goes there is its column; what comes is ours of its word.
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int to = me ^ k;
        const u32 send = to & 2 ? (to & 1 ? own[3] : own[2]) : (to & 1 ? own[1] : own[0]);
        got[k] = __shfl_xor_sync(~0u, send, k);
      }
      u32 word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = j ^ me;
        word[j] = k & 2 ? (k & 1 ? got[3] : got[2]) : (k & 1 ? got[1] : got[0]);
      }
      if (row) *reinterpret_cast<uint4*>(row + (32 * i + 8 * me) * 2) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  // Adds the sums of the piece before, of the same rows and columns, which lie in the ring.
  ATTNKIT_DEVICE void take_over(const MlaPiece& piece, float2 (&totals)[2]) {
    const MlaPartials partials(p, Ctas);
    const int cell = (piece.first * p.row_blocks * Ctas + row0 / Shape::Rows) * 2 + half();
    mbarrier_wait(s.full + 8 * Parts * ring.stage, ring.parity);
    mbarrier_wait(s.full + 8 * (Parts * ring.stage + 1), ring.parity);
    read_acquire(partials.arrived(cell));
    float mine[2], others[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 other = load_l2(partials.weights(2 * cell) + row() + 8 * r);
      const float high = fmaxf(totals[r].x, other.x), base = high == negative_infinity() ? 0.f : high;
      mine[r] = exp2_fast(totals[r].x - base), others[r] = exp2_fast(other.x - base);
      totals[r] = make_float2(high, totals[r].y * mine[r] + other.y * others[r]);
    }
    const u32 from = stage() + thread() * 16;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float4 x;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from + i * 2048) : "memory");
      at(4 * i) = at(4 * i) * mine[0] + x.x * others[0];
      at(4 * i + 1) = at(4 * i + 1) * mine[0] + x.y * others[0];
      at(4 * i + 2) = at(4 * i + 2) * mine[1] + x.z * others[1];
      at(4 * i + 3) = at(4 * i + 3) * mine[1] + x.w * others[1];
    }
    named_barrier(2 + half(), 128);
    if (thread() == 0) *partials.arrived(cell) = 0;
  }

  using Meeting = MlaMeeting<Ctas, Shape::Bf16>;

  // Chunks [Begin, End) of this thread's sums to the workspace.
  template <int Begin, int End>
  ATTNKIT_DEVICE void publish(float4* to) {
#pragma unroll
    for (int i = Begin; i < End; ++i) to[i * 128] = make_float4(at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3));
  }

  // Chunks [First, First + Count) are this piece's to add up, in the order of the pieces, its own from registers.
  template <int First, int Count>
  ATTNKIT_DEVICE void meet_keeping(const Meeting& meeting) {
    constexpr int Most = 4, Batch = 4;
    float4* to = meeting.values(meeting.index) + thread();
    publish<0, First>(to);
    publish<First + Count, MlaPartials::Chunks>(to);
    int todo = meeting.meet();
    if (todo == Meeting::kGivesUp) {
      publish<First, First + Count>(to);
      todo = meeting.give_up();
    }
    if (todo != Meeting::kLeaves) {
      float by[2][Most];
#pragma unroll
      for (int r = 0; r < 2; ++r) meeting.weigh(r, First == 0, by[r]);
      char *to0 = meeting.rows.place(row()), *to1 = meeting.rows.place(row() + 8);
#pragma unroll
      for (int c0 = First; c0 < First + Count; c0 += Batch) {
        float4 x[Batch][Most];
#pragma unroll
        for (int c = 0; c < Batch; ++c) {
#pragma unroll
          for (int i = 0; i < Most; ++i) {
            x[c][i] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (i < meeting.count && i != meeting.index) x[c][i] = load_l2(meeting.values(i) + (c0 + c) * 128 + thread());
          }
        }
#pragma unroll
        for (int c = 0; c < Batch; ++c) {
          float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
          for (int i = 0; i < Most; ++i) {
            const int own = 4 * (c0 + c);
            if (i == meeting.index) x[c][i] = make_float4(at(own), at(own + 1), at(own + 2), at(own + 3));
            total.x += x[c][i].x * by[0][i];
            total.y += x[c][i].y * by[0][i];
            total.z += x[c][i].z * by[1][i];
            total.w += x[c][i].w * by[1][i];
          }
          const int column = 8 * (c0 + c) + 2 * (lane() & 3);
          if (to0) *reinterpret_cast<u32*>(to0 + column * 2) = pack<Shape::Bf16>(total.x, total.y);
          if (to1) *reinterpret_cast<u32*>(to1 + column * 2) = pack<Shape::Bf16>(total.z, total.w);
        }
      }
    }
    meeting.leave(todo);
  }

  ATTNKIT_DEVICE void meet_plainly(const Meeting& meeting, bool handed_on) {
    publish<0, MlaPartials::Chunks>(meeting.values(meeting.index) + thread());
    if (handed_on) {
      fence_async();  // TMA will read what has been written here
      named_barrier(2 + half(), 128);
      if (thread() == 0) add_release(meeting.partials.arrived(meeting.cell(0)), 1);
      return;
    }
    int todo = meeting.meet();
    if (todo == Meeting::kGivesUp) todo = meeting.give_up();
    if (todo != Meeting::kLeaves && meeting.mine() >= 0) meeting.add_part(meeting.mine());
    meeting.leave(todo);
  }

  ATTNKIT_DEVICE void finish(const MlaPiece& piece, const float2 (&totals)[2]) {
    const MlaRows rows{p, piece.b, row0, 256 * half()};
    if (piece.count == 1 || piece.takes_over()) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float by = rows.finish(row() + 8 * r, totals[r].x, totals[r].y, half() == 0 && lane() % 4 == 0);
        store_row(rows.place(row() + 8 * r), r, by);
      }
      return;
    }
    const MlaPartials partials(p, Ctas);
    const int step = p.row_blocks * Ctas * 2, cell0 = piece.first * step + row0 / Shape::Rows * 2 + half();
    const Meeting meeting{p,          partials, rows,   piece.index, piece.count,      piece.early,
                          cell0,      step,     half(), thread(),    s.flags + half(), 2 + half()};
    if (lane() % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) meeting.weights(meeting.index)[row() + 8 * r] = totals[r];
    }
    if (!meeting.keeps_own()) {
      meet_plainly(meeting, piece.handed_on());
    } else if (meeting.mine() == 0) {
      meet_keeping<0, MlaPartials::Chunks / 2>(meeting);
    } else {
      meet_keeping<MlaPartials::Chunks / 2, MlaPartials::Chunks / 2>(meeting);
    }
  }

  ATTNKIT_DEVICE void run() {
#pragma unroll 1
    for (int n = 0;; n = (n + 1) & 3) {
      mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
      const MlaPiece& piece = s.pieces[n];
      const int tiles = piece.tiles;
      if (tiles == 0) break;
      release();
      float2 totals[2];
#pragma unroll
      for (int i = 0; i < 128; ++i) at(i) = 0.0f;
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
        mbarrier_wait(s.full + 8 * (Parts * ring.stage + half()), ring.parity);
        if (t > 0) rescale();
        const int key0 = (piece.tile + t) * T;
        if (key0 < piece.low || key0 + T > piece.length) clear_outside(piece.low - key0, piece.length - key0);
        mbarrier_wait(s.go + 8 * ring.stage, ring.parity);
        multiply();
        if (t == tiles - 1) {
#pragma unroll
          for (int r = 0; r < 2; ++r) totals[r] = s.totals[row() + 8 * r];
        }
        release();
      }
#pragma unroll 1
      for (int sums = 0; sums < (piece.takes_over() ? 2 : 0); ++sums) {
        mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
        if (sums == half()) take_over(piece, totals);
        release();
      }
      finish(piece, totals);
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void mla_wide(const MlaWideParams& p) {
  extern __shared__ __align__(1024) char raw[];
  const MlaWideShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = Shape::Ctas > 1 ? cluster_rank() : 0;
  const int cluster = blockIdx.x / Shape::Ctas, group = cluster / p.row_blocks, block = cluster - group * p.row_blocks;
  if (threadIdx.x == 0) s.init_barriers();
  if (Shape::Ctas > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  launch_dependents();
  wait_for_previous_grid();
  const int row0 = (block * Shape::Ctas + rank) * Shape::Rows;
  if (warp >= 12) {
    registers_lower<Shape::ProducerRegisters>();
    MlaWalker walker(p, group);
    walker.place();
    MlaWideProducer<Shape> producer{p, s, row0, warp - 12};
    producer.run(walker);
  } else if (warp >= 4) {
    registers_raise<Shape::AdderRegisters>();
    MlaWideAdder<Shape> adder{p, s, row0};
    adder.run();
  } else {
    registers_raise<Shape::ScorerRegisters>();
    MlaWideScorer<Shape> scorer{p, s, lane, warp};
    scorer.row0 = row0;
    if (p.softcap > 0.0f) {
      scorer.template run<true>();
    } else {
      scorer.template run<false>();
    }
  }
  if (Shape::Ctas > 1) cluster_sync();  // nobody leaves while another may still arrive at its barriers
}

}  // namespace attnkit
