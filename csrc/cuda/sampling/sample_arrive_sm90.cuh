// Top-p without top-k and min-p, in one launch: a CTA a row, or a cluster where rows are few.
// First a CTA reads its share of the logits once and keeps groups of 16 tokens and counts by level. When groups arrive needs
// no logits (draw_by_arrival in attnkit/reference.py), so only the earliest are read again. Their tokens, in order of time, are
// judged by what precedes them: bounds by levels first; where these do not decide, groups that leave it open are read again.
// The first token that top-p keeps is drawn.
#pragma once
#include "sample_weigh_sm90.cuh"

namespace attnkit::sampling {

// Tokens in the order of their groups: of equals the first group's wins.
ATTNKIT_DEVICE int group_order(int id) { return (id / kPiece * 32 + id % kChunk / 4) * 16 + id % kPiece / kChunk * 4 + id % 4; }
ATTNKIT_DEVICE int of_group_order(int at) { return first_of_group(at / 16) + at % 16 / 4 * kChunk + at % 4; }

// Nothing is told: at first, and again when all have read.
ATTNKIT_DEVICE void forget_told(ArriveShared& s) {
  const int t = thread_here();
  if (t < kTold) s.told[t].key = 0;
  if (t == 0) s.n_early = s.n_told = s.over = 0;
}

template <int Type, bool Penalised>
struct ArriveRow {
  using Share = ArriveShare<Type, Penalised>;
  Share& h;
  ArriveShared& s;
  Weigh<Type, Penalised> scales;
  const float top_p;
  const int lane = h.lane, warp = h.warp;
  Place end{-negative_infinity(), 0};  // the first token that is known to be refused
  bool any = true;                     // none is
  float time = 0.0f, lowest = 0.0f;    // until when tokens are early; logits below are known to be refused
  int tells = 0, full = 0;             // how often was told, and how often all
  bool shorter = false;                // not all is
  bool narrow = false;                 // tokens that are refused are not told
  bool none = false;                   // no open token arrives
  int n_order = 0;                     // how many are in order
  bool bounded = false;                // bounds for them are added up
  int bounds = 0;                      // how often bounds were sent

  ATTNKIT_DEVICE ArriveRow(Share& share, float p) : h(share), s(share.s), scales(share, p), top_p(p) {}

  ATTNKIT_DEVICE bool open(float l, int id) const { return any || end.after(l, id); }
  ATTNKIT_DEVICE bool open(const Place& one) const { return open(one.logit, one.id); }

  // ---- who arrives ----

  // Tells all CTAs which open tokens arrive before ``time`` (of the row's largest logit).
  ATTNKIT_DEVICE void tell_early() {
    scales.open_sums();
    list_early();
    __syncthreads();
    if (s.n_early > kMostEarly) s.over = 1;
    const int found = min(s.n_early, kMostEarly);
    if (warp < kArriveWarps / 2) {
      const float floor = less_log(h.top, time) + fabsf(h.top) * 1e-6f + 1e-3f;
#pragma unroll 1
      for (int i = 4 * warp; i < found; i += 2 * kArriveWarps) tell_four(i + lane / 8 < found ? s.early[i + lane / 8] : -1, floor);
    } else if (tells == 0 && !narrow) {
      scales.add_up_cells();
    }
    __syncthreads();
    if (h.size > 1) send_told();
  }

  ATTNKIT_DEVICE int room() const { return h.size == 1 ? kTold : kTold / h.size; }
  static constexpr u64 kOver = 1;  // a key of none

  // A warp a CTA, as many to each whatever there is to tell; all have all then.
  ATTNKIT_DEVICE void send_told() {
    const int most = room();
    if (thread_here() == 0) expect(s, kOfTold, 16 * h.size * most);
#pragma unroll 1
    for (int i = lane; i < most && warp < h.size; i += 32) {
      Arrival one = s.mine[i];
      if (i >= s.n_told) one.key = 0;
      if (i == 0 && s.over != 0) one.key = kOver;
      send(s, kOfTold, &s.told[i * h.size + h.rank], warp,
           make_uint4(static_cast<u32>(one.key), high_word(one.key), __float_as_uint(one.logit), static_cast<u32>(one.id)));
    }
    await(s, kOfTold, tells);
  }

  // Whether what is told is not all.
  ATTNKIT_DEVICE bool told_over() const {
    if (h.size == 1) return s.over != 0;
    return __any_sync(0xffffffffu, lane < h.size && s.told[min(lane, h.size - 1)].key == kOver);
  }

  // Groups of which a token may arrive before ``time``, and be kept.
  ATTNKIT_DEVICE void list_early() {
    const float pace = 1.008f * 65536.0f * time * h.part(), least = any ? lowest : fmaxf(lowest, scales.from(end.logit));
#pragma unroll 1
    for (int i = 4 * thread_here(); i < h.n; i += 4 * kArriveThreads) {
      const float4 one = *reinterpret_cast<const float4*>(h.groups + i), two = *reinterpret_cast<const float4*>(h.groups + i + 2);
      const uint2 words = *reinterpret_cast<const uint2*>(h.marks + i);
      u32 early = may_arrive(one.x, one.y, words.x & 0xffffu, pace, least) ? 1 : 0;
      early |= may_arrive(one.z, one.w, words.x >> 16, pace, least) ? 2 : 0;
      early |= may_arrive(two.x, two.y, words.y & 0xffffu, pace, least) ? 4 : 0;
      early |= may_arrive(two.z, two.w, words.y >> 16, pace, least) ? 8 : 0;
#pragma unroll 1
      for (; early != 0; early &= early - 1) {
        const int at = atomicAdd(&s.n_early, 1), group = i + __ffs(early) - 1;
        if (at < kMostEarly) s.early[at] = group;
        i64 v = first_of_group(h.number_of(group));
#pragma unroll 1
        for (int c = 0; c < 4; ++c, v += kChunk) prefetch_l2(h.r.logits + min(v, h.p.V - i64{1}) * (Type == kF32 ? 4 : 2));
      }
    }
  }

  // E >= u: no group is missed. A power of two by a straight line between whole ones, up to 6% too large, takes no special unit.
  ATTNKIT_DEVICE bool may_arrive(float peak, float sum, u32 word, float pace, float least) const {
    constexpr float kZero = 98304.0f + 127.0f;  // whose last 16 bits are those of 1, moved down
    const float power = fminf(fmaxf(__fmaf_rn(peak - h.here, h.scale, kZero), kZero - 120.0f), kZero + 1.0f);
    const float mass = sum * __uint_as_float(__float_as_uint(power) << 16);
    return __uint_as_float(0x4b000000u | word) <= __fmaf_rn(mass, pace, 8388608.0f + 1.0f) && peak >= least;
  }

  // Eight lanes take a group, unless it is -1: four a chunk each, two more work out words.
  ATTNKIT_DEVICE void tell_four(int group, float floor) {
    const int chunk = lane & 3, number = h.number_of(max(group, 0)), v = first_of_group(number) + chunk * kChunk;
    float x[4];
    load_chunk<Type, Penalised>(x, h.r, h.o, v, h.p.V);
    const bool tokens = (lane & 4) == 0;
    u32 words[4];
    philox_words(s.seed, s.offset, tokens ? kOfTokens : chunk == 0 ? kOfGroups : kInside,
                 static_cast<u32>(tokens ? v / 4 : chunk == 0 ? number / 128 * 32 + number % 32 : number), words);
    const u32 word = __shfl_sync(0xffffffffu, one_of(words, number / 32), 4, 8), inside = __shfl_sync(0xffffffffu, words[0], 5, 8);
    float base = negative_infinity(), mass[4], upto[4], before = 0.0f, all = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = fminf(x[i], kF32Max), base = fmaxf(base, x[i]);
    base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, 1));
    base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) mass[i] = exp2_fast((x[i] - base) * h.scale), upto[i] = i == 0 ? mass[0] : __fadd_rn(upto[i - 1], mass[i]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c == chunk) before = all;
      all = __fadd_rn(all, __shfl_sync(0xffffffffu, upto[3], c, 4));
    }
    const float reach = share_of(inside, all), time = __fmul_rn(exponential(word), reciprocal(all)), peak = warm(base, h.o);
    int at = 4;
#pragma unroll
    for (int i = 3; i >= 0; --i) at = __fadd_rn(before, upto[i]) > reach ? i : at;
    const u32 holders = __ballot_sync(0xffffffffu, at < 4) >> (lane & 24) & 15u;
    const bool first = chunk == __ffs(holders) - 1;
    u32 early = 0;
    float scores[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float wait = first && i == at ? 0.0f : __fmul_rn(exponential(words[i]), reciprocal(mass[i]));
      scores[i] = less_log(peak, __fadd_rn(time, wait));
      if (scores[i] >= floor && x[i] > negative_infinity() && x[i] >= lowest) early |= 1u << i;
    }
    if (group < 0 || !tokens) early = 0;
#pragma unroll 1
    for (; early != 0; early &= early - 1) {
      const int i = __ffs(early) - 1;
      const float l = warm(one_of(x, i), h.o);
      if (open(l, v + i)) tell(Arrival{pack_best(one_of(scores, i), group_order(v + i)), l, v + i});
    }
  }

  ATTNKIT_DEVICE void tell(const Arrival& one) {
    const int at = atomicAdd(&s.n_told, 1);
    if (at >= room()) {
      s.over = 1;
    } else {
      (h.size == 1 ? s.told : s.mine)[at] = one;
    }
  }

  // Puts what is told in order of time, a warp a token, and adds up bounds at once where there are few.
  ATTNKIT_DEVICE void sort_told() {
    const int last = h.size == 1 ? min(s.n_told, kTold) : kTold;
    n_order = 0;
#pragma unroll
    for (int j = 0; j < kTold / 32; ++j) n_order += __popc(__ballot_sync(0xffffffffu, s.told[32 * j + lane].key != 0));
    bounded = n_order <= kProbes;
    const bool sent = h.size > 1 && bounded;
    if (sent && thread_here() == 0) expect(s, kOfSums, 4 * 2 * n_order * h.size);
#pragma unroll 1
    for (int i = warp; i < last; i += kArriveWarps) {
      const Arrival one = s.told[i];
      if (one.key == 0) continue;
      int rank = 0;
#pragma unroll
      for (int j = 0; j < kTold / 32; ++j) rank += __popc(__ballot_sync(0xffffffffu, s.told[32 * j + lane].key > one.key));
      if (lane == 0) s.order[rank] = Place{one.logit, one.id};
      if (bounded) scales.add_bounds(rank, Place{one.logit, one.id}, sent);
    }
    if (sent) await(s, kOfSums, bounds++);
    __syncthreads();
  }

  // ---- the choice ----

  // The best of all CTAs' and its logit; ``half``: of the room for what they tell, in turn.
  ATTNKIT_DEVICE u64 best_of_all(u64 best, float& logit, int half) {
    const u64 own = warp_max(best);
    __syncthreads();
    if (lane == 0) s.sums[warp] = own;
    if (own != 0 && best == own) s.most[warp] = logit;
    __syncthreads();
    if (warp == 0) {
      const u64 one = s.sums[lane % kArriveWarps], all = warp_max(one);
      const float its = __shfl_sync(0xffffffffu, s.most[lane % kArriveWarps], __ffs(__ballot_sync(0xffffffffu, one == all)) - 1);
      const uint4 record = make_uint4(high_word(all), static_cast<u32>(all), __float_as_uint(its), 0);
      if (lane < h.size) store_remote(remote_address(&s.bests[half][h.rank], lane), record);
    }
    h.meet();
    const uint4 q = s.bests[half][min(lane, h.size - 1)];
    const u64 one = static_cast<u64>(q.x) << 32 | q.y, all = warp_max(one);
    logit = __shfl_sync(0xffffffffu, __uint_as_float(q.z), __ffs(__ballot_sync(0xffffffffu, one == all)) - 1);
    return all;
  }

  // The first open token to arrive, by all of the row: the only one in order.
  ATTNKIT_DEVICE int first_open(int half) {
    Earliest mine;
    const Place last = any ? Place{negative_infinity(), 0x7fffffff} : end;
    const float least = scales.from(last.logit);
    const u64 seed = s.seed, offset = s.offset;
#pragma unroll 1
    for (int i = thread_here(); i < h.n; i += kArriveThreads) {
      const float base = fminf(h.groups[i].x, kF32Max);
      if (!(base > negative_infinity()) || !(any || base >= least)) continue;
      const int number = h.number_of(i), v = first_of_group(number);
      const auto chunk = [&](int c, float(&x)[4]) { load_chunk<Type, Penalised>(x, h.r, h.o, v + c * kChunk, h.p.V); };
      u32 w[4];
      philox_words(seed, offset, kOfGroups, static_cast<u32>(number / 128 * 32 + number % 32), w);
      const u32 word = one_of(w, number / 32);
      // A group's sum is at most 16 times its largest; E >= u.
      const float hope = warm(base, h.o) - log2_fast(uniform(word)) * kLn2 + 2.78f;
      if (hope + fabsf(hope) * 1e-6f >= mine.best) try_arrivals(mine, chunk, base, number, word, seed, offset, h.o, last);
    }
    float logit = warm(mine.raw, h.o);
    const u64 best = best_of_all(mine.best > negative_infinity() ? pack_best(mine.best, group_order(mine.id)) : 0, logit, half);
    if (threadIdx.x == 0) s.order[0] = Place{logit, of_group_order(best_id(best))};
    __syncthreads();
    return best != 0;
  }

  // The largest logit's lowest id.
  ATTNKIT_DEVICE int choose_largest() {
    u64 best = 0;
    float logit = 0.0f;
#pragma unroll 1
    for (int i = thread_here(); i < h.n; i += kArriveThreads) {
      const int v = first_of_group(h.number_of(i));
#pragma unroll 1
      for (int c = 0; c < 4 && fminf(h.groups[i].x, kF32Max) == h.here; ++c) {
        float x[4];
        load_chunk<Type, Penalised>(x, h.r, h.o, v + c * kChunk, h.p.V);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (fminf(x[j], kF32Max) == h.here) best = max(best, pack_best(h.here, v + c * kChunk + j));
        }
      }
    }
    return best_id(best_of_all(best, logit, (tells + 1) & 1));  // other CTAs may still read the half that was told last
  }

  // Nothing is told, once all have read what was. A probe may have been weighed meanwhile: the words' room is a list then.
  ATTNKIT_DEVICE void start_over() {
    h.meet();
    forget_told(s);
    h.load_words();
    h.meet();
  }

  // The first that is kept of those in order from ``next`` on, or -1; those that are refused end what is open.
  ATTNKIT_DEVICE int judge(int next) {
    const int found = min(n_order - next, kProbes);
    if (top_p >= 1.0f) return s.order[next].id;
    if (!bounded) {
      scales.open_sums();
#pragma unroll 1
      for (int q = warp; q < found; q += kArriveWarps) scales.add_bounds(q, s.order[next + q], false);
      h.meet();
    }
    bounded = false;
    const u32* const bounds = scales.close_sums();
    const u32 wanted = scales.wanted, margin = scales.level_margin();
    const u32 kept = __ballot_sync(0xffffffffu, lane < found && bounds[lane % kProbes] + margin < wanted);
    const u32 refused = __ballot_sync(0xffffffffu, lane < found && bounds[kProbes + lane % kProbes] >= wanted + margin);
#pragma unroll 1
    for (int q = 0; q < found; ++q) {
      const Place probe = s.order[next + q];
      if (!open(probe)) continue;
      if ((kept >> q & 1) != 0) return probe.id;
      if ((refused >> q & 1) == 0) {
        const bool is = scales.weigh(probe);
        if (is) return probe.id;
      }
      end = probe, any = false;
    }
    return -1;
  }

  // Puts in order who is judged next. Tokens that arrive early: first of all groups, some ten, in which most rows find one that
  // is kept; then of those that may have open tokens, so many that one is surely kept; then, for what is odd, one by one by all
  // of the row.
  ATTNKIT_DEVICE void find() {
    if (tells > 0) start_over();
    if (full == 2 || tells >= 10) {
      n_order = first_open(++tells & 1), bounded = false, none = n_order == 0;
      return;
    }
    tell_early();
    ++tells;
    if (told_over()) {
      n_order = 0, time *= 0.35f, shorter = true;
    } else {
      sort_told();
      full += shorter ? 0 : 1;
      time = 16.0f * reciprocal(fmaxf(hidden(top_p), 1e-3f) * h.whole), shorter = false;
    }
  }

  ATTNKIT_DEVICE int choose() {
    if (h.o.cold) return choose_largest();
    lowest = negative_infinity();
    // Of small p few tokens are kept: of a row that is one CTA's, those that are not need not be told. Of others each CTA has room
    // for few that it tells.
    narrow = h.size == 1 && top_p < 0.4f && h.bins[0] == 0;
    const float some = fminf(6.0f * reciprocal(fmaxf(top_p, 0.1f)) + 3.0f, h.size == 1 ? 64.0f : h.size == 2 ? 32.0f : 22.0f);
    time = (narrow ? 12.0f * reciprocal(fmaxf(top_p, 1e-3f)) : some) * reciprocal(h.whole);
    if (narrow) {
      if (warp >= kArriveWarps / 2) scales.add_up_cells();
      __syncthreads();
      lowest = scales.refused_from();
    }
    int next = 0;
#pragma unroll 1
    for (int tries = 0; tries < 1 << 20; ++tries) {
      if (next >= n_order) {
        find(), next = 0;
        // Where temperature lifts many beyond the largest float they are equals, but weigh nothing here beside the largest.
        if (none) return choose_largest();
      } else {
        const int id = judge(next);
        if (id >= 0) return id;
        next += kProbes;
      }
    }
    return 0;  // never: nothing precedes the largest
  }
};

// Where a row's shares lie in shared memory. All of it is as it has to be in the beginning.
struct ArriveMemory {
  ArriveShared& s;
  float2* const groups;
  u16* const marks;
  u32* const bins;

  ATTNKIT_DEVICE ArriveMemory(char* memory, int n)
      : s(*reinterpret_cast<ArriveShared*>(memory)), groups(reinterpret_cast<float2*>(&s + 1)), marks(reinterpret_cast<u16*>(groups + n)),
        bins(reinterpret_cast<u32*>(marks + n)) {
    const int t = thread_here();
    for (int i = t; i < kBins / 4; i += kArriveThreads) reinterpret_cast<uint4*>(bins)[i] = make_uint4(0, 0, 0, 0);
    if (t < 3 * 2 * kProbes) s.above[0][t] = 0;
    forget_told(s);
  }
};

// Row b, of which this CTA has ``n`` groups; ``slot``: see ArriveShare.
template <int Type, bool Penalised>
ATTNKIT_DEVICE void draw_by_arrival(const SampleParams& p, const ArriveMemory& m, const RawOptions& raw, float top_p, int b, int size,
                                    int rank, int n, int slot = 0) {
  const RowOptions o = raw.use();
  if (thread_here() == 0) m.s.options = o, m.s.seed = static_cast<u64>(raw.seed), m.s.offset = static_cast<u64>(raw.offset);
  const RowPointers r = row_pointers<Type>(p, b);
  ArriveShare<Type, Penalised> share{p, m.s, m.groups, m.marks, m.bins, b, size, rank, n, slot, r, Penalised ? o : m.s.options, o.rt * kLog2e};
  const bool good = share.add_up_row(share.take_in());
  if (!good) {
    if (rank == 0 && thread_here() == 0) p.tokens[b] = 0, p.valid[b] = false;
    return;
  }
  const int token = ArriveRow<Type, Penalised>(share, top_p).choose();
  if (rank == 0 && thread_here() == 0) p.tokens[b] = token, p.valid[b] = true;
}

template <int Type, bool Penalised>
ATTNKIT_DEVICE void draw_by_arrival(const SampleParams& p, const ArriveMemory& m, int b, int size, int rank, int n) {
  draw_by_arrival<Type, Penalised>(p, m, RawOptions(p, b), option(p.top_p, p.top_p_value, b), b, size, rank, n, Penalised ? p.room : 0);
}

template <int Type, bool Penalised>
ATTNKIT_DEVICE void sample_arrive(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int n = (p.blocks - rank + size - 1) / size * (kBlock / 16);
  const ArriveMemory m(memory, n);
  if (size > 1) {
    if (thread_here() == 0) open_meetings(m.s);
    cluster_arrive();
  }
  wait_for_previous_grid();
  launch_dependents();
  draw_by_arrival<Type, Penalised>(p, m, static_cast<int>(blockIdx.x) / size, size, rank, n);
}

}  // namespace attnkit::sampling
