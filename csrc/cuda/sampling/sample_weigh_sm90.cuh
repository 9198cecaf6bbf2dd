// What precedes a token of a row that is held: bounds by levels, which need no logits, and sums, for which some groups are
// read again.
//
// Order throughout: by logit after temperature, then by the lower id. What decides is a sum of whole multiples of a power of
// two, so that no order of adding shows; sums of floats decide only where they are far enough from what is wanted.
#pragma once
#include "sample_held_sm90.cuh"

namespace attnkit::sampling {

constexpr int kNearAhead = 2;  // groups that a thread has on their way, where they are read again

template <int Type, bool Penalised>
struct Weigh {
  using Share = ArriveShare<Type, Penalised>;
  static constexpr int kHeld = Share::kHeld;
  Share& h;
  const float top_p;
  float unit;  // 2^30 to 2^31 units are the row's mass
  u32 wanted;  // tokens are kept as long as what precedes them weighs less, but for rounding
  int turn = 0;

  ATTNKIT_DEVICE Weigh(Share& share, float p) : h(share), top_p(p) {
    unit = __uint_as_float((284u << 23) - (__float_as_uint(fmaxf(h.whole, 1.0f)) & 0x7f800000u));
    wanted = max(1u, __float2uint_ru(fminf(top_p, 1.0f) * (h.whole * unit)));
  }

  // Sums of floats differ from the one that decides by less, 8e-6 of what they add up, and as much again where the largest logit is 64
  // powers of two away from 0; bounds by levels add up the whole.
  ATTNKIT_DEVICE u32 margin() const {
    return __float2uint_ru(static_cast<float>(wanted) * 8e-6f * (1.0f + fabsf(h.largest * h.scale) / 64.0f)) + 64;
  }
  ATTNKIT_DEVICE u32 level_margin() const { return (wanted >> 15) + (1u << 15) + 64; }

  // A logit before temperature, and from where on it surely is as large, or larger, after. The largest float is what all that
  // temperature lifts beyond it become.
  ATTNKIT_DEVICE float raw_of(float l) const { return fminf(fmaxf(l * h.o.t, -kF32Max), kF32Max); }
  ATTNKIT_DEVICE float from(float l) const { return raw_of(l) - fabsf(raw_of(l)) * kRounding; }
  ATTNKIT_DEVICE float past(float l) const { return l < kF32Max ? raw_of(l) + fabsf(raw_of(l)) * kRounding : -negative_infinity(); }

  // Adds up over all CTAs what the first lanes of a warp give, a place each.
  template <int Places>
  ATTNKIT_DEVICE const u32* add_up(u32 mine) {
    open_sums();
    add_sums<Places>(h.lane, mine, false);
    h.meet();
    return close_sums();
  }
  // Three in turn: the next is zero before any CTA adds to it, and nobody reads that one now.
  ATTNKIT_DEVICE void open_sums() {
    const int t = thread_here();
    if (t < 2 * kProbes) h.s.above[(turn + 1) % 3][t] = 0;
  }
  ATTNKIT_DEVICE const u32* close_sums() { return h.s.above[turn++ % 3]; }
  // What the first lanes of a warp give, at the places that they say, each lane to a CTA; ``sent``: counted there.
  template <int Places>
  ATTNKIT_DEVICE void add_sums(int place, u32 mine, bool sent) {
    u32* const sums = h.s.above[turn % 3];
    if (h.size == 1) {
      if (h.lane < Places) atomicAdd(sums + place, mine);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < Places * h.size; i += 32) {
      const u32* const to = sums + __shfl_sync(0xffffffffu, place, h.lane % Places);
      const u32 its = __shfl_sync(0xffffffffu, mine, h.lane % Places);
      const int cta = (i + h.lane) / Places;
      if (cta >= h.size) continue;
      if (sent) {
        send_added(h.s, kOfSums, to, cta, its);
      } else {
        add_remote(remote_address(to, cta), its);
      }
    }
  }

  // ---- by levels ----

  // What a bin's tokens weigh, each at its level's middle, ``here`` counting one. Within ``within`` of what they do.
  ATTNKIT_DEVICE float middle_of(int bin) const {
    return exp2_fast(fminf(__fmaf_rn(static_cast<float>(bin), -h.s.levels.step, (h.s.levels.highest - h.here) * h.scale), 100.0f));
  }
  ATTNKIT_DEVICE float within() const { return 0.35f * h.s.levels.step + 8e-5f; }  // ln(2) / 2, and rounding

  // What the cells before each cell weigh: the upper half of the warps, while the others are at something else.
  static constexpr int kAdders = kArriveThreads / 2;
  ATTNKIT_DEVICE void add_up_cells() {
    constexpr int kEach = kCells / kAdders, kChunks = kCell / 4;
    const int t = thread_here() - kAdders, warp = t / 32;
    const float later = exp2_fast(-h.s.levels.step);
    float cells[kEach], upto = 0.0f;
    int chunk = t % kChunks;  // so lanes read different banks
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      cells[k] = upto;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const int first = (t * kEach + k) * kCell + chunk * 4;
        chunk = chunk == kChunks - 1 ? 0 : chunk + 1;
        const uint4 q = *reinterpret_cast<const uint4*>(h.bins + first);
        float four = __fmaf_rn(__uint2float_rn(q.w), later, __uint2float_rn(q.z));
        four = __fmaf_rn(__fmaf_rn(four, later, __uint2float_rn(q.y)), later, __uint2float_rn(q.x));
        upto = __fmaf_rn(four, middle_of(first), upto);
      }
    }
    float to = upto;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, to, step);
      to += h.lane >= step ? other : 0.0f;
    }
    if (h.lane == 31) h.s.most[warp] = to;
    named_barrier(1, kAdders);
    float earlier = h.lane < warp ? h.s.most[h.lane] : 0.0f;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) earlier += __shfl_xor_sync(0xffffffffu, earlier, step);
#pragma unroll
    for (int k = 0; k < kEach; ++k) h.s.before[t * kEach + k] = earlier + (to - upto) + cells[k];
    if (t == kAdders - 1) h.s.before[kCells] = earlier + to;
  }

  // From which logit down tokens are refused, if the row is one CTA's. By all.
  ATTNKIT_DEVICE float refused_from() const {
    static_assert(kCells <= kArriveThreads);
    const int t = thread_here();
    const float enough = static_cast<float>(wanted + level_margin()) / unit * (1.0f + 2.0f * within());
    const int kept = __syncthreads_count(t < kCells && h.s.before[min(t, kCells - 1)] < enough);
    if (kept == kCells) return negative_infinity();
    const float lowest = h.s.levels.highest - static_cast<float>(kept * kCell + 2) * (h.s.levels.step / h.scale);
    return lowest - 2.0f * fabsf(lowest) * kRounding;
  }

  // What bins up to ``bin`` weigh, each token at its level's middle, in units. A warp's work.
  ATTNKIT_DEVICE float upto(int bin, float to_units) const {
    const int cell = bin / kCell, mine = cell * kCell + h.lane;
    const float mass = mine <= bin ? __uint2float_rn(h.bins[mine]) * middle_of(mine) : 0.0f;
    return h.s.before[cell] * to_units + __uint2float_rn(__reduce_add_sync(0xffffffffu, __float2uint_rn(mass * to_units)));
  }

  // Adds bounds of what precedes a probe in this CTA's share, at places ``q`` and kProbes + ``q``: a warp's work. From above: what
  // its levels weigh; from below: all but what the others do, whichever says more. The probe does not precede itself.
  ATTNKIT_DEVICE void add_bounds(int q, const Place& probe, bool sent) {
    const int last = h.bin_of(from(probe.logit)), surely = h.bin_of(past(probe.logit)) - 1;
    const float to_units = h.part() * unit, all = h.mass * to_units;
    float most = all, few = 0.0f;
    if (h.bins[0] == 0) {  // else no level is known
      const float levels = h.s.before[kCells] * to_units;
      const float tail = __uint2float_rn(h.bins[kBins - 1]) * middle_of(kBins - 1) * to_units;
      const float high = upto(last, to_units), low = surely >= 0 ? upto(surely, to_units) : 0.0f;
      if (last < kBins - 1) most = fminf(high * (1.0f + within()), all - fmaxf(levels - high - tail, 0.0f) * (1.0f - within()));
      few = fmaxf(low * (1.0f - within()), all - (levels - low) * (1.0f + within()));
    }
    if (probe.id / kBlock % h.size == h.rank) most -= 0.999f * h.mass_of(from(probe.logit)) * to_units;
    add_sums<2>(h.lane * kProbes + q, __float2uint_rn(fmaxf(h.lane == 0 ? most : few, 0.0f)), sent);
  }

  // ---- with groups read again ----

  // What precedes a probe, before temperature: tokens from ``equal`` on where their ids are lower, from ``beyond`` on elsewhere.
  struct Edge {
    float equal, beyond;
    int id;
  };

  // Where a token's logit before temperature reaches ``equal`` it is at least the probe's after it, from ``beyond`` on larger.
  // False if those lie far apart.
  ATTNKIT_DEVICE bool edge_of(const Place& probe, Edge& edge) const {
    const float x = order_value(order_key(raw_of(probe.logit)) - 16 + h.lane), l = tempered(x, h.o);
    const u32 more = __ballot_sync(0xffffffffu, l > probe.logit), same = __ballot_sync(0xffffffffu, l >= probe.logit);
    edge = Edge{__shfl_sync(0xffffffffu, x, __ffs(same) - 1), __shfl_sync(0xffffffffu, x, __ffs(more) - 1), probe.id};
    return more != 0 && (same & 1) == 0;
  }

  // What precedes a probe in a group, the row's largest logit counting one.
  ATTNKIT_DEVICE float sum_before(const Raw<kHeld> (&raw)[4], int number, const Edge& edge) const {
    const int behind = edge.id - first_of_group(number);
    float sums[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<kHeld>(raw[c], x);
      sums[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float mass = exp2_fast((x[i] - h.largest) * h.scale);
        if (x[i] >= (c * kChunk + i < behind ? edge.equal : edge.beyond)) sums[c] += mass;
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // Groups from place ``j`` on, one in ``step``, those that follow on their way: ``take`` gets the tokens and the number.
  template <class N, class F>
  ATTNKIT_DEVICE void read_groups(N&& number_at, int found, int j, int step, F&& take) const {
    const RowPointers& r = h.r;
    const SampleParams& p = h.p;
    if constexpr (Penalised) {
      // There are no registers for two: L2 asks for the next.
#pragma unroll 1
      for (; j < found; j += step) {
        const int v = first_of_group(number_at(j)), next = first_of_group(number_at(min(j + step, found - 1)));
        Fetched<Type, true> fetched;
        fetched.ask(r, v, p.V);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const i64 at = min(next + c * kChunk, p.V - 1);
          prefetch_l2(r.logits + at * (Type == kF32 ? 4 : 2));
          if (r.counts != nullptr) prefetch_l2(r.counts + at * 4);
        }
        Raw<kF32> held[4];
        fetched.use(held, r, h.o, v, p.V);
        take(held, number_at(j));
      }
    } else {
#pragma unroll 1
      for (; j < found; j += kNearAhead * step) {
        Fetched<Type, false> fetched[kNearAhead];
#pragma unroll
        for (int u = 0; u < kNearAhead; ++u) {
          if (j + u * step < found) fetched[u].ask(r, first_of_group(number_at(j + u * step)), p.V);
        }
#pragma unroll
        for (int u = 0; u < kNearAhead; ++u) {
          if (j + u * step < found) take(fetched[u].raw, number_at(j + u * step));
        }
      }
    }
  }

  // What precedes a probe, as a sum of floats. A warp lists those of its groups of which it takes more than the peak to tell.
  ATTNKIT_DEVICE float add_near(float logit, const Edge& edge) const {
    const int warp = thread_here() / 32, pieces = h.n / 32, first = pieces * warp / kArriveWarps, last = pieces * (warp + 1) / kArriveWarps;
    u16* const list = h.marks + first * 32;
    // From ``least`` on a token may precede the probe, above ``beyond`` it does; the others of a group that weigh less than
    // ``alone`` do not.
    const float least = from(logit), beyond = past(logit), alone = h.mass_of(least) * 0.9999f;
    float peaks = 0.0f, sum = 0.0f;
    u32 mine = 0;  // which pieces have such a group of this lane; a warp has 32 at the most
#pragma unroll 4
    for (int k = 0; k < last - first; ++k) {
      const float2 group = h.groups[(first + k) * 32 + h.lane];
      const float peak = h.mass_of(group.x);
      const bool surely = group.x > beyond && peak * (group.y - 0.99999f) < alone;
      mine |= (group.x >= least && !surely ? 1u : 0u) << k;
      peaks += surely ? peak : 0.0f;
    }
    int found = __popc(mine);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int others = __shfl_up_sync(0xffffffffu, found, step);
      found += h.lane >= step ? others : 0;
    }
    u16* to = list + found - __popc(mine);
#pragma unroll 1
    for (; mine != 0; mine &= mine - 1) *to++ = static_cast<u16>(h.number_of((first + __ffs(mine) - 1) * 32 + h.lane));
    found = __shfl_sync(0xffffffffu, found, 31);
    __syncwarp();
    const auto number_at = [=](int j) { return static_cast<int>(list[j]); };
    read_groups(number_at, found, h.lane, 32, [&](const Raw<kHeld>(&raw)[4], int number) { sum += sum_before(raw, number, edge); });
    return sum + peaks * h.part();
  }

  // The same by reading all of the share.
  ATTNKIT_DEVICE float add_all(const Edge& edge) const {
    float sum = 0.0f;
    if constexpr (!Penalised) {
      const int i = thread_here() / 32;
      h.read_share(i, h.spot_of(i), [&](const Raw<kHeld>(&raw)[4], int i) { sum += sum_before(raw, h.number_of(i), edge); });
    }
    return sum;
  }

  // Whether many groups have a token from ``least`` on. By all.
  ATTNKIT_DEVICE bool many_near(float least) const {
    int near = 0, all = 0;
#pragma unroll 1
    for (int i = thread_here(); i < h.n; i += kArriveThreads) near += h.groups[i].x >= least ? 1 : 0, ++all;
    return __syncthreads_count(3 * near > all) > kArriveThreads / 2;
  }

  // What precedes a probe by sums of floats; false if that is too close to what is wanted. Where many groups are near it is sooner
  // to read all than to list them.
  ATTNKIT_DEVICE bool weigh_roughly(const Place& probe, bool& kept) {
    Edge edge;
    if (!(fabsf(h.largest * h.scale) < 64.0f) || !edge_of(probe, edge)) return false;
    const float sum = !Penalised && many_near(from(probe.logit)) ? add_all(edge) : add_near(probe.logit, edge);
    const u32 above = *add_up<1>(__reduce_add_sync(0xffffffffu, __float2uint_rn(sum * unit)));
    kept = above < wanted;
    return above + margin() < wanted || above >= wanted + margin();
  }

  // ---- exactly ----

  // A sum of whole multiples of 2^-16 units, to which each addend is rounded down: no order of adding shows.
  struct Exact {
    static constexpr double kZero = 103079215104.0;  // 1.5 2^36, whose last bit is 2^-16
    double sum = kZero;
    ATTNKIT_DEVICE void add(float units) { sum = __dadd_rd(sum, static_cast<double>(units)); }
    // In two numbers of 20 and 28 bits, of a warp.
    ATTNKIT_DEVICE u32 low() const { return __reduce_add_sync(0xffffffffu, static_cast<u32>(whole() & 0xfffff)); }
    ATTNKIT_DEVICE u32 high() const { return __reduce_add_sync(0xffffffffu, static_cast<u32>(whole() >> 20)); }
    ATTNKIT_DEVICE u64 whole() const { return static_cast<u64>((sum - kZero) * 65536.0); }
    ATTNKIT_DEVICE static double of(u32 low, u32 high) { return static_cast<double>(high) * 1048576.0 + static_cast<double>(low); }
  };

  // What precedes a probe after temperature, token by token: the share is read again.
  ATTNKIT_DEVICE Exact add_tokens(const Place& probe) const {
    Exact above;
    read_groups([&](int j) { return h.number_of(j); }, h.n, thread_here(), kArriveThreads, [&](const Raw<kHeld>(&raw)[4], int number) {
      const int first = first_of_group(number);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<kHeld>(raw[c], x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float l = tempered(x[i], h.o);
          if (probe.after(l, first + c * kChunk + i)) above.add(exp2_fast((l - h.top) * kLog2e) * unit);
        }
      }
    });
    return above;
  }

  // What all groups weigh.
  ATTNKIT_DEVICE Exact add_groups() const {
    Exact all;
#pragma unroll 1
    for (int i = thread_here(); i < h.n; i += kArriveThreads) {
      const float2 group = h.groups[i];
      all.add(group.y * exp2_fast((fminf(group.x, kF32Max) - h.largest) * h.scale) * unit);
    }
    return all;
  }

  // Whether a probe is kept.
  ATTNKIT_DEVICE bool weigh(const Place& probe) {
    bool kept;
    if (weigh_roughly(probe, kept)) return kept;
    const Exact above = add_tokens(probe), all = add_groups();
    const u32 parts[4] = {above.low(), above.high(), all.low(), all.high()};
    const u32* const sums = add_up<4>(one_of(parts, h.lane & 3));
    return Exact::of(sums[0], sums[1]) < fmax(1.0, ceil(static_cast<double>(hidden(top_p)) * Exact::of(sums[2], sums[3])));
  }
};

}  // namespace attnkit::sampling
