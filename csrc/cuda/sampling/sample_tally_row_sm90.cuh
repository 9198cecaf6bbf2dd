// A row of bf16 logits that a CTA has to itself: bulk copies bring it into shared memory, and as much of its end as there is room for
// stays there. While it comes, tokens are counted by their value, and a number of each group of 16 is kept. From which value on to count
// is worked out before the grid before has ended: from a sample of the row and from options that are read too early, perhaps. A bad
// sample costs time alone; options are read again.
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
// A row's options, read past L1, which would keep what is read before the grid before has ended.
struct TallyOptions {
  float t, top_p, min_p;
  i64 seed, offset;

  ATTNKIT_DEVICE TallyOptions() {}
  ATTNKIT_DEVICE TallyOptions(const SampleParams& p, int b)
      : t(read(p.temperature, p.temperature_value, b)),
        top_p(read(p.top_p, p.top_p_value, b)),
        min_p(read(p.min_p, p.min_p_value, b)),
        seed(read(p.seeds, i64{0}, b)),
        offset(read(p.offset, p.offset_value, b)) {}
  // But for noise.
  ATTNKIT_DEVICE bool like(const TallyOptions& x) const { return same(t, x.t) && same(top_p, x.top_p) && same(min_p, x.min_p); }
  ATTNKIT_DEVICE bool operator==(const TallyOptions& x) const { return like(x) && seed == x.seed && offset == x.offset; }
  // Whether tokens are drawn from a list: with min-p few are kept.
  ATTNKIT_DEVICE bool listed() const { return min_p > 0.0f; }
  ATTNKIT_DEVICE RawOptions raw() const {
    RawOptions raw;
    raw.t = t, raw.seed = seed, raw.offset = offset, raw.repetition = 1.0f, raw.presence = raw.frequency = 0.0f;
    return raw;
  }

 private:
  ATTNKIT_DEVICE static bool same(float x, float y) { return __float_as_uint(x) == __float_as_uint(y); }
  ATTNKIT_DEVICE static float read(const float* from, float value, int b) {
    if (from != nullptr) asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(from + b) : "memory");
    return value;
  }
  ATTNKIT_DEVICE static i64 read(const i64* from, i64 value, int b) {
    if (from != nullptr) asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from + b) : "memory");
    return value;
  }
};

// What every such row has in shared memory, at the beginning. What is kept of groups lies kTallyBytes from there, then slots.
struct alignas(128) TallyRowShared {
  u32 counters[Values::kPlaces];
  u64 landed[kMostSlots], taken[kMostSlots];
  u32 sampled[kSamplers][kBounds];                 // masses by the bounds that they are between
  float most_sampled[kSamplers], from[kSamplers];  // the largest of a sample, and from where on it would have tokens counted
  u32 stale;                                       // options were read too early, or there may be tokens beyond the counters
  TallyOptions guess;
  RowOptions o;  // of that
};

// Mirrors TALLY_BYTES in attnkit/backends/cuda/builds/sampling.py.
constexpr int kTallyBytes = 27648;

struct TallyRow {
  const SampleParams& p;
  TallyRowShared& s;
  const int b;
  const char* const logits;
  const int pieces, slots, first_kept;  // of the row; in shared memory; from which slot of the row on all stay there
  u16* const hopes;  // of groups, or their peaks
  const char* const held;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  float scale, shift;  // a token's mass is 2^(logit scale + shift)
  float reference;     // the logit of a mass of one
  Values values;

  ATTNKIT_DEVICE TallyRow(const SampleParams& p, char* memory)
      : p(p), s(*reinterpret_cast<TallyRowShared*>(memory)), b(static_cast<int>(blockIdx.x)), logits(p.logits + b * p.logits_b),
        pieces((p.V + kPiece - 1) / kPiece), slots(p.room), first_kept(max(0, row_slots() - slots)),
        hopes(reinterpret_cast<u16*>(memory + kTallyBytes)), held(memory + kTallyBytes + p.blocks * (kBlock / 16) * 2) {}

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
    if (t == 0) s.stale = 0;
  }

  // The row's options, by one thread for all but the asker: while the grid before still writes them two threads may read different ones.
  ATTNKIT_DEVICE void read_options() const {
    if (threadIdx.x == 0) {
      const TallyOptions guess(p, b);
      s.guess = guess, s.o = guess.raw().use();
    }
    named_barrier(1, kAsker * 32);
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
  template <class T>
  ATTNKIT_DEVICE T of_next(T x) const {
    const T next = __shfl_down_sync(0xffffffffu, x, 1);
    return lane == 31 ? T{} : next;
  }

  // From which value on tokens are counted, by a sampler: from the highest of some bounds below which lies somewhat less than what top-p
  // leaves out. Of all samples the lowest is taken.
  ATTNKIT_DEVICE void find_bound(const Raw<kBf16>& sample) const {
    constexpr float kOne = 1 << 24;
    const float top_p = s.guess.top_p, part = 0.85f * fmaxf(1.0f - top_p, 0.0f);
    const auto of_power = [](float power) { return __float2uint_rn(exp2_fast(power) * kOne); };
    const float scale = s.o.rt * kLog2e;
    float x[4];
    widen_four<kBf16>(sample, x);
    const float mine = max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3]));
    const float most = order_value(__reduce_max_sync(0xffffffffu, order_key(mine)));
    u32* const sampled = s.sampled[warp];
    sampled[lane] = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float power = (x[i] - most) * scale;
      atomicAdd(&sampled[bound_after(power)], of_power(power));
    }
    __syncwarp();
    const u32 below = sum_from(sampled[lane]);
    // The largest does not count: where it is far above the others a sample has too much of it.
    const float all = __uint2float_rn(__shfl_sync(0xffffffffu, below, 0) - of_power(0.0f));
    const u32 fits = __ballot_sync(0xffffffffu, __uint2float_rn(below) <= part * all);
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

  ATTNKIT_DEVICE float mass_of(float x) const { return exp2_fast(__fmaf_rn(x, scale, shift)); }
  // Four of a lane's.
  ATTNKIT_DEVICE float mass_of(const Raw<kBf16>& four) const {
    float x[4];
    widen_four<kBf16>(four, x);
    float sum = mass_of(x[0]);
#pragma unroll
    for (int i = 1; i < 4; ++i) sum += mass_of(x[i]);
    return sum;
  }
  // Logits far from zero are rounded by more when temperature divides them.
  ATTNKIT_DEVICE float large() const { return 1.0f + fabsf(shift) * (1.0f / 64.0f); }
  // What those tokens may weigh too much or too little that have no place of their own.
  ATTNKIT_DEVICE float mass_of_vague() const {
    const u32 near = values.near_zero(), vague = near == Values::kRest ? 0 : s.counters[near] + s.counters[near - 1];
    return vague == 0 ? 0.0f : __uint2float_rn(vague) * mass_of(0.0f) * (exp2_fast(Values::kNear * scale) - 1.0f);
  }
  // Whether sums of such masses are numbers.
  ATTNKIT_DEVICE bool usual() const {
    return fabsf(reference) < kF32Max && fabsf(shift) < 1e30f && scale > 1e-20f && scale < 1e20f && !s.o.cold;
  }

  // ---- one read ----

  // From when on tokens are counted.
  ATTNKIT_DEVICE void take_bound() {
    scale = s.o.rt * kLog2e;
    reference = max_nan(max_nan(s.most_sampled[0], s.most_sampled[1]), max_nan(s.most_sampled[2], s.most_sampled[3]));
    shift = -reference * scale;
    values = Values(fminf(fminf(fminf(s.from[0], s.from[1]), fminf(s.from[2], s.from[3])), Values::kMostBound));
  }

  // Counts four of a lane's tokens.
  template <bool Positive>
  ATTNKIT_DEVICE void count(const Raw<kBf16>& four) const {
    const u32 base = smem_address(s.counters);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 at = values.places<Positive>(four.w[i]) * 4 + (base << 16 | base);
      asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at & 0xffffu) : "memory");
      asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at >> 16) : "memory");
    }
  }

  // A warp's pieces, one of every fourth slot. take(four by four, what is kept of the group) takes a lane's group.
  template <class F>
  ATTNKIT_DEVICE void stream(F&& take) const {
    constexpr int kStep = kTallyWarps / kSlotPieces;
    const int inside = warp % kSlotPieces;
    int at = warp / kSlotPieces;
    u32 landed = smem_address(&s.landed[at]), from = smem_address(held) + at * kSlotBytes + inside * (kPiece * 2) + lane * 8;
    const u32 end = smem_address(held) + slots * kSlotBytes;
    u16* hope = hopes + warp * 32 + lane;
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
      take(raw, *hope);
      hope += kTallyWarps * 32, at += kStep, landed += kStep * sizeof(u64), from += kStep * kSlotBytes;
      if (from >= end) from -= slots * kSlotBytes;
    }
  }
};

}  // namespace attnkit::sampling
