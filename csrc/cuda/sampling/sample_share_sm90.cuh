// A cluster's row, and what each of its CTAs (a share of the row) does while it reads: it lists the tokens that may be
// kept. Which those are is guessed from the first block of every warp, before any token is listed: see Listing::find_bound.
#pragma once
#include "sample_filter_sm90.cuh"
#include "sample_rank_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kBins = 1024;      // of the listed tokens, from the largest down
constexpr int kGuessBins = 256;  // of the first blocks
constexpr int kNear = 512;       // tokens that are ranked by comparing all pairs
constexpr int kFew = 160;        // comparing all pairs takes less than the bins do
constexpr int kMostParts = 8;
constexpr int kMostBlocks = 448;  // of a share
constexpr int kListAll = 4096;    // a share of no more tokens is listed whole

// Shared memory besides the list. Mirrors CUT_BYTES in attnkit/backends/cuda/builds/sampling.py.
struct CutShared {
  u32 bins[kBins];
  u32 guess[kGuessBins];
  Candidate near[kNear];
  uint4 about[kMostParts];   // of every CTA: tokens listed (top bit: a NaN), largest logit, bound, mass
  u64 wholes[kMostParts];    // of every CTA: the mass of its share
  u64 bests[kMostParts];     // in CTA 0, of every CTA: its best draw
  float2 blocks[kMostBlocks];  // of each block: its largest logit, its mass as a multiple of that one's
  u64 sums[kSampleWarps];
  float tops[kSampleWarps], lows[kSampleWarps];
  u64 reached;
  int n, n_near;
  Pick pick;
};
static_assert(sizeof(CutShared) == 17312, "CUT_BYTES");

// The word of a token, by a loop: short where it runs few times.
ATTNKIT_DEVICE u32 token_word(u64 seed, u64 offset, int id) {
  u32 k0 = static_cast<u32>(seed), k1 = high_word(seed);
  u32 c0 = static_cast<u32>(id) >> 2, c1 = static_cast<u32>(offset), c2 = high_word(offset), c3 = kOfTokens;
#pragma unroll 2
  for (int i = 0; i < 10; ++i) {
    const u64 a = static_cast<u64>(kPhiloxM0) * c0, b = static_cast<u64>(kPhiloxM1) * c2;
    c0 = high_word(b) ^ c1 ^ k0;
    c1 = static_cast<u32>(b);
    c2 = high_word(a) ^ c3 ^ k1;
    c3 = static_cast<u32>(a);
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  return id & 2 ? (id & 1 ? c3 : c2) : (id & 1 ? c1 : c0);
}

ATTNKIT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// How a row is held back, and where this CTA's share of it lies. k is 0 where top-k is off.
struct Share {
  int b, size, rank;
  u32 k;
  float top_p, min_p, log_min_p;
  u64 seed, offset;
  int first, from, end, last;  // blocks: the CTA's first, the warp's first and its end, the CTA's end

  ATTNKIT_DEVICE bool plain() const { return k == 0 && top_p >= 1.0f && min_p <= 0.0f; }
  ATTNKIT_DEVICE bool by_mass() const { return k == 0 && top_p < 1.0f; }
};

// What the stream does: lists the tokens from ``low`` on and, for top-p, sums all masses.
template <int Type, bool Penalised>
struct Listing {
  const SampleParams& p;
  CutShared& s;
  float2* const list;  // logit, id
  const Share& h;
  const RowOptions& o;
  const bool weigh;
  float claim = -kF32Max;  // all tokens from this logit on are listed
  float low = -kF32Max;
  float seen = negative_infinity();  // a lane's largest; NaN once there was one
  float base, sum;
  float high, bottom, per;  // the bins of ``guess``
  bool counted = true;      // the block's peaks are in them
  bool hopeless = false;    // the list would not reach as far as top-p does
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  ATTNKIT_DEVICE Listing(const SampleParams& q, CutShared& shared, float2* to, const Share& share, const RowOptions& options)
      : p(q), s(shared), list(to), h(share), o(options), weigh(share.by_mass()) {}

  // ---- the bound ----

  // ``v``: values that stand for a lane's first block: where k is short, peaks of groups, of which k at or above a bound mean
  // as many tokens; else two tokens of each group, by whose share the bound is guessed.
  ATTNKIT_DEVICE bool short_k() const { return h.k != 0 && h.k <= kMostListed; }

  ATTNKIT_DEVICE void find_bound(const float (&v)[8], float most, float least) {
    most = order_value(__reduce_max_sync(0xffffffffu, order_key(most)));
    least = order_value(__reduce_min_sync(0xffffffffu, order_key(least)));
    if (lane == 0) s.tops[warp] = most, s.lows[warp] = least;
    __syncthreads();
    const float x = s.tops[lane % kSampleWarps];
    const float top = order_value(__reduce_max_sync(0xffffffffu, order_key(x)));
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
    if ((h.last - h.first) * kBlock > kListAll || short_k()) claim = guess();
    tighten(top);
    set_low();
    if (weigh && h.min_p <= 0.0f) look_ahead(v, top);
  }

  // Whether far more than top-p leaves out would not be listed, by the first blocks. Then the row is left to the filter kernel.
  ATTNKIT_DEVICE void look_ahead(const float (&v)[8], float top) {
    float all = 0.0f, above = 0.0f;
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const float mass = v[u] > negative_infinity() ? exp2_fast((v[u] - top) * o.rt * kLog2e) : 0.0f;
      all += mass;
      if (v[u] >= low) above += mass;
    }
    all = warp_sum(all), above = warp_sum(above);
    if (lane == 0) s.sums[warp] = static_cast<u64>(__float_as_uint(all)) << 32 | __float_as_uint(above);
    __syncthreads();
    const u64 both = lane < kSampleWarps ? s.sums[lane % kSampleWarps] : 0;
    all = warp_sum(__uint_as_float(high_word(both))), above = warp_sum(__uint_as_float(static_cast<u32>(both)));
    hopeless = (per == 0.0f && p.V > kListAll) || all - above > 4.0f * (1.0f - h.top_p) * all;
    if (hopeless && threadIdx.x == 0) s.n = 0x40000000;
  }

  ATTNKIT_DEVICE void set_low() { low = fmaxf(claim - fabsf(claim) * kRounding, -kF32Max); }
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
    u32 wanted = h.k;
    if (!short_k()) {
      // A sixteenth of the tokens, more for a large top-p, more than k; but no more than the list has room for.
      const float room = 0.6f * p.room / ((h.last - h.first) * kBlock);
      float part = h.top_p <= 0.91f ? 1.0f / 16.0f : h.top_p > 0.96f && room > 0.3f ? 0.33f : 1.0f / 9.0f;
      if (h.k != 0) part = fmaxf(1.0f / 64.0f, 3.0f * h.k / p.V);
      wanted = max(1u, static_cast<u32>(fminf(part, room) * all));
    }
    const u32 before = upto - mine;
    u32 bin = 0, sum = before;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += n[i], bin += sum < wanted;
    bin += 8 * lane;
    const u32 found = __ballot_sync(0xffffffffu, before < wanted && upto >= wanted);
    if (found == 0) return -kF32Max;
    bin = __shfl_sync(0xffffffffu, bin, __ffs(found) - 1);
    if (per > 0.0f && bin < kGuessBins - 1) return high - (bin + 1) * reciprocal(per) - (fabsf(high) + fabsf(bottom)) * 2e-6f;
    return short_k() ? bottom : -kF32Max;
  }

  // What the row's largest logit so far says for certain: min-p leaves nothing below its share of it, and top-p nothing so
  // small that all tokens as small would be less than what it leaves out.
  ATTNKIT_DEVICE void tighten(float top) {
    if (!(top > negative_infinity())) return;
    const float l = warm(top, o);
    float least = -kF32Max;
    if (h.min_p > 0.0f && !(h.k != 0 && h.top_p < 1.0f)) least = __fadd_rn(l, h.log_min_p);
    if (weigh) least = fmaxf(least, l + log2_fast((1.0f - h.top_p) * 0.25f / p.V) * kLn2);
    const float x = least * o.t;
    claim = fmaxf(claim, fminf(x - fabsf(x) * kRounding, kF32Max));
  }

  // ---- the stream ----

  ATTNKIT_DEVICE void block(int) { base = negative_infinity(), sum = 0.0f; }

  template <int Held>
  ATTNKIT_DEVICE void piece(const Raw<Held> (&raw)[4], int number, int) {
    const float peak = peak_of<Held>(raw);
    seen = max_nan(seen, peak);
    if (weigh) add_masses<Held>(raw, peak);
    if (!__any_sync(0xffffffffu, peak >= low)) return;
    append<Held>(raw, number * kPiece + lane * 4);
    if (!counted && peak >= low) count(peak);
  }

  template <int Held>
  ATTNKIT_DEVICE void add_masses(const Raw<Held> (&raw)[4], float peak) {
    const float most = order_value(__reduce_max_sync(0xffffffffu, order_key(peak))), scale = o.rt * kLog2e;
    if (most > base) {
      sum *= exp2_fast((base - most) * scale);
      base = most;
    }
    if (base == negative_infinity()) return;
    const float shift = -base * scale;
    if (fabsf(shift) > 256.0f) {  // a product and a sum would lose digits
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<Held>(raw[c], x);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += exp2_fast((x[i] - base) * scale);
      }
      return;
    }
    float sums[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Held>(raw[c], x);
      sums[c] = exp2_fast(__fmaf_rn(x[0], scale, shift));
#pragma unroll
      for (int i = 1; i < 4; ++i) sums[c] += exp2_fast(__fmaf_rn(x[i], scale, shift));
    }
    sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // A lane's places follow those of the lanes before it. Each comparison is made twice: cheaper than to keep sixteen.
  template <int Held>
  ATTNKIT_DEVICE void append(const Raw<Held> (&raw)[4], int v) {
    int n = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Held>(raw[c], x);
#pragma unroll
      for (int i = 0; i < 4; ++i) n -= at_least(x[i], low);
    }
    int upto = n, at = 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, step);
      upto += lane >= step ? other : 0;
    }
    const int all = __shfl_sync(0xffffffffu, upto, 31);
    if (lane == 0) asm volatile("atom.shared.add.s32 %0, [%1], %2;" : "=r"(at) : "r"(smem_address(&s.n)), "r"(all) : "memory");
    at = __shfl_sync(0xffffffffu, at, 0);
    if (at + all > p.room) return;  // no room: the count says so
    u32 to = smem_address(list) + static_cast<u32>(at + upto - n) * 8;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Held>(raw[c], x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile(
            "{\n.reg .pred is;\n"
            "setp.ge.f32 is, %1, %2;\n"
            "@is st.shared.b32 [%0], %1;\n"
            "@is st.shared.b32 [%0 + 4], %3;\n"
            "@is add.u32 %0, %0, 8;\n}"
            : "+r"(to) : "f"(x[i]), "f"(low), "r"(v + c * kChunk + i) : "memory");
      }
    }
  }

  // -1 where x >= bound, else 0.
  ATTNKIT_DEVICE static int at_least(float x, float bound) {
    int r;
    asm volatile("set.ge.s32.f32 %0, %1, %2;" : "=r"(r) : "f"(x), "f"(bound));
    return r;
  }

  ATTNKIT_DEVICE void end_block(int number) {
    if (short_k()) {  // with more peaks the bound rises
      claim = fmaxf(claim, guess());
      set_low();
      counted = false;
    }
    if (!weigh) return;
    const float all = warp_sum(sum);
    if (lane == 0) s.blocks[number - h.first] = make_float2(base, all);
  }
};

// What the stream does for a row that nothing holds back: as sample_draw_sm90.cuh.
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
    const u32 word = place & 2 ? (place & 1 ? w[3] : w[2]) : (place & 1 ? w[1] : w[0]);
    try_group<Held>(best, floor, raw, number * 32 + static_cast<int>(lane_id()), word, o);
  }
  ATTNKIT_DEVICE void end_block(int) {}
};

// A warp's blocks of a row, one after the other; the first one's logits are on their way if it is whole.
template <int Type, bool Penalised, class Work>
ATTNKIT_DEVICE void stream_share(const SampleParams& p, Work& work, Spot<Type> spot, int end, Raw<Type> (&raw)[Penalised ? 1 : 4][4],
                                 const RowPointers& r, const RowOptions& o) {
  constexpr int kHeldType = Penalised ? kF32 : Type;
#pragma unroll 1
  while (spot.block < end) {
    const Spot<Type> next(p, spot.block + 1, end);
    const int piece = spot.v / kPiece;
    work.block(piece / 4);
    if (!Penalised && spot.whole) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if constexpr (!Penalised) {
          work.template piece<kHeldType>(raw[u], piece + u, u);
          if (next.whole) next.load(raw[u], u);
        }
      }
    } else {
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        Raw<kHeldType> held[4];
        load_piece<Type, Penalised>(held, r, o, spot.v + u * kPiece + static_cast<int>(lane_id()) * 4, p.V);
        work.template piece<kHeldType>(held, piece + u, u);
      }
      if (!Penalised && next.whole) {
#pragma unroll
        for (int u = 0; u < 4; ++u) next.load(raw[Penalised ? 0 : u], u);
      }
    }
    work.end_block(piece / 4);
    spot = next;
  }
}

}  // namespace attnkit::sampling
