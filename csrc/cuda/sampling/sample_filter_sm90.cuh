// top-k, top-p and min-p: a cluster holds a row in its shared memory, so the logits are read from memory once.
// Most calls are others': sample_once_sm90.cuh has top-k and min-p, of rows that it holds. sample_list_sm90.cuh lists few tokens
// for log-probabilities.
//
// No cut is looked for: a draw from all tokens is checked by counting and weighing what precedes it. Where a filter
// refuses it, so it does everything that follows, and the best of the tokens before it is tried.
//
// Order throughout: by logit after temperature, then by the lower id. The slice holds logits before temperature, so
// what lies within rounding of a place is looked at again. Sums are taken in an order that depends on V alone.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

constexpr int kListed = 512;  // candidates of a row, and the room for them
constexpr int kLocal = 256;   // of a CTA
constexpr int kMostCluster = 16;
constexpr int kGroups = 4;  // parts in which a slice arrives

struct Pick {
  u32 bin, need, equal;
};

// Shared memory besides the slice of the row. Mirrors FIXED_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct FilterShared {
  union {
    float2 listed[kListed];                         // candidates of all CTAs: logit, id
    uint4 records[2][kMostCluster * kSampleWarps];  // what warps tell each other otherwise
  };
  union {
    float2 local[kLocal];  // of this CTA
    u32 counted[2][256];
    float4 peaks[kSampleThreads / 8];
  };
  u64 ready[kGroups];
  u64 reached_by_groups;
  u64 sums[kSampleWarps];
  float tops[kMostCluster * kSampleWarps];
  int counts[kMostCluster];
  float bounds[kMostCluster], masses[kMostCluster];
  Pick pick;
  int n_local, kept;
  u32 reached, top;
  float bound;
};
static_assert(sizeof(FilterShared) == 6992, "FIXED_BYTES");

ATTNKIT_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
ATTNKIT_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

ATTNKIT_DEVICE u32 cluster_size() {
  u32 n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return n;
}

// The address of the same variable in another CTA of the cluster.
ATTNKIT_DEVICE u32 remote_address(const void* p, u32 cta) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(smem_address(p)), "r"(cta));
  return r;
}
ATTNKIT_DEVICE void store_remote(u32 to, u32 x) { asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }
ATTNKIT_DEVICE void store_remote(u32 to, u64 x) { asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(to), "l"(x) : "memory"); }
ATTNKIT_DEVICE void store_remote(u32 to, float2 x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}
ATTNKIT_DEVICE void store_remote(u32 to, uint4 x) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
ATTNKIT_DEVICE void add_remote(u32 to, u32 x) { asm volatile("red.shared::cluster.add.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }
ATTNKIT_DEVICE u32 load_remote(u32 from) {
  u32 x;
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}

template <int Type>
struct FilterRow {
  const SampleParams& p;
  FilterShared& s;
  char* const slice;  // tile j of this CTA, four tokens a thread
  const int b, size, rank, count;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  RowOptions o;
  u64 seed, offset;
  i64 top_k;
  float share, ratio;
  float top = 0.0f;  // largest logit of the row, after temperature
  int turn = 0;      // which records are written next

  // Tokens as they are in memory; bulk copies bring whole tiles.
  static constexpr int kItem = Type == kF32 ? 4 : 2, kTileBytes = kItem * kSampleTile;

  ATTNKIT_DEVICE int part() const { return (count + kGroups - 1) / kGroups; }
  ATTNKIT_DEVICE int group_end(int group) const { return min(count, (group + 1) * part()); }
  ATTNKIT_DEVICE int first_id(int j) const { return (rank + j * size) * kSampleTile + static_cast<int>(threadIdx.x) * 4; }

  // One thread: asks for all of the slice, in groups of part() tiles.
  ATTNKIT_DEVICE void ask(const RowPointers& r) {
    const int whole = copied_tokens<Type>(r.logits, p.V);
    const u64 policy = evict_first_policy();
#pragma unroll 1
    for (int group = 0, j = 0; group < kGroups; ++group) {
      const u32 ready = smem_address(&s.ready[group]);
      const int end = group_end(group);
      u32 bytes = 0;
      for (int i = j; i < end; ++i) bytes += max(0, min(kSampleTile, whole - (rank + i * size) * kSampleTile)) * kItem;
      mbarrier_arrive_expect(ready, bytes);
      for (; j < end; ++j) {
        const int v = (rank + j * size) * kSampleTile, n = min(kSampleTile, whole - v) * kItem;
        if (n > 0) copy_bulk(smem_address(slice) + j * kTileBytes, r.logits + static_cast<u64>(v) * kItem, n, ready, policy);
      }
    }
  }

  // The four tokens of tile j that are this thread's, as the slice holds them.
  ATTNKIT_DEVICE void held(int j, float (&x)[4]) const {
    widen_four<Type>(reinterpret_cast<const Raw<Type>*>(slice + j * kTileBytes)[threadIdx.x], x);
  }

  // f(x, v) for four tokens of the slice at a time, ``Together`` tiles in a turn: few where f is long, so that it stays in
  // the innermost instruction cache.
  template <int Together, class F>
  ATTNKIT_DEVICE void for_slice(F&& f) const {
#pragma unroll 1
    for (int j = 0; j < count; j += Together) {
      float x[Together][4];
#pragma unroll
      for (int u = 0; u < Together; ++u) held(j + u < count ? j + u : j, x[u]);
#pragma unroll
      for (int u = 0; u < Together; ++u) {
        if (j + u < count) f(x[u], first_id(j + u));
      }
    }
  }

  // Takes a group in once it is there: f(x, v) for four of its tokens at a time. Afterwards the slice holds it.
  template <class F>
  ATTNKIT_DEVICE void take(const RowPointers& r, int group, F&& f) {
    const int whole = copied_tokens<Type>(r.logits, p.V), end = group_end(group), step = size * kSampleTile;
    int j = group * part(), v = first_id(j);
    mbarrier_wait(smem_address(&s.ready[group]), 0);
#pragma unroll 1
    for (; j < end; ++j, v += step) {
      Raw<Type>* const at = reinterpret_cast<Raw<Type>*>(slice + j * kTileBytes) + threadIdx.x;
      Raw<Type> raw;
      if (v < whole) {
        raw = *at;
      } else {
        *at = raw = load_four_guarded<Type>(r.logits, v, p.V);
      }
      float x[4];
      widen_four<Type>(raw, x);
      f(x, v);
    }
  }

  // ---- what the cluster's warps tell each other ----

  ATTNKIT_DEVICE void tell(uint4 record) {
    if (lane < size) store_remote(remote_address(&s.records[turn][rank * kSampleWarps + warp], lane), record);
  }

  // After the barrier that follows: f(record) for this lane's share of all records.
  template <class F>
  ATTNKIT_DEVICE void hear(F&& f) {
    for (int i = lane; i < size * kSampleWarps; i += 32) f(s.records[turn][i]);
    turn ^= 1;
  }

  // ``mine``: of each lane, and its token's logit before temperature.
  ATTNKIT_DEVICE uint4 record_of(u64 mine, float raw) const {
    const u64 best = warp_max(mine);
    raw = __shfl_sync(0xffffffffu, raw, __ffs(__ballot_sync(0xffffffffu, mine == best)) - 1);
    return make_uint4(high_word(best), static_cast<u32>(best), __float_as_uint(raw), best_id(best));
  }

  // Four of a group's logits: chunk c of the group in the slice, ``piece`` counted in the slice.
  ATTNKIT_DEVICE Raw<Type> held_chunk(int piece, int c, int lane_of_group) const {
    const int at = piece % 2 * 128 + c * 32 + lane_of_group;
    return reinterpret_cast<const Raw<Type>*>(slice + piece / 2 * kTileBytes)[at];
  }

  // Draws among the groups of the slice's pieces [from, to).
  ATTNKIT_DEVICE void try_pieces(Best& best, Floor& floor, int from, int to) const {
#pragma unroll 1
    for (int piece = from + warp; piece < to; piece += kSampleWarps) {
      const int number = (rank + piece / 2 * size) * 2 + piece % 2;
      Raw<Type> raw[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) raw[c] = held_chunk(piece, c, lane);
      u32 w[4];
      philox_words(seed, offset, kOfGroups, static_cast<u32>(number / 4 * 32 + lane), w);
      const u32 word = number & 2 ? (number & 1 ? w[3] : w[2]) : (number & 1 ? w[1] : w[0]);
      try_group<Type>(best, floor, raw, number * 32 + lane, word, o);
    }
  }

  // Of a warp's groups: the best, and its token.
  ATTNKIT_DEVICE uint4 record_of(const Best& mine) const {
    const u64 best = warp_max(mine.packed());
    if (best == 0 || best == kNaNSeen) return make_uint4(high_word(best), static_cast<u32>(best), 0, 0);
    const int group = best_id(best), piece = (group / 64 - rank) / size * 2 + group / 32 % 2;
    float four[4], x;
    widen_four<Type>(held_chunk(piece, lane & 3, group & 31), four);
    const int token = choose_inside(four, group, seed, offset, o, x);
    return make_uint4(high_word(best), static_cast<u32>(best), __float_as_uint(x), token);
  }

  // The best of the cluster's draws (the token's own id now), and its logit before temperature.
  ATTNKIT_DEVICE u64 hear_best(float& raw) {
    u64 best = 0;
    float x = 0.0f;
    u32 id = 0;
    hear([&](uint4 r) {
      const u64 packed = static_cast<u64>(r.x) << 32 | r.y;
      if (packed > best) best = packed, x = __uint_as_float(r.z), id = r.w;
    });
    const u64 all = warp_max(best);
    const u32 holder = __ffs(__ballot_sync(0xffffffffu, best == all)) - 1;
    raw = __shfl_sync(0xffffffffu, x, holder);
    id = __shfl_sync(0xffffffffu, id, holder);
    return all == 0 ? 0 : all >> 32 << 32 | (0xffffffffu - id);
  }

  ATTNKIT_DEVICE void tell_peak(float peak) {
    const float most = order_value(__reduce_max_sync(0xffffffffu, order_key(peak)));
    if (lane < size) store_remote(remote_address(&s.tops[rank * kSampleWarps + warp], lane), __float_as_uint(most));
  }

  // The row's largest logit before temperature; NaN if there is one.
  ATTNKIT_DEVICE float hear_peak() {
    u32 most = 0;
    for (int i = lane; i < size * kSampleWarps; i += 32) most = max(most, order_key(s.tops[i]));
    return order_value(__reduce_max_sync(0xffffffffu, most));
  }

  ATTNKIT_DEVICE void write(int token, bool good) const {
    if (rank == 0 && threadIdx.x == 0) {
      p.tokens[b] = token;
      p.valid[b] = good;
    }
  }

  // ---- the k first tokens, for any k ----

  // The k-th largest key of those that key_of(l, v, key) says count, over the cluster: all its bits by four counts.
  template <class F>
  ATTNKIT_DEVICE u32 kth(u32 k, F&& key_of, u32& need, u32& equal) {
    u32 prefix = 0, mask = 0;
    need = k;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
      u32* const counted = s.counted[shift / 8 & 1];
      counted[threadIdx.x] = 0;
      __syncthreads();
      for_slice<1>([&](const float(&x)[4], int v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u32 key;
          if (key_of(warm(x[i], o), v + i, key) && (key & mask) == prefix) atomicAdd(&counted[key >> shift & 255], 1u);
        }
      });
      cluster_sync();
      u32 mine = 0;
      for (int cta = 0; cta < size; ++cta) mine += load_remote(remote_address(&counted[255 - threadIdx.x], cta));
      const u32 before = sum_before(mine, s.sums);
      if (before < need && before + mine >= need) s.pick = Pick{255 - threadIdx.x, need - before, mine};
      __syncthreads();
      const Pick pick = s.pick;
      __syncthreads();
      prefix |= pick.bin << shift;
      mask |= 255u << shift;
      need = pick.need;
      equal = pick.equal;
    }
    return prefix;
  }

  // The place after the k first tokens.
  ATTNKIT_DEVICE Place after_first(u32 k) {
    u32 need, equal;
    const float logit = order_value(kth(k, [](float l, int, u32& key) { key = order_key(l); return true; }, need, equal));
    if (need >= equal) return Place{logit, 0x7fffffff};
    u32 a, c;
    const u32 id = kth(need, [&](float l, int v, u32& key) { key = ~static_cast<u32>(v); return l == logit; }, a, c);
    return Place{logit, static_cast<int>(~id) + 1};
  }

  // ---- any number of survivors ----

  // The best draw among the tokens before a place that are at least ``least``, for this warp's record.
  ATTNKIT_DEVICE uint4 draw_before(const Place& end, float least, const Philox& philox) {
    __syncthreads();  // all have read the former floor
    if (threadIdx.x == 0) s.reached = 0;
    __syncthreads();
    Draw draw(o.rt, &s.reached);
    // Logits before temperature below this are out for certain.
    const float lowest = fminf(fmaxf(least, end.logit) * o.t, kF32Max), low = lowest - fabsf(lowest) * kRounding;
    for_slice<1>([&](const float(&x)[4], int v) {
      if (!__any_sync(0xffffffffu, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) >= low)) return;
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float l = warm(x[i], o);
        y[i] = l >= least && end.after(l, v + i) ? x[i] : negative_infinity();
      }
      u32 w[4];
      philox.words(static_cast<u32>(v) >> 2, w);
      draw.four(y, w, v, [&](float z) { return warm(z, o); });
    });
    return record_of(draw.packed(), draw.raw);
  }

  // As draw_before, where top-p alone holds back; ``attempt`` counts from 1.
  ATTNKIT_DEVICE uint4 arrive_before(const Place& end, int attempt) const {
    Earliest mine;
    Floor floor(&s.reached_by_groups, attempt);
    const float scale = o.rt * kLog2e;
#pragma unroll 1
    for (int at = warp; at < 2 * count; at += kSampleWarps) {
      const int number = (rank + at / 2 * size) * 2 + at % 2, group = number * 32 + lane;
      Raw<Type> raw[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) raw[c] = held_chunk(at, c, lane);
      u32 w[4];
      philox_words(seed, offset, kOfGroups, static_cast<u32>(number / 4 * 32 + lane), w);
      const u32 word = number & 2 ? (number & 1 ? w[3] : w[2]) : (number & 1 ? w[1] : w[0]);
      const float peak = fminf(peak_of<Type>(raw), kF32Max);
      floor.refresh();
      const bool hope = peak > negative_infinity() && !(Draw::one_and(word) > 1.0f + exp2_fast(__fmaf_rn(peak, scale, floor.shift)));
      if (!__any_sync(0xffffffffu, hope)) continue;
      if (hope) {
        const auto chunk = [&](int c, float(&x)[4]) { widen_four<Type>(held_chunk(at, c, lane), x); };
        try_arrivals(mine, chunk, peak, group, word, seed, offset, o, end);
      }
      __syncwarp();
      floor.raise(mine.best);
    }
    return record_of(mine.best > negative_infinity() ? pack_best(mine.best, mine.id) : 0, mine.raw);
  }

  // How many tokens precede ``at`` (``raw`` before temperature), their mass, and the mass of all before ``end``.
  ATTNKIT_DEVICE void weigh(const Place& at, float raw, const Place& end, u32& before, float& mass, float& whole) {
    u32 n = 0, near = 0;
    float sum = 0.0f, all = 0.0f;
    const float high = raw + fabsf(raw) * kRounding, low = raw - fabsf(raw) * kRounding;
    const float scale = o.rt * kLog2e, shift = -top * kLog2e;
    const bool plain = fabsf(top) < 1e5f && scale < 1e5f && end.logit == negative_infinity();
    if (plain) {
      for_slice<4>([&](const float(&x)[4], int) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float m = exp2_fast(__fmaf_rn(x[i], scale, shift));
          all += m;
          if (x[i] > high) sum += m, ++n;
          if (x[i] >= low) ++near;
        }
      });
    }
    // What lies within rounding is compared as it should be, where it is more than the token itself.
    const int tile = at.id / kSampleTile;
    const bool own = tile % size == rank && at.id / 4 % kSampleThreads == static_cast<int>(threadIdx.x);
    if (!plain || near - n > own) {
      n = 0, sum = 0.0f, all = 0.0f;
      for_slice<1>([&](const float(&x)[4], int v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float l = warm(x[i], o), m = exp2_fast((l - top) * kLog2e);
          if (at.after(l, v + i)) sum += m, ++n;
          if (end.after(l, v + i)) all += m;
        }
      });
    }
    n = __reduce_add_sync(0xffffffffu, n);
    sum = warp_sum(sum);
    tell(make_uint4(n, __float_as_uint(sum), __float_as_uint(warp_sum(all)), 0));
    cluster_sync();
    before = 0, mass = 0.0f, whole = 0.0f;
    hear([&](uint4 r) { before += r.x, mass += __uint_as_float(r.y), whole += __uint_as_float(r.z); });
    before = __reduce_add_sync(0xffffffffu, before);
    mass = warp_sum(mass);
    whole = warp_sum(whole);
  }

  // The lowest id of the largest logit, ``peak`` before temperature.
  ATTNKIT_DEVICE void choose_largest(float peak) {
    u32 first = ~0u;
    peak = fminf(peak, kF32Max);
    for_slice<4>([&](const float(&x)[4], int v) {
#pragma unroll
      for (int i = 3; i >= 0; --i) first = fminf(x[i], kF32Max) == peak ? min(first, static_cast<u32>(v + i)) : first;
    });
    tell(make_uint4(__reduce_min_sync(0xffffffffu, first), 0, 0, 0));
    cluster_sync();
    first = ~0u;
    hear([&](uint4 r) { first = min(first, r.x); });
    write(static_cast<int>(__reduce_min_sync(0xffffffffu, first)), true);
  }

  // Tries the best draw, then the best of those before it, and so on. ``best`` is the first, if it is known.
  ATTNKIT_DEVICE void draw_and_check(u64 best, float raw, u32 k, float share, float least, const Philox& philox) {
    const bool by_count = k != 0, by_mass = share < 1.0f, by_arrival = !by_count && ratio <= 0.0f;
    int attempt = 0;
    Place end{negative_infinity(), 0};
    if (by_count && by_mass) end = after_first(k);
    Place cut = end;
    float whole = -1.0f;
    while (true) {
      if (best == 0) {
        tell(by_arrival ? arrive_before(cut, ++attempt) : draw_before(cut, least, philox));
        cluster_sync();
        best = hear_best(raw);
        if (best == 0) break;
      }
      if (!by_count && !by_mass) break;
      const Place at{warm(raw, o), best_id(best)};
      u32 before;
      float mass, all;
      weigh(at, raw, end, before, mass, all);
      if (whole < 0.0f) whole = all;
      if (before == 0 || ((!by_count || before < k) && (!by_mass || mass < share * whole))) break;
      cut = at;
      best = 0;
    }
    write(best == 0 ? 0 : best_id(best), true);
  }
};

// A cluster's start: what every thread needs before the row can be read. The row's copies are under way in the end.
template <int Type>
ATTNKIT_DEVICE FilterRow<Type> begin_row(const SampleParams& p, char* memory) {
  FilterShared& s = *reinterpret_cast<FilterShared*>(memory);
  cluster_arrive();
  const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int b = static_cast<int>(blockIdx.x) / size;
  const int tiles = (p.V + kSampleTile - 1) / kSampleTile;
  FilterRow<Type> row{p, s, memory + sizeof(FilterShared), b, size, rank, (tiles - rank + size - 1) / size};
  if (threadIdx.x < 32 && elect_one()) {
    for (int i = 0; i < kGroups; ++i) mbarrier_init(smem_address(&s.ready[i]), 1);
    mbarrier_init_fence();
    s.n_local = s.kept = 0;
    s.reached = s.top = 0;
    s.reached_by_groups = 0;
    s.bound = negative_infinity();
  }
  __syncwarp();
  wait_for_previous_grid();
  launch_dependents();
  const RawOptions raw(p, b);
  row.top_k = option(p.top_k, p.top_k_value, b);
  row.share = option(p.top_p, p.top_p_value, b);
  row.ratio = option(p.min_p, p.min_p_value, b);
  if (threadIdx.x < 32 && elect_one()) row.ask(row_pointers<Type>(p, b));
  __syncthreads();
  row.o = raw.use();
  row.seed = static_cast<u64>(raw.seed), row.offset = static_cast<u64>(raw.offset);
  return row;
}

template <int Type>
ATTNKIT_DEVICE void sample_filter(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  auto row = begin_row<Type>(p, memory);
  const RowPointers pointers = row_pointers<Type>(p, row.b);
  const u32 k = row.top_k > 0 && row.top_k < p.V ? static_cast<u32>(row.top_k) : 0;
  const float share = row.share, ratio = row.ratio;
  const Philox philox = Philox(row.seed, row.offset, kOfTokens).of_warp();

  // Where the first draw can be made from all tokens it is made as they are read.
  const bool early = !row.o.cold && ratio <= 0.0f && (k == 0 || share >= 1.0f);
  float peak = negative_infinity();
  if (early && k == 0) {
    Best best;
    Floor floor(&row.s.reached_by_groups, 0);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      row.take(pointers, group, [](const float(&)[4], int) {});
      __syncthreads();
      row.try_pieces(best, floor, 2 * group * row.part(), 2 * row.group_end(group));
    }
    peak = best.seen;
    cluster_wait();
    row.tell(row.record_of(best));
  } else if (early) {
    Draw draw(row.o.rt, &row.s.reached);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      row.take(pointers, group, [&](const float(&x)[4], int v) {
        peak = max_nan(peak, max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])));
        u32 w[4];
        philox.words(static_cast<u32>(v) >> 2, w);
        draw.four(x, w, v, [&](float y) { return warm(y, row.o); });
      });
    }
    cluster_wait();
    row.tell(row.record_of(draw.packed(), draw.raw));
  } else {
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      row.take(pointers, group, [&](const float(&x)[4], int) {
        peak = max_nan(peak, max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])));
      });
    }
    cluster_wait();
  }
  row.tell_peak(peak);
  cluster_sync();
  peak = row.hear_peak();
  row.top = warm(peak, row.o);
  if (!(row.top > negative_infinity())) {
    row.write(0, false);
    return;
  }
  if (row.o.cold) {
    row.choose_largest(peak);
    return;
  }
  float raw = 0.0f;
  const u64 best = early ? row.hear_best(raw) : 0;
  row.draw_and_check(best, raw, k, share, ratio > 0.0f ? __fadd_rn(row.top, logf(ratio)) : -kF32Max, philox);
}

}  // namespace attnkit::sampling
