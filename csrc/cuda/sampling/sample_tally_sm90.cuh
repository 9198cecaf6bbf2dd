// Top-p alone over bf16 logits, in one launch: a CTA has a row and a multiprocessor to itself. Bulk copies bring the row into shared
// memory, and as much of its end as there is room for stays there. While it comes, tokens are counted by their value, and what is
// hoped of each group of 16 is kept. The counters then say of any token what precedes it, but for which of its equals do; so the
// few groups that arrive early are read again and their tokens judged at once. A row that this leaves open is drawn by arrival.
#pragma once
#include "sample_arrive_sm90.cuh"
#include "sample_values_sm90.cuh"

namespace attnkit::sampling {

constexpr int kTallyThreads = 1024, kTallyWarps = kTallyThreads / 32;
constexpr int kSlotBytes = 8192, kSlotTokens = kSlotBytes / 2, kSlotPieces = kSlotTokens / kPiece;
constexpr int kMostSlots = 64;          // of a row
constexpr int kAheadSlots = 12;         // that are asked for before one is there
constexpr int kMostTallied = 512;       // groups that arrive early
constexpr int kCandidates = 64;         // of their tokens, those that may be drawn
constexpr int kSampled = 16;            // tokens that a warp gives to the sample
constexpr float kLeastTallied = 0.05f;  // of a smaller p few early tokens are kept

// A token that arrives early and is not refused. ``above``: what larger ones weigh.
struct alignas(16) Candidate {
  u64 key;
  int id;
  u32 bits;
  float above, mass;
  u32 equals;  // tokens of its value
  u32 state;
};
enum CandidateState : u32 { kKept, kByRank, kTooClose };

// Shared memory; what is hoped of groups follows, then slots. Mirrors TALLY_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct TallyShared {
  u32 counters[Values::kPlaces];
  float after[kTallyThreads];  // what the places after a thread's four weigh, of its warp
  u64 landed[kMostSlots], taken[kMostSlots];
  Candidate candidates[kCandidates];
  alignas(16) float2 sample[kTallyWarps][kSampled];  // logit, mass
  float sums[kTallyWarps], masses[kTallyWarps];
  u32 tops[kTallyWarps], below[kTallyWarps], equal[kTallyWarps];
  u32 all;
  int chosen;
  int n_early, n_open, n_candidates, unused;
  u16 early[kMostTallied], open[kMostTallied];
};
static_assert(sizeof(TallyShared) == 30368, "TALLY_BYTES");

struct Tally {
  const SampleParams& p;
  TallyShared& s;
  const int b;
  const char* const logits;
  const int pieces, slots, first_kept;  // of the row; in shared memory; from which slot of the row on all stay there
  u16* const hopes;
  const char* const held;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  RowOptions o;
  u64 seed, offset;
  float top_p, scale, shift;  // a token's mass is 2^(logit scale + shift)
  float reference;            // the logit of a mass of one
  Values values;
  float whole, wanted, margin, counted;
  float after_warp;  // lane i: what the places after warp i's weigh

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
  // Where token v lies, which is even: in shared memory or not.
  ATTNKIT_DEVICE u32 load_two(int v) const {
    const int i = v / kSlotTokens;
    return *reinterpret_cast<const u32*>(i >= first_kept ? slot(i) + v % kSlotTokens * 2 : logits + v * 2);
  }

  // ---- before the row is there ----

  ATTNKIT_DEVICE void open() const {
    const int t = static_cast<int>(threadIdx.x);
    reinterpret_cast<uint4*>(s.counters)[t] = make_uint4(0, 0, 0, 0);
    if (t < kTallyWarps) s.below[t] = 0;
    if (lane == 0) {
      for (int i = warp; i < row_slots(); i += kTallyWarps) {
        mbarrier_init(smem_address(&s.landed[i]), 1), mbarrier_init(smem_address(&s.taken[i]), kSlotPieces);
      }
    }
    if (t == 0) s.all = 0, s.n_early = s.n_open = s.n_candidates = 0;
    mbarrier_init_fence();
  }

  // Four tokens of each warp's sample in each of its first lanes.
  ATTNKIT_DEVICE Raw<kBf16> ask_sample() const {
    constexpr int kPlaces = kTallyWarps * kSampled / 4;
    const int at = warp * (kSampled / 4) + lane;
    if (lane >= kSampled / 4) return {{0xff80ff80u, 0xff80ff80u}};
    return load_stream<kBf16>(logits + static_cast<i64>(p.V / 4 * at / kPlaces) * 8);
  }

  // The row's seed and offset past L1, which would keep what is read too early.
  ATTNKIT_DEVICE static u64 fresh(const i64* at, i64 value, int b) {
    asm volatile("{\n.reg .pred given;\nsetp.ne.u64 given, %1, 0;\n@given ld.relaxed.gpu.global.s64 %0, [%2];\n}" : "+l"(value) : "l"(at), "l"(at + b) : "memory");
    return static_cast<u64>(value);
  }
  ATTNKIT_DEVICE void ask_seed() { seed = fresh(p.seeds, 0, b), offset = fresh(p.offset, p.offset_value, b); }

  // Minus the logarithm of each group's word.
  ATTNKIT_DEVICE void load_words() const {
    const Philox groups(seed, offset, kOfGroups);
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < p.blocks * 32; c += kTallyThreads) {
      u32 w[4];
      groups.words(static_cast<u32>(c), w);
      u16* const to = hopes + c / 32 * 128 + c % 32;
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j * 32] = half_of(32.0f - log2_fast(__uint2float_rn(w[j]) + 0.5f));
    }
  }
  ATTNKIT_DEVICE static u16 half_of(float x) { return static_cast<u16>(pack_f16(x, 0.0f)); }

  // From which value on tokens are counted: what lies below weighs some eighth of what top-p leaves out, as a sample has it. False for
  // a row that is not for here.
  ATTNKIT_DEVICE bool find_bound(const Raw<kBf16>& sample) {
    float x[4];
    widen_four<kBf16>(sample, x);
    const float most = max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3]));
    const u32 top = __reduce_max_sync(0xffffffffu, order_key(most));
    if (lane == 0) s.tops[warp] = top;
    __syncthreads();
    reference = order_value(__reduce_max_sync(0xffffffffu, s.tops[lane]));
    shift = -reference * scale;
    if (!(fabsf(reference) < kF32Max && fabsf(shift) < 1e30f && o.rt > 1e-20f && o.rt < 1e20f) || o.cold || !(top_p >= kLeastTallied)) return false;
    if (lane < kSampled / 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s.sample[warp][lane * 4 + i] = make_float2(x[i], mass_of(x[i]));
    }
    __syncwarp();
    float below = 0.0f, all = 0.0f;
    const float bound = bound_of(lane);
#pragma unroll
    for (int i = 0; i < kSampled; i += 2) {
      const float4 two = load_shared<float4>(smem_address(&s.sample[warp][i]));
      all += two.y + two.w;
      below += two.x < bound ? two.y : 0.0f;
      below += two.z < bound ? two.w : 0.0f;
    }
    constexpr float kOne = 1 << 21;
    atomicAdd(&s.below[lane], __float2uint_rn(below * kOne));
    if (lane == 0) atomicAdd(&s.all, __float2uint_rn(all * kOne));
    __syncthreads();
    // The largest does not count: where it is far above the others a sample has too much of it.
    const float enough = 0.12f * fmaxf(1.0f - top_p, 0.0f) * (__uint2float_rn(s.all) - kOne);
    const u32 fits = __ballot_sync(0xffffffffu, __uint2float_rn(s.below[lane]) <= enough);
    const float from = bound_of(top_p >= 1.0f ? 0 : fits == 0 ? 31 : __ffs(fits) - 1);
    values = Values(fminf(from, Values::kMostBound));
    return true;
  }
  ATTNKIT_DEVICE float bound_of(int i) const { return reference - 0.0234f * static_cast<float>(i * i) * reciprocal(scale); }
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

  // A warp's pieces. What a lane's groups weigh.
  template <bool Positive>
  ATTNKIT_DEVICE float stream() const {
    const int all = row_slots();
    float sum = 0.0f;
#pragma unroll 1
    for (int i = warp; i < pieces; i += kTallyWarps) {
      const int at = i / kSlotPieces;
      mbarrier_wait(smem_address(&s.landed[at]), 0);
      if (i % kSlotPieces == 0 && at + kAheadSlots < all && elect_one()) ask(at + kAheadSlots);
      const u32 from = smem_address(slot(at)) + i % kSlotPieces * (kPiece * 2) + lane * 8;
      Raw<kBf16> raw[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) raw[c] = load_raw<kBf16>(from + c * kChunk * 2);
      if (at < first_kept) {
        __syncwarp();
        if (elect_one()) mbarrier_arrive(smem_address(&s.taken[at]));
      }
      if ((i + 1) * kPiece > p.V) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (i * kPiece + c * kChunk + lane * 4 >= p.V) raw[c] = {{0xff80ff80u, 0xff80ff80u}};
        }
      }
      const float mass = take<Positive>(raw);
      sum += mass;
      u16* const hope = hopes + i * 32 + lane;
      *hope = half_of(log2_fast(mass) + f16_to_float(*hope));
    }
    return sum;
  }

  // ---- the choice ----

  ATTNKIT_DEVICE static float warp_total(float x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  // What a thread's four places weigh, and what those after it do.
  ATTNKIT_DEVICE void weigh_places() const {
    const int first = static_cast<int>(threadIdx.x) * 4;
    const uint4 q = reinterpret_cast<const uint4*>(s.counters)[threadIdx.x];
    const u32 n[4] = {q.x, q.y, q.z, q.w};
    float to = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float mass = mass_of(values.value(first + i));
      to += n[i] != 0 && first + i < Values::kRest ? __uint2float_rn(n[i]) * mass : 0.0f;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_down_sync(0xffffffffu, to, step);
      to += lane + step < 32 ? other : 0.0f;
    }
    const float after = __shfl_down_sync(0xffffffffu, to, 1);
    s.after[threadIdx.x] = lane == 31 ? 0.0f : after;
    if (lane == 0) s.masses[warp] = to;
  }

  // Groups of which a token may arrive before ``time``.
  ATTNKIT_DEVICE void list_early(float time) const {
    const float log = log2_fast(time), least = -log - 0.1f - fabsf(log) * 2e-3f;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < pieces * 4; i += kTallyThreads) {
      const uint4 q = reinterpret_cast<const uint4*>(hopes)[i];
      const u32 w[4] = {q.x, q.y, q.z, q.w};
      u32 most = max_pairs<kF16>(max_pairs<kF16>(w[0], w[1]), max_pairs<kF16>(w[2], w[3]));
      const float2 two = unpack(most, false);
      if (!(max_nan(two.x, two.y) >= least)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!(f16_to_float(static_cast<u16>(w[j / 2] >> j % 2 * 16)) >= least)) continue;
        const int at = atomicAdd(&s.n_early, 1);
        if (at < kMostTallied) s.early[at] = static_cast<u16>(i * 8 + j);
      }
    }
  }

  // Sixteen lanes take a group, unless it is -1: eight two tokens each, two more work out words. Those of its tokens that arrive from
  // score ``floor`` on and may be kept are candidates.
  ATTNKIT_DEVICE void judge_two(int group, float floor) const {
    const int in = lane & 15, pair = in & 7, number = max(group, 0), v = first_of_group(number) + pair / 2 * kChunk + pair % 2 * 2;
    const bool there = in < 8 && v < p.V;
    const u32 two = there ? load_two(v) : 0xff80ff80u;
    u32 words[4];
    philox_words(seed, offset, in < 8 ? kOfTokens : in == 8 ? kOfGroups : kInside,
                 static_cast<u32>(in < 8 ? v / 4 : in == 8 ? number / 128 * 32 + number % 32 : number), words);
    const u32 word = __shfl_sync(0xffffffffu, one_of(words, number / 32), 8, 16), inside = __shfl_sync(0xffffffffu, words[0], 9, 16);
    const float2 x = unpack(two, true);
    float base = fmaxf(x.x, x.y);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, step));
    const float mass[2] = {exp2_fast((x.x - base) * scale), exp2_fast((x.y - base) * scale)};
    // As all implementations add: four neighbours, then chunks.
    const float own = __fadd_rn(mass[0], mass[1]), left = __shfl_sync(0xffffffffu, own, in & 14, 16);
    const float upto[2] = {in % 2 == 0 ? mass[0] : __fadd_rn(left, mass[0]), in % 2 == 0 ? own : __fadd_rn(__fadd_rn(left, mass[0]), mass[1])};
    float before = 0.0f, all = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c == in / 2) before = all;
      all = __fadd_rn(all, __shfl_sync(0xffffffffu, upto[1], 2 * c + 1, 16));
    }
    const float reach = share_of(inside, all), time = __fmul_rn(exponential(word), reciprocal(all)), peak = warm(base, o);
    const bool reached[2] = {__fadd_rn(before, upto[0]) > reach, __fadd_rn(before, upto[1]) > reach};
    const u32 holders = __ballot_sync(0xffffffffu, reached[1]) >> (lane & 16) & 255u;
    const bool first = in == __ffs(holders) - 1;
    u32 early = 0;
    float scores[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is = first && (i == 0 ? reached[0] : !reached[0]);
      const float wait = is ? 0.0f : __fmul_rn(exponential(in % 2 == 0 ? words[i] : words[2 + i]), reciprocal(mass[i]));
      scores[i] = less_log(peak, __fadd_rn(time, wait));
      if (group >= 0 && there && scores[i] >= floor && (i == 0 ? x.x : x.y) > negative_infinity()) early |= 1u << i;
    }
#pragma unroll 1
    while (__any_sync(0xffffffffu, early != 0)) {
      const int i = early & 1 ? 0 : 1;
      judge(early != 0, i == 0 ? scores[0] : scores[1], i == 0 ? two & 0xffffu : two >> 16, v + i);
      early &= early - 1;
    }
  }

  // A token, if there is one: what precedes it, by the counters. Whole warps.
  ATTNKIT_DEVICE void judge(bool is, float score, u32 bits, int id) const {
    const u32 place = values.place(bits), near = values.near_zero();
    const bool vague = near != Values::kRest && (place == near || place + 1 == near);
    const u32 at = vague ? near : place, cell = at / 4;
    float above = __shfl_sync(0xffffffffu, after_warp, static_cast<int>(cell / 32));
    if (!is || (place >= Values::kRest && top_p < 1.0f)) return;  // those are refused
    above += s.after[cell];
    const uint4 q = reinterpret_cast<const uint4*>(s.counters)[cell];
    const u32 n[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (u32 i = 1; i < 4; ++i) {
      const u32 after = cell * 4 + i;
      const float more = __uint2float_rn(n[i]) * mass_of(values.value(after));
      above += n[i] != 0 && after > at && after < Values::kRest ? more : 0.0f;
    }
    const u32 equals = s.counters[at] + (vague && at != 0 ? s.counters[at - 1] : 0);
    const float mass = mass_of(values.value(at));
    u32 state = kTooClose;
    if (top_p >= 1.0f || above + __uint2float_rn(equals - (vague ? 0 : 1)) * mass < wanted - margin) {
      state = kKept;
    } else if (above >= wanted + margin) {
      return;
    } else if (equals > 1 && !vague) {
      state = kByRank;
    }
    const int to = atomicAdd(&s.n_candidates, 1);
    if (to < kCandidates) s.candidates[to] = Candidate{pack_best(score, group_order(id)), id, bits, above, mass, equals, state};
  }

  // How many tokens of a value precede one of them; by all.
  ATTNKIT_DEVICE u32 rank_of(const Candidate& one) const {
    const bool before = one.id < p.V / 2;
    const int from = before ? 0 : one.id + 1, to = before ? one.id : p.V;
    u32 n = count_equal(one.bits, from, to);
    n = __reduce_add_sync(0xffffffffu, n);
    __syncthreads();
    if (lane == 0) s.equal[warp] = n;
    __syncthreads();
    n = __reduce_add_sync(0xffffffffu, s.equal[lane]);
    return before ? n : one.equals - 1 - n;
  }
  // Of tokens ``from`` to ``to``, a thread's part.
  ATTNKIT_DEVICE u32 count_equal(u32 bits, int from, int to) const {
    const u32 both = bits << 16 | bits;
    u32 sum = 0;  // of either half, as bf16: fewer than 256
    const int kept = min(first_kept * kSlotTokens, to), t = static_cast<int>(threadIdx.x);
    constexpr int kAhead = 4;
#pragma unroll 1
    for (int i = from / 8 + t; i * 8 < kept; i += kAhead * kTallyThreads) {
      uint4 q[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int v = (i + u * kTallyThreads) * 8;
        q[u] = v < kept ? *reinterpret_cast<const uint4*>(logits + v * 2) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) add_equal(sum, q[u], both, (i + u * kTallyThreads) * 8, from, min(to, kept));
    }
#pragma unroll 1
    for (int i = max(from, first_kept * kSlotTokens) / 8 + t; i * 8 < to; i += kTallyThreads) {
      const uint4 q = load_shared<uint4>(smem_address(slot(i / (kSlotTokens / 8)) + i % (kSlotTokens / 8) * 16));
      add_equal(sum, q, both, i * 8, from, to);
    }
    const float2 two = unpack(sum, true);
    return __float2uint_rn(two.x + two.y);
  }
  ATTNKIT_DEVICE static void add_equal(u32& sum, const uint4& q, u32 both, int v, int from, int to) {
    const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 equal;
      asm("set.eq.bf16x2.bf16x2 %0, %1, %2;" : "=r"(equal) : "r"(w[i]), "r"(both));
      const int at = v + 2 * i;
      if (at < from || at >= to) equal &= 0xffff0000u;
      if (at + 1 < from || at + 1 >= to) equal &= 0xffffu;
      asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(sum) : "r"(equal));
    }
  }

  // The earliest of the candidates that is not refused, equals from id ``refused`` on being; -1 if there is none. A warp's work.
  ATTNKIT_DEVICE int earliest(int refused) const {
    const int n = s.n_candidates;
    u64 best = 0;
    int at = -1;
    if (n > kCandidates || s.n_early > kMostTallied) return -1;
#pragma unroll
    for (int i = 0; i < kCandidates; i += 32) {
      const Candidate& one = s.candidates[i + lane];
      if (i + lane < n && one.key > best && !(one.state == kByRank && one.id >= refused)) best = one.key, at = i + lane;
    }
    const u64 most = warp_max(best);
    return __shfl_sync(0xffffffffu, at, __ffs(__ballot_sync(0xffffffffu, best == most)) - 1);  // -1 in all lanes if there is none
  }

  // The token that is drawn; -1 if it is not known. All threads come to the same.
  ATTNKIT_DEVICE int choose() const {
    int refused = 0x7fffffff;
#pragma unroll 1
    while (true) {
      if (warp == 0) {
        const bool known = top_p >= 1.0f || counted >= wanted + margin;
        const int at = earliest(refused);
        if (lane == 0) s.chosen = known ? at : -1;
      }
      __syncthreads();
      const int at = s.chosen;
      if (at < 0) return -1;
      const Candidate one = s.candidates[at];
      if (one.state != kByRank) return one.state == kKept ? one.id : -1;
      const float precedes = one.above + __uint2float_rn(rank_of(one)) * one.mass;
      if (precedes < wanted - margin) return one.id;
      if (precedes < wanted + margin) return -1;
      refused = one.id;
    }
  }

  // From which place on tokens may be kept, or some that are not. Whole warps.
  ATTNKIT_DEVICE u32 lowest_open() const {
    const float enough = wanted + margin;
    const int of = __popc(__ballot_sync(0xffffffffu, after_warp >= enough));
    const float after = __shfl_sync(0xffffffffu, after_warp, of) + s.after[of * 32 + lane];
    return 4 * (of * 32 + __popc(__ballot_sync(0xffffffffu, after >= enough)));
  }

  // Of the groups that arrive early, those that have a token that may be kept: where p is small few have.
  ATTNKIT_DEVICE void list_open() const {
    const u32 lowest = lowest_open();
    const int i = static_cast<int>(threadIdx.x);
    if (i >= min(s.n_early, kMostTallied)) return;
    const int group = s.early[i], v = first_of_group(group);
    u32 most = 0xff80ff80u;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int at = v + c / 2 * kChunk + c % 2 * 2;
      if (at < p.V) most = max_pairs<kBf16>(most, load_two(at));
    }
    const float2 two = unpack(most, true);
    const u32 place = values.place(__float_as_uint(fmaxf(two.x, two.y)) >> 16);
    if (place >= lowest && place < Values::kRest) s.open[atomicAdd(&s.n_open, 1)] = static_cast<u16>(group);
  }

  // The row's token, or -1.
  ATTNKIT_DEVICE int draw() {
    const float t = option(p.temperature, p.temperature_value, b);
    top_p = option(p.top_p, p.top_p_value, b);
    const u64 was_seed = seed, was_offset = offset;
    ask_seed();
    const Raw<kBf16> sample = ask_sample();
    if (warp < min(kAheadSlots, row_slots()) && elect_one()) ask(warp);
    RawOptions raw;
    raw.t = t, raw.repetition = 1.0f;
    o = raw.use();
    scale = o.rt * kLog2e;
    if (seed != was_seed || offset != was_offset) load_words();
    if (!find_bound(sample)) return -1;
    const float mine = warp_total(values.positive ? stream<true>() : stream<false>());
    if (lane == 0) s.sums[warp] = mine;
    __syncthreads();
    whole = warp_total(s.sums[lane]);
    if (!(whole < 1e30f)) return -1;
    wanted = fminf(top_p, 1.0f) * whole;
    const float time = (10.0f * reciprocal(fminf(top_p, 1.0f)) + 2.0f) * reciprocal(whole);
    list_early(time);
    weigh_places();
    __syncthreads();
    set_margin();
    judge_early(time);
    __syncthreads();
    return choose();
  }

  // Candidates of all groups that arrive early.
  ATTNKIT_DEVICE void judge_early(float time) {
    const u16* list = s.early;
    int found = min(s.n_early, kMostTallied);
    if (found > 2 * kTallyWarps && top_p < 1.0f) {
      weigh_warps();
      list_open();
      __syncthreads();
      list = s.open, found = s.n_open;
    } else if (2 * warp < found) {
      weigh_warps();
    }
    if (2 * warp >= found) return;
    const float l = warm(reference, o), floor = less_log(l, time) + fabsf(l) * 1e-6f + 1e-3f;
#pragma unroll 1
    for (int i = 2 * warp; i < found; i += 2 * kTallyWarps) judge_two(i + lane / 16 < found ? list[i + lane / 16] : -1, floor);
  }

  // What the places after each warp's weigh, and all.
  ATTNKIT_DEVICE void weigh_warps() {
    float to = s.masses[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_down_sync(0xffffffffu, to, step);
      to += lane + step < 32 ? other : 0.0f;
    }
    counted = __shfl_sync(0xffffffffu, to, 0);
    const float after = __shfl_down_sync(0xffffffffu, to, 1);
    after_warp = lane == 31 ? 0.0f : after;
  }

  // How far from what is wanted a sum has to be to decide.
  ATTNKIT_DEVICE void set_margin() {
    margin = whole * 8e-6f;
    const u32 near = values.near_zero();
    if (near == Values::kRest) return;
    const u32 vague = s.counters[near] + (near != 0 ? s.counters[near - 1] : 0);
    margin += __uint2float_rn(vague) * mass_of(0.0f) * (exp2_fast(Values::kNear * scale) - 1.0f);
  }

  // What was asked for has landed.
  ATTNKIT_DEVICE void drain(bool all) const {
    const int last = all ? row_slots() : min(kAheadSlots, row_slots());
    for (int i = static_cast<int>(threadIdx.x); i < last; i += kTallyThreads) mbarrier_wait(smem_address(&s.landed[i]), 0);
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
  row.open();
  // Seeds are read again after the grid before; mostly they are what they were, and the words are there.
  row.ask_seed();
  row.load_words();
  __syncthreads();
  wait_for_previous_grid();
  launch_dependents();
  const int token = row.draw();
  if (token >= 0) {
    if (threadIdx.x == 0) p.tokens[row.b] = token, p.valid[row.b] = true;
    return;
  }
  row.drain(false);
  __syncthreads();
  if (row.warp < kArriveWarps) draw_open(p, memory, row.b);
}

}  // namespace attnkit::sampling
