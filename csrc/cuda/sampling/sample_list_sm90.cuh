// The first tokens of a row, for log-probabilities: each CTA of its cluster lists what may be among the k first.
//
// While the last part of a slice is on its way, the pairs of threads' largest logits so far (peaks) are ranked. As many
// tokens as peaks are at or above the m-th; with m about twice a CTA's share of k, the largest of all CTAs' bounds has
// k tokens above it for nearly every row. Where it has not (ties, or most of the k in one CTA), they are counted out.
#pragma once
#include "sample_filter_sm90.cuh"
#include "sample_rank_sm90.cuh"

namespace attnkit::sampling {

template <int Type>
struct ListRow {
  using Row = FilterRow<Type>;
  Row& row;
  FilterShared& s;
  const int size, rank;
  const int room_log2;  // a CTA's entries in the common list
  float low = 0.0f;     // what this CTA lists from

  ATTNKIT_DEVICE explicit ListRow(Row& r)
      : row(r), s(r.s), size(r.size), rank(r.rank), room_log2(r.size <= 2 ? 8 : r.size <= 4 ? 7 : r.size <= 8 ? 6 : 5) {}

  // Puts the slice's tokens that are at least ``from`` on this CTA's own list.
  ATTNKIT_DEVICE void collect(float from) {
#pragma unroll 1
    for (int j = 0; j < row.count; j += 4) {
      float x[4][4];
#pragma unroll
      for (int u = 0; u < 4; ++u) row.held(min(j + u, row.count - 1), x[u]);
      u32 tiles = 0;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (fmaxf(fmaxf(x[u][0], x[u][1]), fmaxf(x[u][2], x[u][3])) >= from && j + u < row.count) tiles |= 1u << u;
      }
#pragma unroll 1
      for (; tiles != 0; tiles &= tiles - 1) {
        const int tile = j + __ffs(tiles) - 1;
        row.held(tile, x[0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (x[0][i] >= from) append(x[0][i], row.first_id(tile) + i);
        }
      }
    }
    __syncthreads();
  }

  ATTNKIT_DEVICE void append(float x, int v) {
    const int at = atomicAdd(&s.n_local, 1);
    if (at < kLocal) s.local[at] = make_float2(x, __int_as_float(v));
  }

  // Ranks the peaks; the m-th is the bound.
  ATTNKIT_DEVICE void find_bound(float peak, int m) {
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
    const int mine = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) & 1;
    reinterpret_cast<float*>(s.peaks)[mine] = peak;
    __syncthreads();
    int before = 0;
#pragma unroll 4
    for (int i = 0; i < kSampleThreads / 16; ++i) {
      const int at = 2 * i + half;
      const float4 q = s.peaks[at];
      before += q.x > peak || (q.x == peak && 4 * at < mine);
      before += q.y > peak || (q.y == peak && 4 * at + 1 < mine);
      before += q.z > peak || (q.z == peak && 4 * at + 2 < mine);
      before += q.w > peak || (q.w == peak && 4 * at + 3 < mine);
    }
    before += __shfl_xor_sync(0xffffffffu, before, 1);
    if (before == m - 1) s.bound = peak;
    __syncthreads();
    low = fminf(fmaxf(s.bound, -kF32Max), kF32Max);
  }

  // Takes the row in and lists it. Returns this thread's largest logit (NaN if there is one).
  ATTNKIT_DEVICE float load(const RowPointers& r, u32 k) {
    const int room = 1 << room_log2, share = static_cast<int>((2 * k + size - 1) / size) + 6;
    const int m = size == 1 ? static_cast<int>(k) : min(share * 3 / 4, room * 5 / 8);
    float peak = negative_infinity();
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      row.take(r, group, [&](const float(&x)[4], int) {
        peak = max_nan(peak, max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])));
      });
      if (group == kGroups - 2) find_bound(peak, m);
    }
    collect(fmaxf(low - fabsf(low) * kRounding, -kF32Max));
    return peak;
  }

  // Gives the list to all CTAs. True if the list surely holds the k first; ``nan`` if the row holds one.
  ATTNKIT_DEVICE bool share(float peak, u32 k, bool& nan) {
    const bool mine = __syncthreads_or(peak != peak) != 0;
    const int found = s.n_local, room = 1 << room_log2;
    cluster_wait();
    if (threadIdx.x < size) {
      store_remote(remote_address(&s.counts[rank], threadIdx.x), static_cast<u32>(found) | (mine ? 0x40000000u : 0u));
      store_remote(remote_address(&s.bounds[rank], threadIdx.x), __float_as_uint(low));
    }
    if (threadIdx.x < min(found, room)) {
      const float2 one = s.local[threadIdx.x];
      const float2* const at = &s.listed[(rank << room_log2) + threadIdx.x];
      for (int cta = 0; cta < size; ++cta) store_remote(remote_address(at, cta), one);
    }
    cluster_sync();
    bool fits = true;
    float bound = -kF32Max;
    nan = false;
    for (int i = 0; i < size; ++i) {
      const int n = s.counts[i];
      nan = nan || (n & 0x40000000) != 0;
      fits = fits && n <= room;
      bound = fmaxf(bound, s.bounds[i]);
    }
    low = bound;
    int above = 0;
    u32 top = 0;
    for (int i = threadIdx.x; i < size << room_log2; i += kSampleThreads) {
      const float x = s.listed[i].x;
      const bool is = (i & (room - 1)) < s.counts[i >> room_log2];
      above += is && x >= bound;
      top = is ? max(top, order_key(x)) : top;
    }
    top = __reduce_max_sync(0xffffffffu, top);
    above = __reduce_add_sync(0xffffffffu, above);
    if (row.lane == 0) {
      atomicMax(&s.top, top);
      atomicAdd(&s.kept, above);
    }
    __syncthreads();
    const u32 most = s.top;
    row.top = most == 0 ? negative_infinity() : warm(order_value(most), row.o);
    above = s.kept;
    // The sorting CTA takes one candidate a thread; a few more come for rounding's sake.
    return nan || (fits && above <= kSampleThreads - 16 && (above >= static_cast<int>(k) || bound == -kF32Max));
  }

  // Lists exactly the k first, k at most kLocal; one after the other. Their number is the sum of counts.
  ATTNKIT_DEVICE void count_out(u32 k) {
    const Place end = row.after_first(k);
    if (threadIdx.x == 0) s.n_local = 0, s.top = 0;
    cluster_sync();  // others may be reading the counts that lie where the list will
    row.template for_slice<1>([&](const float(&x)[4], int v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (end.after(warm(x[i], row.o), v + i)) append(x[i], v + i);
      }
    });
    __syncthreads();
    const int found = s.n_local;
    if (threadIdx.x < size) store_remote(remote_address(&s.counts[rank], threadIdx.x), static_cast<u32>(found));
    cluster_sync();
    int first = 0;
    for (int i = 0; i < rank; ++i) first += s.counts[i];
    u32 top = 0;
    if (threadIdx.x < found) {
      const float2 one = s.local[threadIdx.x];
      for (int cta = 0; cta < size; ++cta) store_remote(remote_address(&s.listed[first + threadIdx.x], cta), one);
    }
    cluster_sync();
    int n = 0;
    for (int i = 0; i < size; ++i) n += s.counts[i];
    if (threadIdx.x < n) top = order_key(s.listed[threadIdx.x].x);
    top = __reduce_max_sync(0xffffffffu, top);
    if (row.lane == 0) atomicMax(&s.top, top);
    __syncthreads();
    row.top = warm(order_value(s.top), row.o);
    low = -kF32Max;
  }

  // CTA 0: the candidates in the slice's memory, those below the bound left out. Returns their number.
  ATTNKIT_DEVICE int gather(bool apart) {
    Candidate* const candidates = reinterpret_cast<Candidate*>(row.slice);
    if (threadIdx.x == 0) s.kept = 0;
    __syncthreads();
    int n = kListed;
    if (!apart) {
      n = 0;
      for (int i = 0; i < size; ++i) n += s.counts[i];
    }
    const float from = fmaxf(low - fabsf(low) * kRounding, -kF32Max);
    for (int i = threadIdx.x; i < min(n, apart ? size << room_log2 : kListed); i += kSampleThreads) {
      const float2 one = s.listed[i];
      const bool is = !apart || (i & ((1 << room_log2) - 1)) < s.counts[i >> room_log2];
      if (is && one.x >= from) {
        const float logit = warm(one.x, row.o);
        const int at = atomicAdd(&s.kept, 1);
        if (at < kSampleThreads) candidates[at] = Candidate{pack_best(logit, __float_as_int(one.y)), 0};
      }
    }
    __syncthreads();
    return min(s.kept, kSampleThreads);
  }
};

}  // namespace attnkit::sampling
