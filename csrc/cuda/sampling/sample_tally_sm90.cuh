// Top-p alone over bf16 logits, in one launch: a CTA has a row and a multiprocessor to itself. Bulk copies bring the row into shared
// memory, and as much of its end as there is room for stays there. While it comes, tokens are counted by their value, and what is
// hoped of each group of 16 is kept. The few groups that arrive early are read again, for when their tokens do, and the counters say
// of each of those what precedes it, but for which of its equals do. A row that this leaves open is drawn by arrival.
// From which value on to count, and when groups would arrive that weigh one, is worked out before the grid before has ended: from a
// sample of the row and from options that are read too early, perhaps. A bad sample costs time alone; options are read again.
#pragma once
#include "sample_arrive_sm90.cuh"
#include "sample_values_sm90.cuh"

namespace attnkit::sampling {

constexpr int kTallyThreads = 1024, kTallyWarps = kTallyThreads / 32;
constexpr int kSlotBytes = 8192, kSlotTokens = kSlotBytes / 2, kSlotPieces = kSlotTokens / kPiece;
constexpr int kMostSlots = 64;          // of a row
constexpr int kAheadSlots = 8;          // that are asked for before one is there
constexpr int kSamplers = 4;            // warps that have a sample of the row each, four tokens a lane
constexpr int kBounds = 32;             // that are tried with each
constexpr int kAsker = kTallyWarps - 1; // the warp that asks for the first slots
constexpr int kWeighers = 16;           // the last warps, which weigh places
constexpr int kMostTallied = 512;       // groups that arrive early
constexpr int kMostJudged = 128;        // of their tokens
constexpr float kLeastTallied = 0.05f;  // of a smaller p few early tokens are kept
constexpr float kNarrow = 0.2f;         // of a smaller p few early groups have one

// A token that arrives early. ``above``: what larger ones weigh, but for those that have no counter.
struct alignas(16) Judged {
  u64 key;
  float above;
  u16 bits, state;

  ATTNKIT_DEVICE int id() const { return of_group_order(best_id(key)); }
};
// What is not known by counters alone goes by its rank among its equals, or by what else has no counter.
enum JudgedState : u16 { kKept, kRefused, kByRank, kByRest, kTooClose };
enum Outcome : int { kNobody = -1, kOpen = -2, kDrawn = -3 };  // of those that arrived nobody is kept; the row is left open

// A row's options, read past L1, which would keep what is read before the grid before has ended.
struct TallyOptions {
  float t, top_p;
  u64 seed, offset;

  ATTNKIT_DEVICE TallyOptions() {}
  ATTNKIT_DEVICE TallyOptions(const SampleParams& p, int b)
      : t(read(p.temperature, p.temperature_value, b)),
        top_p(read(p.top_p, p.top_p_value, b)),
        seed(read(p.seeds, i64{0}, b)),
        offset(read(p.offset, p.offset_value, b)) {}
  ATTNKIT_DEVICE bool operator==(const TallyOptions& x) const {
    const bool floats = __float_as_uint(t) == __float_as_uint(x.t) && __float_as_uint(top_p) == __float_as_uint(x.top_p);
    return floats && seed == x.seed && offset == x.offset;
  }

 private:
  ATTNKIT_DEVICE static float read(const float* from, float value, int b) {
    if (from != nullptr) asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(from + b) : "memory");
    return value;
  }
  ATTNKIT_DEVICE static u64 read(const i64* from, i64 value, int b) {
    if (from != nullptr) asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from + b) : "memory");
    return static_cast<u64>(value);
  }
};

// Shared memory; what is hoped of groups follows, then slots. Mirrors TALLY_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct alignas(128) TallyShared {
  u32 counters[Values::kPlaces];
  float after[kTallyThreads];      // what the places after each four weigh, of 32 such
  float after_warps[kTallyWarps];  // what the places after 32 fours weigh
  float counted, margin;           // all of them; how far from what is wanted a sum has to be to decide
  u32 lowest;                      // place from which on tokens may be kept, or some that are not
  float light;                     // the logarithm of what a group weighs at the least that has a token that may be kept
  u64 landed[kMostSlots], taken[kMostSlots];
  Judged judged[kMostJudged];
  float sums[kTallyWarps], masses[kTallyWarps];
  u32 sampled[kSamplers][kBounds];                 // masses by the bounds that they are between
  float most_sampled[kSamplers], from[kSamplers];  // the largest of a sample, and from where on it would have tokens counted
  u32 stale;                                       // options were read too early, or there may be tokens beyond the counters
  int chosen;
  int n_early, n_open, n_judged;
  TallyOptions guess;
  RowOptions o;  // of that
  u16 early[kMostTallied], open[kMostTallied];
};
static_assert(sizeof(TallyShared) == 26624, "TALLY_BYTES");

struct Tally {
  const SampleParams& p;
  TallyShared& s;
  const int b;
  const char* const logits;
  const int pieces, slots, first_kept;  // of the row; in shared memory; from which slot of the row on all stay there
  u16* const hopes;
  const char* const held;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  float scale, shift;  // a token's mass is 2^(logit scale + shift)
  float reference;     // the logit of a mass of one
  Values values;
  float whole, wanted;

  ATTNKIT_DEVICE Tally(const SampleParams& p, char* memory)
      : p(p), s(*reinterpret_cast<TallyShared*>(memory)), b(static_cast<int>(blockIdx.x)), logits(p.logits + b * p.logits_b),
        pieces((p.V + kPiece - 1) / kPiece), slots(p.room), first_kept(max(0, row_slots() - slots)),
        hopes(reinterpret_cast<u16*>(&s + 1)), held(memory + sizeof(TallyShared) + p.blocks * (kBlock / 16) * 2) {}

  // ---- the row's bytes ----

  ATTNKIT_DEVICE int row_slots() const { return (p.V + kSlotTokens - 1) / kSlotTokens; }
  ATTNKIT_DEVICE const char* slot(int i) const {
    while (i >= slots) i -= slots;
    return held + i * kSlotBytes;
  }
  ATTNKIT_DEVICE int slot_bytes(int i) const { return min(p.V * 2 - i * kSlotBytes, kSlotBytes); }
  // By one thread.
  ATTNKIT_DEVICE void ask(int i) const {
    if (i >= slots) mbarrier_wait(smem_address(&s.taken[i - slots]), 0);
    const u32 barrier = smem_address(&s.landed[i]), bytes = slot_bytes(i);
    mbarrier_arrive_expect(barrier, bytes);
    bulk_load(smem_address(slot(i)), logits + i * kSlotBytes, bytes, barrier);
  }
  // Token v, which stays in shared memory or does not.
  ATTNKIT_DEVICE u32 load_one(int v) const {
    const int i = v / kSlotTokens;
    return *reinterpret_cast<const u16*>(i >= first_kept ? slot(i) + v % kSlotTokens * 2 : logits + v * 2);
  }

  // ---- before the grid before has ended ----

  ATTNKIT_DEVICE void open() const {
    const int t = static_cast<int>(threadIdx.x);
    reinterpret_cast<uint4*>(s.counters)[t] = make_uint4(0, 0, 0, 0);
    if (t == 0) s.stale = 0, s.n_early = s.n_open = s.n_judged = 0;
  }

  ATTNKIT_DEVICE void take(const TallyOptions& guess) {
    RawOptions raw;
    raw.t = guess.t, raw.repetition = 1.0f;
    const RowOptions o = raw.use();
    if (threadIdx.x == 0) s.guess = guess, s.o = o;
    scale = o.rt * kLog2e;
  }

  // The first slots, as soon as it has ended. A warp's work.
  ATTNKIT_DEVICE void ask_first() const {
    for (int i = lane; i < row_slots(); i += 32) {
      mbarrier_init(smem_address(&s.landed[i]), 1), mbarrier_init(smem_address(&s.taken[i]), kSlotPieces);
    }
    mbarrier_init_fence();
    __syncwarp();
    wait_for_previous_grid();
    launch_dependents();
    if (lane < min(kAheadSlots, row_slots())) ask(lane);
    __syncwarp();
  }

  // Four tokens for each lane of the samplers.
  ATTNKIT_DEVICE Raw<kBf16> ask_sample() const {
    Raw<kBf16> four;
    const int t = static_cast<int>(threadIdx.x);
    const char* const from = logits + static_cast<i64>(p.V / 4) * t / (kSamplers * 32) * 8;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(four.w[0]), "=r"(four.w[1]) : "l"(from) : "memory");
    return four;
  }

  // From which value on tokens are counted, by a sampler: what lies below is to weigh somewhat less than what top-p leaves out. Of all
  // samples the lowest bound is taken, as one that has by chance more large ones than others bounds too high.
  ATTNKIT_DEVICE void find_bound(const Raw<kBf16>& sample, float top_p) const {
    float x[4];
    widen_four<kBf16>(sample, x);
    const float mine = max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3]));
    const float most = order_value(__reduce_max_sync(0xffffffffu, order_key(mine)));
    u32* const sampled = s.sampled[warp];
    sampled[lane] = 0;
    __syncwarp();
    constexpr float kOne = 1 << 24;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float power = (x[i] - most) * scale;
      atomicAdd(&sampled[bound_after(power)], __float2uint_rn(exp2_fast(power) * kOne));
    }
    __syncwarp();
    u32 below = sampled[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u32 other = __shfl_down_sync(0xffffffffu, below, step);
      below += lane + step < 32 ? other : 0;
    }
    // The largest does not count: where it is far above the others a sample has too much of it.
    const float all = __uint2float_rn(__shfl_sync(0xffffffffu, below, 0)) - kOne, enough = 0.85f * fmaxf(1.0f - top_p, 0.0f) * all;
    const u32 fits = __ballot_sync(0xffffffffu, __uint2float_rn(below) <= enough);
    // Of a row that is masked but for few tokens a sample says little, but few are counted.
    const bool few = __popc(__ballot_sync(0xffffffffu, mine > negative_infinity())) < 24;
    const int at = top_p >= 1.0f ? 0 : few || fits == 0 ? kBounds - 1 : __ffs(fits) - 1;
    const float from = most - kBoundStep * static_cast<float>(at * at) * reciprocal(scale);
    if (lane == 0) s.most_sampled[warp] = most, s.from[warp] = most > negative_infinity() ? from : -negative_infinity();
  }
  // Bound i is so far below the sample's largest that a token weighs 2^(-i^2 kBoundStep) of it.
  static constexpr float kBoundStep = 0.0234f;
  ATTNKIT_DEVICE static int bound_after(float power) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(power * (-1.0f / kBoundStep), 0.0f)));
    return __float2int_rz(fminf(r, kBounds - 1.0f));
  }

  // Minus the logarithm of each group's word. By all but the asker.
  ATTNKIT_DEVICE void load_words(u64 seed, u64 offset) const {
    const Philox groups(seed, offset, kOfGroups);
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

  ATTNKIT_DEVICE float mass_of(float x) const { return exp2_fast(__fmaf_rn(x, scale, shift)); }

  // ---- one read ----

  // Counts what a lane has of a piece; what it weighs.
  template <bool Positive>
  ATTNKIT_DEVICE float take(const Raw<kBf16> (&raw)[4]) const {
    const u32 base = smem_address(s.counters);
    float sums[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 at = values.places<Positive>(raw[c].w[i]) * 4 + (base << 16 | base);
        asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at & 0xffffu) : "memory");
        asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at >> 16) : "memory");
      }
      float x[4];
      widen_four<kBf16>(raw[c], x);
      sums[c] = mass_of(x[0]);
#pragma unroll
      for (int i = 1; i < 4; ++i) sums[c] += mass_of(x[i]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // A warp's pieces, one of every fourth slot. What a lane's groups weigh.
  template <bool Positive>
  ATTNKIT_DEVICE float stream() const {
    constexpr int kStep = kTallyWarps / kSlotPieces;
    const int inside = warp % kSlotPieces;
    int at = warp / kSlotPieces;
    u32 landed = smem_address(&s.landed[at]), from = smem_address(held) + at * kSlotBytes + inside * (kPiece * 2) + lane * 8;
    const u32 end = smem_address(held) + slots * kSlotBytes;
    u16* hope = hopes + warp * 32 + lane;
    float sum = 0.0f;
#pragma unroll 1
    for (int i = warp; i < pieces; i += kTallyWarps) {
      mbarrier_wait(landed, 0);
      // Each warp in its turn.
      if (i / kTallyWarps % kSlotPieces == inside && at + kAheadSlots < row_slots() && lane == 0) ask(at + kAheadSlots);
      Raw<kBf16> raw[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) raw[c] = load_raw<kBf16>(from + c * kChunk * 2);
      if (at < first_kept) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(landed + sizeof(s.landed));
      }
      if ((i + 1) * kPiece > p.V) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (i * kPiece + c * kChunk + lane * 4 >= p.V) raw[c] = {{0xff80ff80u, 0xff80ff80u}};
        }
      }
      const float mass = take<Positive>(raw);
      sum += mass;
      *hope = half_of(log2_fast(mass) + f16_to_float(*hope));
      hope += kTallyWarps * 32, at += kStep, landed += kStep * sizeof(u64), from += kStep * kSlotBytes;
      if (from >= end) from -= slots * kSlotBytes;
    }
    return sum;
  }

  // ---- the choice ----

  // What four places of each lane weigh, and what those after them do, of as many. By the weighers.
  ATTNKIT_DEVICE void weigh_places() const {
#pragma unroll 1
    for (int of = warp - (kTallyWarps - kWeighers); of < kTallyWarps; of += kWeighers) {
      const int cell = of * 32 + lane;
      const uint4 q = reinterpret_cast<const uint4*>(s.counters)[cell];
      const u32 n[4] = {q.x, q.y, q.z, q.w};
      float to = 0.0f, after = 0.0f;
      if (__any_sync(0xffffffffu, (q.x | q.y | q.z | q.w) != 0)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float mass = mass_of(values.value(cell * 4 + i));
          to += n[i] != 0 && cell * 4 + i < Values::kRest ? __uint2float_rn(n[i]) * mass : 0.0f;
        }
        to = sum_from(to, after);
      }
      s.after[cell] = after;
      if (lane == 0) s.masses[of] = to;
    }
    named_barrier(2, kWeighers * 32);
    if (warp == kTallyWarps - kWeighers) {
      float after;
      const float to = sum_from(s.masses[lane], after);
      s.after_warps[lane] = after;
      if (lane == 0) s.counted = to;
      set_margin();
      __syncwarp();
      find_lowest();
    }
  }
  // A lane's sum and that of those after it; of those alone.
  ATTNKIT_DEVICE float sum_from(float x, float& after) const {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_down_sync(0xffffffffu, x, step);
      x += lane + step < 32 ? other : 0.0f;
    }
    after = __shfl_down_sync(0xffffffffu, x, 1);
    if (lane == 31) after = 0.0f;
    return x;
  }
  // Groups of which a token may arrive before ``time``.
  ATTNKIT_DEVICE void list_early(float time) const {
    const float log = log2_fast(time), least = -log - 0.1f - fabsf(log) * 2e-3f;
    const u32 both = pack_f16(least, least);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < pieces * 4; i += kTallyThreads) {
      const uint4 q = reinterpret_cast<const uint4*>(hopes)[i];
      const u32 w[4] = {q.x, q.y, q.z, q.w};
      u32 early = 0;  // a bit for each
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 is;
        asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(is) : "r"(w[j]), "r"(both));
        early |= is & 0x10001u << j;
      }
#pragma unroll 1
      for (; early != 0; early &= early - 1) {
        const int j = __ffs(early) - 1, at = atomicAdd(&s.n_early, 1);
        if (at < kMostTallied) s.early[at] = static_cast<u16>(i * 8 + j % 16 * 2 + j / 16);
      }
    }
  }

  // Sixteen lanes take a group, unless it is -1, a token each. Notes those that arrive before ``time`` and may be kept.
  ATTNKIT_DEVICE void note_two(int group, float time) const {
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
    if (!(there && score >= floor && x > negative_infinity()) || (s.guess.top_p < kNarrow && !may_be_kept(bits))) return;
    const int to = atomicAdd(&s.n_judged, 1);
    if (to < kMostJudged) s.judged[to].key = pack_best(score, group_order(v)), s.judged[to].bits = static_cast<u16>(bits);
  }
  ATTNKIT_DEVICE bool may_be_kept(u32 bits) const {
    const u32 place = values.place(bits);
    return (values.vague(place) ? values.near_zero() : place) >= s.lowest && (place < Values::kRest || s.counted < wanted + s.margin);
  }

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
    } else if (equals > 1 && !vague) {
      state = kByRank;
    }
    one.above = above, one.state = static_cast<u16>(state);
  }

  // f(eight tokens, the first's id) for a thread's part of tokens ``from`` to ``to``, multiples of eight.
  template <class F>
  ATTNKIT_DEVICE void for_eights(int from, int to, F&& f) const {
    constexpr int kAhead = 5;
    const int kept = min(first_kept * kSlotTokens, to), t = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = from / 8 + t; i * 8 < kept; i += kAhead * kTallyThreads) {
      uint4 q[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int v = (i + u * kTallyThreads) * 8;
        q[u] = *reinterpret_cast<const uint4*>(logits + (v < kept ? v : from) * 2);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if ((i + u * kTallyThreads) * 8 < kept) f(q[u], (i + u * kTallyThreads) * 8);
      }
    }
    const u32 end = smem_address(held) + slots * kSlotBytes;
    int i = max(from, first_kept * kSlotTokens) / 8 + t;
    u32 at = smem_address(slot(i / (kSlotTokens / 8))) + i % (kSlotTokens / 8) * 16;
#pragma unroll 4
    for (; i * 8 < to; i += kTallyThreads) {
      f(load_shared<uint4>(at), i * 8);
      at += kTallyThreads * 16;
      if (at >= end) at -= slots * kSlotBytes;
    }
  }
  // Over all threads.
  ATTNKIT_DEVICE float sum_of(float x) const {
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) s.sums[warp] = x;
    __syncthreads();
    return warp_sum(s.sums[lane]);
  }

  // What precedes a token that the counters leave open. By all.
  ATTNKIT_DEVICE float weigh_before(const Judged& one) const {
    if (one.state == kByRest) return s.counted + sum_of(rest_before(one.bits, one.id()));
    const u32 place = values.place(one.bits), equals = s.counters[place];
    // Those before it are counted, or those after it: what stays in shared memory is near.
    const int id = one.id();
    const bool before = first_kept == 0 ? id < p.V / 2 : id < first_kept * kSlotTokens;
    const float n = sum_of(count_equal(one.bits, id, before));
    return one.above + (before ? n : __uint2float_rn(equals - 1) - n) * mass_of(values.value(place));
  }
  // How many tokens before ``id`` have a value, or after it; a thread's part.
  ATTNKIT_DEVICE float count_equal(u32 bits, int id, bool before) const {
    const u32 both = bits << 16 | bits;
    const int eight = id & ~7, t = static_cast<int>(threadIdx.x);
    u32 sum = 0;  // of either half, as bf16: fewer than 256
    for_eights(before ? 0 : eight + 8, before ? eight : p.V, [&](const uint4& q, int) {
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
    return two.x + two.y + (near ? 1.0f : 0.0f);
  }
  // What those tokens weigh that have no counter and precede one that has none; a thread's part.
  ATTNKIT_DEVICE float rest_before(u32 bits, int id) const {
    const float own = __uint_as_float(bits << 16);
    float sum = 0.0f;
    for_eights(0, p.V, [&](const uint4& q, int v) {
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

  // The earliest of those that arrived and are not refused, or kNobody, or kOpen. ``anew``: none is judged yet. A warp's work.
  ATTNKIT_DEVICE int earliest(bool anew) const {
    const int n = s.n_judged;
    if (n > kMostJudged || s.n_early > kMostTallied) return kOpen;
    u64 best = 0;
    int at = kNobody;
#pragma unroll 1
    for (int i = lane; i < n; i += 32) {
      Judged& one = s.judged[i];
      if (anew) judge(one);
      if (one.state != kRefused && one.key > best) best = one.key, at = i;
    }
    __syncwarp();
    const u64 most = warp_max(best);
    return __shfl_sync(0xffffffffu, at, __ffs(__ballot_sync(0xffffffffu, best == most)) - 1);
  }

  // Refuses a token, and its equals after it. A warp's work.
  ATTNKIT_DEVICE void refuse(const Judged& last) const {
#pragma unroll 1
    for (int i = lane; i < s.n_judged; i += 32) {
      Judged& one = s.judged[i];
      if (one.state == last.state && one.bits == last.bits && one.id() >= last.id()) one.state = kRefused;
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void give(int id) const { p.tokens[b] = id, p.valid[b] = true; }

  // Draws a token, or says why not. All threads come to the same.
  ATTNKIT_DEVICE int choose() const {
#pragma unroll 1
    for (int round = 0;; ++round) {
      if (warp == 0) {
        int at = earliest(round == 0);
        const Judged& one = s.judged[max(at, 0)];
        if (at >= 0 && one.state == kKept) {
          at = kDrawn;
          if (lane == 0) give(one.id());
        } else if (at >= 0 && (one.state == kTooClose || (one.state == kByRest && round > 2))) {
          at = kOpen;
        }
        if (lane == 0) s.chosen = at;
      }
      __syncthreads();
      if (s.chosen < 0) return s.chosen;
      const Judged one = s.judged[s.chosen];
      const float precedes = weigh_before(one);
      if (precedes < wanted - s.margin) {
        if (threadIdx.x == 0) give(one.id());
        return kDrawn;
      }
      if (precedes < wanted + s.margin) return kOpen;
      if (warp == 0) refuse(one);
    }
  }

  // From which place on tokens may be kept, and what a group weighs that has one. By the warp that added all up.
  ATTNKIT_DEVICE void find_lowest() const {
    const float enough = wanted + s.margin;
    const int of = __popc(__ballot_sync(0xffffffffu, s.after_warps[lane] >= enough));
    const float after = s.after_warps[of] + s.after[of * 32 + lane];
    const u32 lowest = 4 * (of * 32 + __popc(__ballot_sync(0xffffffffu, after >= enough)));
    const bool all = lowest == 0 || lowest >= Values::kRest || values.vague(lowest) || s.counted < enough;
    if (lane == 0) s.lowest = lowest, s.light = all ? negative_infinity() : __fmaf_rn(values.value(lowest), scale, shift) - 0.15f;
  }

  // Of the groups that arrive early, lists those that weigh as much as a token that may be kept: where p is small few do.
  ATTNKIT_DEVICE void list_open() const {
    const int i = static_cast<int>(threadIdx.x), found = min(s.n_early, kMostTallied), group = i < found ? s.early[i] : 0;
    float mass = 0.0f;
    if (warp < kTallyWarps - kWeighers) mass = mass_of_group(group);
    __syncthreads();
    if (i < found && !(mass < s.light)) s.open[atomicAdd(&s.n_open, 1)] = static_cast<u16>(group);
    __syncthreads();
  }
  static_assert(kMostTallied <= (kTallyWarps - kWeighers) * 32);
  // Its logarithm: what is hoped of a group, and its word's.
  ATTNKIT_DEVICE float mass_of_group(int group) const {
    u32 w[4];
    philox_words(s.guess.seed, s.guess.offset, kOfGroups, static_cast<u32>(group / 128 * 32 + group % 32), w);
    return f16_to_float(hopes[group]) - 32.0f + log2_fast(__uint2float_rn(one_of(w, group / 32)) + 0.5f);
  }

  // True if the row's token is drawn.
  ATTNKIT_DEVICE bool draw() {
    reference = max_nan(max_nan(s.most_sampled[0], s.most_sampled[1]), max_nan(s.most_sampled[2], s.most_sampled[3]));
    shift = -reference * scale;
    const bool usual = fabsf(reference) < kF32Max && fabsf(shift) < 1e30f && scale > 1e-20f && scale < 1e20f && !s.o.cold;
    if (!usual || !(s.guess.top_p >= kLeastTallied)) return false;
    values = Values(fminf(fminf(fminf(s.from[0], s.from[1]), fminf(s.from[2], s.from[3])), Values::kMostBound));
    const float mine = warp_sum(values.positive ? stream<true>() : stream<false>());
    if (lane == 0) s.sums[warp] = mine;
    __syncthreads();
    whole = warp_sum(s.sums[lane]);
    if (!(whole < 1e30f)) return false;
    const float top_p = fminf(s.guess.top_p, 1.0f);
    wanted = top_p * whole;
    float time = (10.0f * reciprocal(top_p) + 2.0f) * reciprocal(whole);
#pragma unroll 1
    for (int tries = 0; tries < 3; ++tries, time *= 3.0f) {
      list_early(time);
      __syncthreads();
      note_early(time);
      __syncthreads();
      if (s.stale != 0) return false;
      const int outcome = choose();
      if (outcome != kNobody) return outcome == kDrawn;
      __syncthreads();
      if (threadIdx.x == 0) s.n_early = s.n_open = s.n_judged = 0;
      __syncthreads();
    }
    return false;
  }

  // Notes tokens of the groups that arrive early, two groups a warp at a time. Places are weighed and options read again meanwhile.
  ATTNKIT_DEVICE void note_early(float time) const {
    if (warp >= kTallyWarps - kWeighers) weigh_places();
    const bool narrow = s.guess.top_p < kNarrow;
    if (narrow) list_open();
    if (warp == kAsker && !(TallyOptions(p, b) == s.guess)) s.stale = 1;
    const u16* const list = narrow ? s.open : s.early;
    const int found = min(narrow ? s.n_open : s.n_early, kMostTallied);
#pragma unroll 1
    for (int i = 2 * warp; i < found; i += 2 * kTallyWarps) note_two(i + lane / 16 < found ? list[i + lane / 16] : -1, time);
  }

  // How far from what is wanted a sum has to be to decide.
  ATTNKIT_DEVICE void set_margin() const {
    float margin = whole * 8e-6f * (1.0f + fabsf(shift) * (1.0f / 64.0f));
    const u32 near = values.near_zero(), vague = near == Values::kRest ? 0 : s.counters[near] + s.counters[near - 1];
    if (vague != 0) margin += __uint2float_rn(vague) * mass_of(0.0f) * (exp2_fast(Values::kNear * scale) - 1.0f);
    s.margin = margin;
    // What lies beyond the counters is refused: if the least of it weighs more than the row, there is none.
    if (s.guess.top_p < 1.0f && !(mass_of(values.value(Values::kRest)) > whole)) s.stale = 1;
  }

  // What was asked for at first has landed.
  ATTNKIT_DEVICE void drain() const {
    const int t = static_cast<int>(threadIdx.x);
    if (t < min(kAheadSlots, row_slots())) mbarrier_wait(smem_address(&s.landed[t]), 0);
  }
};

// A row that is left open, by its first threads alone.
__device__ __noinline__ void draw_open(const SampleParams& p, char* memory, int b) {
  const int n = p.blocks * (kBlock / 16);
  draw_by_arrival<kBf16, false>(p, ArriveMemory(memory, n), b, 1, 0, n);
}

ATTNKIT_DEVICE void sample_tally(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  Tally row(p, memory);
  Raw<kBf16> sample;
  if (row.warp == kAsker) row.ask_first();
  if (row.warp < kSamplers) sample = row.ask_sample();
  row.open();
  const TallyOptions guess(p, row.b);
  row.take(guess);
  if (row.warp < kSamplers) row.find_bound(sample, guess.top_p);
  if (row.warp != kAsker) {
    row.load_words(guess.seed, guess.offset);
    wait_for_previous_grid();
  }
  __syncthreads();
  if (row.draw()) return;
  row.drain();
  __syncthreads();
  if (row.warp < kArriveWarps) draw_open(p, memory, row.b);
}

}  // namespace attnkit::sampling
