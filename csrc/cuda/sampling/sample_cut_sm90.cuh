// Top-p and min-p without top-k: one read of the logits by a cluster a row. While they stream by, each CTA lists the tokens that
// may be kept and the groups that arrive early, in its shared memory (sample_share_sm90.cuh); from those the token is chosen
// (sample_choose_sm90.cuh).
#pragma once
#include "sample_choose_sm90.cuh"

namespace attnkit::sampling {

// A row that nothing holds back, or a greedy one, from the best of its CTAs.
template <int Type>
ATTNKIT_DEVICE void draw_plainly(const SampleParams& p, CutShared& s, const Share& h, const RowOptions& o, const Best& mine) {
  const u64 own = warp_max(mine.packed());
  if (lane_id() == 0) s.sums[threadIdx.x / 32] = own;
  __syncthreads();
  cluster_wait();
  u64 best = 0;
#pragma unroll
  for (int i = 0; i < kSampleWarps; ++i) best = max(best, s.sums[i]);
  if (threadIdx.x == 0) store_remote(remote_address(&s.bests[h.rank], 0), best);
  cluster_sync();
  if (h.rank != 0 || threadIdx.x >= 32) return;
  for (int i = 0; i < h.size; ++i) best = max(best, s.bests[i]);
  const bool good = best != 0 && best != kNaNSeen;
  int token = good ? best_id(best) : 0;
  if (good && !o.cold) {
    float x[4], chosen;
    load_chunk<Type, false>(x, row_pointers<Type>(p, h.b), o, first_of_group(token) + static_cast<int>(lane_id() & 3) * kChunk, p.V);
    token = choose_inside(x, token, h.seed, h.offset, o, chosen);
  }
  if (lane_id() == 0) p.tokens[h.b] = token, p.valid[h.b] = good;
}

// Two tokens of each of a lane's groups in a warp's first block, its largest peak and the smallest (see Listing::find_bound).
template <int Type>
ATTNKIT_DEVICE void stand_for(const SampleParams& p, const Spot<Type>& spot, bool some, const Raw<Type> (&raw)[4][4],
                              const RowPointers& r, const RowOptions& o, float (&v)[8], float& most, float& least) {
  most = negative_infinity(), least = -negative_infinity();
#pragma unroll
  for (int u = 0; u < 8; ++u) v[u] = negative_infinity();
  if (spot.whole) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Raw<Type>(&four)[4] = raw[u];
      float x[4], y[4];
      widen_four<Type>(four[0], x);
      widen_four<Type>(four[2], y);
      v[u] = x[0], v[4 + u] = y[0];
      const float peak = peak_of<Type>(four);
      most = fmaxf(most, peak);
      if (peak > negative_infinity()) least = fminf(least, peak);
    }
  } else if (some) {
    // The first piece alone.
    Raw<Type> held[4];
    load_piece<Type, false>(held, r, o, spot.v + static_cast<int>(lane_id()) * 4, p.V);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float x[4];
      widen_four<Type>(held[u], x);
      v[u] = x[0], v[4 + u] = x[2];
    }
    const float peak = peak_of<Type>(held);
    most = fmaxf(most, peak);
    if (peak > negative_infinity()) least = peak;
  }
}

template <int Type>
ATTNKIT_DEVICE void sample_cut(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  CutShared& s = *reinterpret_cast<CutShared*>(memory);
  cluster_arrive();
  Share h;
  h.size = static_cast<int>(cluster_size()), h.rank = static_cast<int>(cluster_rank());
  h.b = static_cast<int>(blockIdx.x) / h.size;
  const int warp = static_cast<int>(threadIdx.x / 32), warps = h.size * kSampleWarps, mine = h.rank * kSampleWarps + warp;
  h.first = p.blocks * (h.rank * kSampleWarps) / warps, h.last = p.blocks * ((h.rank + 1) * kSampleWarps) / warps;
  h.from = p.blocks * mine / warps, h.end = p.blocks * (mine + 1) / warps;
  s.guess[threadIdx.x] = 0;
  if (threadIdx.x < 3 * kProbes) s.above[0][threadIdx.x] = 0;
  if (threadIdx.x == 0) s.n_early = s.n_arrivals = 0, s.reached = 0, s.mass = 0.0f;
  wait_for_previous_grid();
  launch_dependents();
  const RawOptions options(p, h.b);
  h.top_p = option(p.top_p, p.top_p_value, h.b);
  h.min_p = option(p.min_p, p.min_p_value, h.b);
  const int all = h.b * p.blocks, end = all + h.end;
  const Spot<Type> spot(p, all + h.from, end);
  Raw<Type> raw[4][4];
  if (spot.whole) {
#pragma unroll
    for (int u = 0; u < 4; ++u) spot.load(raw[u], u);
  }
  const RowOptions o = options.use();
  const RowPointers r = row_pointers<Type>(p, h.b);
  h.seed = static_cast<u64>(options.seed), h.offset = static_cast<u64>(options.offset);
  h.log_min_p = h.min_p > 0.0f ? logf(h.min_p) : negative_infinity();
  if (h.plain() || o.cold) {
    __syncthreads();
    Drawing drawing(s, h, o);
    stream_share<Type>(p, drawing, spot, end, raw, r, o);
    draw_plainly<Type>(p, s, h, o, drawing.best);
    return;
  }
  float2* const list = reinterpret_cast<float2*>(memory + sizeof(CutShared));
  Listing<Type> listing(p, s, list, h, o);
  float v[8], most, least;
  stand_for<Type>(p, spot, h.from < h.end, raw, r, o, v, most, least);
  __syncthreads();
  listing.find_bound(v, most, least);
  stream_share<Type>(p, listing, spot, end, raw, r, o);
  CutRow<Type> row{p, s, list, h, o};
  row.meet(listing);
  if (row.nan || !(row.most > negative_infinity())) {
    row.write(0, false);
    return;
  }
  row.choose();
}

}  // namespace attnkit::sampling
