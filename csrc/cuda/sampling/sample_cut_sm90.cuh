// Top-p and min-p without top-k: one read of the logits by a cluster a row. While they stream by, each CTA lists the tokens that
// may be kept, in its shared memory (sample_share_sm90.cuh); from the lists the token is chosen (sample_choose_sm90.cuh). Rows that
// the lists do not decide, flat ones mostly, are marked and left to the filter kernel (sample_filter_sm90.cuh), which follows. Top-k
// is understood too, but short top-k has kernels of its own (sample_topk_sm90.cuh), and greedy rows are all of it that comes.
#pragma once
#include "sample_choose_sm90.cuh"

namespace attnkit::sampling {

// A row that nothing holds back, from the best of its CTAs' groups.
template <int Type, bool Penalised>
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
  int token = 0;
  if (good) {
    float x[4], chosen;
    token = best_id(best);
    load_chunk<Type, Penalised>(x, row_pointers<Type>(p, h.b), o, first_of_group(token) + static_cast<int>(lane_id() & 3) * kChunk, p.V);
    token = choose_inside(x, token, h.seed, h.offset, o, chosen);
  }
  if (lane_id() == 0) p.tokens[h.b] = token, p.valid[h.b] = good, p.state[h.b] = 0;
}

// Values that stand for a warp's first block, its largest peak and the smallest (see Listing::find_bound).
template <int Type, bool Penalised>
ATTNKIT_DEVICE void stand_for(const SampleParams& p, const Spot<Type>& spot, bool some, const Raw<Type> (&raw)[Penalised ? 1 : 4][4],
                              const RowPointers& r, const RowOptions& o, bool peaks, float (&v)[8], float& most, float& least) {
  constexpr int kHeldType = Penalised ? kF32 : Type;
  most = negative_infinity();
#pragma unroll
  for (int u = 0; u < 8; ++u) v[u] = negative_infinity();
  if (!Penalised && spot.whole) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Raw<Type>(&four)[4] = raw[Penalised ? 0 : u];
      float x[4], y[4];
      widen_four<Type>(four[0], x);
      widen_four<Type>(four[2], y);
      const float peak = peak_of<Type>(four);
      v[u] = peaks ? peak : x[0];
      if (!peaks) v[4 + u] = y[0];
      most = fmaxf(most, peak);
      if (peak > negative_infinity()) least = fminf(least, peak);
    }
  } else if (some) {
    // The first piece alone.
    Raw<kHeldType> held[4];
    load_piece<Type, Penalised>(held, r, o, spot.v + static_cast<int>(lane_id()) * 4, p.V);
    const float peak = peak_of<kHeldType>(held);
    if (peaks) v[0] = peak;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float x[4];
      widen_four<kHeldType>(held[u], x);
      if (!peaks) v[u] = x[0], v[4 + u] = x[2];
    }
    most = fmaxf(most, peak);
    if (peak > negative_infinity()) least = peak;
  }
}

template <int Type, bool Penalised>
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
  reinterpret_cast<uint4*>(s.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  s.guess[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    s.n = s.n_near = 0;
    s.reached = 0;
    s.pick = Pick{kBins, 0, 0};
  }
  wait_for_previous_grid();
  launch_dependents();
  const RawOptions options(p, h.b);
  const i64 k = option(p.top_k, p.top_k_value, h.b);
  h.top_p = option(p.top_p, p.top_p_value, h.b);
  h.min_p = option(p.min_p, p.min_p_value, h.b);
  const int all = h.b * p.blocks, end = all + h.end;
  const Spot<Type> spot(p, all + h.from, end);
  Raw<Type> raw[Penalised ? 1 : 4][4];
  if (!Penalised && spot.whole) {
#pragma unroll
    for (int u = 0; u < 4; ++u) spot.load(raw[Penalised ? 0 : u], u);
  }
  const RowOptions o = options.use();
  const RowPointers r = row_pointers<Type>(p, h.b);
  h.k = k > 0 && k < p.V ? static_cast<u32>(k) : 0;
  h.seed = static_cast<u64>(options.seed), h.offset = static_cast<u64>(options.offset);
  if (o.cold) h.k = 1, h.top_p = 1.0f, h.min_p = 0.0f;
  h.log_min_p = h.min_p > 0.0f ? logf(h.min_p) : negative_infinity();
  if (h.plain()) {
    __syncthreads();
    Drawing drawing(s, h, o);
    stream_share<Type, Penalised>(p, drawing, spot, end, raw, r, o);
    draw_plainly<Type, Penalised>(p, s, h, o, drawing.best);
    return;
  }
  float2* const list = reinterpret_cast<float2*>(memory + sizeof(CutShared));
  Listing<Type, Penalised> listing(p, s, list, h, o);
  float v[8], most, least = -negative_infinity();
  stand_for<Type, Penalised>(p, spot, h.from < h.end, raw, r, o, listing.short_k(), v, most, least);
  __syncthreads();
  listing.find_bound(v, most, least);
  if (!listing.hopeless) stream_share<Type, Penalised>(p, listing, spot, end, raw, r, o);
  CutRow<Type, Penalised> row{p, s, list, h, o};
  row.meet(listing);
  if (!row.full && (row.nan || !(row.most > negative_infinity()))) {
    row.write(0, false);
    return;
  }
  if (row.choose() == kUndecided && h.rank == 0 && threadIdx.x == 0) p.state[h.b] = 1;
}

}  // namespace attnkit::sampling
