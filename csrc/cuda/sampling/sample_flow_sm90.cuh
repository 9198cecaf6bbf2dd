// Greedy choice and draws from all tokens of many rows of 16-bit logits, without penalties: one read of the logits, in
// registers. Each of many warps holds a block while its next one is on its way; the few groups of it that may lead are set aside in
// shared memory and worked out by four lanes each.
#pragma once
#include "sample_lead_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

constexpr int kFlowWarps = 16, kFlowThreads = 32 * kFlowWarps;
constexpr int kTried = 8;  // groups that a warp works out at a time

// A group that may lead: its logits, the largest of them, what is hoped of it, its word and its number.
template <int Type>
struct alignas(16) FlowTried {
  Raw<Type> chunks[4];
  float peak, hope;
  u32 word;
  int group;
};

// In front of the rows, as many as the CTA has.
template <int Type>
struct FlowShared {
  FlowTried<Type> tried[kFlowWarps][kTried];
};
static_assert(sizeof(FlowShared<kBf16>) == 6144 && sizeof(LeadRow) == 128, "FLOW_BYTES and LEAD_ROW_BYTES");

ATTNKIT_DEVICE u32 lanes_before() {
  u32 mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// Logarithms of what may lead are counted in the last bits of a float: 2^23 an octave. The bits of a whole number as a float
// then are its logarithm, along a straight line from each power of two to the next: never more, and less by 0.09 octaves at
// the most. A draw hopes for peak scale - these bits of its word: at least the logarithm of 2^-159 e^score, if its group's sum
// is its largest alone. What a greedy row hopes for is the peak itself.
constexpr float kOctave = 8388608.0f;

ATTNKIT_DEVICE float log_of(u32 word) { return __uint2float_rn(__float_as_uint(__uint2float_rn(word))); }
ATTNKIT_DEVICE float hope_of(float peak, float scale, float log) { return __fmaf_rn(peak, scale, -log); }

// What a group must hope for at the least: a group's sum is at most 16 times its largest; E >= u.
ATTNKIT_DEVICE float least_hope(u64 best, bool cold) {
  const float score = order_value(high_word(best)), less = __fmaf_rn(fabsf(score), -1e-6f, score);
  return cold ? score : __fmaf_rn(less, kLog2e * kOctave, -(159.0f + 4.0f + 2e-3f * kLog2e) * kOctave);
}

// The largest logits of a lane's four groups.
template <int Type>
struct FlowPeaks {
  Raw<Type> raw;

  ATTNKIT_DEVICE FlowPeaks(const Raw<Type> (&logits)[4][4]) : raw(peaks_of<Type>(logits)) {}
  ATTNKIT_DEVICE float of(int u) const {
    const float2 two = unpack(raw.w[u / 2], Type == kBf16);
    return u % 2 ? two.y : two.x;
  }
};

// A block of a warp: its number, its row, and where the lane's first logits lie.
template <int Type>
struct FlowSpot {
  int n, b;
  const char* from;

  ATTNKIT_DEVICE FlowSpot(const SampleParams& p, int n) : n(n) { find(p, n / p.blocks); }
  ATTNKIT_DEVICE int inside(const SampleParams& p) const { return n - b * p.blocks; }  // its number in the row
  ATTNKIT_DEVICE void find(const SampleParams& p, int row) {
    b = row;
    from = logits_at<Type>(p, b, inside(p) * kBlock);
  }
  ATTNKIT_DEVICE FlowSpot after(const SampleParams& p) const {
    FlowSpot next = *this;
    next.n += kFlowWarps, next.from += kFlowWarps * kBlock * 2;
    if (next.inside(p) >= p.blocks) next.find(p, next.n / p.blocks);
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
struct Flow : Lead<Type, kFlowWarps, FlowShared<Type>> {
  using Base = Lead<Type, kFlowWarps, FlowShared<Type>>;
  using Base::p, Base::s, Base::lane, Base::warp, Base::first, Base::end, Base::reached, Base::raise, Base::options;

  ATTNKIT_DEVICE Flow(const SampleParams& p, FlowShared<Type>& s, int first, int end) : Base(p, s, first, end) {}

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

  // The most that is hoped of a lane's groups, of those that are ``open``. NaN if there is one.
  ATTNKIT_DEVICE static float most_hoped(const FlowPeaks<Type>& peaks, float scale, const FlowWords& words, u32 open = 15) {
    float most = negative_infinity();
#pragma unroll
    for (int u = 0; u < 4; ++u) most = (open >> u & 1) != 0 ? max_nan(most, hope_of(peaks.of(u), scale, words.logs[u])) : most;
    return most;
  }

  // ---- choosing ----

  // The packed best of a quarter of a group, whose other quarters are with the lane's neighbours; 0 where it cannot lead.
  ATTNKIT_DEVICE u64 score_of(const LeadRow& row, const FlowTried<Type>& group, const Raw<Type>& chunk, float least) const {
    const float most = fminf(group.peak, kF32Max);
    float x[4];
    widen_four<Type>(chunk, x);
    if (row.cold != 0) {
      int at = 4;
#pragma unroll
      for (int i = 3; i >= 0; --i) at = fminf(x[i], kF32Max) == most ? i : at;
      return at < 4 ? pack_best(most, first_of_group(group.group) + lane % 4 * kChunk + at) : 0;
    }
    const RowOptions o = options(row);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += exp2_fast((fminf(x[i], kF32Max) - most) * (o.rt * kLog2e));
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float times = log2_fast(sum);
    if (!__any_sync(0xffffffffu, !(__fmaf_rn(times, kOctave, group.hope) < least))) return 0;
    const float score = noisy(__fadd_rn(warm(most, o), __fmul_rn(times, kLn2)), group.word);
    return score > negative_infinity() ? pack_best(score, group.group * 16) : 0;
  }

  // Sets groups of which at least ``least`` is hoped aside: their number, of which the first kTried are no longer ``open``.
  ATTNKIT_DEVICE int set_aside(const FlowSpot<Type>& at, const Raw<Type> (&raw)[4][4], const FlowPeaks<Type>& peaks, const FlowWords& words,
                               float scale, float least, int behind, u32& open) const {
    int count = 0;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float peak = peaks.of(u), hoped = hope_of(peak, scale, words.logs[u]);
      const int block = at.inside(p);
      const bool late = hoped == least && block * kBlock + u * kPiece + lane * 4 > behind;
      const bool hope = (open >> u & 1) != 0 && !(hoped < least) && peak != negative_infinity() && !late;
      const u32 who = __ballot_sync(0xffffffffu, hope);
      const int slot = count + __popc(who & lanes_before());
      if (hope && slot < kTried) {
        const u32 to = smem_address(s.tried[warp] + slot), group = block * (kBlock / 16) + u * 32 + lane;
#pragma unroll
        for (int c = 0; c < 4; ++c) store_raw<Type>(to + c * sizeof(Raw<Type>), raw[u][c]);
        store_raw<kF32>(to + 4 * sizeof(Raw<Type>), {__float_as_uint(peak), __float_as_uint(hoped), words.w[u], group});
        open &= ~(1u << u);
      }
      count += __popc(who);
    }
    __syncwarp();
    return count;
  }

  // Tries the groups that were set aside, four lanes each; ``least`` is what must be hoped of one by its sum. Which token it is that
  // the first to arrive stands for is chosen at once, while logits are on their way, not at the row's end.
  ATTNKIT_DEVICE void try_aside(LeadRow& row, int count, u64 now, float least) const {
    const u32 from = smem_address(s.tried[warp] + lane / 4);
    const Raw<Type> chunk = load_raw<Type>(from + lane % 4 * sizeof(Raw<Type>));
    const Raw<kF32> head = load_raw<kF32>(from + 4 * sizeof(Raw<Type>));
    FlowTried<Type> group;
    group.peak = __uint_as_float(head.w[0]), group.hope = __uint_as_float(head.w[1]), group.word = head.w[2], group.group = head.w[3];
    u64 mine = score_of(row, group, chunk, least);
    if (group.peak != group.peak) mine = kNaNSeen;
    if (lane / 4 >= count) mine = 0;
    if (!__any_sync(0xffffffffu, mine > now)) return;
    u64 top = warp_max(mine);
    if (row.cold == 0 && top != kNaNSeen) {
      if (top <= __shfl_sync(0xffffffffu, reached(row), 0)) return;
      const int number = best_id(top) / 16, holder = (__ffs(__ballot_sync(0xffffffffu, mine == top)) - 1) / 4 * 4 + lane % 4;
      Raw<Type> its;
#pragma unroll
      for (int i = 0; i < 2; ++i) its.w[i] = __shfl_sync(0xffffffffu, chunk.w[i], holder);
      float four[4], unused;
      widen_four<Type>(its, four);
      top = with_token(top, choose_inside(four, number, row.seed, row.offset, options(row), unused));
    }
    raise(row, top);
  }

  // Tries groups of a block of which some may lead; the most hoped of first while the row has no leader.
  ATTNKIT_DEVICE void contest(const FlowSpot<Type>& at, const Raw<Type> (&raw)[4][4], const FlowPeaks<Type>& peaks, const FlowWords& words) const {
    LeadRow& row = this->row_of(at.b);
    const bool cold = row.cold != 0;
    const float scale = scale_of(row);
    u32 open = 15;
#pragma unroll 1
    while (true) {
      const u64 now = __shfl_sync(0xffffffffu, reached(row), 0);
      if (now == kNaNSeen) return;
      float least = least_hope(now, cold);
      if (now == 0) {
        const u32 most = __reduce_max_sync(0xffffffffu, order_key(most_hoped(peaks, scale, words, open)));
        least = order_value(most) - (cold ? 0.0f : 2.5f * kOctave);
      }
      const int behind = cold && now != 0 ? best_id(now) : 0x7fffffff;
      const int count = set_aside(at, raw, peaks, words, scale, least, behind, open);
      if (count == 0) return;
      try_aside(row, count, now, now == 0 ? negative_infinity() : least + 4.0f * kOctave);
      __syncwarp();
      if (now != 0 && count <= kTried) return;
      if (!__any_sync(0xffffffffu, !(most_hoped(peaks, scale, words, open) < least_hope(reached(row), cold)))) return;
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
  FlowShared<Type>& s = *reinterpret_cast<FlowShared<Type>*>(memory);
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int first = static_cast<int>(all * blockIdx.x / gridDim.x), end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  const Flow<Type> flow(p, s, first, end);
  const int b = flow.first_row, rows = (end - 1) / p.blocks - b + 1;
  const FlowSpot<Type> at(p, first + flow.warp);
  if (at.n < end) ask_block_l2<Type>(p, at.b, at.inside(p));
  flow.ask_options(b, rows);
  wait_for_previous_grid();
  launch_dependents();
  flow.open_rows(b, rows);  // before the queue is full of logits
  Raw<Type> coming[4][4];
  if (at.n < end) load_pieces<Type>(coming, p, at.b, at.inside(p) * kBlock, at.from);
  __syncthreads();
  flow.run(at, coming);
}

}  // namespace attnkit::sampling
