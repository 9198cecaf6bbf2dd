// A row of bf16 logits that a CTA has to itself, for top-p alone: bulk copies bring it into shared memory, and as much of its end as
// there is room for stays there. While it comes, tokens are counted by their value, and what is hoped of each group of 16 is kept.
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

// A row's options, read past L1, which would keep what is read before the grid before has ended.
struct TallyOptions {
  float t, top_p;
  i64 seed, offset;

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
  ATTNKIT_DEVICE RawOptions raw() const {
    RawOptions raw;
    raw.t = t, raw.seed = seed, raw.offset = offset, raw.repetition = 1.0f, raw.presence = raw.frequency = 0.0f;
    return raw;
  }

 private:
  ATTNKIT_DEVICE static float read(const float* from, float value, int b) {
    if (from != nullptr) asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(from + b) : "memory");
    return value;
  }
  ATTNKIT_DEVICE static i64 read(const i64* from, i64 value, int b) {
    if (from != nullptr) asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from + b) : "memory");
    return value;
  }
};

// Shared memory; what is hoped of groups follows, then slots. Mirrors TALLY_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct alignas(128) TallyShared {
  u32 counters[Values::kPlaces];
  float after[kTallyThreads];      // what the places after each four weigh, of 32 such
  float after_warps[kTallyWarps];  // what the places after 32 fours weigh
  float counted;                   // all of them
  float margin, vague;             // how far from what is wanted a sum has to be to decide; for what is near to zero
  u32 lowest;                      // place from which on tokens may be kept, or some that are not
  float light;                     // the logarithm of what a group weighs at the least that has a token that may be kept
  u32 edge;                        // the value at which top-p ends, if it has equals, or kNoEdge
  u64 ranked;                      // key of the earliest token of that value, when its equals before it, or after it, are counted:
  u32 rank;                        // so many
  u64 landed[kMostSlots], taken[kMostSlots];
  Judged judged[kMostJudged];
  float sums[kTallyWarps];  // what each warp's tokens weigh
  union {
    u32 sampled[kSamplers][kBounds];  // masses by the bounds that they are between
    struct {
      double shares[kTallyWarps];
      float masses[kTallyWarps];
    };
  };
  float most_sampled[kSamplers], from[kSamplers];  // the largest of a sample, and from where on it would have tokens counted
  u32 stale;                                       // options were read too early, or there may be tokens beyond the counters
  int chosen, then;                                // who is to be looked at closer; who is after that
  int n_early, n_open, n_judged, n_holders, n_equals;
  TallyOptions guess;
  RowOptions o;  // of that
  u16 early[kMostTallied], open[kMostTallied];  // early: then those groups that may have a token at which top-p ends
  int equals[kMostEquals];
};
static_assert(sizeof(TallyShared) == 26752, "TALLY_BYTES");

struct TallyRow {
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

  ATTNKIT_DEVICE TallyRow(const SampleParams& p, char* memory)
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

  // What was asked for at first has landed.
  ATTNKIT_DEVICE void drain() const {
    const int t = static_cast<int>(threadIdx.x);
    if (t < min(kAheadSlots, row_slots())) mbarrier_wait(smem_address(&s.landed[t]), 0);
  }

  // ---- before the grid before has ended ----

  ATTNKIT_DEVICE void open() const {
    const int t = static_cast<int>(threadIdx.x);
    reinterpret_cast<uint4*>(s.counters)[t] = make_uint4(0, 0, 0, 0);
    if (t == 0) s.stale = 0, s.rank = 0, s.ranked = 0, s.n_early = s.n_open = s.n_judged = s.n_holders = s.n_equals = 0;
  }

  // The row's options, by one thread for all but the asker: while the grid before still writes them two threads may read different ones.
  ATTNKIT_DEVICE void read_options() {
    if (threadIdx.x == 0) {
      const TallyOptions guess(p, b);
      s.guess = guess, s.o = guess.raw().use();
    }
    named_barrier(1, kAsker * 32);
    scale = s.o.rt * kLog2e;
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

  // A lane's and those of all lanes after it.
  template <class T>
  ATTNKIT_DEVICE T sum_from(T x) const {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const T other = __shfl_down_sync(0xffffffffu, x, step);
      x += lane + step < 32 ? other : T{};
    }
    return x;
  }
  // The next lane's, of the last lane 0.
  ATTNKIT_DEVICE float of_next(float x) const {
    const float next = __shfl_down_sync(0xffffffffu, x, 1);
    return lane == 31 ? 0.0f : next;
  }

  // From which value on tokens are counted, by a sampler: what lies below is to weigh somewhat less than what top-p leaves out. Of all
  // samples the lowest bound is taken, as one that has by chance more large ones than others bounds too high.
  ATTNKIT_DEVICE void find_bound(const Raw<kBf16>& sample) const {
    const float top_p = s.guess.top_p;
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
    const u32 below = sum_from(sampled[lane]);
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

  ATTNKIT_DEVICE float mass_of(float x) const { return exp2_fast(__fmaf_rn(x, scale, shift)); }

  // ---- one read ----

  // From when on tokens are counted.
  ATTNKIT_DEVICE void take_bound() {
    scale = s.o.rt * kLog2e;
    reference = max_nan(max_nan(s.most_sampled[0], s.most_sampled[1]), max_nan(s.most_sampled[2], s.most_sampled[3]));
    shift = -reference * scale;
    values = Values(fminf(fminf(fminf(s.from[0], s.from[1]), fminf(s.from[2], s.from[3])), Values::kMostBound));
  }
  ATTNKIT_DEVICE void take_whole() {
    whole = warp_sum(s.sums[lane]);
    wanted = fminf(s.guess.top_p, 1.0f) * whole;
  }

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
};

}  // namespace attnkit::sampling
