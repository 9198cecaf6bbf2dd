// Min-p without top-k over bf16 logits, with top-p if it comes: a row that is held (sample_tally_row_sm90.cuh), with the largest logit of
// each group, and weighed as it comes. Groups that reach min-p's bound are listed and read again, and the best of their tokens by noise is
// drawn, if top-p keeps it: what precedes it is in these groups too.
#pragma once
#include "sample_any_sm90.cuh"
#include "sample_hot_sm90.cuh"
#include "sample_tally_row_sm90.cuh"
#include "sample_topk_sm90.cuh"

namespace attnkit::sampling {

constexpr int kListSlots = kMostSlots * kSlotTokens / 16 * sizeof(u16) / kSlotBytes;  // for all groups

constexpr int kHotGroups = 4096;  // listed ones from which on all of the row is read again instead

struct TallyListShared : TallyRowShared {
  u64 bests[2][kTallyWarps];         // scores; of one draw and the next
  u64 of_bests[2][kTallyWarps];      // whose
  float before[2][kTallyWarps];      // what precedes who is drawn
  u32 tops[kTallyWarps];             // keys of the largest logits
  float sums[kTallyWarps];           // what a warp's tokens weigh
  int n_holders;
  int list_at, near;                 // the list's slot in the ring; from which slot of the row on others stay there
  float log_min_p;
};
static_assert(sizeof(TallyListShared) <= kTallyBytes);
static_assert(kListSlots <= 8);  // LEAST_SLOTS in attnkit/backends/cuda/builds/sampling.py

struct TallyList : TallyRow {
  TallyListShared& s;
  float top;  // the largest logit

  ATTNKIT_DEVICE TallyList(const SampleParams& p, char* memory) : TallyRow(p, memory), s(*reinterpret_cast<TallyListShared*>(memory)) {}

  // Before the grid before has ended, when the options are there.
  ATTNKIT_DEVICE void open() const {
    if (threadIdx.x != kSamplers * 32) return;  // who has nothing else to do
    s.n_holders = 0;
    s.log_min_p = logf(s.guess.min_p);
    // Where the oldest of the row's slots were, if none is free.
    int at = row_slots(), near = 0;
    if (at + kListSlots > slots) {
      at = first_kept % slots, near = first_kept + kListSlots;
      if (at + kListSlots > slots) near += slots - at, at = 0;
    }
    s.list_at = at, s.near = near;
  }

  // Keeps the largest of each group; a lane's, as two in a register. ``mass``: what its tokens weigh.
  ATTNKIT_DEVICE u32 take_row(float& mass) const {
    u32 most = 0xff80ff80u;
    float sum = 0.0f;
    stream([&](const Raw<kBf16>(&raw)[4], u16& peak) {
      u32 two = max_pairs<kBf16>(raw[0].w[0], raw[0].w[1]);
      float sums[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[c] = mass_of(raw[c]);
        if (c > 0) two = max_pairs<kBf16>(two, max_pairs<kBf16>(raw[c].w[0], raw[c].w[1]));
      }
      sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      two = max_pairs<kBf16>(two, two >> 16 | two << 16);
      peak = static_cast<u16>(two), most = max_pairs<kBf16>(most, two);
    });
    mass = warp_sum(sum);
    return most;
  }

  // Options that were read too early may differ in noise, which is not in use yet, but in nothing else.
  ATTNKIT_DEVICE void check_options() const {
    const TallyOptions now(p, b);
    if (lane == 0) s.guess.seed = now.seed, s.guess.offset = now.offset;
    if (!now.like(s.guess)) s.stale = 1;
  }

  // Values as bits.
  static constexpr u32 kLeastNumber = 0xff7f;
  ATTNKIT_DEVICE static u32 bits_of(float x) { return __float_as_uint(x) >> 16; }
  // The largest that is not above x.
  ATTNKIT_DEVICE static u32 bits_below(float x) { return bits_of(x) + (x < 0.0f && (__float_as_uint(x) & 0xffffu) != 0 ? 1 : 0); }
  ATTNKIT_DEVICE static u32 max_bits(u32 a, u32 b) { return __uint_as_float(a << 16) >= __uint_as_float(b << 16) ? a : b; }

  // ---- who may be kept ----

  // Groups that have a token which reaches a value, listed by all.
  ATTNKIT_DEVICE u16* holders() const { return reinterpret_cast<u16*>(const_cast<char*>(held) + s.list_at * kSlotBytes); }
  ATTNKIT_DEVICE void list_from(u32 bits) const {
    const u32 both = bits << 16 | bits;
#pragma unroll 1
    for (int of = warp * 32; of < pieces * 4; of += kTallyThreads) list_holders(of + lane, both);
    __syncthreads();
  }
  // Those of a lane's eight groups. A warp's work.
  ATTNKIT_DEVICE void list_holders(int i, u32 both) const {
    u32 hold = i < pieces * 4 ? reach_of_peaks(i, both) : 0;
    if (!__any_sync(0xffffffffu, hold != 0)) return;
    int at = lay_out(__popc(hold));
#pragma unroll 1
    for (; hold != 0; hold &= hold - 1, ++at) {
      const int j = __ffs(hold) - 1;
      holders()[at] = static_cast<u16>(i * 8 + j % 16 * 2 + j / 16);
    }
  }
  // A bit for each of eight peaks that reach a value: of the first of two in the lower half.
  ATTNKIT_DEVICE u32 reach_of_peaks(int i, u32 both) const {
    const uint4 q = reinterpret_cast<const uint4*>(hopes)[i];
    const u32 w[4] = {q.x, q.y, q.z, q.w};
    u32 hold = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 reach;
      asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(reach) : "r"(w[j]), "r"(both));
      hold |= reach & 0x10001u << j;
    }
    return hold;
  }
  // Where in the list a lane's go, of which there are eight at the most. A warp's work.
  ATTNKIT_DEVICE int lay_out(u32 mine) const {
    const u32 before = (1u << lane) - 1;
    int at = 0, all = 0, base = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 votes = __ballot_sync(0xffffffffu, (mine >> i & 1) != 0);
      at += __popc(votes & before) << i, all += __popc(votes) << i;
    }
    if (lane == 0) base = atomicAdd(&s.n_holders, all);
    return __shfl_sync(0xffffffffu, base, 0) + at;
  }

  // f(logits, first id) for each chunk of four tokens of the listed groups.
  template <class F>
  ATTNKIT_DEVICE void for_chunks(F&& f) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 4 * s.n_holders; i += kTallyThreads) {
      const int v = first_of_group(holders()[i / 4]) + i % 4 * kChunk, in = v / kSlotTokens;
      if (v >= p.V) continue;
      const uint2 four = *reinterpret_cast<const uint2*>(in >= s.near ? slot(in) + v % kSlotTokens * 2 : logits + v * 2);
      const float x[4] = {__uint_as_float(four.x << 16), __uint_as_float(four.x & 0xffff0000u), __uint_as_float(four.y << 16),
                          __uint_as_float(four.y & 0xffff0000u)};
      f(x, v);
    }
  }

  // ---- the draw ----

  // A token by its logit and id: the larger comes before.
  static constexpr u64 kNobody = 0;
  ATTNKIT_DEVICE static float logit_of(u64 token) { return order_value(high_word(token)); }

  // The best of the tokens that reach ``from``, before ``limit``; kNobody if there is none. By all, ``round`` after round.
  ATTNKIT_DEVICE u64 best_above(float from, u64 limit, int round) const {
    const float least = __fadd_rn(warm(top, s.o), s.log_min_p);
    u64 best = 0, own = kNobody;
    for_chunks([&](const float(&x)[4], int v) {
      u32 are = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) are |= x[i] >= from ? 1u << i : 0;
      if (are == 0) return;
      u32 w[4];
      philox_words(s.guess.seed, s.guess.offset, kOfTokens, static_cast<u32>(v) >> 2, w);
#pragma unroll 1
      for (; are != 0; are &= are - 1) {
        const int i = __ffs(are) - 1;
        const float raw = i & 2 ? (i & 1 ? x[3] : x[2]) : (i & 1 ? x[1] : x[0]), l = warm(raw, s.o);
        const u64 token = pack_best(raw, v + i), score = s.o.cold ? token : pack_best(noisy(l, one_of(w, i)), v + i);
        if (l >= least && token > limit && score > best) best = score, own = token;
      }
    });
    const u64 most = warp_max(best);
    u64 *const bests = s.bests[round & 1], *const whose = s.of_bests[round & 1];
    if (lane == 0) bests[warp] = most;
    if (best == most && best != 0) whose[warp] = own;
    __syncthreads();
    const u64 one = bests[lane], all = warp_max(one);
    return all == 0 ? kNobody : whose[__ffs(__ballot_sync(0xffffffffu, one == all)) - 1];
  }

  // Whether top-p keeps a token; kUnknown if floats do not say. By all, ``round`` after round.
  enum State { kIs, kIsNot, kUnknown };
  ATTNKIT_DEVICE State is_kept(u64 token, int round) const {
    if (s.guess.top_p >= 1.0f || s.o.cold) return kIs;
    const float own = logit_of(token);
    float before = 0.0f;
    for_chunks([&](const float(&x)[4], int v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (x[i] > own || (x[i] == own && v + i < best_id(token))) before += mass_of(x[i]);
      }
    });
    before = warp_sum(before);
    if (lane == 0) s.before[round & 1][warp] = before;
    __syncthreads();
    before = warp_sum(s.before[round & 1][lane]);
    const float all = warp_sum(s.sums[lane]), wanted = s.guess.top_p * all, margin = wanted * 3e-6f * large();
    if (!(all < 1e30f)) return kUnknown;
    return before < wanted - margin || before == 0.0f ? kIs : before >= wanted + margin ? kIsNot : kUnknown;
  }

  ATTNKIT_DEVICE void give(int id) const {
    if (threadIdx.x == 0) p.tokens[b] = max(id, 0), p.valid[b] = id >= 0;
  }

  // False if it takes more to know who is drawn, which is then ``hot`` or nothing of the row is known.
  ATTNKIT_DEVICE bool draw(bool& hot) {
    take_bound();
    if (!(fabsf(reference) < kF32Max)) reference = shift = 0.0f;  // the sample has no number
    if (warp == kAsker) check_options();
    float mass;
    const u32 most = take_row(mass), key = __reduce_max_sync(0xffffffffu, order_key(__uint_as_float(most << 16)));
    if (lane == 0) s.tops[warp] = key, s.sums[warp] = mass;
    __syncthreads();
    top = order_value(__reduce_max_sync(0xffffffffu, s.tops[lane]));
    if (!(top > negative_infinity())) {
      give(-1);
      return true;
    }
    if (s.stale != 0 || !(fabsf(top) < 1e30f && scale > 1e-20f && scale < 1e20f)) return false;
    const float lowest = s.o.cold ? top : TopkRow<kBf16, false>::below(__fadd_rn(warm(top, s.o), s.log_min_p) * s.o.t);
    const u32 bits = max_bits(kLeastNumber, bits_below(lowest));
    list_from(bits);
    hot = !s.o.cold && s.n_holders > kHotGroups;
    if (hot) return false;
    u64 drawn = kNobody;
#pragma unroll 1
    for (int round = 0;; ++round) {
      drawn = best_above(__uint_as_float(bits << 16), drawn, round);
      if (drawn == kNobody) break;
      const State is = is_kept(drawn, round);
      if (is == kUnknown) return false;
      if (is == kIs) break;
    }
    give(drawn == kNobody ? -1 : best_id(drawn));
    return true;
  }
};

}  // namespace attnkit::sampling
