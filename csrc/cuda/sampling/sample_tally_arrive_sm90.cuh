// Top-p alone over bf16 logits, in one launch: a row that is held and counted by value (sample_tally_row_sm90.cuh). The few groups that
// arrive early are read again, for when their tokens do, and the counters say of each of those what precedes it, but for which of its
// equals do. A row that this leaves open is drawn by arrival.
#pragma once
#include "sample_tally_row_sm90.cuh"

namespace attnkit::sampling {

constexpr int kWeighers = 11;           // the last warps, which weigh places
constexpr int kNoters = kTallyWarps - kWeighers;  // the others, which list groups that arrive early and note their tokens
constexpr int kOpeners = 12;            // the first warps, which note tokens where p is small; the others list equals
constexpr int kMostEquals = 32;         // of the value at which top-p ends, that are listed
constexpr int kMostTallied = 512;       // groups that arrive early
constexpr int kMostJudged = 128;        // of their tokens
constexpr float kLeastTallied = 0.05f;  // of a smaller p few early tokens are kept
constexpr float kNarrow = 0.25f;        // of a smaller p few early groups have one

// A token that arrives early. ``above``: what larger ones weigh, but for those that have no counter.
struct alignas(16) Judged {
  u64 key;
  float above;
  u16 bits, state;

  ATTNKIT_DEVICE int id() const { return of_group_order(best_id(key)); }
};
// What these sums leave open: kByRank, how many of its equals precede it, and sums in double precision where floats are too close;
// kByRest, what else has no counter; kTooClose, nothing here, as others share the places of what is near to zero.
enum JudgedState : u16 { kKept, kRefused, kByRank, kByRest, kTooClose };
enum Outcome : int { kNobody = -1, kDrawn = -2 };  // of those that arrived nobody is kept

struct TallyArriveShared : TallyRowShared {
  float after[kTallyThreads];      // what the places after each four weigh, of 32 such
  float after_warps[kTallyWarps];  // what the places after 32 fours weigh
  float counted;                   // all of them
  float margin, vague;             // how far from what is wanted a sum has to be to decide; for what is near to zero
  u32 lowest;                      // place from which on tokens may be kept, or some that are not
  float light;                     // the logarithm of what a group weighs at the least that has a token that may be kept
  u32 edge;                        // the value at which top-p ends, if it has equals, or kNoEdge
  u64 ranked;                      // key of the earliest token of that value, when its equals before it, or after it, are counted:
  u32 rank;                        // so many
  Judged judged[kMostJudged];
  float sums[kTallyWarps];  // what each warp's tokens weigh
  double shares[kTallyWarps];
  float masses[kTallyWarps];
  int chosen, then;                // who is to be looked at closer; who is after that
  int n_early, n_open, n_judged, n_holders, n_equals;
  u16 early[kMostTallied], open[kMostTallied];  // early: then those groups that may have a token at which top-p ends
  int equals[kMostEquals];
};
static_assert(sizeof(TallyArriveShared) <= kTallyBytes);

struct TallyArrive : TallyRow {
  TallyArriveShared& s;
  float whole, wanted;

  ATTNKIT_DEVICE TallyArrive(const SampleParams& p, char* memory)
      : TallyRow(p, memory), s(*reinterpret_cast<TallyArriveShared*>(memory)) {}

  ATTNKIT_DEVICE void open() const {
    TallyRow::open();
    if (threadIdx.x == 0) s.rank = 0, s.ranked = 0, s.n_early = s.n_open = s.n_judged = s.n_holders = s.n_equals = 0;
  }

  // Minus the logarithm of each group's word. By all but the asker.
  ATTNKIT_DEVICE void load_words() const {
    const Philox groups(s.guess.seed, s.guess.offset, kOfGroups);
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < p.blocks * 32; c += kAsker * 32) {
      u32 w[4];
      groups.words(static_cast<u32>(c), w);
      u16* const to = hopes + c / 32 * 128 + c % 32;
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j * 32] = half_of(32.0f - log2_fast(__uint2float_rn(w[j]) + 0.5f));
    }
  }
  ATTNKIT_DEVICE static u16 half_of(float x) { return static_cast<u16>(pack_f16(x, 0.0f)); }

  // ---- what places weigh ----

  // What four places of each lane weigh, and what those after them do, of as many. By the weighers.
  ATTNKIT_DEVICE void weigh_places() const {
#pragma unroll 1
    for (int of = warp - kNoters; of < kTallyWarps; of += kWeighers) {
      const int cell = of * 32 + lane;
      const uint4 q = reinterpret_cast<const uint4*>(s.counters)[cell];
      const u32 n[4] = {q.x, q.y, q.z, q.w};
      float to = 0.0f;
      if (__any_sync(0xffffffffu, (q.x | q.y | q.z | q.w) != 0)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float mass = mass_of(values.value(cell * 4 + i));
          to += n[i] != 0 && cell * 4 + i < Values::kRest ? __uint2float_rn(n[i]) * mass : 0.0f;
        }
        to = sum_from(to);
      }
      s.after[cell] = of_next(to);
      if (lane == 0) s.masses[of] = to;
    }
    named_barrier(2, kWeighers * 32);
    if (warp == kNoters) {
      const float to = sum_from(s.masses[lane]);
      s.after_warps[lane] = of_next(to);
      if (lane == 0) s.counted = to;
      set_margin();
      __syncwarp();
      find_lowest();
    }
  }

  // How far from what is wanted a sum has to be to decide: roundings of floats add up to less.
  ATTNKIT_DEVICE void set_margin() const {
    s.vague = mass_of_vague();
    s.margin = wanted * 3e-6f * large() + s.vague;
    // What lies beyond the counters is refused: if the least of it weighs more than the row, there is none.
    if (s.guess.top_p < 1.0f && !(mass_of(values.value(Values::kRest)) > whole)) s.stale = 1;
  }

  // From which place on tokens may be kept, and what a group weighs that has one. By the warp that added all up.
  ATTNKIT_DEVICE void find_lowest() const {
    const float enough = wanted + s.margin;
    float after;
    const u32 lowest = 4 * find_four(enough, after);
    const bool all = lowest == 0 || lowest >= Values::kRest || values.vague(lowest) || s.counted < enough;
    if (lane == 0) s.lowest = lowest, s.light = all ? negative_infinity() : __fmaf_rn(values.value(lowest), scale, shift) - 0.15f;
  }
  // Which four places hold the first for which it and those after it weigh ``enough``; what those after the four weigh.
  ATTNKIT_DEVICE u32 find_four(float enough, float& after) const {
    const int of = __popc(__ballot_sync(0xffffffffu, s.after_warps[lane] >= enough));
    after = s.after_warps[of] + s.after[of * 32 + lane];
    const int in = __popc(__ballot_sync(0xffffffffu, after >= enough));
    after = __shfl_sync(0xffffffffu, after, in & 31);
    return of * 32 + in;
  }
  // The value at which top-p ends. A warp's work.
  ATTNKIT_DEVICE void find_edge() const {
    float upto;
    const u32 place = find_four(wanted, upto) * 4 + 3 - (lane & 3), n = place < Values::kRest ? s.counters[place] : 0;
    const float mass = n == 0 ? 0.0f : __uint2float_rn(n) * mass_of(values.value(place));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float one = __shfl_sync(0xffffffffu, mass, i);
      upto += i <= (lane & 3) ? one : 0.0f;
    }
    const u32 ends = __ballot_sync(0xffffffffu, upto >= wanted);
    const bool some = n > 1 && !values.vague(place);
    if (lane == __ffs(ends | 1u << 31) - 1) s.edge = some ? __float_as_uint(values.value(place)) >> 16 : kNoEdge;
  }
  static constexpr u32 kNoEdge = 0x10000;

  // ---- who arrives early ----

  // Groups of which a token may arrive before ``time``. By the noters.
  ATTNKIT_DEVICE void list_early(float time) const {
    const float log = log2_fast(time);
    list_hopes(-log - 0.1f - fabsf(log) * 2e-3f, 0, kNoters, s.n_early);
  }
  // Lists groups of which is hoped as much. By some warps.
  ATTNKIT_DEVICE void list_hopes(float least, int first, int warps, int& n) const {
    const u32 both = pack_f16(least, least);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) - first * 32; i < pieces * 4; i += warps * 32) {
      const uint4 q = reinterpret_cast<const uint4*>(hopes)[i];
      const u32 w[4] = {q.x, q.y, q.z, q.w};
      u32 early = 0;  // a bit for each
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 is;
        asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(is) : "r"(w[j]), "r"(both));
        early |= is & 0x10001u << j;
      }
      if (early == 0) continue;
      int at = atomicAdd(&n, __popc(early));
#pragma unroll 1
      for (; early != 0; early &= early - 1, ++at) {
        const int j = __ffs(early) - 1;
        if (at < kMostTallied) s.early[at] = static_cast<u16>(i * 8 + j % 16 * 2 + j / 16);
      }
    }
  }

  // Of the groups that arrive early, lists those that weigh as much as a token that may be kept: where p is small few do.
  ATTNKIT_DEVICE void list_open() const {
    const int i = static_cast<int>(threadIdx.x), found = min(s.n_early, kMostTallied), group = i < found ? s.early[i] : 0;
    const float mass = i < found ? mass_of_group(group) : 0.0f;
    __syncthreads();
    if (i < found && !(mass < s.light)) s.open[atomicAdd(&s.n_open, 1)] = static_cast<u16>(group);
    __syncthreads();
  }
  static_assert(kMostTallied <= kNoters * 32);
  // Its logarithm: what is hoped of a group, and its word's.
  ATTNKIT_DEVICE float mass_of_group(int group) const {
    u32 w[4];
    philox_words(s.guess.seed, s.guess.offset, kOfGroups, static_cast<u32>(group / 128 * 32 + group % 32), w);
    return f16_to_float(hopes[group]) - 32.0f + log2_fast(__uint2float_rn(one_of(w, group / 32)) + 0.5f);
  }

  // Sixteen lanes take a group, unless it is -1, a token each. Notes those that arrive before ``time``; ``narrow``: and may be kept.
  ATTNKIT_DEVICE void note_two(int group, float time, bool narrow) const {
    const int in = lane & 15, number = max(group, 0);
    const int v = first_of_group(number) + in / 4 * kChunk + in % 4;
    const bool there = group >= 0 && v < p.V;
    const u32 bits = there ? load_one(v) : 0xff80u;
    // What needs no logit, while they come. Of four lanes with a chunk's tokens one works out their words, another may the group's.
    const Noise kind = in == 1 ? kOfGroups : in == 5 ? kInside : kOfTokens;
    u32 words[4];
    philox_words(s.guess.seed, s.guess.offset, kind,
                 static_cast<u32>(in == 1 ? number / 128 * 32 + number % 32 : in == 5 ? number : v / 4), words);
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 one = __shfl_sync(0xffffffffu, words[i], 0, 4);
      word = i == in % 4 ? one : word;
    }
    const u32 inside = __shfl_sync(0xffffffffu, words[0], 5, 16);
    const float lasts = exponential(word), arrives = exponential(__shfl_sync(0xffffffffu, one_of(words, number / 32), 1, 16));
    const float l = warm(reference, s.o), floor = less_log(l, time) + fabsf(l) * 1e-6f + 1e-3f;
    const float x = __uint_as_float(bits << 16);
    float base = x;
#pragma unroll
    for (int step = 1; step < 16; step *= 2) base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, step));
    const float mass = exp2_fast((x - base) * scale);
    // As all implementations add: four neighbours, then chunks.
    float upto = 0.0f, chunk = 0.0f, before = 0.0f, all = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float one = __shfl_sync(0xffffffffu, mass, i, 4);
      chunk = i == 0 ? one : __fadd_rn(chunk, one);
      if (i == in % 4) upto = chunk;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c == in / 4) before = all;
      all = __fadd_rn(all, __shfl_sync(0xffffffffu, chunk, 4 * c, 16));
    }
    const u32 holders = __ballot_sync(0xffffffffu, __fadd_rn(before, upto) > share_of(inside, all)) >> (lane & 16) & 0xffffu;
    const float wait = in == __ffs(holders) - 1 ? 0.0f : __fmul_rn(lasts, reciprocal(mass));
    const float score = less_log(warm(base, s.o), __fadd_rn(__fmul_rn(arrives, reciprocal(all)), wait));
    if (!(there && score >= floor && x > negative_infinity()) || (narrow && !may_be_kept(bits))) return;
    const int to = atomicAdd(&s.n_judged, 1);
    if (to < kMostJudged) s.judged[to].key = pack_best(score, group_order(v)), s.judged[to].bits = static_cast<u16>(bits);
  }

  ATTNKIT_DEVICE bool may_be_kept(u32 bits) const {
    const u32 place = values.place(bits);
    return (values.vague(place) ? values.near_zero() : place) >= s.lowest && (place < Values::kRest || s.counted < wanted + s.margin);
  }

  // Notes tokens of the groups that arrive early, or of those that are open, two groups a warp at a time.
  ATTNKIT_DEVICE void note_early(float time, bool narrow) const {
    if (warp >= kNoters) {
      weigh_places();
    } else {
      list_early(time);
      named_barrier(3, kNoters * 32);
    }
    if (narrow) list_open();
    const u16* const list = narrow ? s.open : s.early;
    const int found = min(narrow ? s.n_open : s.n_early, kMostTallied), warps = narrow ? kOpeners : kNoters;
    if (warp < warps) {
#pragma unroll 1
      for (int i = 2 * warp; i < found; i += 2 * warps) note_two(i + lane / 16 < found ? list[i + lane / 16] : -1, time, narrow);
    }
    if (!narrow && warp == kNoters) find_edge();
    if (narrow && warp >= kOpeners) list_equals();
    __syncthreads();
  }

  // ---- equals ----

  // f(eight tokens, the first's id) for a thread's part of tokens ``from`` to ``to``, multiples of eight: of the last kThreads. What does
  // not stay in shared memory is on its way while the rest is looked at.
  template <int kThreads, class F>
  ATTNKIT_DEVICE void for_eights(u32 from, u32 to, F&& f) const {
    constexpr u32 kFar = 3, kNear = 2;
    const u32 first = first_kept * kSlotTokens, kept = min(first, to), t = threadIdx.x - (kTallyThreads - kThreads);
    uint4 q[kFar];
    u32 v = from + t * 8;
    const auto ask = [&] {
#pragma unroll
      for (u32 u = 0; u < kFar; ++u) {
        const u32 at = v + u * kThreads * 8;
        q[u] = *reinterpret_cast<const uint4*>(logits + (at < kept ? at : from) * 2);
      }
    };
    if (v < kept) ask();
    const u32 bytes = slots * kSlotBytes, end = smem_address(held) + bytes;
    u32 near = max(from, first) + t * 8, at = smem_address(held) + near * 2;
    while (at >= end) at -= bytes;
#pragma unroll 1
    for (; near < to; near += kNear * kThreads * 8) {
      uint4 one[kNear];
#pragma unroll
      for (u32 u = 0; u < kNear; ++u) {
        if (near + u * kThreads * 8 < to) one[u] = load_shared<uint4>(at);
        at += kThreads * 16;
        if (at >= end) at -= bytes;
      }
#pragma unroll
      for (u32 u = 0; u < kNear; ++u) {
        if (near + u * kThreads * 8 < to) f(one[u], static_cast<int>(near + u * kThreads * 8));
      }
    }
#pragma unroll 1
    while (v < kept) {
#pragma unroll
      for (u32 u = 0; u < kFar; ++u) {
        if (v + u * kThreads * 8 < kept) f(q[u], static_cast<int>(v + u * kThreads * 8));
      }
      v += kFar * kThreads * 8;
      if (v < kept) ask();
    }
  }
  // Over all threads.
  ATTNKIT_DEVICE double sum_of(double x) const {
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) s.shares[warp] = x;
    __syncthreads();
    return warp_sum(s.shares[lane]);
  }

  // How many tokens before ``id`` have a value, or after it; a part of one of the last kThreads.
  template <int kThreads>
  ATTNKIT_DEVICE u32 count_equal(u32 bits, int id) const {
    const u32 both = bits << 16 | bits;
    const bool before = counts_before(id);
    const int eight = id & ~7, t = static_cast<int>(threadIdx.x) - (kTallyThreads - kThreads);
    u32 sum = 0;  // of either half, as bf16: fewer than 256
    for_eights<kThreads>(before ? 0 : eight + 8, before ? eight : p.V, [&](const uint4& q, int) {
      const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 equal;
        asm("set.eq.bf16x2.bf16x2 %0, %1, %2;" : "=r"(equal) : "r"(w[i]), "r"(both));
        asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(sum) : "r"(equal));
      }
    });
    const bool near = t < 8 && (before ? eight + t < id : eight + t > id) && load_one(eight + t) == bits;
    const float2 two = unpack(sum, true);
    return static_cast<u32>(two.x + two.y) + (near ? 1 : 0);
  }

  // How many of its equals precede a token. By all.
  ATTNKIT_DEVICE u32 rank_of(const Judged& one, u32 equals) const {
    if (equals == 1) return 0;
    if (one.key == s.ranked) return rank_of(one.id(), equals, s.rank);
    return rank_of(one.id(), equals, static_cast<u32>(sum_of(count_equal<kTallyThreads>(one.bits, one.id()))));
  }
  ATTNKIT_DEVICE u32 rank_of(int id, u32 equals, u32 counted) const { return counts_before(id) ? counted : equals - 1 - counted; }
  // Those before it are counted, or those after it: what stays in shared memory is near.
  ATTNKIT_DEVICE bool counts_before(int id) const { return first_kept == 0 ? id < p.V / 2 : id < first_kept * kSlotTokens; }

  // Counts for the earliest token of the value at which top-p ends, if one is noted, before it is known that somebody asks. By all
  // warps but the first.
  ATTNKIT_DEVICE void count_ahead() const {
    if (warp == 1) {
      u64 key = 0;
#pragma unroll 1
      for (int i = lane; i < min(s.n_judged, kMostJudged); i += 32) key = max(key, s.judged[i].bits == s.edge ? s.judged[i].key : 0);
      s.ranked = warp_max(key);
    }
    named_barrier(1, kCounters);
    const u64 key = s.ranked;
    if (key == 0) return;
    const u32 n = __reduce_add_sync(0xffffffffu, count_equal<kCounters>(s.edge, of_group_order(best_id(key))));
    if (lane == 0) atomicAdd(&s.rank, n);
  }
  static constexpr int kCounters = kTallyThreads - 32;

  // Lists the tokens of the value at which top-p ends, where p is small: few groups may have one. By the warps that are not openers.
  ATTNKIT_DEVICE void list_equals() const {
    constexpr int kListers = kTallyWarps - kOpeners, kAtOnce = 4;
    if (warp == kOpeners) find_edge();
    named_barrier(1, kListers * 32);
    if (s.edge == kNoEdge || s.counters[values.place(s.edge)] > kMostEquals) return;
    // What is hoped of a group is at least what it weighs.
    list_hopes(__fmaf_rn(__uint_as_float(s.edge << 16), scale, shift) - 0.15f, kOpeners, kListers, s.n_holders);
    named_barrier(1, kListers * 32);
    const int n = s.n_holders;
    if (n > kMostTallied) return;
#pragma unroll 1
    for (int i = 2 * (warp - kOpeners) + lane / 16; i < n; i += 2 * kListers * kAtOnce) {
      int v[kAtOnce];
      u32 bits[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = i + u * 2 * kListers;
        v[u] = at < n ? first_of_group(s.early[at]) + lane % 16 / 4 * kChunk + lane % 4 : p.V;
        bits[u] = v[u] < p.V ? load_one(v[u]) : kNoEdge;
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (bits[u] == s.edge) s.equals[atomicAdd(&s.n_equals, 1)] = v[u];
      }
    }
  }

  // ---- who is kept ----

  // What precedes a token, by the counters.
  ATTNKIT_DEVICE void judge(Judged& one) const {
    const u32 place = values.place(one.bits);
    const bool vague = values.vague(place);
    const u32 at = vague ? values.near_zero() : place, cell = at / 4;
    float above = s.after_warps[cell / 32] + s.after[cell];
    const uint4 q = reinterpret_cast<const uint4*>(s.counters)[cell];
    const u32 n[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (u32 i = 1; i < 4; ++i) {
      const u32 after = cell * 4 + i;
      const float more = __uint2float_rn(n[i]) * mass_of(values.value(after));
      above += n[i] != 0 && after > at && after < Values::kRest ? more : 0.0f;
    }
    const u32 equals = s.counters[at] + (vague ? s.counters[at - 1] : 0);
    const float mass = mass_of(values.value(at));
    u32 state = kTooClose;
    if (s.guess.top_p >= 1.0f) {
      state = kKept;
    } else if (place >= Values::kRest) {
      state = s.counted >= wanted + s.margin ? kRefused : kByRest;
    } else if (above + __uint2float_rn(equals - (vague ? 0 : 1)) * mass < wanted - s.margin) {
      state = kKept;
    } else if (above >= wanted + s.margin) {
      state = kRefused;
    } else if (!vague) {
      state = kByRank;
      if (one.bits == s.edge && equals == s.n_equals) {
        u32 rank = 0;
#pragma unroll 1
        for (int i = 0; i < s.n_equals; ++i) rank += s.equals[i] < one.id() ? 1 : 0;
        const u32 known = decide(above + __uint2float_rn(rank) * mass);
        if (known != kTooClose) state = known;
      }
    }
    one.above = above, one.state = static_cast<u16>(state);
  }

  // Whether a token that the counters leave open is kept, or kTooClose. By all.
  ATTNKIT_DEVICE u32 decide(const Judged& one) const {
    if (one.state == kTooClose) return kTooClose;
    if (one.state == kByRest) return decide(s.counted + static_cast<float>(sum_of(rest_before(one.bits, one.id()))));
    const u32 rank = rank_of(one, s.counters[values.place(one.bits)]), state = decide_by_rank(one, rank);
    return state == kTooClose ? decide_closely(values.place(one.bits), rank) : state;
  }
  ATTNKIT_DEVICE u32 decide_by_rank(const Judged& one, u32 rank) const {
    return decide(one.above + __uint2float_rn(rank) * mass_of(values.value(values.place(one.bits))));
  }
  ATTNKIT_DEVICE u32 decide(float precedes) const {
    return precedes < wanted - s.margin ? kKept : precedes >= wanted + s.margin ? kRefused : kTooClose;
  }

  // The same by sums in double precision, of logits after temperature as the reference rounds them: of all of the row as of its counters.
  ATTNKIT_DEVICE u32 decide_closely(u32 place, u32 rank) const {
    const double base = warm(reference, s.o);
    double above = 0.0, counted = 0.0, streamed = 0.0;
#pragma unroll 1
    for (u32 at = threadIdx.x; at < Values::kRest; at += kTallyThreads) {
      const u32 n = s.counters[at];
      if (n == 0) continue;
      const float x = values.value(at);
      const double mass = exp2((warm(x, s.o) - base) * 1.4426950408889634);
      above += at > place ? n * mass : at == place ? rank * mass : 0.0;
      counted += n * mass, streamed += n * static_cast<double>(mass_of(x));
    }
    const double all = warp_sum(static_cast<double>(s.sums[lane])) / sum_of(streamed) * sum_of(counted);
    const double enough = fminf(s.guess.top_p, 1.0f) * all, margin = enough * 5e-7 * large() + s.vague;
    above = sum_of(above);
    return above < enough - margin ? kKept : above >= enough + margin ? kRefused : kTooClose;
  }

  // What those tokens weigh that have no counter and precede one that has none; a thread's part.
  ATTNKIT_DEVICE double rest_before(u32 bits, int id) const {
    const float own = __uint_as_float(bits << 16);
    float sum = 0.0f;
    for_eights<kTallyThreads>(0, p.V, [&](const uint4& q, int v) {
      const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const u32 one = i % 2 == 0 ? w[i / 2] << 16 : w[i / 2] & 0xffff0000u;
        const float x = __uint_as_float(one);
        const bool before = x > own || (x == own && v + i < id);
        if (before && values.place(one >> 16) >= Values::kRest) sum += mass_of(x);
      }
    });
    return sum;
  }

  // The earliest of those that are not refused, or kNobody. A warp's work.
  ATTNKIT_DEVICE int earliest() const {
    u64 best = 0;
    int at = kNobody;
#pragma unroll 1
    for (int i = lane; i < s.n_judged; i += 32) {
      const Judged& one = s.judged[i];
      if (one.state != kRefused && one.key > best) best = one.key, at = i;
    }
    const u64 most = warp_max(best);
    return __shfl_sync(0xffffffffu, at, __ffs(__ballot_sync(0xffffffffu, best == most)) - 1);
  }

  // A token is kept, or it is refused and its equals after it are. A warp's work.
  ATTNKIT_DEVICE void settle(const Judged& last, u32 state) const {
#pragma unroll 1
    for (int i = lane; i < s.n_judged; i += 32) {
      Judged& one = s.judged[i];
      const bool is = one.state == last.state && one.bits == last.bits;
      if (is && (one.id() == last.id() || (state == kRefused && one.id() > last.id()))) one.state = static_cast<u16>(state);
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void give(int id) const { p.tokens[b] = id, p.valid[b] = true; }

  // Draws the earliest token of those that are not refused, if it is kept. Which is to be looked at closer, or kNobody, or kDrawn. A
  // warp's work.
  ATTNKIT_DEVICE int choose() const {
    const int at = earliest();
    if (at < 0 || s.judged[at].state != kKept) return at;
    if (lane == 0) give(s.judged[at].id());
    return kDrawn;
  }

  // Goes on where the equals of that token were counted ahead. By all.
  ATTNKIT_DEVICE int choose_ranked(int at) const {
    if (warp == 0) {
      const Judged one = s.judged[at];
      const u32 state = decide_by_rank(one, rank_of(one.id(), s.counters[values.place(one.bits)], s.rank));
      if (state != kTooClose) settle(one, state);
      const int then = choose();
      if (lane == 0) s.then = then;
    }
    __syncthreads();
    return s.then;
  }

  // Goes on where that token is none that the counters alone decide, by all, with what shared memory has. True if one is drawn.
  ATTNKIT_DEVICE bool look_closer(int chosen) {
    take_bound(), take_whole();
#pragma unroll 1
    for (int round = 0; chosen >= 0; ++round) {
      const Judged one = s.judged[chosen];
      if (one.state == kByRest && round > 2) return false;
      const u32 state = decide(one);
      if (state == kTooClose) return false;
      __syncthreads();
      if (warp == 0) {
        settle(one, state);
        chosen = choose();
        if (lane == 0) s.chosen = chosen;
      }
      __syncthreads();
      chosen = s.chosen;
    }
    return chosen == kDrawn;
  }

  ATTNKIT_DEVICE void take_whole() {
    whole = warp_sum(s.sums[lane]);
    wanted = fminf(s.guess.top_p, 1.0f) * whole;
  }

  // Counts the row and keeps what is hoped of its groups; what a lane's weigh.
  template <bool Positive>
  ATTNKIT_DEVICE float weigh_row() const {
    float sum = 0.0f;
    stream([&](const Raw<kBf16>(&raw)[4], u16& hope) {
      float sums[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        count<Positive>(raw[c]);
        sums[c] = mass_of(raw[c]);
      }
      const float mass = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      sum += mass;
      hope = half_of(log2_fast(mass) + f16_to_float(hope));
    });
    return sum;
  }

  // Draws the row's token, or says which is to be looked at closer, or kNobody.
  ATTNKIT_DEVICE int draw() {
    take_bound();
    if (!usual() || !(s.guess.top_p >= kLeastTallied)) return kNobody;
    if (warp == kAsker && !(TallyOptions(p, b) == s.guess)) s.stale = 1;
    const float mine = warp_sum(values.positive ? weigh_row<true>() : weigh_row<false>());
    if (lane == 0) s.sums[warp] = mine;
    __syncthreads();
    take_whole();
    if (!(whole < 1e30f)) return kNobody;
    const bool narrow = s.guess.top_p < kNarrow;
    // Of 60 000 rows one has no token by then that is kept.
    note_early((11.0f * reciprocal(fminf(s.guess.top_p, 1.0f)) + 2.0f) * reciprocal(whole), narrow);
    if (warp == 0) {
      int at = kNobody;
      if (s.stale == 0 && s.n_judged <= kMostJudged && s.n_early <= kMostTallied) {
#pragma unroll 1
        for (int i = lane; i < s.n_judged; i += 32) judge(s.judged[i]);
        __syncwarp();
        at = choose();
      }
      if (lane == 0) s.chosen = at;
    } else if (!narrow) {
      count_ahead();
    }
    __syncthreads();
    const int at = s.chosen;
    return at >= 0 && s.judged[at].key == s.ranked ? choose_ranked(at) : at;
  }
};

}  // namespace attnkit::sampling
