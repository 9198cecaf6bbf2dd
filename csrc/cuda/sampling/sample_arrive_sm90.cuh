// Top-p without top-k and min-p, in one launch: a cluster for each row, all rows at the same time as long as there is room.
// First a CTA reads its share of the logits once and keeps of each group of 16 tokens the largest logit (peak) and the sum of exp, in
// shared memory. When groups arrive needs no logits (draw_by_arrival in attnkit/reference.py), so only the earliest are read
// again. Their tokens, in order of time, are judged by what precedes them: no more than the groups whose peak reaches them, and a like
// bound from below. Where these do not decide, those groups are read again. The first token that top-p keeps is drawn.
//
// Order throughout: by logit after temperature, then by the lower id. What decides is a sum of whole multiples of a power of
// two, so that no order of adding shows; sums of floats decide only where they are far enough from what is wanted.
#pragma once
#include "sample_filter_sm90.cuh"
#include "sample_split_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kArriveThreads = ATTNKIT_THREADS, kArriveWarps = kArriveThreads / 32, kMostArriveWarps = 16;
constexpr int kPiecesAhead = kArriveThreads == 256 ? 4 : 2;  // pieces of 512 tokens that a warp has on their way
constexpr int kNearAhead = kArriveThreads == 256 ? 3 : 2;    // groups that a thread has on their way, where they are read again
constexpr int kMostParts = 8;    // CTAs of a row
constexpr int kMostEarly = 128;  // groups of a CTA that arrive early
constexpr int kTold = 64;        // tokens of a row that arrive early
constexpr int kProbes = 4;       // tokens that are judged at a time

// A group's sum of exp, its largest counting one. Converged warps only.
template <int Type>
ATTNKIT_DEVICE float sum_of(const Raw<Type> (&raw)[4], float peak, float scale) {
  const float base = peak > negative_infinity() ? fminf(peak, kF32Max) : 0.0f, shift = -base * scale;
  float sums[4];
  if (__any_sync(0xffffffffu, fabsf(shift) > 64.0f)) {  // a product and a sum would lose digits
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Type>(raw[c], x);
      sums[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c] += exp2_fast((fminf(x[i], kF32Max) - base) * scale);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Type>(raw[c], x);
      sums[c] = exp2_fast(__fmaf_rn(x[0], scale, shift));
#pragma unroll
      for (int i = 1; i < 4; ++i) sums[c] += exp2_fast(__fmaf_rn(x[i], scale, shift));
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The larger the score, the earlier. ``logit``: after temperature.
struct alignas(16) Arrival {
  float score, logit;
  int id;
};

// Shared memory; the groups follow. Mirrors ARRIVE_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct ArriveShared {
  Arrival told[kTold];         // by all CTAs, in parts
  uint4 about[kMostParts];     // of every CTA: largest logit, a NaN seen, mass
  uint4 bests[2][kMostParts];  // of every CTA
  u64 sums[kMostArriveWarps];
  Place probes[kProbes];
  u32 above[3][2 * kProbes];
  float most[kMostArriveWarps];
  int early[kMostEarly];
  int n_early, n_told, n_probes, n_near;
  int over;  // some CTA had more to tell
};
static_assert(sizeof(ArriveShared) == 2272, "ARRIVE_BYTES");

// Tokens in the order of their groups: of equals the first group's wins.
ATTNKIT_DEVICE int group_order(int id) { return (id / kPiece * 32 + id % kChunk / 4) * 16 + id % kPiece / kChunk * 4 + id % 4; }
ATTNKIT_DEVICE int of_group_order(int at) { return first_of_group(at / 16) + at % 16 / 4 * kChunk + at % 4; }

template <int Type, bool Penalised>
struct ArriveRow {
  static constexpr int kHeld = Penalised ? kF32 : Type;  // what penalties make of logits are floats
  const SampleParams& p;
  ArriveShared& s;
  float2* const groups;  // of this CTA: peak, and mass, its largest logit's being one
  u16* const marks;      // of each group the upper half of its word; then which groups' peaks reach a probe
  const int b, size, rank, n;
  const RowPointers& r;
  const RowOptions& o;
  const float top_p, scale;
  const u64 seed, offset;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  int turn = 0;
  float here = 0.0f, part = 0.0f;      // this CTA's largest logit, and its mass, the row's largest being one
  float largest = 0.0f, top = 0.0f;    // the row's largest logit, before and after temperature
  float whole = 0.0f, unit = 0.0f;     // the row's mass; 2^30 to 2^31 units are the row's
  u32 wanted = 0;                      // tokens are kept as long as what precedes them weighs less
  Place end{-negative_infinity(), 0};  // the first token that is known to be refused
  bool any = true;                     // none is

  // Blocks are dealt to CTAs in turn.
  ATTNKIT_DEVICE int number_of(int i) const { return (i / 128 * size + rank) * 128 + i % 128; }
  ATTNKIT_DEVICE bool open(float l, int id) const { return any || end.after(l, id); }
  // A logit before temperature, and from where on it surely is as large, or larger, after. The largest float is what all that
  // temperature lifts beyond it become.
  ATTNKIT_DEVICE float raw_of(float l) const { return fminf(fmaxf(l * o.t, -kF32Max), kF32Max); }
  ATTNKIT_DEVICE float from(float l) const { return raw_of(l) - fabsf(raw_of(l)) * kRounding; }
  ATTNKIT_DEVICE float past(float l) const { return l < kF32Max ? raw_of(l) + fabsf(raw_of(l)) * kRounding : -negative_infinity(); }
  ATTNKIT_DEVICE void write(int token, bool good) const {
    if (rank == 0 && threadIdx.x == 0) p.tokens[b] = token, p.valid[b] = good;
  }

  // ---- the row's mass ----

  ATTNKIT_DEVICE void load_words() {
#pragma unroll 1
    for (int c = threadIdx.x; c < n / 4; c += kArriveThreads) {
      u32 w[4];
      philox_words(seed, offset, kOfGroups, static_cast<u32>((c / 32 * size + rank) * 32 + lane), w);
#pragma unroll
      for (int j = 0; j < 4; ++j) marks[c / 32 * 128 + j * 32 + lane] = static_cast<u16>(w[j] >> 16);
    }
  }

  // All pieces of this CTA's share, 512 tokens each, those that follow on their way: ``take`` gets what a lane has of one and the
  // place of its group. While the first are, words are worked out.
  template <class F>
  ATTNKIT_DEVICE void stream_share(F&& take) {
    constexpr int kParts = 4 / kPiecesAhead;
    const int parts = n / 128 * kParts, last = (b + 1) * p.blocks;
    const auto spot_of = [&](int i) { return Spot<Type>(p, i < parts ? b * p.blocks + i / kParts * size + rank : last, last); };
    int i = warp;
    Spot<Type> spot = spot_of(i);
    Raw<Type> raw[kPiecesAhead][4];
    if (spot.whole) {
#pragma unroll
      for (int u = 0; u < kPiecesAhead; ++u) spot.load(raw[u], i % kParts * kPiecesAhead + u);
    }
    load_words();
#pragma unroll 1
    for (; i < parts; i += kArriveWarps) {
      const Spot<Type> next = spot_of(i + kArriveWarps);
      const int first = i % kParts * kPiecesAhead, at = i * (128 / kParts) + lane;  // kArriveWarps is a multiple of kParts
      if (spot.whole) {
#pragma unroll
        for (int u = 0; u < kPiecesAhead; ++u) {
          take(raw[u], at + u * 32);
          if (next.whole) next.load(raw[u], first + u);
        }
      } else {
#pragma unroll 1
        for (int u = 0; u < kPiecesAhead; ++u) {
          Raw<Type> held[4];
          load_piece<Type, false>(held, r, o, spot.v + (first + u) * kPiece + lane * 4, p.V);
          take(held, at + u * 32);
        }
        if (next.whole) {
#pragma unroll
          for (int u = 0; u < kPiecesAhead; ++u) next.load(raw[u], first + u);
        }
      }
      spot = next;
    }
  }

  // The same with penalties: one piece is on its way, and L2 asks for the next but one.
  template <class F>
  ATTNKIT_DEVICE void stream_penalised(F&& take) {
    const int pieces = n / 32;
    const auto first_of = [&](int i) { return (i / 4 * size + rank) * kBlock + i % 4 * kPiece; };
    int i = warp;
    Fetched<Type, true> fetched;
    if (i < pieces) fetched.ask(r, first_of(i) + lane * 4, p.V);
    load_words();
#pragma unroll 1
    for (; i < pieces; i += kArriveWarps) {
      const int coming = i + kArriveWarps;
      Raw<kF32> held[4];
      fetched.use(held, r, o, first_of(i) + lane * 4, p.V);
      if (coming < pieces) fetched.ask(r, first_of(coming) + lane * 4, p.V);
      if (coming + kArriveWarps < pieces) ask_l2<Type>(p, b, first_of(coming + kArriveWarps));
      take(held, i * 32 + lane);
    }
  }

  // Of each group the largest logit and the sum of exp; the largest of all, or NaN.
  ATTNKIT_DEVICE float take_in() {
    float most = negative_infinity();
    const auto take = [&](const Raw<kHeld>(&raw)[4], int i) {
      const float peak = peak_of<kHeld>(raw);
      most = max_nan(most, peak);
      groups[i] = make_float2(peak, sum_of<kHeld>(raw, peak, scale));
    };
    if constexpr (Penalised) {
      stream_penalised(take);
    } else {
      stream_share(take);
    }
    return most;
  }

  // What the row weighs. False for a row with NaN or without a token.
  ATTNKIT_DEVICE bool add_up_row(float most) {
    const int pairs = n / 2;
    float4* const to = reinterpret_cast<float4*>(groups);
    const u32 key = __reduce_max_sync(0xffffffffu, order_key(most == most ? most : negative_infinity()));
    if (lane == 0) s.most[warp] = order_value(key);
    const bool odd = __syncthreads_or(most != most) != 0;
    here = fminf(order_value(__reduce_max_sync(0xffffffffu, order_key(s.most[lane % kArriveWarps]))), kF32Max);
    const float base = here > negative_infinity() ? here : 0.0f;
    u64 sum = 0;
#pragma unroll 2
    for (int i = threadIdx.x; i < pairs; i += kArriveThreads) {
      float4 q = to[i];
      q.y *= exp2_fast((fminf(q.x, kF32Max) - base) * scale);
      q.w *= exp2_fast((fminf(q.z, kF32Max) - base) * scale);
      to[i] = q;
      sum += static_cast<u64>((q.y + q.w) * kMassOne);
    }
    const u64 low24 = __reduce_add_sync(0xffffffffu, static_cast<u32>(sum) & 0xffffffu);
    const u64 high = __reduce_add_sync(0xffffffffu, static_cast<u32>(sum >> 24));
    if (lane == 0) s.sums[warp] = low24 + (high << 24);
    __syncthreads();
    cluster_wait();
    if (threadIdx.x < size) {
      u64 all = 0;
#pragma unroll 4
      for (int i = 0; i < kArriveWarps; ++i) all += s.sums[i];
      const uint4 record = make_uint4(__float_as_uint(here), odd, static_cast<u32>(all), high_word(all));
      store_remote(remote_address(&s.about[rank], threadIdx.x), record);
    }
    cluster_sync();
    const uint4 q = s.about[min(lane, size - 1)];
    if (__any_sync(0xffffffffu, q.y != 0)) return false;
    const float own = __uint_as_float(q.x);
    largest = order_value(__reduce_max_sync(0xffffffffu, order_key(own)));
    if (!(largest > negative_infinity())) return false;
    top = warm(largest, o);
    part = exp2_fast((here - largest) * scale);
    float mass = static_cast<float>(static_cast<u64>(q.w) << 32 | q.z) * (1.0f / kMassOne) * exp2_fast((own - largest) * scale);
    mass = lane < size ? mass : 0.0f;
#pragma unroll
    for (int step = 1; step < kMostParts; step *= 2) mass += __shfl_xor_sync(0xffffffffu, mass, step);
    whole = __shfl_sync(0xffffffffu, mass, 0);
    unit = __uint_as_float((284u << 23) - (__float_as_uint(fmaxf(whole, 1.0f)) & 0x7f800000u));
    wanted = max(1u, static_cast<u32>(ceil(static_cast<double>(top_p) * static_cast<double>(whole) * static_cast<double>(unit))));
    return true;
  }

  // ---- who arrives ----

  // Tells all CTAs which open tokens arrive before ``time`` (of the row's largest logit). Sixteen lanes take a group.
  ATTNKIT_DEVICE void tell_early(float time) {
    const float pace = 1.002f * 65536.0f * time * part, floor = less_log(top, time) + fabsf(top) * 1e-6f + 1e-3f, least = from(end.logit);
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kArriveThreads) {
      const float2 q = groups[i];
      // E >= u: no group is missed.
      if (static_cast<float>(marks[i]) > q.y * pace || !(any || q.x >= least)) continue;
      const int at = atomicAdd(&s.n_early, 1);
      if (at < kMostEarly) s.early[at] = i;
    }
    __syncthreads();
    const int found = s.n_early, room = kTold / size, place = lane & 15;
    if (found > kMostEarly) tell_over();
#pragma unroll 1
    for (int i = 2 * warp; i < min(found, kMostEarly); i += 2 * kArriveWarps) {
      const bool is = i + lane / 16 < min(found, kMostEarly);
      const int number = number_of(s.early[is ? i + lane / 16 : i]), id = first_of_group(number) + place / 4 * kChunk + place % 4;
      float four[4];
      load_chunk<Type, Penalised>(four, r, o, id & ~3, p.V);
      u32 own[4], shared[4];
      philox_words(seed, offset, kOfTokens, static_cast<u32>(id) >> 2, own);
      const bool inner = (lane & 1) != 0;
      philox_words(seed, offset, inner ? kInside : kOfGroups, static_cast<u32>(inner ? number : number / 128 * 32 + number % 32), shared);
      const u32 word = __shfl_sync(0xffffffffu, one_of(shared, number / 32), 0, 16), inside = __shfl_sync(0xffffffffu, shared[0], 1, 16);
      const float x = fminf(one_of(four, place), kF32Max);
      float base = x;
#pragma unroll
      for (int step = 1; step < 16; step *= 2) base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, step));
      const float mass = exp2_fast((x - base) * scale);
      float upto = mass;
#pragma unroll
      for (int step = 1; step < 16; step *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, upto, step, 16);
        upto = place >= step ? __fadd_rn(upto, other) : upto;
      }
      const float all = __shfl_sync(0xffffffffu, upto, 15, 16);
      // Behind the last token sums may round otherwise: only tokens that are there count.
      const u32 there = __ballot_sync(0xffffffffu, x > negative_infinity()) >> (lane & 16) & 0xffffu;
      const u32 past = __ballot_sync(0xffffffffu, upto > share_of(inside, all)) >> (lane & 16) & there;
      const int first = past != 0 ? __ffs(past) - 1 : 31 - __clz(there);
      const float wait = place == first ? 0.0f : __fmul_rn(exponential(one_of(own, id)), reciprocal(mass));
      const float score = less_log(warm(base, o), __fadd_rn(__fmul_rn(exponential(word), reciprocal(all)), wait)), l = warm(x, o);
      if (!is || !(score >= floor) || !(x > negative_infinity()) || !open(l, id)) continue;
      const int at = atomicAdd(&s.n_told, 1);
      if (at >= room) tell_over();
      const uint4 record = make_uint4(__float_as_uint(score), __float_as_uint(l), static_cast<u32>(id), 0);
#pragma unroll 1
      for (int cta = 0; cta < size && at < room; ++cta) store_remote(remote_address(&s.told[rank * room + at], cta), record);
    }
    cluster_sync();
  }

  // What is told is not all.
  ATTNKIT_DEVICE void tell_over() {
#pragma unroll 1
    for (int cta = 0; cta < size; ++cta) store_remote(remote_address(&s.over, cta), 1u);
  }

  // Nothing is told: at first, and again when all have read.
  ATTNKIT_DEVICE void forget_told() {
    if (threadIdx.x < kTold) s.told[threadIdx.x].score = negative_infinity();
    if (threadIdx.x == 0) s.n_early = s.n_told = s.over = 0;
  }

  // The next open tokens after ``last`` that are told, in order of time. By one warp for all.
  ATTNKIT_DEVICE int next_told(u64& last) {
    __syncthreads();
    if (warp == 0) {
      u64 keys[kTold / 32];
#pragma unroll
      for (int i = 0; i < kTold / 32; ++i) {
        const Arrival one = s.told[32 * i + lane];
        const bool is = s.over == 0 && one.score > negative_infinity() && open(one.logit, one.id);
        keys[i] = is ? pack_best(one.score, group_order(one.id)) : 0;
      }
      int found = 0;
#pragma unroll 1
      for (; found < kProbes; ++found) {
        u64 best = 0;
        int at = 0;
#pragma unroll
        for (int i = 0; i < kTold / 32; ++i) {
          if (keys[i] < last && keys[i] > best) best = keys[i], at = i;
        }
        const u64 next = warp_max(best);
        if (next == 0) break;
        last = next;
        if (best == next) s.probes[found] = Place{s.told[32 * at + lane].logit, s.told[32 * at + lane].id};
      }
      if (lane == 0) s.n_probes = found;
    }
    __syncthreads();
    return s.n_probes;
  }

  // ---- what precedes a token ----

  // Sums of floats differ from the sum of whole numbers, one a token, that decides, by less.
  ATTNKIT_DEVICE u32 margin() const { return (wanted >> 12) + static_cast<u32>(p.V); }

  // Adds up over all CTAs; what a lane gives is its warp's sum for place ``lane % Places``.
  template <int Places>
  ATTNKIT_DEVICE const u32* add_up(u32 mine) {
    // Three in turn: the next is zero before any CTA adds to it, and nobody reads that one now.
    const int now = turn % 3, next = (turn + 1) % 3;
    if (threadIdx.x < 2 * kProbes) s.above[next][threadIdx.x] = 0;
#pragma unroll 1
    for (int i = lane; i < size * Places; i += 32) add_remote(remote_address(&s.above[now][i % Places], i / Places), mine);
    cluster_sync();
    ++turn;
    return s.above[now];
  }

  // Bounds for each probe: no more than the groups whose peak reaches it; no less than the largest of those groups, or all of
  // a group but for 15 tokens like the probe.
  ATTNKIT_DEVICE const u32* bound(int found) {
    float least[kProbes], beyond[kProbes], others[kProbes], high[kProbes], low[kProbes];
#pragma unroll
    for (int q = 0; q < kProbes; ++q) {
      const float logit = s.probes[min(q, found - 1)].logit;
      least[q] = from(logit), beyond[q] = past(logit), others[q] = 15.0f * exp2_fast((raw_of(logit) - here) * scale);
      high[q] = low[q] = 0.0f;
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < n; i += kArriveThreads) {
      const float2 group = groups[i];
      const float peak = exp2_fast((fminf(group.x, kF32Max) - here) * scale);
#pragma unroll
      for (int q = 0; q < kProbes; ++q) {
        if (group.x >= least[q]) high[q] += group.y;
        if (group.x > beyond[q]) low[q] += fmaxf(peak, group.y - others[q]);
      }
    }
    const float to_units = part * unit;
    u32 sum = 0;
#pragma unroll
    for (int q = 0; q < kProbes; ++q) {
      const u32 most = __reduce_add_sync(0xffffffffu, __float2uint_rn(high[q] * to_units));
      const u32 few = __reduce_add_sync(0xffffffffu, __float2uint_rn(low[q] * to_units));
      sum = lane % (2 * kProbes) == q ? most : lane % (2 * kProbes) == kProbes + q ? few : sum;
    }
    return add_up<2 * kProbes>(sum);
  }

  // Lists the groups whose peak reaches ``least``.
  ATTNKIT_DEVICE int list_near(float least) {
    if (threadIdx.x == 0) s.n_near = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kArriveThreads) {
      const bool mine = groups[i].x >= least;
      const u32 is = __ballot_sync(0xffffffffu, mine);
      int at = 0;
      if (lane == 0 && is != 0) at = atomicAdd(&s.n_near, __popc(is));
      at = __shfl_sync(0xffffffffu, at, 0) + __popc(is & ((1u << lane) - 1));
      if (mine) marks[at] = static_cast<u16>(number_of(i));
    }
    __syncthreads();
    return s.n_near;
  }

  // Where a token's logit before temperature reaches ``equal`` it is at least the probe's after it, from ``beyond`` on larger.
  // False if those lie far apart.
  ATTNKIT_DEVICE bool edges(float logit, float& equal, float& beyond) const {
    const float x = order_value(order_key(raw_of(logit)) - 16 + lane), l = tempered(x, o);
    const u32 more = __ballot_sync(0xffffffffu, l > logit), same = __ballot_sync(0xffffffffu, l >= logit);
    equal = __shfl_sync(0xffffffffu, x, __ffs(same) - 1), beyond = __shfl_sync(0xffffffffu, x, __ffs(more) - 1);
    return more != 0 && (same & 1) == 0;
  }

  // What precedes a probe, before temperature: tokens from ``equal`` on where their ids are lower, from ``beyond`` on elsewhere.
  struct Edge {
    float equal, beyond;
    int id;
  };

  // Adds what precedes each probe in a group.
  template <int N>
  ATTNKIT_DEVICE void add_group(const Raw<kHeld> (&raw)[4], int number, const Edge (&edge)[N], float (&above)[N]) const {
    const float shift = -largest * scale;
    const int group = first_of_group(number);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4], mass[4];
      widen_four<kHeld>(raw[c], x);
#pragma unroll
      for (int i = 0; i < 4; ++i) mass[i] = exp2_fast(__fmaf_rn(x[i], scale, shift));
#pragma unroll
      for (int q = 0; q < N; ++q) {
        const float least = number / 32 < edge[q].id / kPiece ? edge[q].equal : edge[q].beyond;
#pragma unroll
        for (int i = 0; i < 4; ++i) above[q] += x[i] >= least ? mass[i] : 0.0f;
      }
    }
#pragma unroll
    for (int q = 0; q < N; ++q) {
      if (number / 32 != edge[q].id / kPiece) continue;
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        float four[4];
        widen_four<kHeld>(one_of(raw, i / 4), four);
        const float x = one_of(four, i);
        const bool is = group + i / 4 * kChunk + i % 4 < edge[q].id && x >= edge[q].equal && x < edge[q].beyond;
        above[q] += is ? exp2_fast(__fmaf_rn(x, scale, shift)) : 0.0f;
      }
    }
  }

  // Listed groups from place ``j`` on, one in ``step``, those that follow on their way: ``take`` gets the tokens and the number.
  template <class F>
  ATTNKIT_DEVICE void read_groups(const u16* list, int found, int j, int step, F&& take) const {
    if constexpr (Penalised) {
      // There are no registers for two: L2 asks for the next.
#pragma unroll 1
      for (; j < found; j += step) {
        const int v = first_of_group(list[j]), next = first_of_group(list[min(j + step, found - 1)]);
        Fetched<Type, true> fetched;
        fetched.ask(r, v, p.V);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const i64 at = min(next + c * kChunk, p.V - 1);
          prefetch_l2(r.logits + at * (Type == kF32 ? 4 : 2));
          if (r.counts != nullptr) prefetch_l2(r.counts + at * 4);
        }
        Raw<kF32> held[4];
        fetched.use(held, r, o, v, p.V);
        take(held, list[j]);
      }
    } else {
#pragma unroll 1
      for (; j < found; j += kNearAhead * step) {
        Fetched<Type, false> fetched[kNearAhead];
#pragma unroll
        for (int u = 0; u < kNearAhead; ++u) {
          if (j + u * step < found) fetched[u].ask(r, first_of_group(list[j + u * step]), p.V);
        }
#pragma unroll
        for (int u = 0; u < kNearAhead; ++u) {
          if (j + u * step < found) take(fetched[u].raw, list[j + u * step]);
        }
      }
    }
  }

  // What precedes the probes in groups whose peak reaches ``least``, as a sum of floats. A warp lists its own; a thread has
  // several on their way.
  template <int N>
  ATTNKIT_DEVICE void add_near(float least, const Edge (&edge)[N], float (&above)[N]) const {
    const int pieces = n / 32, first = pieces * warp / kArriveWarps, last = pieces * (warp + 1) / kArriveWarps;
    u16* const list = marks + first * 32;
    int found = 0;
#pragma unroll 4
    for (int i = first * 32 + lane; i < last * 32; i += 32) {
      const bool mine = groups[i].x >= least;
      const u32 is = __ballot_sync(0xffffffffu, mine);
      if (mine) list[found + __popc(is & ((1u << lane) - 1))] = static_cast<u16>(number_of(i));
      found += __popc(is);
    }
    __syncwarp();
    read_groups(list, found, lane, 32, [&](const Raw<kHeld>(&raw)[4], int number) { add_group(raw, number, edge, above); });
  }

  // The same after temperature, as a sum of whole numbers, one a token.
  ATTNKIT_DEVICE void add_near_exactly(int found, const Place& one, const Place& two, u32 (&above)[2]) const {
    read_groups(marks, found, threadIdx.x, kArriveThreads, [&](const Raw<kHeld>(&raw)[4], int number) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<kHeld>(raw[c], x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int id = first_of_group(number) + c * kChunk + i;
          const float l = tempered(x[i], o);
          const u32 mass = __float2uint_rn(exp2_fast((l - top) * kLog2e) * unit);
          above[0] += one.after(l, id) ? mass : 0;
          above[1] += two.after(l, id) ? mass : 0;
        }
      }
    });
  }

  ATTNKIT_DEVICE const u32* add_up_two(u32 one, u32 two) {
    one = __reduce_add_sync(0xffffffffu, one), two = __reduce_add_sync(0xffffffffu, two);
    return add_up<2>((lane & 1) != 0 ? two : one);
  }

  // Whether probes are kept, a bit each, by sums of floats; false if those are too close to what is wanted.
  template <int N>
  ATTNKIT_DEVICE bool weigh_roughly(const Place (&probes)[N], u32& kept) {
    Edge edge[N];
    float mass[N], least = -negative_infinity();
    bool plain = fabsf(largest * scale) < 64.0f;
#pragma unroll
    for (int q = 0; q < N; ++q) {
      edge[q].id = probes[q].id, mass[q] = 0.0f;
      plain = edges(probes[q].logit, edge[q].equal, edge[q].beyond) && plain;
      least = fminf(least, from(probes[q].logit));
    }
    if (!plain) return false;
    add_near(least, edge, mass);
    const u32* const above = add_up_two(__float2uint_rn(mass[0] * unit), __float2uint_rn(mass[N - 1] * unit));
    bool sure = true;
    kept = 0;
#pragma unroll
    for (int q = 0; q < N; ++q) {
      kept |= (above[q] + margin() < wanted ? 1u : 0u) << q;
      sure = sure && (above[q] + margin() < wanted || above[q] >= wanted + margin());
    }
    return sure;
  }

  // Whether two probes are kept: bit 0 and bit 1.
  ATTNKIT_DEVICE u32 weigh(const Place& one, const Place& two) {
    const Place alone[1] = {one}, both[2] = {one, two};
    u32 kept;
    if (one.id == two.id) {
      if (weigh_roughly<1>(alone, kept)) return kept | kept << 1;
    } else if (weigh_roughly<2>(both, kept)) {
      return kept;
    }
    u32 mass[2] = {0, 0};
    add_near_exactly(list_near(fminf(from(one.logit), from(two.logit))), one, two, mass);
    const u32* const above = add_up_two(mass[0], mass[1]);
    return (above[0] < wanted ? 1 : 0) | (above[1] < wanted ? 2 : 0);
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
      if (lane < size) store_remote(remote_address(&s.bests[half][rank], lane), record);
    }
    cluster_sync();
    const uint4 q = s.bests[half][min(lane, size - 1)];
    const u64 one = static_cast<u64>(q.x) << 32 | q.y, all = warp_max(one);
    logit = __shfl_sync(0xffffffffu, __uint_as_float(q.z), __ffs(__ballot_sync(0xffffffffu, one == all)) - 1);
    return all;
  }

  // The first open token to arrive, by all of the row: the only probe.
  ATTNKIT_DEVICE int first_open(int half) {
    Earliest mine;
    const Place last = any ? Place{negative_infinity(), 0x7fffffff} : end;
    const float least = from(last.logit);
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kArriveThreads) {
      const float base = fminf(groups[i].x, kF32Max);
      if (!(base > negative_infinity()) || !(any || base >= least)) continue;
      const int number = number_of(i), v = first_of_group(number);
      const auto chunk = [&](int c, float(&x)[4]) { load_chunk<Type, Penalised>(x, r, o, v + c * kChunk, p.V); };
      u32 w[4];
      philox_words(seed, offset, kOfGroups, static_cast<u32>(number / 128 * 32 + number % 32), w);
      const u32 word = one_of(w, number / 32);
      // A group's sum is at most 16 times its largest; E >= u.
      const float hope = warm(base, o) - log2_fast(uniform(word)) * kLn2 + 2.78f;
      if (hope + fabsf(hope) * 1e-6f >= mine.best) try_arrivals(mine, chunk, base, number, word, seed, offset, o, last);
    }
    float logit = warm(mine.raw, o);
    const u64 best = best_of_all(mine.best > negative_infinity() ? pack_best(mine.best, group_order(mine.id)) : 0, logit, half);
    if (threadIdx.x == 0) s.probes[0] = Place{logit, of_group_order(best_id(best))};
    __syncthreads();
    return best != 0;
  }

  // The largest logit's lowest id.
  ATTNKIT_DEVICE int choose_largest() {
    u64 best = 0;
    float unused = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kArriveThreads) {
      const int v = first_of_group(number_of(i));
#pragma unroll 1
      for (int c = 0; c < 4 && fminf(groups[i].x, kF32Max) == here; ++c) {
        float x[4];
        load_chunk<Type, Penalised>(x, r, o, v + c * kChunk, p.V);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (fminf(x[j], kF32Max) == here) best = max(best, pack_best(here, v + c * kChunk + j));
        }
      }
    }
    return best_id(best_of_all(best, unused, 0));
  }

  // Nothing is told, once all have read what was. A probe may have been weighed meanwhile: the words' room is a list then.
  ATTNKIT_DEVICE void start_over() {
    cluster_sync();
    forget_told();
    load_words();
    cluster_sync();
  }

  // Tokens that arrive early: first of all groups, some ten, in which most rows find one that is kept; then of those that may
  // have open tokens, so many that one is surely kept; then, for what is odd, one by one by all of the row.
  ATTNKIT_DEVICE int choose() {
    if (o.cold) return choose_largest();
    // Of small p few tokens are kept; of a row that many CTAs share each has room for few that it tells.
    const float some = fminf(6.0f * reciprocal(fmaxf(top_p, 0.1f)) + 2.0f, size <= 2 ? 32.0f : 16.0f);
    float time = some * reciprocal(whole);
    u64 last = 0;
    bool shorter = false;
#pragma unroll 1
    for (int round = 0, half = 0, tells = 0; round < 3;) {
      if (round < 2 && last == 0) {
        tell_early(time);
        if (s.over != 0 && tells < 8) {
          start_over();
          ++tells, time *= 0.35f, shorter = true;
          continue;
        }
        last = ~0ull;
      }
      const int found = round < 2 ? next_told(last) : first_open(half ^= 1);
      if (found == 0) {
        start_over();
        if (!shorter || ++tells >= 8) ++round;
        last = 0, shorter = false, time = 16.0f * reciprocal(fmaxf(top_p, 1e-3f)) * reciprocal(whole);
        continue;
      }
      if (top_p >= 1.0f) return s.probes[0].id;
      const u32* const bounds = bound(found);
      u32 kept = __ballot_sync(0xffffffffu, lane < found && bounds[lane % kProbes] + margin() < wanted);
      u32 refused = __ballot_sync(0xffffffffu, lane < found && bounds[kProbes + lane % kProbes] >= wanted + margin());
#pragma unroll 1
      for (int q = 0; q < found;) {
        const Place probe = s.probes[q];
        if (open(probe.logit, probe.id)) {
          if ((kept >> q & 1) != 0) return probe.id;
          if ((refused >> q & 1) == 0) {  // this one, and the next that is not known
            const u32 unknown = ~(kept | refused) & ((1u << found) - (2u << q));
            const int other = unknown != 0 ? __ffs(unknown) - 1 : q;
            const u32 both = weigh(probe, s.probes[other]);
            ((both & 1) != 0 ? kept : refused) |= 1u << q;
            ((both & 2) != 0 ? kept : refused) |= 1u << other;
            continue;
          }
          end = probe, any = false;
        }
        ++q;
      }
    }
    return 0;  // never: nothing precedes the largest
  }
};

template <int Type, bool Penalised>
ATTNKIT_DEVICE void sample_arrive(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  ArriveShared& s = *reinterpret_cast<ArriveShared*>(memory);
  const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int b = static_cast<int>(blockIdx.x) / size, n = (p.blocks - rank + size - 1) / size * (kBlock / 16);
  if (threadIdx.x < 3 * 2 * kProbes) s.above[0][threadIdx.x] = 0;
  cluster_arrive();
  wait_for_previous_grid();
  launch_dependents();
  const RawOptions raw(p, b);
  const float top_p = option(p.top_p, p.top_p_value, b);
  if (Penalised && p.listed != 0 && top_p >= kCutFrom) {  // the other launch's row: all of the cluster leave
    cluster_wait();
    return;
  }
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<Type>(p, b);
  float2* const groups = reinterpret_cast<float2*>(memory + sizeof(ArriveShared));
  ArriveRow<Type, Penalised> row{p, s, groups, reinterpret_cast<u16*>(groups + n), b, size, rank, n, r, o, top_p, o.rt * kLog2e,
                                 static_cast<u64>(raw.seed), static_cast<u64>(raw.offset)};
  row.forget_told();
  if (!row.add_up_row(row.take_in())) {
    row.write(0, false);
    return;
  }
  row.write(row.choose(), true);
}

}  // namespace attnkit::sampling
