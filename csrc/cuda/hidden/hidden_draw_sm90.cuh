// Draws from logits that a multiplying CTA has in shared memory, a tile at a time. Eight lanes share a row: each takes one
// group of 16 tokens of the tile (sample_group_sm90.cuh), and the row's best so far stays in their registers.
#pragma once
#include "../sampling/sample_group_sm90.cuh"

namespace attnkit::hidden {

using namespace attnkit::sampling;

// A tile is 4 stretches of 32 tokens, one of each chunk of a piece: 8 whole groups.
constexpr int kTile = 128, kStretch = kTile / 4;
constexpr int kPitch = kTile + 4;  // floats from row to row of a tile's logits: neither stores nor loads meet in a bank

ATTNKIT_DEVICE int first_of_tile(int tile) { return tile / 4 * kPiece + tile % 4 * kStretch; }

// Which of a group's tokens, in the order of their ids; ``most``: the largest of its logits. As choose_inside, by one thread.
ATTNKIT_DEVICE int choose_of_sixteen(const float (&x)[4][4], float most, int group, u64 seed, u64 offset, float scale) {
  float to[4][4], all = 0.0f, before[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[c][i] = sum = __fadd_rn(sum, exp2_fast((fminf(x[c][i], kF32Max) - most) * scale));
    before[c] = all;
    all = __fadd_rn(all, sum);
  }
  u32 w[4];
  philox_words(seed, offset, kInside, static_cast<u32>(group), w);
  const float reach = share_of(w[0], all);
  int at = 0;
#pragma unroll
  for (int i = 15; i >= 0; --i) at = __fadd_rn(before[i / 4], to[i / 4][i % 4]) > reach ? i : at;
  return at;
}

// One of the eight lanes of row ``b``.
struct RowDraw {
  int b;
  RowOptions o;
  u64 seed, offset;
  u64 best = 0;  // of all eight: score and token (greedy), or score, group and which of its 16

  ATTNKIT_DEVICE void begin(const SampleParams& p, int thread) {
    b = thread / 8;
    const RawOptions raw(p, there(p) ? b : 0);
    o = raw.use();
    seed = static_cast<u64>(raw.seed), offset = static_cast<u64>(raw.offset);
  }

  static ATTNKIT_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 8; }
  ATTNKIT_DEVICE bool there(const SampleParams& p) const { return b < p.B; }

  // The lane's group, -inf past the end of the row, after penalties.
  ATTNKIT_DEVICE void load(const SampleParams& p, float (&x)[4][4], u32 logits, int first, bool extras) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4 four = load_shared<float4>(logits + (b * kPitch + c * kStretch + lane() * 4) * 4);
      const int v = first + c * kChunk;
      x[c][0] = v < p.V ? four.x : negative_infinity(), x[c][1] = v + 1 < p.V ? four.y : negative_infinity();
      x[c][2] = v + 2 < p.V ? four.z : negative_infinity(), x[c][3] = v + 3 < p.V ? four.w : negative_infinity();
    }
    if (!extras || !there(p)) return;
    const RowPointers r = row_pointers<kF32>(p, b);
    Extras e[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) load_extras(e[c], r, first + c * kChunk, p.V);
#pragma unroll
    for (int c = 0; c < 4; ++c) penalise(x[c], e[c], r, o, first + c * kChunk, p.V);
  }

  ATTNKIT_DEVICE static u64 largest(const float (&x)[4][4], float peak, int first) {
    const float most = fminf(peak, kF32Max);
    int id = 0;
#pragma unroll
    for (int i = 15; i >= 0; --i) id = fminf(x[i / 4][i % 4], kF32Max) == most ? first + i / 4 * kChunk + i % 4 : id;
    return most > negative_infinity() ? pack_best(most, id) : 0;
  }

  // As try_group.
  ATTNKIT_DEVICE u64 arrival(const float (&x)[4][4], float base, int group) const {
    u32 w[4];
    philox_words(seed, offset, kOfGroups, static_cast<u32>(group / 128 * 32 + group % 32), w);
    const float scale = o.rt * kLog2e;
    float sums[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c] += exp2_fast((fminf(x[c][i], kF32Max) - base) * scale);
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const float score = noisy(__fadd_rn(warm(base, o), __fmul_rn(log2_fast(sum), kLn2)), one_of(w, group / 32));
    return score > negative_infinity() ? pack_best(score, group * 16) : 0;
  }

  // The largest of the row's eight.
  ATTNKIT_DEVICE static u64 of_eight(u64 x) {
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
      const u64 other = __shfl_xor_sync(0xffffffffu, x, d);
      x = other > x ? other : x;
    }
    return x;
  }

  // A tile's logits, at ``logits`` in shared memory. Whole warps.
  ATTNKIT_DEVICE void tile(const SampleParams& p, int tile, u32 logits, bool extras) {
    const int first = first_of_tile(tile) + lane() * 4, group = first / kPiece * 32 + first % kChunk / 4;
    float x[4][4];
    load(p, x, logits, first, extras);
    float peak = x[0][0];
#pragma unroll
    for (int i = 1; i < 16; ++i) peak = max_nan(peak, x[i / 4][i % 4]);
    const float base = peak > negative_infinity() ? fminf(peak, kF32Max) : 0.0f;
    u64 mine = peak != peak ? kNaNSeen : o.cold ? largest(x, peak, first) : arrival(x, base, group);
    const u64 top = of_eight(mine);
    const bool mine_leads = mine == top && top > best;
    if (mine_leads && !o.cold && top != kNaNSeen) mine -= choose_of_sixteen(x, base, group, seed, offset, o.rt * kLog2e);
    best = of_eight(mine_leads ? mine : best);
  }

  // CTAs meet in 16 bytes a row of ``state``, zero between launches: the best, and how many have arrived. The last one writes.
  ATTNKIT_DEVICE void finish(const SampleParams& p, int ctas) {
    if (!there(p) || lane() != 0) return;
    u64* const at = reinterpret_cast<u64*>(p.state + 4 * b);
    int* const arrived = p.state + 4 * b + 2;
    if (best != 0) atomicMax(at, best);
    if (add_release(arrived, 1) + 1 != ctas) return;
    const u64 top = atomicExch(at, 0ull);
    *arrived = 0;
    const bool good = top != 0 && top != kNaNSeen;
    const int id = best_id(top), inside = id % 16;
    const int drawn = first_of_group(id / 16) + inside / 4 * kChunk + inside % 4;
    p.tokens[b] = good ? (o.cold ? id : drawn) : 0;
    p.valid[b] = good;
  }
};

}  // namespace attnkit::hidden
