// A cluster's row, and what each of its CTAs (a share of the row) does while it reads: it lists the tokens that may be
// kept, sums masses, and lists the groups that arrive early (draw_by_arrival in attnkit/reference.py). From which logit on
// tokens are listed is guessed from the first block of every warp: see Listing::find_bound.
#pragma once
#include "sample_filter_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kGuessBins = 256;    // of the first blocks
constexpr int kMostParts = 8;
constexpr int kMostBlocks = 448;   // of a share
constexpr int kMostEarly = 160;    // groups that arrive early
constexpr int kMostArrivals = 64;  // tokens of a share that arrive early
constexpr int kTold = 16;          // of those, how many a CTA tells the others
constexpr int kProbes = 4;         // tokens that are weighed at a time

struct alignas(16) EarlyGroup {
  float x[16];
  int number;
  u32 word;
};

// The larger the score, the earlier. ``logit``: after temperature.
struct alignas(16) Arrival {
  float score, logit;
  int id;
};

// Shared memory besides the list. Mirrors CUT_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct CutShared {
  EarlyGroup early[kMostEarly];
  Arrival arrivals[kMostArrivals], told[kMostParts * kTold];
  u32 guess[kGuessBins];
  uint4 about[kMostParts];     // of every CTA: largest logit, bound, mass, 1: a NaN, 2: a list ran over
  float2 floors[kMostParts];   // of every CTA: all arrivals from this score on are told, and how many those are
  float2 blocks[kMostBlocks];  // of each block: its largest logit, its mass as a multiple of that one's
  u64 bests[kMostParts];       // in CTA 0, of every CTA
  u64 sums[kSampleWarps];
  float tops[kSampleWarps], lows[kSampleWarps];
  u32 above[3][kProbes];
  u64 reached;
  float mass;  // of the blocks that have been read
  int n_early, n_arrivals;
};
static_assert(sizeof(CutShared) == 20944, "CUT_BYTES");

// How a row is held back, and where this CTA's share of it lies.
struct Share {
  int b, size, rank;
  float top_p, min_p, log_min_p;
  u64 seed, offset;
  int first, from, end, last;  // blocks: the CTA's first, the warp's first and its end, the CTA's end

  ATTNKIT_DEVICE bool plain() const { return !by_mass() && min_p <= 0.0f; }
  ATTNKIT_DEVICE bool by_mass() const { return top_p < 1.0f; }
  ATTNKIT_DEVICE bool by_arrival() const { return by_mass() && min_p <= 0.0f; }
};

// What the stream does: lists the tokens from ``low`` on, each lane its own; for top-p it sums all masses; for top-p alone it
// lists the groups that arrive before a time by which some ten tokens of this share do.
template <int Type>
struct Listing {
  const SampleParams& p;
  CutShared& s;
  const Share& h;
  const RowOptions& o;
  const bool weigh, timed;
  float claim = -kF32Max;  // all tokens from this logit on are listed
  float low = -kF32Max;
  float seen = negative_infinity();  // a lane's largest; NaN once there was one
  float base, sum;
  float reference = 0.0f;  // times and the CTA's mass so far are of this logit
  float awaited, pace;     // tokens of the share by the time that counts as early; the same for a mass of ``base``
  float guessed = 0.0f;    // the share's mass, by its first blocks
  u32 w[4];
  float high, bottom, per;  // the bins of ``guess``
  u32 to;                   // where the next token goes
  const u32 to_end;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  ATTNKIT_DEVICE Listing(const SampleParams& q, CutShared& shared, const float2* list, const Share& share, const RowOptions& options)
      : p(q), s(shared), h(share), o(options), weigh(share.by_mass()), timed(share.by_arrival()),
        to(smem_address(list) + threadIdx.x * 8), to_end(to + (q.room - 4) * kSampleThreads * 8) {
    awaited = fminf(6.0f * reciprocal(fmaxf(h.top_p, 0.1f)) + 2.0f, 20.0f);
  }

  // ---- the bound ----

  // ``v``: two tokens of each group of a lane's first block, by whose share the bound is guessed.
  ATTNKIT_DEVICE void find_bound(const float (&v)[8], float most, float least) {
    most = order_value(__reduce_max_sync(0xffffffffu, order_key(most)));
    least = order_value(__reduce_min_sync(0xffffffffu, order_key(least)));
    if (lane == 0) s.tops[warp] = most, s.lows[warp] = least;
    __syncthreads();
    const float x = s.tops[lane % kSampleWarps];
    const float top = order_value(__reduce_max_sync(0xffffffffu, order_key(x)));
    if (weigh) {
      // Few lie above the smallest of the warps' largest.
      high = order_value(__reduce_min_sync(0xffffffffu, order_key(x > negative_infinity() ? x : -negative_infinity())));
      bottom = order_value(__reduce_min_sync(0xffffffffu, order_key(s.lows[lane % kSampleWarps])));
      const float range = high - bottom;
      per = range > 0.0f && range < kF32Max ? (kGuessBins - 1) * reciprocal(range) : 0.0f;
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        if (v[u] > negative_infinity()) count(v[u]);
      }
      __syncthreads();
      claim = guess();
    }
    tighten(top);
    low = fmaxf(claim - fabsf(claim) * kRounding, -kF32Max);
    if (weigh) look_ahead(v, top);
  }

  // By the first blocks: the share's mass, the largest of the tokens counted once; and whether far more than top-p leaves out
  // would not be listed: then nothing is.
  ATTNKIT_DEVICE void look_ahead(const float (&v)[8], float top) {
    float all = 0.0f, above = 0.0f, most = 0.0f;
    reference = top > negative_infinity() ? top : 0.0f;
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const float mass = v[u] > negative_infinity() ? exp2_fast((v[u] - reference) * o.rt * kLog2e) : 0.0f;
      all += mass;
      most = fmaxf(most, mass);
      if (v[u] >= low) above += mass;
    }
    all = warp_sum(all), above = warp_sum(above);
    most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most)));
    if (lane == 0) s.sums[warp] = static_cast<u64>(__float_as_uint(all)) << 32 | __float_as_uint(above), s.lows[warp] = most;
    __syncthreads();
    const u64 both = lane < kSampleWarps ? s.sums[lane % kSampleWarps] : 0;
    all = warp_sum(__uint_as_float(high_word(both))), above = warp_sum(__uint_as_float(static_cast<u32>(both)));
    most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(s.lows[lane % kSampleWarps])));
    guessed = fmaxf((all - most) * (h.last - h.first) + most, 1.0f);
    if (timed && all - above > 4.0f * (1.0f - h.top_p) * all) claim = low = -negative_infinity();
  }

  ATTNKIT_DEVICE void count(float x) { atomicAdd(&s.guess[static_cast<int>(fminf(fmaxf((high - x) * per, 0.0f), kGuessBins - 1))], 1u); }

  ATTNKIT_DEVICE float guess() const {
    const uint4 a = reinterpret_cast<const uint4*>(s.guess)[2 * lane], c = reinterpret_cast<const uint4*>(s.guess)[2 * lane + 1];
    const u32 n[8] = {a.x, a.y, a.z, a.w, c.x, c.y, c.z, c.w};
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) mine += n[i];
    u32 upto = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u32 other = __shfl_up_sync(0xffffffffu, upto, step);
      upto += lane >= step ? other : 0;
    }
    const u32 all = __shfl_sync(0xffffffffu, upto, 31);
    // A sixteenth of the tokens, more for a large top-p, but no more than every lane has room for.
    const float room = 0.5f * p.room * kSampleThreads / ((h.last - h.first) * kBlock);
    const float part = h.top_p <= 0.91f ? 1.0f / 16.0f : h.top_p > 0.96f && room > 0.3f ? 0.33f : 1.0f / 9.0f;
    const u32 wanted = max(1u, static_cast<u32>(fminf(part, room) * all));
    const u32 before = upto - mine;
    u32 bin = 0, sum = before;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += n[i], bin += sum < wanted;
    bin += 8 * lane;
    const u32 found = __ballot_sync(0xffffffffu, before < wanted && upto >= wanted);
    if (found == 0) return -kF32Max;
    bin = __shfl_sync(0xffffffffu, bin, __ffs(found) - 1);
    if (per > 0.0f && bin < kGuessBins - 1) return high - (bin + 1) * reciprocal(per) - (fabsf(high) + fabsf(bottom)) * 2e-6f;
    return -kF32Max;
  }

  // What the row's largest logit so far says for certain: min-p leaves nothing below its share of it, and top-p nothing so
  // small that all tokens as small would be less than what it leaves out.
  ATTNKIT_DEVICE void tighten(float top) {
    if (!(top > negative_infinity())) return;
    const float l = warm(top, o);
    float least = h.min_p > 0.0f ? __fadd_rn(l, h.log_min_p) : -kF32Max;
    if (weigh) least = fmaxf(least, l + log2_fast((1.0f - h.top_p) * 0.25f / p.V) * kLn2);
    const float x = least * o.t;
    claim = fmaxf(claim, fminf(x - fabsf(x) * kRounding, kF32Max));
  }

  // ---- the stream ----

  ATTNKIT_DEVICE float scale() const { return o.rt * kLog2e; }

  ATTNKIT_DEVICE void block(int number) {
    base = negative_infinity(), sum = 0.0f, pace = 0.0f;
    if (timed) philox_words(h.seed, h.offset, kOfGroups, static_cast<u32>(number) * 32 + lane_id(), w);
  }

  ATTNKIT_DEVICE void set_base(float most) {
    sum *= exp2_fast((base - most) * scale());
    base = most;
    pace = 1.002f * awaited * exp2_fast((base - reference) * scale());
  }

  // The share's mass, as far as it is known: it only grows, so the time that counts as early only shrinks.
  ATTNKIT_DEVICE float known_mass() const { return fmaxf(guessed, *const_cast<volatile float*>(&s.mass)); }

  template <int Held>
  ATTNKIT_DEVICE void piece(const Raw<Held> (&raw)[4], int number, int place) {
    const float peak = peak_of<Held>(raw);
    seen = max_nan(seen, peak);
    if (weigh) {
      const float most = order_value(__reduce_max_sync(0xffffffffu, order_key(peak)));
      if (most > base) set_base(most);
      const float mass = base > negative_infinity() ? mass_of<Held>(raw) : 0.0f;
      sum += mass;
      if (timed) {
        const u32 word = place & 2 ? (place & 1 ? w[3] : w[2]) : (place & 1 ? w[1] : w[0]);
        // E >= u: no group is missed.
        const bool is = !(Draw::one_and(word) > __fmaf_rn(mass, pace * reciprocal(known_mass()), 1.0f));
        if (__any_sync(0xffffffffu, is)) note_group<Held>(is, raw, number * 32 + lane, word);
      }
    }
    if (__any_sync(0xffffffffu, peak >= low)) append<Held>(raw, number * kPiece + lane * 4);
  }

  // Of a lane's group, in units of ``base``.
  template <int Held>
  ATTNKIT_DEVICE float mass_of(const Raw<Held> (&raw)[4]) const {
    const float shift = -base * scale();
    float sums[4];
    if (fabsf(shift) > 256.0f) {  // a product and a sum would lose digits
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<Held>(raw[c], x);
        sums[c] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c] += exp2_fast((x[i] - base) * scale());
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<Held>(raw[c], x);
        sums[c] = exp2_fast(__fmaf_rn(x[0], scale(), shift));
#pragma unroll
        for (int i = 1; i < 4; ++i) sums[c] += exp2_fast(__fmaf_rn(x[i], scale(), shift));
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  template <int Held>
  ATTNKIT_DEVICE void note_group(bool is, const Raw<Held> (&raw)[4], int number, u32 word) {
    if (!is) return;
    const int at = atomicAdd(&s.n_early, 1);
    if (at % 32 == 31 && at > kMostEarly / 3) atomicAdd(&s.mass, known_mass());  // too many: it must be more
    if (at >= kMostEarly) return;  // the count says so
    EarlyGroup& group = s.early[at];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Held>(raw[c], x);
      reinterpret_cast<float4*>(group.x)[c] = make_float4(x[0], x[1], x[2], x[3]);
    }
    group.number = number, group.word = word;
  }

  // Four more might not fit: then none follows.
  ATTNKIT_DEVICE bool ran_over() const { return to > to_end; }

  // A lane's tokens lie as far apart as all threads have room for one.
  template <int Held>
  ATTNKIT_DEVICE void append(const Raw<Held> (&raw)[4], int v) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Held>(raw[c], x);
      const float from = ran_over() ? __uint_as_float(0x7fffffffu) : low;  // NaN: none
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile(
            "{\n.reg .pred is;\n"
            "setp.ge.f32 is, %1, %2;\n"
            "@is st.shared.v2.b32 [%0], {%1, %3};\n"
            "@is add.u32 %0, %0, %4;\n}"
            : "+r"(to) : "f"(x[i]), "f"(from), "r"(v + c * kChunk + i), "n"(kSampleThreads * 8) : "memory");
      }
    }
  }

  ATTNKIT_DEVICE void end_block(int number) {
    if (!weigh) return;
    const float all = warp_sum(sum);
    if (lane != 0) return;
    s.blocks[number - h.first] = make_float2(base, all);
    if (timed && base > negative_infinity()) atomicAdd(&s.mass, fminf(all * exp2_fast((base - reference) * scale()), 1e30f));
  }
};

// What the stream does for a row that nothing holds back, or a greedy one: as sample_draw_sm90.cuh.
struct Drawing {
  const Share& h;
  const RowOptions& o;
  Floor floor;
  Best best;
  u32 w[4];

  ATTNKIT_DEVICE Drawing(CutShared& s, const Share& share, const RowOptions& options) : h(share), o(options), floor(&s.reached, 0) {}
  ATTNKIT_DEVICE void block(int n) { philox_words(h.seed, h.offset, kOfGroups, static_cast<u32>(n) * 32 + lane_id(), w); }
  template <int Held>
  ATTNKIT_DEVICE void piece(const Raw<Held> (&raw)[4], int number, int place) {
    const int lane = static_cast<int>(lane_id());
    if (o.cold) {
      best.largest<Held>(raw, number * kPiece + lane * 4);
    } else {
      const u32 word = place & 2 ? (place & 1 ? w[3] : w[2]) : (place & 1 ? w[1] : w[0]);
      try_group<Held>(best, floor, raw, number * 32 + lane, word, o);
    }
  }
  ATTNKIT_DEVICE void end_block(int) {}
};

// A warp's blocks of a row, one after the other; the first one's logits are on their way if it is whole.
template <int Type, class Work>
ATTNKIT_DEVICE void stream_share(const SampleParams& p, Work& work, Spot<Type> spot, int end, Raw<Type> (&raw)[4][4], const RowPointers& r,
                                 const RowOptions& o) {
#pragma unroll 1
  while (spot.block < end) {
    const Spot<Type> next(p, spot.block + 1, end);
    const int piece = spot.v / kPiece;
    work.block(piece / 4);
    if (spot.whole) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        work.template piece<Type>(raw[u], piece + u, u);
        if (next.whole) next.load(raw[u], u);
      }
    } else {
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        Raw<Type> held[4];
        load_piece<Type, false>(held, r, o, spot.v + u * kPiece + static_cast<int>(lane_id()) * 4, p.V);
        work.template piece<Type>(held, piece + u, u);
      }
      if (next.whole) {
#pragma unroll
        for (int u = 0; u < 4; ++u) next.load(raw[u], u);
      }
    }
    work.end_block(piece / 4);
    spot = next;
  }
}

}  // namespace attnkit::sampling
