// top-k up to 128 (with top-p and min-p if they come), in two launches. The first reads all logits once and keeps the
// largest of each group of 16 tokens, its peak. The second has a CTA for each row: as many tokens as peaks are at or above
// the k-th largest of 512 larger peaks, so only groups whose peak is can hold one of the k first: some 60 groups for k = 50.
// Their tokens are read again, ranked, and one is drawn. Where ties leave too many, the k first are counted out.
#pragma once
#include "sample_rank_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kTopkThreads = 512, kTopkWarps = kTopkThreads / 32;
constexpr int kCandidates = 512;  // tokens that are ranked, and groups they may come from

// ---- first launch ----

template <int Type>
struct PeakWork {
  static constexpr bool kAhead = true;
  const SampleParams& p;
  RawOptions coming;
  RowOptions o;
  float* to = nullptr;
  i64 top_k = 0;
  int asked = -1, judged = -1;
  bool wanted = true;

  ATTNKIT_DEVICE explicit PeakWork(const SampleParams& q) : p(q) {}
  ATTNKIT_DEVICE void ask(int b) {
    coming = RawOptions(p, b);
    if (p.listed != 0) top_k = option(p.top_k, p.top_k_value, b), asked = b;
  }
  ATTNKIT_DEVICE void begin(int b) {
    o = coming.use();
    to = p.peaks + static_cast<i64>(b) * p.blocks * (kBlock / 16) + lane_id();
  }
  ATTNKIT_DEVICE bool wants(int b) {
    if (p.listed != 0 && b != judged) {
      wanted = (b == asked ? listed_k(top_k, coming.t, p.V) : listed_k(p, b)) != 0;
      judged = b;
    }
    return wanted;
  }
  ATTNKIT_DEVICE void block(int) {}
  template <int Held>
  ATTNKIT_DEVICE void piece(const Raw<Held> (&raw)[4], int number, int) {
    to[number * 32] = peak_of<Held>(raw);
  }
  ATTNKIT_DEVICE void end(int, int) {}
};

// Without penalties: whole blocks, each asked for once the one before is done with. Whether a row is wanted comes with its logits.
template <int Type>
ATTNKIT_DEVICE void keep_peaks(const SampleParams& p) {
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  int n = static_cast<int>(all * blockIdx.x / gridDim.x) + static_cast<int>(threadIdx.x / 32), b = n / p.blocks, judged = -1;
  bool wanted = true;
  if (n >= end) return;
  Raw<Type> raw[4][4];
  load_block<Type>(raw, p, b, n - b * p.blocks, block_at<Type>(p, b, n - b * p.blocks));
#pragma unroll 1
  while (true) {
    if (p.listed != 0 && b != judged) wanted = listed_k(p, b) != 0, judged = b;
    float peaks[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) peaks[u] = peak_of<Type>(raw[u]);
    float* const to = p.peaks + static_cast<i64>(n) * (kBlock / 16) + lane_id();
    const bool kept = wanted;
    do {
      n += kSampleWarps;
      while (n >= (b + 1) * p.blocks) ++b;
    } while (!wanted && n < end && b == judged);
    if (n < end) load_block<Type>(raw, p, b, n - b * p.blocks, block_at<Type>(p, b, n - b * p.blocks));
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (kept) to[u * 32] = peaks[u];
    }
    if (n >= end) return;
  }
}

template <int Type, bool Penalised>
ATTNKIT_DEVICE void sample_peaks(const SampleParams& p) {
  wait_for_previous_grid();
  launch_dependents();
  if constexpr (Penalised) {
    PeakWork<Type> work(p);
    stream_rows<Type, true>(p, work);
  } else {
    keep_peaks<Type>(p);
  }
}

// ---- second launch ----

struct TopkShared {
  Candidate candidates[kCandidates];
  union {
    int groups[kCandidates];
    u32 counted[2][256];
  };
  u64 sums[kTopkWarps];
  uint2 range[kTopkWarps];  // of keys
  int n, n_groups;
  u32 bin, need, equal;
};

template <int Type, bool Penalised>
struct TopkRow {
  const SampleParams& p;
  TopkShared& s;
  const RowPointers& r;
  const RowOptions& o;
  float top = 0.0f;    // largest logit after temperature
  float bound = 0.0f;  // before temperature: k tokens reach it
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  ATTNKIT_DEVICE void append(float logit, int id) {
    const int at = atomicAdd(&s.n, 1);
    const float mass = exp2_fast((logit - top) * kLog2e);
    if (at < kCandidates) s.candidates[at] = Candidate{pack_best(logit, id), static_cast<u64>(mass * kMassOne)};
  }

  // A bound that k of the threads' largest peaks reach and few more, by bisection; the largest of all. ``mine``: this thread's.
  // False for a row with NaN or without a token.
  ATTNKIT_DEVICE bool find_bound(const float4* peaks, int n, u32 k, float& mine) {
    float most = negative_infinity();
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 4 * kTopkThreads) {
      float4 q[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        q[u] = i + u * kTopkThreads < n ? peaks[i + u * kTopkThreads] : make_float4(most, most, most, most);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) most = max_nan(most, max_nan(max_nan(q[u].x, q[u].y), max_nan(q[u].z, q[u].w)));
    }
    mine = most;
    const u32 key = order_key(most), high_here = __reduce_max_sync(0xffffffffu, key), low_here = __reduce_min_sync(0xffffffffu, key);
    if (lane == 0) s.range[warp] = make_uint2(low_here, high_here);
    if (__syncthreads_or(most != most) != 0) return false;
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
        if (reach <= k + k / 16) break;
      }
    }
    bound = order_value(low);
    return top > negative_infinity();
  }

  // A bit for each of four that are at least ``from``.
  ATTNKIT_DEVICE static u32 reaching(const float (&x)[4], float from) {
    return (x[0] >= from ? 1u : 0u) | (x[1] >= from ? 2u : 0u) | (x[2] >= from ? 4u : 0u) | (x[3] >= from ? 8u : 0u);
  }

  // Lists the tokens that are at least ``from`` before temperature. False if there was no room.
  ATTNKIT_DEVICE bool collect(const float4* peaks, int n, float from, float mine) {
    // Few are found: a bit for each, then one by one.
#pragma unroll 1
    for (int i = threadIdx.x; i < n && mine >= from; i += 4 * kTopkThreads) {
      u32 found = 0;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int at = i + u * kTopkThreads;
        const float4 q = peaks[min(at, n - 1)];
        const float x[4] = {q.x, q.y, q.z, q.w};
        found |= at < n ? reaching(x, from) << 4 * u : 0;
      }
#pragma unroll 1
      for (; found != 0; found &= found - 1) {
        const int bit = __ffs(found) - 1, at = atomicAdd(&s.n_groups, 1);
        if (at < kCandidates) s.groups[at] = 4 * (i + bit / 4 * kTopkThreads) + bit % 4;
      }
    }
    __syncthreads();
    const int groups = s.n_groups;
    if (groups > kCandidates) return false;
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
    __syncthreads();
    return s.n <= kCandidates;
  }

  // ---- any row, slowly ----

  // Sum of x over the threads before this one, and over all.
  ATTNKIT_DEVICE u32 block_before(u32 x, u32& all) {
    u32 sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u32 other = __shfl_up_sync(0xffffffffu, sum, step);
      sum += lane >= step ? other : 0;
    }
    __syncthreads();
    if (lane == 31) s.sums[warp] = sum;
    __syncthreads();
    all = 0;
#pragma unroll
    for (int i = 0; i < kTopkWarps; ++i) {
      sum += i < warp ? static_cast<u32>(s.sums[i]) : 0;
      all += static_cast<u32>(s.sums[i]);
    }
    return sum - x;
  }

  // f(logits after temperature, first id) for four tokens a thread; every thread as often.
  template <class F>
  ATTNKIT_DEVICE void for_row(F&& f) {
#pragma unroll 1
    for (int at = 0; at < p.V; at += 4 * kTopkThreads) {
      const int v = at + 4 * static_cast<int>(threadIdx.x);
      float x[4];
      load_chunk<Type, Penalised>(x, r, o, v, p.V);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = warm(x[i], o);
      f(x, v);
    }
  }

  // Lists exactly the k first.
  ATTNKIT_DEVICE void count_out(u32 k) {
    u32 prefix = 0, mask = 0, need = k, all;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
      u32* const counted = s.counted[shift / 8 & 1];
      __syncthreads();
      if (threadIdx.x < 256) counted[threadIdx.x] = 0;
      __syncthreads();
      for_row([&](const float(&l)[4], int v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 key = order_key(l[i]);
          if (v + i < p.V && (key & mask) == prefix) atomicAdd(&counted[key >> shift & 255], 1u);
        }
      });
      __syncthreads();
      const u32 bin = 255 - threadIdx.x, mine = threadIdx.x < 256 ? counted[bin & 255] : 0;
      const u32 before = block_before(mine, all);
      if (before < need && before + mine >= need) s.bin = bin, s.need = need - before;
      __syncthreads();
      prefix |= s.bin << shift;
      mask |= 255u << shift;
      need = s.need;
    }
    if (threadIdx.x == 0) s.n = 0;
    u32 taken = 0;
    for_row([&](const float(&l)[4], int v) {
      u32 equal = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) equal += order_key(l[i]) == prefix;
      u32 at = taken + block_before(equal, all);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 key = order_key(l[i]);
        if (v + i < p.V && (key > prefix || (key == prefix && at < need))) append(l[i], v + i);
        at += key == prefix;
      }
      taken += all;
    });
    __syncthreads();
  }

  // ---- the draw ----

  // The sum over all threads, below 2^49.
  ATTNKIT_DEVICE u64 block_sum(u64 x) {
    const u64 low24 = __reduce_add_sync(0xffffffffu, static_cast<u32>(x) & 0xffffffu);
    const u64 high = __reduce_add_sync(0xffffffffu, static_cast<u32>(x >> 24));
    if (lane == 0) s.sums[warp] = low24 + (high << 24);
    __syncthreads();
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < kTopkWarps; ++i) sum += s.sums[i];
    __syncthreads();
    return sum;
  }

  // The id drawn among the k first candidates that top-p and min-p let pass, in thread 0.
  ATTNKIT_DEVICE int draw(u32 k, float share, float least, u64 seed, u64 offset) {
    const Ranked r = rank_candidates<kTopkThreads>(s.candidates, s.n);
    const bool is = r.is && r.before < k;
    u64 best = 0;
    const int id = r.own.id();
    if (is && r.own.logit() >= least) {
      u32 w[4];
      philox_words(seed, offset, kOfTokens, static_cast<u32>(id) >> 2, w);
      best = pack_best(noisy(r.own.logit(), id & 2 ? (id & 1 ? w[3] : w[2]) : (id & 1 ? w[1] : w[0])), id);
    }
    if (share < 1.0f) {
      const double target = static_cast<double>(share) * static_cast<double>(block_sum(is ? r.own.mass : 0));
      if (r.before != 0 && static_cast<double>(r.heavier) >= target) best = 0;
    }
    best = warp_max(best);
    if (lane == 0) s.sums[warp] = best;
    __syncthreads();
#pragma unroll
    for (int j = 1; j < kTopkWarps; ++j) best = max(best, s.sums[j]);
    return best_id(best);
  }
};

template <int Type, bool Penalised>
ATTNKIT_DEVICE void sample_topk(const SampleParams& p) {
  __shared__ TopkShared s;
  const int b = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) s.n = s.n_groups = 0;
  // This grid started when all before the first launch had ended: a row's options are there.
  const RawOptions raw(p, b);
  const float share = option(p.top_p, p.top_p_value, b), ratio = option(p.min_p, p.min_p_value, b);
  const u32 k = listed_k(p, b);
  wait_for_previous_grid();
  launch_dependents();
  if (k == 0) return;
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<Type>(p, b);
  TopkRow<Type, Penalised> row{p, s, r, o};
  const int n = p.blocks * (kBlock / 64);
  const float4* const peaks = reinterpret_cast<const float4*>(p.peaks) + static_cast<i64>(b) * n;
  float mine;
  if (!row.find_bound(peaks, n, k, mine)) {
    if (threadIdx.x == 0) p.tokens[b] = 0, p.valid[b] = false;
    return;
  }
  // What lies within rounding of the bound may be equal to it after temperature.
  const float bound = fminf(fmaxf(row.bound, -kF32Max), kF32Max);
  if (!row.collect(peaks, n, fmaxf(bound - fabsf(bound) * kRounding, -kF32Max), mine)) row.count_out(k);
  const float least = ratio > 0.0f ? __fadd_rn(row.top, logf(ratio)) : -kF32Max;
  const int token = row.draw(k, share, least, static_cast<u64>(raw.seed), static_cast<u64>(raw.offset));
  if (threadIdx.x == 0) p.tokens[b] = token, p.valid[b] = true;
}

}  // namespace attnkit::sampling
