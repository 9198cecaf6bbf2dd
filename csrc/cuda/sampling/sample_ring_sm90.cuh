// Greedy choice and draws from all tokens of many rows of float32, without penalties: one read of the logits by bulk copies
// into shared memory. Each of many warps has a short ring there, and asks for the piece after next as soon as it holds one in
// registers: more warps hide more arithmetic, and little needs to be under way.
#pragma once
#include "sample_lead_sm90.cuh"

namespace attnkit::sampling {

// One CTA a multiprocessor; pieces that a warp has under way.
constexpr int kRingWarps = 16, kRingThreads = 32 * kRingWarps, kRingSlots = 2;
constexpr int kPieceBytes = kPiece * 4;

// The logits of the group that a warp last brought to the lead in a row: a place for each warp in each of a CTA's first rows.
struct RingKept {
  Raw<kF32> chunks[4];
  int group, unused[3];
};
constexpr int kKeptRows = 4;

// In front of the rows, as many as the CTA has.
struct RingShared {
  char slots[kRingWarps][kRingSlots][kPieceBytes];
  u64 barriers[kRingWarps][kRingSlots];
  RingKept kept[kKeptRows][kRingWarps];
};
static_assert(sizeof(RingShared) == 70912 && sizeof(LeadRow) == 128, "RING_BYTES and LEAD_ROW_BYTES");

ATTNKIT_DEVICE void prefetch_bulk(const void* p, u32 bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes)); }

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
struct Ring : Lead<kF32, kRingWarps, RingShared> {
  const u32 slots, barriers;

  ATTNKIT_DEVICE Ring(const SampleParams& p, RingShared& s, const LeadShare& share)
      : Lead(p, s, share), slots(smem_address(s.slots[warp])), barriers(smem_address(s.barriers[warp])) {}

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

  ATTNKIT_DEVICE void keep_nothing() const {
    if (threadIdx.x < kKeptRows * kRingWarps) s.kept[0][threadIdx.x].group = -1;
  }
  ATTNKIT_DEVICE RingKept* kept_of(int b) const { return place_of(b) < kKeptRows ? &s.kept[place_of(b)][warp] : nullptr; }

  // The largest logit, of equals the lowest id; v: the lane's first token.
  ATTNKIT_DEVICE static void largest(LeadRow& row, const Raw<kF32> (&raw)[4], int v) {
    const float peak = peak_of<kF32>(raw), most = fminf(peak, kF32Max);
    const u64 hope = peak != peak ? kNaNSeen : peak > negative_infinity() ? pack_best(most, v) : 0;
    if (!__any_sync(0xffffffffu, hope > reached(row))) return;
    int id = v;
#pragma unroll
    for (int i = 15; i >= 0; --i) id = fminf(__uint_as_float(raw[i / 4].w[i % 4]), kF32Max) == most ? v + i / 4 * kChunk + i % 4 : id;
    raise(row, warp_max(hope == kNaNSeen || hope == 0 ? hope : pack_best(most, id)));
  }

  // As try_group. The logits of a group that leads are kept.
  ATTNKIT_DEVICE void arrival(LeadRow& row, RingKept* kept, RingFloor& floor, float scale, const Raw<kF32> (&raw)[4], int group, u32 word) const {
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

  // A row's best with the token: its group's logits from what a warp has kept, or from memory. Whole warps.
  ATTNKIT_DEVICE u64 choose(int b, u64 best) const {
    const LeadRow& row = row_of(b);
    const RowOptions o = options(row);
    const int group = best_id(best) / 16;
    const RingKept* const of_row = s.kept[min(place_of(b), kKeptRows - 1)];
    const bool mine = place_of(b) < kKeptRows && lane < kRingWarps && of_row[lane % kRingWarps].group == group;
    const u32 holders = __ballot_sync(0xffffffffu, mine);
    float four[4], unused;
    if (holders != 0) {
      widen_four<kF32>(load_raw<kF32>(smem_address(&of_row[__ffs(holders) - 1].chunks[lane & 3])), four);
    } else {
      load_chunk<kF32, false>(four, row_pointers<kF32>(p, b), o, first_of_group(group) + (lane & 3) * kChunk, p.V);
    }
    return with_token(best, choose_inside(four, group, row.seed, row.offset, o, unused));
  }

  // ---- all of it ----

  // A block; ``ahead`` is the warp's next.
  ATTNKIT_DEVICE void block(const RingSpot& at, const RingSpot& ahead, RingSource& from, RingFloor& floor, u32& parity) const {
    const char* const logits = p.logits + at.b * p.logits_b;
    const bool whole = at.v + kBlock <= p.V && (reinterpret_cast<u64>(logits) & 15) == 0;
    LeadRow& row = row_of(at.b);
    RingKept* const kept = kept_of(at.b);
    const bool cold = row.cold != 0;
    const float scale = row.scale;
    u32 w[4] = {};
    if (!cold) row.groups.words(static_cast<u32>(at.v / kBlock) * 32 + lane, w);
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
      for (int c = 0; c < 4; ++c) raw[c] = load_raw<kF32>(here + c * kChunk * 4);
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
      if (last) seen = met(at.b);
      block(at, next, from, floor, parity);
      ++taken;
      if (last) {
        leave(at.b, taken, [&] { return seen; }, [&](u64 best) { return choose(at.b, best); });
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
  const LeadShare share(p);
  const Ring ring(p, s, share);
  const RingSpot at(p, share.first + ring.warp);
  RingSource from(p, at);
  if (ring.lane < kRingSlots) mbarrier_init(ring.barriers + ring.lane * 8, 1);
  mbarrier_init_fence();
  ring.keep_nothing();
  if (at.n < share.end && from.left > 0 && elect_one()) prefetch_bulk(from.at, min(from.left, 4 * kPieceBytes));
  ring.ask_options();
  wait_for_previous_grid();
  launch_dependents();
  __syncwarp();
  if (at.n < share.end) {
#pragma unroll
    for (int u = 0; u < kRingSlots; ++u) ring.ask(from, u);
  }
  ring.open_rows();
  __syncthreads();
  ring.run(at, from);
}

}  // namespace attnkit::sampling
