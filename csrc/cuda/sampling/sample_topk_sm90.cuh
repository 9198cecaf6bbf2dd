// A row of a short top-k (with top-p and min-p if they come), by its peaks: as many tokens as peaks are at or above the k-th largest
// of 512 larger peaks, so only groups whose peak is can hold one of the k first: some 60 groups for k = 50. Their tokens are read
// again, ranked, and one is drawn. Where ties leave too many, the row is one of any.
#pragma once
#include "sample_any_sm90.cuh"
#include "sample_rank_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kCandidates = 512;  // tokens that are ranked, and groups they may come from

struct alignas(16) TopkShared {
  Candidate candidates[kCandidates];
  union {
    int groups[kCandidates];
    AnyShared any;
  };
  uint2 range[kTopkWarps];  // of keys
  u64 bests[kTopkWarps], enough;
  int n, n_groups, nan;  // candidates, groups; a NaN was seen

  // By all; nobody finds anything before all are here.
  ATTNKIT_DEVICE void open() {
    if (threadIdx.x == 0) n = n_groups = nan = 0;
    __syncthreads();
  }
};

// A row whose tokens have no room. A function of its own: what it keeps in registers is not the others'. ``enough``: see AnyRow.
template <int Type, bool Penalised>
__device__ __noinline__ int draw_unlisted(const SampleParams& p, AnyShared& s, int b, u32 k, float top, Between enough = Between{0, 0}) {
  const RawOptions raw(p, b);
  const TopkOptions options(p, b);
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<Type>(p, b);
  const AnyRow<Type, Penalised, false> row{p, s, r, o, static_cast<u64>(raw.seed), static_cast<u64>(raw.offset)};
  return row.draw(k, options.share, options.ratio, top, enough);
}

template <int Type, bool Penalised>
struct TopkRow {
  static constexpr int kHeld = Penalised ? kF32 : Type;
  using Peaks = Raw<kHeld>;  // of a lane's four groups of a block; 32 of them are a block's
  const SampleParams& p;
  TopkShared& s;
  const RowPointers& r;
  const RowOptions& o;
  const u32 k;
  const u64 seed, offset;
  float top = 0.0f;  // the largest logit after temperature, once there is a bound
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  // A token after temperature.
  ATTNKIT_DEVICE void append(float logit, int id) {
    const int at = atomicAdd(&s.n, 1);
    if (at < kCandidates) s.candidates[at] = Candidate{pack_best(logit, id), whole_mass(logit, top)};
  }

  // From which logit on, before temperature, there are k tokens and few more: by bisection, what k of the threads' largest peaks
  // reach. All of a CTA.
  ATTNKIT_DEVICE float find_bound(float most) {
    if (most != most) s.nan = 1;
    const u32 key = order_key(most), high_here = __reduce_max_sync(0xffffffffu, key), low_here = __reduce_min_sync(0xffffffffu, key);
    if (lane == 0) s.range[warp] = make_uint2(low_here, high_here);
    __syncthreads();
    const uint2 range = s.range[lane % kTopkWarps];
    u32 low = __reduce_min_sync(0xffffffffu, range.x), high = __reduce_max_sync(0xffffffffu, range.y);
    top = warm(order_value(high), o);
    // As many as k reach ``low``; fewer do what is above ``high``.
#pragma unroll 1
    for (int step = 0; step < 16 && low < high; ++step) {
      const u32 middle = high - (high - low) / 2;
      const u32 reach = __syncthreads_count(key >= middle);
      if (reach < k) {
        high = middle - 1;
      } else {
        low = middle;
        if (reach <= k + k / 8) break;
      }
    }
    return below(order_value(low));
  }

  // What lies within rounding of a bound may be equal to it after temperature.
  ATTNKIT_DEVICE static float below(float x) {
    const float bound = fminf(fmaxf(x, -kF32Max), kF32Max);
    return fmaxf(bound - fabsf(bound) * kRounding, -kF32Max);
  }

  // A bit for each of four that are at least ``from``.
  ATTNKIT_DEVICE static u32 reaching(const float (&x)[4], float from) {
    return (x[0] >= from ? 1u : 0u) | (x[1] >= from ? 2u : 0u) | (x[2] >= from ? 4u : 0u) | (x[3] >= from ? 8u : 0u);
  }

  // Lists the tokens from ``from`` on of groups whose peaks are at least that; they are read again. There may be no room: the counts
  // say so. ``mine``: a thread's largest peak. All of a CTA.
  ATTNKIT_DEVICE void collect(const Peaks* peaks, int n, float from, float mine) {
    // Few are found: a bit for each, then one by one.
#pragma unroll 1
    for (int i = threadIdx.x; i < n && mine >= from; i += 4 * kTopkThreads) {
      u32 found = 0;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int at = i + u * kTopkThreads;
        float x[4];
        widen_four<kHeld>(peaks[min(at, n - 1)], x);
        found |= at < n ? reaching(x, from) << 4 * u : 0;
      }
#pragma unroll 1
      for (; found != 0; found &= found - 1) {
        const int bit = __ffs(found) - 1, at = atomicAdd(&s.n_groups, 1), one = i + bit / 4 * kTopkThreads;
        if (at < kCandidates) s.groups[at] = (one / 32 * 4 + bit % 4) * 32 + one % 32;
      }
    }
    __syncthreads();
    const int groups = s.n_groups <= kCandidates ? s.n_groups : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < 4 * groups; i += kTopkThreads) {
      const int v = first_of_group(s.groups[i / 4]) + i % 4 * kChunk;
      float x[4];
      load_chunk<Type, Penalised>(x, r, o, v, p.V);
#pragma unroll 1
      for (u32 found = reaching(x, from); found != 0; found &= found - 1) {
        const int j = __ffs(found) - 1;
        append(warm(one_of(x, j), o), v + j);
      }
    }
  }

  // ---- the draw ----

  // The best of the k first candidates that top-p and min-p let pass, in thread 0.
  ATTNKIT_DEVICE u64 draw(const TopkOptions& options, int n) {
    const float least = options.ratio > 0.0f ? __fadd_rn(top, logf(options.ratio)) : -kF32Max;
    const Ranked r = rank_candidates<kTopkThreads>(s.candidates, n);
    u64 best = 0;
    const int id = r.own.id();
    if (r.is && r.before < k && r.own.logit() >= least) {
      u32 w[4];
      philox_words(seed, offset, kOfTokens, static_cast<u32>(id) >> 2, w);
      best = pack_best(noisy(r.own.logit(), one_of(w, id)), id);
    }
    if (options.share < 1.0f) {
      // What weighs as much before it leaves a token out.
      if (r.is && r.before == min(k, static_cast<u32>(n)) - 1) {
        s.enough = static_cast<u64>(ceil(static_cast<double>(options.share) * static_cast<double>(r.heavier + r.own.mass)));
      }
      __syncthreads();
      if (r.before != 0 && r.heavier >= s.enough) best = 0;
    }
    best = warp_max(best);
    if (lane == 0) s.bests[warp] = best;
    __syncthreads();
    return warp == 0 ? warp_max(s.bests[lane % kTopkWarps]) : 0;
  }

  // From the listed tokens to what is written. All of a CTA.
  ATTNKIT_DEVICE void finish(const TopkOptions& options, int b) {
    __syncthreads();
    const int n = s.n;
    const bool listed = s.n_groups <= kCandidates && n <= kCandidates;
    int id = -1;
    if (s.nan == 0 && listed) {
      if (n > 0) id = best_id(draw(options, n));
    } else if (s.nan == 0) {
      id = draw_unlisted<Type, Penalised>(p, s.any, b, k, top);
    }
    if (threadIdx.x == 0) p.tokens[b] = max(id, 0), p.valid[b] = id >= 0;
  }
};

}  // namespace attnkit::sampling
