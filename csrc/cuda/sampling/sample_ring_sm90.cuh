// Greedy choice and draws from all tokens of many rows of float32, without penalties: one read of the logits by bulk copies
// into shared memory. Each of many warps has a short ring there, and asks for the piece after next as soon as it holds one in
// registers: more warps hide more arithmetic, and little needs to be under way. What warps find in a row meets in shared
// memory; the CTAs that share a row meet in one 64-bit word of ``state``.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

// One CTA a multiprocessor; pieces that a warp has under way.
constexpr int kRingWarps = 16, kRingThreads = 32 * kRingWarps, kRingSlots = 2;
constexpr int kPieceBytes = kPiece * 4;

// A row of a CTA: what has been reached (as pack_best: a score, a group and, at last, which of its 16; greedy: a logit and its
// token), the row's options, and how many of the CTA's blocks of it are done.
struct RingRow {
  u64 best, seed, offset;
  float t, rt, scale;  // scale: rt log2(e)
  int cold, done, unused;
};

// The logits of the group that a warp last brought to the lead in a row: a place for each warp in each of a CTA's first rows.
struct RingKept {
  float4 chunks[4];
  int group, unused[3];
};
constexpr int kKeptRows = 4;

// In front of the rows, as many as the CTA has.
struct RingShared {
  char slots[kRingWarps][kRingSlots][kPieceBytes];
  u64 barriers[kRingWarps][kRingSlots];
  RingKept kept[kKeptRows][kRingWarps];
};
static_assert(sizeof(RingShared) == 70912 && sizeof(RingRow) == 48, "RING_BYTES and RING_ROW_BYTES");

// CTAs meet in 64 bits a row, zero between launches: the upper 52 of a packed best whose id has 20 bits, and 12 for how many
// blocks it stands for. Who finds all others there need not wait for memory any more.
constexpr int kMetBits = 12;
constexpr u64 kMetBlocks = (1ull << kMetBits) - 1;

ATTNKIT_DEVICE u64 pack_met(u64 best, int blocks) {
  return (best >> 32 << 32) | (best & 0xfffff) << kMetBits | static_cast<u64>(blocks);
}
ATTNKIT_DEVICE u64 unpack_met(u64 met) { return (met >> 32 << 32) | (met == 0 ? 0u : 0xfff00000u) | (static_cast<u32>(met) >> kMetBits); }

ATTNKIT_DEVICE u64 read_relaxed(const u64* p) {
  u64 x;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
ATTNKIT_DEVICE void prefetch_bulk(const void* p, u32 bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes)); }

ATTNKIT_DEVICE Raw<kF32> load_raw(u32 from) {
  const uint4 x = load_shared<uint4>(from);
  return Raw<kF32>{{x.x, x.y, x.z, x.w}};
}
ATTNKIT_DEVICE void store_raw(u32 to, const Raw<kF32>& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3]) : "memory");
}

// A block of a warp: its number, its row, and its first token there.
struct RingSpot {
  int n, b, v;

  ATTNKIT_DEVICE RingSpot(const SampleParams& p, int first) : n(first), b(first / p.blocks), v((first - b * p.blocks) * kBlock) {}
  ATTNKIT_DEVICE void advance(const SampleParams& p) {
    n += kRingWarps, v += kRingWarps * kBlock;
    while (v >= p.blocks * kBlock) v -= p.blocks * kBlock, ++b;
  }
};

// Where the next piece of a block lies, and how many bytes of the row from there on bulk copies may bring.
struct RingSource {
  const char* at;
  int left;

  ATTNKIT_DEVICE RingSource(const SampleParams& p, const RingSpot& spot) {
    const char* const row = p.logits + spot.b * p.logits_b;
    at = row + static_cast<i64>(spot.v) * 4;
    left = (copied_tokens<kF32>(row, p.V) - spot.v) * 4;
  }
};

// A score that the CTA has reached in a row. A group's sum is at most 16 times its largest; E >= u.
struct RingFloor {
  u32 key = 0;
  float shift = -negative_infinity();  // a group may win: u <= 2^(peak scale + shift)

  ATTNKIT_DEVICE void set(u32 k) {
    const float score = order_value(k);
    key = k;
    shift = k == high_word(kNaNSeen) ? negative_infinity() : (fabsf(score) * 1e-6f + 2e-3f - score) * kLog2e + 4.0f;
  }
};

// One warp's part in it.
struct Ring {
  const SampleParams& p;
  RingShared& s;
  const int lane, warp, first, end;  // first, end: blocks of the CTA
  const u32 slots, barriers;

  ATTNKIT_DEVICE Ring(const SampleParams& p, RingShared& s, int first, int end)
      : p(p), s(s), lane(lane_id()), warp(threadIdx.x / 32), first(first), end(end), slots(smem_address(s.slots[warp])),
        barriers(smem_address(s.barriers[warp])) {}

  ATTNKIT_DEVICE int place_of(int b) const { return b - first / p.blocks; }
  ATTNKIT_DEVICE RingRow& row_of(int b) const { return reinterpret_cast<RingRow*>(&s + 1)[place_of(b)]; }

  // ---- reading ----

  // A piece into its slot. All lanes have read what was there.
  ATTNKIT_DEVICE void ask(RingSource& from, int slot) const {
    if (elect_one()) {
      const int bytes = max(0, min(from.left, kPieceBytes));
      mbarrier_arrive_expect(barriers + slot * 8, bytes);
      if (bytes != 0) bulk_load(slots + slot * kPieceBytes, from.at, bytes, barriers + slot * 8);
    }
    from.at += kPieceBytes, from.left -= kPieceBytes;
  }

  // What bulk copies do not bring, to where it belongs: the end of a row, rows at odd addresses.
  ATTNKIT_DEVICE void patch(const char* row, int v, u32 slot) const {
    const int copied = copied_tokens<kF32>(row, p.V);
    Raw<kF32> raw[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (v + c * kChunk + 4 > copied) raw[c] = load_four_guarded<kF32>(row, v + c * kChunk, p.V);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (v + c * kChunk + 4 > copied) store_raw(slot + c * kChunk * 4, raw[c]);
    }
    fence_async_shared();  // before the slot's next copy
    __syncwarp();
  }

  // ---- choosing ----

  // The CTA's best of the row so far. Lanes that read at different times may differ.
  ATTNKIT_DEVICE static u64 reached(const RingRow& row) {
    u64 x;
    asm volatile("ld.volatile.shared.b64 %0, [%1];" : "=l"(x) : "r"(smem_address(&row.best)));
    return x;
  }
  ATTNKIT_DEVICE static void raise(RingRow& row, u64 top) {
    if (elect_one()) asm volatile("red.shared.max.u64 [%0], %1;" ::"r"(smem_address(&row.best)), "l"(top) : "memory");
  }

  // The largest logit, of equals the lowest id; v: the lane's first token.
  ATTNKIT_DEVICE static void largest(RingRow& row, const Raw<kF32> (&raw)[4], int v) {
    const float peak = peak_of<kF32>(raw), most = fminf(peak, kF32Max);
    const u64 hope = peak != peak ? kNaNSeen : peak > negative_infinity() ? pack_best(most, v) : 0;
    if (!__any_sync(0xffffffffu, hope > reached(row))) return;
    int id = v;
#pragma unroll
    for (int i = 15; i >= 0; --i) id = fminf(__uint_as_float(raw[i / 4].w[i % 4]), kF32Max) == most ? v + i / 4 * kChunk + i % 4 : id;
    raise(row, warp_max(hope == kNaNSeen || hope == 0 ? hope : pack_best(most, id)));
  }

  // As try_group. The logits of a group that leads are kept.
  ATTNKIT_DEVICE void arrival(RingRow& row, RingKept* kept, RingFloor& floor, float scale, const Raw<kF32> (&raw)[4], int group, u32 word) const {
    const float peak = peak_of<kF32>(raw);
    const u64 now = reached(row);
    if (high_word(now) != floor.key) floor.set(high_word(now));
    const bool hope = !(Draw::one_and(word) > 1.0f + exp2_fast(__fmaf_rn(peak, scale, floor.shift)));
    if (!__any_sync(0xffffffffu, hope)) return;
    const RowOptions o = options(row);
    const float base = peak > negative_infinity() ? fminf(peak, kF32Max) : 0.0f;
    float sums[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c] += exp2_fast((fminf(__uint_as_float(raw[c].w[i]), kF32Max) - base) * scale);
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const float score = noisy(__fadd_rn(warm(base, o), __fmul_rn(log2_fast(sum), kLn2)), word);
    const u64 mine = peak != peak ? kNaNSeen : score > negative_infinity() ? pack_best(score, group * 16) : 0;
    if (!__any_sync(0xffffffffu, mine > now)) return;
    const u64 top = warp_max(mine);
    raise(row, top);
    if (mine == top && kept != nullptr) {
#pragma unroll
      for (int c = 0; c < 4; ++c) store_raw(smem_address(&kept->chunks[c]), raw[c]);
      kept->group = group;
    }
  }

  ATTNKIT_DEVICE static RowOptions options(const RingRow& row) {
    RowOptions o;
    o.t = row.t, o.rt = row.rt, o.tempered = o.t != 1.0f;
    return o;
  }

  // Which token of the row's group: its logits from what its warp has kept, or from memory. Whole warps.
  ATTNKIT_DEVICE int choose(const RingRow& row, int b, int group) const {
    const RowOptions o = options(row);
    const RingKept* const kept = s.kept[min(place_of(b), kKeptRows - 1)];
    const bool mine = place_of(b) < kKeptRows && lane < kRingWarps && kept[lane % kRingWarps].group == group;
    const u32 holders = __ballot_sync(0xffffffffu, mine);
    float four[4], unused;
    if (holders != 0) {
      widen_four<kF32>(load_raw(smem_address(&kept[__ffs(holders) - 1].chunks[lane & 3])), four);
    } else {
      load_chunk<kF32, false>(four, row_pointers<kF32>(p, b), o, first_of_group(group) + (lane & 3) * kChunk, p.V);
    }
    return choose_inside(four, group, row.seed, row.offset, o, unused);
  }

  // ---- a row's end ----

  // ``blocks`` of the CTA's are done by this warp; ``seen``: what was in ``state`` some time ago. The last warp goes on.
  ATTNKIT_DEVICE void leave(int b, int blocks, u64 seen) const {
    RingRow& row = row_of(b);
    const int share = min(end, (b + 1) * p.blocks) - max(first, b * p.blocks);
    int old = 0;
    __syncwarp();
    if (lane == 0) asm volatile("atom.acq_rel.cta.shared.add.s32 %0, [%1], %2;" : "=r"(old) : "r"(smem_address(&row.done)), "r"(blocks) : "memory");
    old = __shfl_sync(0xffffffffu, old, 0);
    if (old + blocks != share) return;
    u64 best = reached(row);
    if (best != 0 && best != kNaNSeen && row.cold == 0) {
      const int group = best_id(best) / 16, at = choose(row, b, group) - first_of_group(group);
      best -= static_cast<u32>(at / kChunk * 4 + at % 4);
    }
    if (lane == 0) meet(b, share, best, row.cold != 0, seen);
    __syncwarp();
  }

  // The CTAs of a row: whoever finds all others there writes. Nobody waits: who fails to add his part has been told another's.
  ATTNKIT_DEVICE void meet(int b, int share, u64 best, bool cold, u64 seen) const {
    u64* const at = reinterpret_cast<u64*>(p.state + 4 * b);
    const u64 mine = pack_met(best, share);
#pragma unroll 1
    while (share < p.blocks) {
      const u64 all = max(mine & ~kMetBlocks, seen & ~kMetBlocks) | ((mine + seen) & kMetBlocks);
      if ((all & kMetBlocks) == p.blocks) {
        *at = 0;  // nobody else comes
        best = unpack_met(all & ~kMetBlocks);
        break;
      }
      const u64 old = atomicCAS(at, seen, all);
      if (old == seen) return;
      seen = old;
    }
    const bool good = best != 0 && best != kNaNSeen;
    const int id = best_id(best), inside = id % 16;
    const int drawn = first_of_group(id / 16) + inside / 4 * kChunk + inside % 4;
    p.tokens[b] = good ? (cold ? id : drawn) : 0;
    p.valid[b] = good;
  }

  // ---- all of it ----

  // A block; ``ahead`` is the warp's next.
  ATTNKIT_DEVICE void block(const RingSpot& at, const RingSpot& ahead, RingSource& from, RingFloor& floor, u32& parity) const {
    const char* const logits = p.logits + at.b * p.logits_b;
    const bool whole = at.v + kBlock <= p.V && (reinterpret_cast<u64>(logits) & 15) == 0;
    RingRow& row = row_of(at.b);
    RingKept* const kept = place_of(at.b) < kKeptRows ? &s.kept[place_of(at.b)][warp] : nullptr;
    const bool cold = row.cold != 0;
    const float scale = row.scale;
    u32 w[4] = {};
    if (!cold) philox_words(row.seed, row.offset, kOfGroups, static_cast<u32>(at.v / kBlock) * 32 + lane, w);
    int group = at.v / 16 + lane, v = at.v + lane * 4;
#pragma unroll 1
    for (int u = 0; u < 4; ++u, group += 32, v += kPiece) {
      const int slot = u % kRingSlots;
      const u32 here = slots + slot * kPieceBytes + lane * 16;
      if (u == 4 - kRingSlots) from = RingSource(p, ahead);
      mbarrier_wait(barriers + slot * 8, parity);
      if (slot == kRingSlots - 1) parity ^= 1;
      if (!whole) patch(logits, v, here);
      Raw<kF32> raw[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) raw[c] = load_raw(here + c * kChunk * 4);
      __syncwarp();
      if (u < 4 - kRingSlots || ahead.n < end) ask(from, slot);
      if (cold) {
        largest(row, raw, v);
      } else {
        arrival(row, kept, floor, scale, raw, group, w[0]);
      }
      w[0] = w[1], w[1] = w[2], w[2] = w[3];
    }
  }

  ATTNKIT_DEVICE void run(RingSpot at, RingSource from) const {
    int taken = 0;
    u32 parity = 0;
    RingFloor floor;
#pragma unroll 1
    while (at.n < end) {
      RingSpot next = at;
      next.advance(p);
      const bool last = next.b != at.b || next.n >= end;
      u64 seen = 0;
      if (last) seen = read_relaxed(reinterpret_cast<const u64*>(p.state + 4 * at.b));
      block(at, next, from, floor, parity);
      ++taken;
      if (last) {
        leave(at.b, taken, seen);
        taken = 0;
        floor = RingFloor();
      }
      at = next;
    }
  }
};

ATTNKIT_DEVICE void sample_ring(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  RingShared& s = *reinterpret_cast<RingShared*>(memory);
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int first = static_cast<int>(all * blockIdx.x / gridDim.x), end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  const int b = first / p.blocks, rows = (end - 1) / p.blocks - b + 1;
  const Ring ring(p, s, first, end);
  const RingSpot at(p, first + ring.warp);
  RingSource from(p, at);
  if (ring.lane < kRingSlots) mbarrier_init(ring.barriers + ring.lane * 8, 1);
  mbarrier_init_fence();
  if (threadIdx.x < kKeptRows * kRingWarps) s.kept[0][threadIdx.x].group = -1;
  // L2 may be asked before the grid before has ended: it stays coherent with who may still write.
  if (at.n < end && from.left > 0 && elect_one()) prefetch_bulk(from.at, min(from.left, 4 * kPieceBytes));
  if (static_cast<int>(threadIdx.x) < rows) {
    prefetch_l2(p.seeds + b + threadIdx.x);
    if (p.temperature != nullptr) prefetch_l2(p.temperature + b + threadIdx.x);
  }
  wait_for_previous_grid();
  launch_dependents();
  __syncwarp();
  if (at.n < end) {
#pragma unroll
    for (int u = 0; u < kRingSlots; ++u) ring.ask(from, u);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < rows; i += kRingThreads) {
    const RawOptions raw(p, b + i);
    const RowOptions o = raw.use();
    ring.row_of(b + i) = {0, static_cast<u64>(raw.seed), static_cast<u64>(raw.offset), o.t, o.rt, o.rt * kLog2e, o.cold, 0, 0};
  }
  __syncthreads();
  ring.run(at, from);
}

}  // namespace attnkit::sampling
