// Greedy choice and draws from all tokens of many rows of 16-bit logits, without penalties: one read of the logits, in
// registers. Each of many warps holds a block, sets the few groups of it that may lead aside, asks for its next block, works
// those groups out by four lanes each, and makes the next block's noise while that is on its way.
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
  LeadKept<Type> kept[kKeptRows][kFlowWarps];
  FlowTried<Type> tried[kFlowWarps][kTried];
};
static_assert(sizeof(FlowShared<kBf16>) == 9216 && sizeof(LeadRow) == 128, "FLOW_BYTES and LEAD_ROW_BYTES");

// Logarithms of what may lead are counted in the last bits of a float: 2^23 an octave. The bits of a whole number as a float
// then are its logarithm, along a straight line from each power of two to the next: never more, and less by 0.09 octaves at
// the most. A draw hopes for peak scale - these bits of its word: at least the logarithm of 2^-159 e^score, if its group's sum
// is its largest alone. What a greedy row hopes for is the peak itself.
constexpr float kOctave = 8388608.0f;

ATTNKIT_DEVICE float hope_of(float peak, float scale, u32 word) {
  return __fmaf_rn(peak, scale, -__uint2float_rn(__float_as_uint(__uint2float_rn(word))));
}

ATTNKIT_DEVICE u32 lanes_before() {
  u32 mask;
  asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// What a group must hope for at the least: a group's sum is at most 16 times its largest; E >= u.
ATTNKIT_DEVICE float least_hope(u64 best, bool cold) {
  const float score = order_value(high_word(best)), less = __fmaf_rn(fabsf(score), -1e-6f, score);
  return cold ? score : __fmaf_rn(less, kLog2e * kOctave, -(159.0f + 4.0f + 2e-3f * kLog2e) * kOctave);
}

// The largest logits of a lane's four groups, as they are in memory.
template <int Type>
struct FlowPeaks {
  u32 w[2];

  ATTNKIT_DEVICE FlowPeaks(const Raw<Type> (&raw)[4][4]) {
    u32 most[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      most[u] = max_pairs<Type>(raw[u][0].w[0], raw[u][0].w[1]);
#pragma unroll
      for (int c = 1; c < 4; ++c) most[u] = max_pairs<Type>(most[u], max_pairs<Type>(raw[u][c].w[0], raw[u][c].w[1]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 a = most[2 * i], b = most[2 * i + 1];
      w[i] = max_pairs<Type>(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
    }
  }
  ATTNKIT_DEVICE float of(int u) const {
    const float2 two = unpack(w[u / 2], Type == kBf16);
    return u % 2 ? two.y : two.x;
  }
};

// A block of a warp: its number, and its row.
struct FlowSpot {
  int n, b;

  ATTNKIT_DEVICE int inside(const SampleParams& p) const { return n - b * p.blocks; }  // its number in the row
};

// One warp's part in it.
template <int Type>
struct Flow : Lead<Type, kFlowWarps, FlowShared<Type>> {
  using Base = Lead<Type, kFlowWarps, FlowShared<Type>>;
  using typename Base::Kept;
  using Base::p, Base::s, Base::lane, Base::warp, Base::first, Base::end, Base::reached, Base::raise, Base::options;

  ATTNKIT_DEVICE Flow(const SampleParams& p, FlowShared<Type>& s, int first, int end) : Base(p, s, first, end) {}

  ATTNKIT_DEVICE FlowSpot after(FlowSpot at) const {
    at.n += kFlowWarps;
    while (at.inside(p) >= p.blocks) ++at.b;
    return at;
  }

  // ---- reading ----

  ATTNKIT_DEVICE void ask_l2(const FlowSpot& at) const {
    constexpr int kItem = 2, kLine = 128 / kItem;
    const char* const row = p.logits + at.b * p.logits_b;
#pragma unroll
    for (int i = 0; i < kBlock; i += 32 * kLine) {
      const int v = at.inside(p) * kBlock + i + lane * kLine;
      if (v < p.V) prefetch_l2(row + static_cast<i64>(v) * kItem);
    }
  }

  // The most that is hoped of a lane's groups. NaN if there is one.
  ATTNKIT_DEVICE static float most_hoped(const FlowPeaks<Type>& peaks, float scale, const u32 (&w)[4], u32 open) {
    float most = negative_infinity();
#pragma unroll
    for (int u = 0; u < 4; ++u) most = (open >> u & 1) != 0 ? max_nan(most, hope_of(peaks.of(u), scale, w[u])) : most;
    return most;
  }

  ATTNKIT_DEVICE static float scale_of(const LeadRow& row) { return row.cold != 0 ? 1.0f : row.scale * kOctave; }

  // The words of a lane's four groups.
  ATTNKIT_DEVICE void words(u32 (&w)[4], const FlowSpot& at) const {
    const LeadRow& row = this->row_of(at.b);
    w[0] = w[1] = w[2] = w[3] = 0;
    if (row.cold == 0) row.groups.words(static_cast<u32>(at.inside(p)) * 32 + lane, w);
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

  // What of a warp's block may lead.
  struct Hopes {
    u64 now;      // the row's best as all lanes have seen it
    float least;  // what must be hoped of a group
    int count;    // groups that were set aside, or would have been
  };

  // Sets groups that may lead aside, those most hoped of first while the row has no leader. ``open``: which of the lane's are
  // left to try.
  ATTNKIT_DEVICE Hopes set_aside(const FlowSpot& at, const Raw<Type> (&raw)[4][4], const FlowPeaks<Type>& peaks, const u32 (&w)[4],
                                 u32& open) const {
    const LeadRow& row = this->row_of(at.b);
    const bool cold = row.cold != 0;
    const float scale = scale_of(row);
    Hopes h{__shfl_sync(0xffffffffu, reached(row), 0), 0.0f, 0};
    if (h.now == kNaNSeen) return h;
    h.least = least_hope(h.now, cold);
    if (h.now == 0) {
      const u32 most = __reduce_max_sync(0xffffffffu, order_key(most_hoped(peaks, scale, w, open)));
      h.least = order_value(most) - (cold ? 0.0f : 2.5f * kOctave);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float peak = peaks.of(u), hoped = hope_of(peak, scale, w[u]);
      const int group = (at.inside(p) * 4 + u) * 32 + lane;
      const bool late = cold && h.now != 0 && hoped == h.least && first_of_group(group) > best_id(h.now);
      const bool hope = (open >> u & 1) != 0 && !(hoped < h.least) && peak != negative_infinity() && !late;
      const u32 who = __ballot_sync(0xffffffffu, hope);
      const int slot = h.count + __popc(who & lanes_before());
      if (hope && slot < kTried) {
        const u32 to = smem_address(s.tried[warp] + slot);
#pragma unroll
        for (int c = 0; c < 4; ++c) store_raw<Type>(to + c * sizeof(Raw<Type>), raw[u][c]);
        store_raw<kF32>(to + 4 * sizeof(Raw<Type>), {__float_as_uint(peak), __float_as_uint(hoped), w[u], static_cast<u32>(group)});
        open &= ~(1u << u);
      }
      h.count += __popc(who);
    }
    __syncwarp();
    return h;
  }

  // Tries groups, four lanes each.
  ATTNKIT_DEVICE void contest(LeadRow& row, Kept* kept, const Hopes& h) const {
    const u32 from = smem_address(s.tried[warp] + lane / 4);
    const Raw<Type> chunk = load_raw<Type>(from + lane % 4 * sizeof(Raw<Type>));
    const Raw<kF32> head = load_raw<kF32>(from + 4 * sizeof(Raw<Type>));
    FlowTried<Type> group;
    group.peak = __uint_as_float(head.w[0]), group.hope = __uint_as_float(head.w[1]), group.word = head.w[2], group.group = head.w[3];
    u64 mine = score_of(row, group, chunk, h.now == 0 ? negative_infinity() : h.least + 4.0f * kOctave);
    if (group.peak != group.peak) mine = kNaNSeen;
    if (lane / 4 >= h.count) mine = 0;
    if (!__any_sync(0xffffffffu, mine > h.now)) return;
    const u64 top = warp_max(mine);
    raise(row, top);
    if (mine == top && row.cold == 0 && kept != nullptr) {
      store_raw<Type>(smem_address(&kept->chunks[lane % 4]), chunk);
      kept->group = group.group;
    }
  }

  // ---- all of it ----

  // Whether a group that is left may lead. The same for all lanes.
  ATTNKIT_DEVICE bool may_lead(const LeadRow& row, const FlowPeaks<Type>& peaks, const u32 (&w)[4], u32 open) const {
    return __any_sync(0xffffffffu, !(most_hoped(peaks, scale_of(row), w, open) < least_hope(reached(row), row.cold != 0)));
  }

  ATTNKIT_DEVICE void run(FlowSpot at, Raw<Type> (&raw)[4][4]) const {
    u32 w[4], open = 15;
    if (at.n >= end) return;
    words(w, at);
#pragma unroll 1
    while (true) {
      LeadRow& row = this->row_of(at.b);
      const FlowPeaks<Type> peaks(raw);
      Hopes hopes{};
      if (may_lead(row, peaks, w, open)) hopes = set_aside(at, raw, peaks, w, open);
      const FlowSpot next = after(at);
      bool again = hopes.count > kTried;
      if (!again && next.n < end) load_block<Type>(raw, p, next.b, next.inside(p));
      if (hopes.count > 0) {
        contest(row, this->kept_of(at.b), hopes);
        __syncwarp();
        again = again || (hopes.now == 0 && may_lead(row, peaks, w, open));
      }
      if (again) {  // seldom: groups that may lead are left, so the block is read again
        load_block<Type>(raw, p, at.b, at.inside(p));
        continue;
      }
      open = 15;
      if (next.n >= end || next.b != at.b) {
        const int taken = (at.n - max(first, at.b * p.blocks)) / kFlowWarps + 1;
        this->leave(at.b, taken, [&] { return this->met(at.b); });
      }
      if (next.n >= end) return;
      words(w, next);
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
  const int b = first / p.blocks, rows = (end - 1) / p.blocks - b + 1;
  const Flow<Type> flow(p, s, first, end);
  const FlowSpot at = {first + flow.warp, (first + flow.warp) / p.blocks};
  flow.keep_nothing();
  if (at.n < end) flow.ask_l2(at);
  flow.ask_options(b, rows);
  wait_for_previous_grid();
  launch_dependents();
  flow.open_rows(b, rows);  // before the queue is full of logits
  Raw<Type> raw[4][4];
  if (at.n < end) load_block<Type>(raw, p, at.b, at.inside(p));
  __syncthreads();
  flow.run(at, raw);
}

}  // namespace attnkit::sampling
