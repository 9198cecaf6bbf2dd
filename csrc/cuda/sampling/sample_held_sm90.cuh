// A CTA's share of a row, read once: of each group of 16 tokens the largest logit (peak) and the sum of exp, and how many tokens
// each of 14336 levels has, all in shared memory. A row is one CTA's, or a cluster's; blocks are dealt to CTAs in turn.
#pragma once
#include "sample_counted_sm90.cuh"
#include "sample_filter_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kArriveThreads = 512, kArriveWarps = kArriveThreads / 32;
constexpr int kPiecesAhead = 2;  // pieces of 512 tokens that a warp has on their way
constexpr int kMostParts = 12;   // CTAs of a row
constexpr int kMostEarly = 256;  // groups of a CTA that arrive early
constexpr int kTold = 128;       // tokens of a row that arrive early
constexpr int kProbes = 32;      // tokens that are judged at a time

// Levels, a bin each, even in logits; the last holds all that is lower too. How far apart they are is the row's affair: up to
// kAbove powers of two above the largest of a sample, and kBelow below it.
constexpr int kCells = kArriveThreads, kCell = 28, kBins = kCells * kCell;
constexpr float kAbove = 24.0f, kBelow = 24.0f;

// ``highest``: the logit of bin 0; ``per_logit``: of all levels; ``step``: between two, in powers of two.
struct Levels {
  float highest, per_logit, step;
};

// A token that arrives early; the larger the key, the earlier. ``logit``: after temperature.
struct alignas(16) Arrival {
  u64 key;
  float logit;
  int id;
};

// Shared memory; groups, marks, bins and what copies bring follow, each in whole lines of 128 bytes. Mirrors ARRIVE_BYTES in
// attnkit/backends/cuda/builds/sampling.py.
struct alignas(128) ArriveShared {
  Arrival told[kTold];         // by all CTAs in turn
  union {
    Place order[kTold];        // the same in order of time
    Arrival mine[kTold / 2];   // this CTA's, until all CTAs have them
  };
  uint4 about[kMostParts];     // of every CTA: largest logit, mass
  uint4 bests[2][kMostParts];  // of every CTA
  u64 sums[kArriveWarps];
  float2 warps[kArriveWarps];  // of every warp: largest logit, mass
  float most[kArriveWarps];
  float2 samples[kArriveWarps];  // of every warp: largest logit of its sample, and how far below it the others are
  u32 above[3][2 * kProbes];
  float before[kCells + 1];    // what the cells before a cell weigh
  int early[kMostEarly];
  RowOptions options;          // here, as are the next, since registers are scarce
  u64 seed, offset;
  Levels levels;
  int n_early, n_told;
  int over;  // this CTA had more to tell
  u64 met[3];  // barriers that count what all CTAs of a row send to each: Meeting
};
static_assert(sizeof(ArriveShared) == 8064, "ARRIVE_BYTES");

// What all CTAs of a row send to all of them: what they hold, the tokens that arrive early, and bounds of what precedes those. It is
// counted where it arrives, which takes half as long as a barrier of the cluster: that waits until memory has all stores.
enum Meeting { kOfAbout, kOfTold, kOfSums };

ATTNKIT_DEVICE void open_meetings(ArriveShared& s) {
  for (int i = 0; i < 3; ++i) mbarrier_init(smem_address(&s.met[i]), 1);
  mbarrier_init_fence();
}
// By one thread: how many bytes will come.
ATTNKIT_DEVICE void expect(ArriveShared& s, Meeting of, int bytes) { mbarrier_arrive_expect(smem_address(&s.met[of]), bytes); }
ATTNKIT_DEVICE void await(ArriveShared& s, Meeting of, int turn) { mbarrier_wait_cluster(smem_address(&s.met[of]), turn & 1); }
// To the same place in another CTA.
ATTNKIT_DEVICE void send(ArriveShared& s, Meeting of, const void* to, int cta, uint4 x) {
  store_async_16(remote_address(to, cta), remote_address(&s.met[of], cta), x.x, x.y, x.z, x.w);
}
ATTNKIT_DEVICE void send_added(ArriveShared& s, Meeting of, const void* to, int cta, u32 x) {
  asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];" ::"r"(remote_address(to, cta)),
               "r"(x), "r"(remote_address(&s.met[of], cta))
               : "memory");
}

// What follows from these is not worked out ahead of a loop: there are no registers to keep it.
ATTNKIT_DEVICE float hidden(float x) {
  float same;
  asm volatile("mov.b32 %0, %1;" : "=f"(same) : "f"(x));
  return same;
}
ATTNKIT_DEVICE int thread_here() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}

// A group's sum of exp, its largest counting one. Converged warps only.
template <int Type>
ATTNKIT_DEVICE float sum_of(const Raw<Type> (&raw)[4], float peak, float scale) {
  const float base = fmaxf(fminf(peak, kF32Max), -kF32Max), shift = -base * scale;
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

template <int Type, bool Penalised>
struct ArriveShare {
  static constexpr int kHeld = Penalised ? kF32 : Type;  // what penalties make of logits are floats
  const SampleParams& p;
  ArriveShared& s;
  float2* const groups;  // of this CTA: peak, and sum, the peak counting one
  u16* const marks;      // of each group the upper half of its word; then lists of groups
  u32* const bins;
  const int b, size, rank, n;
  const int slot;  // bytes behind the bins that each warp has for a piece with penalties, or 0
  const RowPointers& r;
  const RowOptions& o;
  const float scale;  // to powers of two
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  float highest = 0.0f, per_logit = 0.0f;  // levels', while logits stream by
  float here = 0.0f, mass = 0.0f;    // this CTA's largest logit, and its mass, that one counting one
  float largest = 0.0f, top = 0.0f;  // the row's largest logit, before and after temperature
  float whole = 0.0f;                // the row's mass, the row's largest counting one

  // Blocks are dealt to CTAs in turn.
  ATTNKIT_DEVICE int number_of(int i) const { return (i / 128 * size + rank) * 128 + i % 128; }
  // Of a logit of this CTA, the largest's being one.
  ATTNKIT_DEVICE float mass_of(float x) const { return exp2_fast((fminf(x, kF32Max) - here) * scale); }
  // This CTA's largest logit weighs, the row's largest being one.
  ATTNKIT_DEVICE float part() const { return exp2_fast((hidden(here) - largest) * scale); }

  // All of the row, and what they wrote.
  ATTNKIT_DEVICE void meet() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  // 2^23 and the bin of a logit.
  ATTNKIT_DEVICE static float level_of(float x, float highest, float per_logit) {
    return __fmaf_rn(__saturatef((highest - x) * per_logit), static_cast<float>(kBins - 1), 8388608.0f);
  }
  ATTNKIT_DEVICE int bin_of(float x) const {
    return static_cast<int>(__float_as_uint(level_of(x, s.levels.highest, s.levels.per_logit)) - 0x4b000000u);
  }

  // ---- one read of the logits ----

  ATTNKIT_DEVICE void load_words() {
    const u64 seed = s.seed, offset = s.offset;
#pragma unroll 1
    for (int c = thread_here(); c < n / 4; c += kArriveThreads) {
      u32 w[4];
      philox_words(seed, offset, kOfGroups, static_cast<u32>((c / 32 * size + rank) * 32 + lane), w);
#pragma unroll
      for (int j = 0; j < 4; ++j) marks[c / 32 * 128 + j * 32 + lane] = static_cast<u16>(w[j] >> 16);
    }
  }

  // What levels go by: 128 tokens a warp, without penalties. A row of much larger logits has tokens in bin 0.
  ATTNKIT_DEVICE Raw<Type> ask_sample() const {
    const int v = (p.V + kChunk - 1) / kChunk * warp / kArriveWarps * kChunk + lane * 4;
    Raw<Type> sample;
    if (r.logits_wide && v + 4 <= p.V) {
      sample = load_stream<Type>(r.logits + static_cast<i64>(v) * (Type == kF32 ? 4 : 2));
    } else {
      sample = load_four_guarded<Type>(r.logits, v, p.V);
    }
    return sample;
  }
  ATTNKIT_DEVICE void use_sample(const Raw<Type>& sample) {
    float x[4], most = -kF32Max, below = 0.0f;
    widen_four<Type>(sample, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) most = x[i] < kF32Max ? fmaxf(most, x[i]) : most;
    most = order_value(__reduce_max_sync(0xffffffffu, order_key(most)));
#pragma unroll
    for (int i = 0; i < 4; ++i) below += fminf(fmaxf(most - x[i], 0.0f) * scale, kBelow);
    const u32 sum = __reduce_add_sync(0xffffffffu, __float2uint_rn(below * 256.0f));
    const int t = thread_here();
    if (t % 32 == 0) s.samples[t / 32] = make_float2(most, __uint2float_rn(sum) * (1.0f / (128 * 256)));
    __syncthreads();
    const float2 one = s.samples[lane % kArriveWarps];
    most = order_value(__reduce_max_sync(0xffffffffu, order_key(one.x)));
    below = one.y + fminf((most - one.x) * scale, kBelow);
    set_levels(most, __uint2float_rn(__reduce_add_sync(0xffffffffu, __float2uint_rn(below * 256.0f))) * (1.0f / (32 * 256)));
  }

  // The largest of a sample, and by how many powers of two the others are below it on average: of flat rows levels are close.
  ATTNKIT_DEVICE void set_levels(float most, float below) {
    const float above = fminf(5.0f * below + 2.0f, kAbove), range = above + fminf(2.0f * below + 0.5f, kBelow);
    highest = most + above * reciprocal(scale), per_logit = scale * reciprocal(range);
    s.levels = Levels{highest, per_logit, range * (1.0f / (kBins - 1))};  // all threads the same
  }

  // While L2 asks for the first pieces, words are worked out; loads would make who waits for the sample wait for them.
  template <class F>
  ATTNKIT_DEVICE void stream_share(F&& take) {
    const Spot<Type> spot = spot_of(warp);
    const Raw<Type> sample = ask_sample();
    spot.template ask_l2<kPiecesAhead>(warp % kParts * kPiecesAhead);
    __syncthreads();
    load_words();
    use_sample(sample);
    read_share(warp, spot, take);
  }

  // A warp takes a part of a block at a time; kArriveWarps is a multiple of kParts.
  static constexpr int kParts = 4 / kPiecesAhead;
  ATTNKIT_DEVICE Spot<Type> spot_of(int i) const {
    const int last = (b + 1) * p.blocks;
    return Spot<Type>(p, i < n / 128 * kParts ? b * p.blocks + i / kParts * size + rank : last, last);
  }

  // All pieces of this CTA's share, 512 tokens each, those that follow on their way: ``take`` gets what a lane has of one and the
  // place of its group; the warp's first part is ``i``, at ``spot``.
  template <class F>
  ATTNKIT_DEVICE void read_share(int i, Spot<Type> spot, F&& take) const {
    const int parts = n / 128 * kParts;
    Raw<Type> raw[kPiecesAhead][4];
    if (spot.whole) {
#pragma unroll
      for (int u = 0; u < kPiecesAhead; ++u) spot.load(raw[u], i % kParts * kPiecesAhead + u);
    }
#pragma unroll 1
    for (; i < parts; i += kArriveWarps) {
      const Spot<Type> next = spot_of(i + kArriveWarps);
      const int first = i % kParts * kPiecesAhead, at = i * (128 / kParts) + lane;
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

  // The same with penalties: one piece is on its way. Which token is the first of the CTA's piece i:
  ATTNKIT_DEVICE int first_of(int i) const { return (i / 4 * size + rank) * kBlock + i % 4 * kPiece; }
  // In shared memory, until what becomes of it is in registers.
  template <bool Plain, class F>
  ATTNKIT_DEVICE void stream_copied(F&& take) {
    const Counted<Type, false, Plain> counted(p, reinterpret_cast<const char*>(bins + kBins), slot, 0);
    const auto ask = [&](int i) {
      if (i >= n / 32) return;
      CountedPiece piece = counted.piece_at(r, b, first_of(i));
      counted.ask(piece, counted.slots);
    };
    const Raw<Type> sample = ask_sample();
    ask(warp);
    __syncthreads();
    load_words();
    use_sample(sample);
#pragma unroll 1
    for (int i = warp; i < n / 32; i += kArriveWarps) {
      copy_async_wait_all();
      float x[4][4], seen_most = negative_infinity();
      const u32 seen = counted.put_aside(counted.slots, o, seen_most);
      counted.all_of(counted.slots, seen, x);
      Raw<kF32> held[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int j = 0; j < 4; ++j) held[c].w[j] = __float_as_uint(x[c][j]);
      }
      ask(i + kArriveWarps);
      take(held, i * 32 + lane);
    }
  }
  // In registers.
  template <class F>
  ATTNKIT_DEVICE void stream_loaded(F&& take) {
    const int pieces = n / 32;
    int i = warp;
    Fetched<Type, true> fetched;
    const Raw<Type> sample = ask_sample();
    __syncthreads();
    if (i < pieces) fetched.ask(r, first_of(i) + lane * 4, p.V);
    load_words();
    use_sample(sample);
#pragma unroll 1
    for (; i < pieces; i += kArriveWarps) {
      const int coming = i + kArriveWarps;
      Raw<kF32> held[4];
      fetched.use(held, r, o, first_of(i) + lane * 4, p.V);
      if (coming < pieces) fetched.ask(r, first_of(coming) + lane * 4, p.V);
      take(held, i * 32 + lane);
    }
  }

  // Fills groups and bins. A lane's largest logit, or NaN, and its mass, that one counting one.
  ATTNKIT_DEVICE float2 take_in() {
    const u32 first = smem_address(bins) - (0x4b000000u << 2);
    float most = -kF32Max, sum = 0.0f;
    const auto take = [&](const Raw<kHeld>(&raw)[4], int i) {
      const float peak = peak_of<kHeld>(raw), share = sum_of<kHeld>(raw, peak, scale), was = most;
      most = max_nan(was, fminf(peak, kF32Max));
      if (peak != peak) most = peak;
      groups[i] = make_float2(peak, share);
      sum = sum * exp2_fast((was - most) * scale) + share * exp2_fast((fminf(peak, kF32Max) - most) * scale);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<kHeld>(raw[c], x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          asm volatile("red.shared.add.u32 [%0], 1;" ::"r"((__float_as_uint(level_of(x[j], highest, per_logit)) << 2) + first) : "memory");
        }
      }
    };
    if constexpr (!Penalised) {
      stream_share(take);
    } else if (slot == 0) {
      stream_loaded(take);
    } else if (only_counts(p)) {
      stream_copied<true>(take);
    } else {
      stream_copied<false>(take);
    }
    return make_float2(most, sum);
  }

  // ---- the row's mass ----

  // The largest of all lanes, and the mass of all.
  ATTNKIT_DEVICE float2 gather(float2 mine) const {
    const float most = order_value(__reduce_max_sync(0xffffffffu, order_key(mine.x)));
    float sum = mine.y * exp2_fast((mine.x - most) * scale);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return make_float2(most, sum);
  }

  // What the row weighs. False for a row with NaN or without a token.
  ATTNKIT_DEVICE bool add_up_row(float2 mine) {
    const float2 own = gather(mine);
    if (lane == 0) s.warps[warp] = own;
    __syncthreads();
    const float2 none = make_float2(-kF32Max, 0.0f);
    float2 all = gather(lane < kArriveWarps ? s.warps[lane] : none);
    here = all.x, mass = all.y;
    if (size > 1) {
      cluster_wait();
      const int t = thread_here();
      if (t == 0) expect(s, kOfAbout, 16 * size);
      if (t < size) send(s, kOfAbout, &s.about[rank], t, make_uint4(__float_as_uint(here), __float_as_uint(mass), 0, 0));
      await(s, kOfAbout, 0);
      const uint4 q = s.about[min(lane, size - 1)];
      all = gather(lane < size ? make_float2(__uint_as_float(q.x), __uint_as_float(q.y)) : none);
    }
    largest = all.x, whole = all.y, top = warm(largest, o);
    return whole > 0.0f;
  }
};

}  // namespace attnkit::sampling
