// Who leads in a row, for kernels whose CTAs have blocks of few rows each: what a CTA's warps find meets in shared memory; the CTAs
// that share a row meet in one 64-bit word of ``state``. Blocks of all rows are dealt out evenly to CTAs.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

// A row of a CTA: what has been reached (as pack_best: a score, a group and which of its 16; greedy: a logit and its token), the
// row's options, how many of the CTA's blocks of it are done, and what the words of its groups have in common.
struct LeadRow {
  u64 best, seed, offset;
  float t, rt, scale;  // scale: rt log2(e)
  int cold, done, unused;
  Philox groups;
};

// A packed best of a group, and which of the group's tokens it is.
ATTNKIT_DEVICE u64 with_token(u64 best, int token) {
  const int at = token - first_of_group(best_id(best) / 16);
  return best - static_cast<u32>(at / kChunk * 4 + at % 4);
}

// Logarithms of what may lead are counted in the last bits of a float: 2^23 an octave. The bits of a whole number as a float
// then are its logarithm, along a straight line from each power of two to the next: never more, and less by 0.09 octaves at
// the most. A draw hopes for peak scale - these bits of its word: at least the logarithm of 2^-159 e^score, if its group's sum
// is its largest alone. What a greedy row hopes for is the peak itself.
constexpr float kOctave = 8388608.0f;

ATTNKIT_DEVICE float log_of(u32 word) { return __uint2float_rn(__float_as_uint(__uint2float_rn(word))); }
ATTNKIT_DEVICE float hope_of(float peak, float scale, float log) { return __fmaf_rn(peak, scale, -log); }

// What a group must hope for at the least: a group's sum is at most 16 times its largest; E >= u.
ATTNKIT_DEVICE float least_hope(u64 best, bool cold) {
  const float score = order_value(high_word(best)), less = __fmaf_rn(fabsf(score), -1e-6f, score);
  return cold ? score : __fmaf_rn(less, kLog2e * kOctave, -(159.0f + 4.0f + 2e-3f * kLog2e) * kOctave);
}

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

ATTNKIT_DEVICE int row_of_block(const SampleParams& p, int n) { return static_cast<int>(static_cast<u32>(n) / static_cast<u32>(p.blocks)); }

// A CTA's blocks, and the row of the first. ``room``: how many each CTA has at the least. Memory waits for this at a launch's start,
// so there is one division.
struct LeadShare {
  int first, end, row;

  ATTNKIT_DEVICE LeadShare(const SampleParams& p) {
    const int cta = static_cast<int>(blockIdx.x), more = p.B * p.blocks - p.room * static_cast<int>(gridDim.x);
    first = cta * p.room + min(cta, more), end = first + p.room + (cta < more);
    row = row_of_block(p, first);
  }
};

// One warp's part in the rows of its CTA. ``Shared`` has what its warps keep, and the rows behind it.
template <int Type, int Warps, class Shared>
struct Lead {
  const SampleParams& p;
  Shared& s;
  const int lane, warp, first, end, first_row;  // blocks of the CTA, and the row of the first

  ATTNKIT_DEVICE Lead(const SampleParams& p, Shared& s, const LeadShare& share)
      : p(p), s(s), lane(lane_id()), warp(threadIdx.x / 32), first(share.first), end(share.end), first_row(share.row) {}

  ATTNKIT_DEVICE int place_of(int b) const { return b - first_row; }
  ATTNKIT_DEVICE LeadRow& row_of(int b) const { return reinterpret_cast<LeadRow*>(&s + 1)[place_of(b)]; }

  // ---- before the first block ----

  // L2 may be asked before the grid before has ended: it stays coherent with who may still write.
  ATTNKIT_DEVICE void ask_options() const {
    const int b = first_row + static_cast<int>(threadIdx.x);
    if (b * p.blocks < end) {
      prefetch_l2(p.seeds + b);
      if (p.temperature != nullptr) prefetch_l2(p.temperature + b);
    }
  }
  ATTNKIT_DEVICE void open_rows() const {
#pragma unroll 1
    for (int b = first_row + static_cast<int>(threadIdx.x); b * p.blocks < end; b += 32 * Warps) {
      const RawOptions raw(p, b);
      const RowOptions o = raw.use();
      const u64 seed = static_cast<u64>(raw.seed), offset = static_cast<u64>(raw.offset);
      row_of(b) = {0, seed, offset, o.t, o.rt, o.rt * kLog2e, o.cold, 0, 0, Philox(seed, offset, kOfGroups)};
    }
  }

  // ---- choosing ----

  // The CTA's best of the row so far. Lanes that read at different times may differ.
  ATTNKIT_DEVICE static u64 reached(const LeadRow& row) {
    u64 x;
    asm volatile("ld.volatile.shared.b64 %0, [%1];" : "=l"(x) : "r"(smem_address(&row.best)));
    return x;
  }
  ATTNKIT_DEVICE static void raise(LeadRow& row, u64 top) {
    if (elect_one() && top > reached(row)) asm volatile("red.shared.max.u64 [%0], %1;" ::"r"(smem_address(&row.best)), "l"(top) : "memory");
  }

  ATTNKIT_DEVICE static RowOptions options(const LeadRow& row) {
    RowOptions o;
    o.t = row.t, o.rt = row.rt, o.tempered = o.t != 1.0f;
    return o;
  }

  // ---- a row's end ----

  ATTNKIT_DEVICE u64 met(int b) const { return read_relaxed(reinterpret_cast<const u64*>(p.state + 4 * b)); }

  // ``blocks`` of the CTA's are done by this warp; ``early()``: what was in ``state`` some time ago; ``choose(best)``: the same with the
  // token. The last warp goes on.
  template <class Early, class Choose>
  ATTNKIT_DEVICE void leave(int b, int blocks, Early&& early, Choose&& choose) const {
    LeadRow& row = row_of(b);
    const int share = min(end, (b + 1) * p.blocks) - max(first, b * p.blocks);
    int old = 0;
    __syncwarp();
    if (lane == 0) asm volatile("atom.acq_rel.cta.shared.add.s32 %0, [%1], %2;" : "=r"(old) : "r"(smem_address(&row.done)), "r"(blocks) : "memory");
    old = __shfl_sync(0xffffffffu, old, 0);
    if (old + blocks != share) return;
    const u64 seen = share < p.blocks ? early() : 0;
    const u64 found = reached(row), best = found != 0 && found != kNaNSeen && row.cold == 0 ? choose(found) : found;
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
};

}  // namespace attnkit::sampling
