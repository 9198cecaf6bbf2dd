// Greedy choice and draws from all tokens of many rows of 16-bit logits, without penalties: one read of the logits, in
// registers. Each of many warps holds a block while its next one is on its way; the few groups of it that may lead are worked out by
// the lanes that hold them, one each at a time.
#pragma once
#include "sample_lead_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kFlowWarps = 16, kFlowThreads = 32 * kFlowWarps;
// Nothing but the rows, as many as the CTA has.
struct alignas(sizeof(LeadRow)) FlowShared {};
static_assert(sizeof(FlowShared) == 128 && sizeof(LeadRow) == 128, "FLOW_BYTES and LEAD_ROW_BYTES");

// The largest logits of a lane's four groups.
template <int Type>
struct FlowPeaks {
  Raw<Type> raw;

  ATTNKIT_DEVICE FlowPeaks(const Raw<Type> (&logits)[4][4]) : raw(peaks_of<Type>(logits)) {}
  ATTNKIT_DEVICE float of(int u) const {
    const float2 two = unpack(raw.w[u / 2], Type == kBf16);
    return u % 2 ? two.y : two.x;
  }
  // The same where u is not known at compile time.
  ATTNKIT_DEVICE float at(int u) const {
    const u32 two = u & 2 ? raw.w[1] : raw.w[0];
    return unpack(u & 1 ? two >> 16 : two, Type == kBf16).x;
  }
};

// A block of a warp: its number, its row, and where the lane's first logits lie.
template <int Type>
struct FlowSpot {
  int n, b;
  const char* from;

  // ``row``: of a block not behind it.
  ATTNKIT_DEVICE FlowSpot(const SampleParams& p, int n, int row) : n(n), b(row) {
    find(p, inside(p) < p.blocks ? row : row_of_block(p, n));
  }
  ATTNKIT_DEVICE int inside(const SampleParams& p) const { return n - b * p.blocks; }  // its number in the row
  ATTNKIT_DEVICE void find(const SampleParams& p, int row) {
    b = row;
    from = logits_at<Type>(p, b, inside(p) * kBlock);
  }
  ATTNKIT_DEVICE FlowSpot after(const SampleParams& p) const {
    FlowSpot next = *this;
    next.n += kFlowWarps, next.from += kFlowWarps * kBlock * 2;
    if (next.inside(p) >= p.blocks) next.find(p, row_of_block(p, next.n));
    return next;
  }
};

// The words of a lane's four groups, and their logarithms.
struct FlowWords {
  u32 w[4];
  float logs[4];
};

// One warp's part in it.
template <int Type>
struct Flow : Lead<Type, kFlowWarps, FlowShared> {
  using Base = Lead<Type, kFlowWarps, FlowShared>;
  using Base::p, Base::s, Base::lane, Base::warp, Base::first, Base::end, Base::reached, Base::raise, Base::options;

  ATTNKIT_DEVICE Flow(const SampleParams& p, FlowShared& s, const LeadShare& share) : Base(p, s, share) {}

  // ---- what is hoped ----

  ATTNKIT_DEVICE static float scale_of(const LeadRow& row) { return row.cold != 0 ? 1.0f : row.scale * kOctave; }

  ATTNKIT_DEVICE FlowWords words(const FlowSpot<Type>& at) const {
    const LeadRow& row = this->row_of(at.b);
    FlowWords words = {};
    if (row.cold != 0) return words;
    row.groups.words(static_cast<u32>(at.inside(p)) * 32 + lane, words.w);
#pragma unroll
    for (int u = 0; u < 4; ++u) words.logs[u] = log_of(words.w[u]);
    return words;
  }

  // The most that is hoped of a lane's groups. NaN if there is one.
  ATTNKIT_DEVICE static float most_hoped(const FlowPeaks<Type>& peaks, float scale, const FlowWords& words) {
    float most = negative_infinity();
#pragma unroll
    for (int u = 0; u < 4; ++u) most = max_nan(most, hope_of(peaks.of(u), scale, words.logs[u]));
    return most;
  }

  // ---- choosing, by the lane that has the group ----

  // The first of a group's tokens that has its largest logit.
  ATTNKIT_DEVICE static int largest_of(const Raw<Type> (&raw)[4], float most) {
    int at = 0;
#pragma unroll
    for (int c = 3; c >= 0; --c) {
      float x[4];
      widen_four<Type>(raw[c], x);
#pragma unroll
      for (int i = 3; i >= 0; --i) at = fminf(x[i], kF32Max) == most ? c * kChunk + i : at;
    }
    return at;
  }

  // exp of four logits over their group's largest.
  ATTNKIT_DEVICE static void masses_of(const Raw<Type>& chunk, float most, float scale, float (&mass)[4]) {
    float x[4];
    widen_four<Type>(chunk, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) mass[i] = exp2_fast((fminf(x[i], kF32Max) - most) * scale);
  }

  ATTNKIT_DEVICE static Raw<Type> one_chunk(const Raw<Type>& a, const Raw<Type>& b, const Raw<Type>& c, const Raw<Type>& d, int at) {
    Raw<Type> one;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 of[4] = {a.w[i], b.w[i], c.w[i], d.w[i]};
      one.w[i] = one_of(of, at);
    }
    return one;
  }

  // The token that a group stands for, as choose_inside finds it. ``sums``: of its chunks.
  ATTNKIT_DEVICE static int chosen_of(const Raw<Type> (&raw)[4], const float (&sums)[4], float most, float scale, u32 word) {
    float before[4], all = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c) before[c] = all, all = __fadd_rn(all, sums[c]);
    const float reach = share_of(word, all);
    int chunk = 3, at = 3;
#pragma unroll
    for (int c = 2; c >= 0; --c) chunk = __fadd_rn(before[c], sums[c]) > reach ? c : chunk;
    float mass[4], sum = 0.0f;
    masses_of(one_chunk(raw[0], raw[1], raw[2], raw[3], chunk), most, scale, mass);
    const float passed = one_of(before, chunk);
#pragma unroll
    for (int i = 0; i < 4; ++i) mass[i] = sum = __fadd_rn(sum, mass[i]);
#pragma unroll
    for (int i = 2; i >= 0; --i) at = __fadd_rn(passed, mass[i]) > reach ? i : at;
    return chunk * kChunk + at;
  }

  // Tries groups of a block of which some may lead: each lane the one of which it hopes for most, until none may. Sums first, noise
  // only where those still may lead; which token a group stands for is chosen at once, while logits are on their way, not at the row's
  // end. Lanes may read different bests: all of a warp go on by votes.
  ATTNKIT_DEVICE void contest(const FlowSpot<Type>& at, const Raw<Type> (&raw)[4][4], const FlowPeaks<Type>& peaks,
                              const FlowWords& words) const {
    LeadRow& row = this->row_of(at.b);
    const bool cold = row.cold != 0;
    const float scale = scale_of(row);
    float hopes[4];  // -inf: none (any more)
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float peak = peaks.of(u);
      hopes[u] = peak == negative_infinity() ? peak : max_nan(hope_of(peak, scale, words.logs[u]), -kF32Max);
    }
#pragma unroll 1
    while (true) {
      const u64 now = reached(row);
      const float hope = max_nan(max_nan(hopes[0], hopes[1]), max_nan(hopes[2], hopes[3]));
      const float least = now == 0 ? -kF32Max : least_hope(now, cold);
      const int u = hopes[0] == hope ? 0 : hopes[1] == hope ? 1 : hopes[2] == hope ? 2 : 3;
      const int group = at.inside(p) * (kBlock / 16) + u * 32 + lane;
      bool may = now != kNaNSeen && hope != negative_infinity() && !(hope < least);
      if (cold && now != 0) may = may && (hope != least || first_of_group(group) < best_id(now));
      if (!__any_sync(0xffffffffu, may)) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) hopes[i] = i == u ? negative_infinity() : hopes[i];
      Raw<Type> its[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) its[c] = one_chunk(raw[0][c], raw[1][c], raw[2][c], raw[3][c], u);
      const float most = fminf(peaks.at(u), kF32Max);
      u64 mine;
      if (cold) {
        mine = pack_best(most, first_of_group(group) + largest_of(its, most));
      } else {
        float sums[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float mass[4];
          masses_of(its[c], most, row.scale, mass);
          sums[c] = ((mass[0] + mass[1]) + mass[2]) + mass[3];
        }
        const float times = log2_fast((sums[0] + sums[1]) + (sums[2] + sums[3]));
        may = may && (now == 0 || !(__fmaf_rn(times, kOctave, hope) < least + 4.0f * kOctave));
        if (!__any_sync(0xffffffffu, may)) continue;
        u32 inside[4];
        philox_words(row.seed, row.offset, kInside, static_cast<u32>(group), inside);
        const float score = noisy(__fadd_rn(warm(most, options(row)), __fmul_rn(times, kLn2)), one_of(words.w, u));
        const int token = first_of_group(group) + chosen_of(its, sums, most, row.scale, inside[0]);
        mine = score > negative_infinity() ? with_token(pack_best(score, group * 16), token) : 0;
      }
      if (hope != hope) mine = kNaNSeen;
      raise(row, warp_max(may ? mine : 0));
      __syncwarp();
    }
  }

  // ---- all of it ----

  // The logits of a block of which some groups may lead move to registers of their own, so that the next block's are on their way
  // while those groups are tried.
  ATTNKIT_DEVICE void run(FlowSpot<Type> at, Raw<Type> (&coming)[4][4]) const {
    if (at.n >= end) return;
    FlowWords its = words(at);
    Raw<Type> raw[4][4];
#pragma unroll 1
    while (true) {
      const FlowSpot<Type> next = at.after(p);
      const LeadRow& row = this->row_of(at.b);
      const float least = least_hope(reached(row), row.cold != 0), scale = scale_of(row);
      const FlowPeaks<Type> peaks(coming);
      const bool some = __any_sync(0xffffffffu, !(most_hoped(peaks, scale, its) < least));
      if (some) {
#pragma unroll
        for (int i = 0; i < 16; ++i) raw[i / 4][i % 4] = coming[i / 4][i % 4];
      }
      if (next.n < end) load_pieces<Type>(coming, p, next.b, next.inside(p) * kBlock, next.from);
      if (some) contest(at, raw, peaks, its);
      if (next.n >= end || next.b != at.b) {
        const int taken = (at.n - max(first, at.b * p.blocks)) / kFlowWarps + 1;
        this->leave(at.b, taken, [&] { return this->met(at.b); }, [](u64 best) { return best; });
      }
      if (next.n >= end) return;
      its = words(next);
      at = next;
    }
  }
};

template <int Type>
ATTNKIT_DEVICE void sample_flow(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  FlowShared& s = *reinterpret_cast<FlowShared*>(memory);
  const LeadShare share(p);
  const Flow<Type> flow(p, s, share);
  const FlowSpot<Type> at(p, share.first + flow.warp, share.row);
  if (at.n < share.end) ask_block_l2<Type>(p, at.b, at.inside(p));
  flow.ask_options();
  wait_for_previous_grid();
  launch_dependents();
  flow.open_rows();  // before the queue is full of logits
  Raw<Type> coming[4][4];
  if (at.n < share.end) load_pieces<Type>(coming, p, at.b, at.inside(p) * kBlock, at.from);
  __syncthreads();
  flow.run(at, coming);
}

}  // namespace attnkit::sampling
