// From the lists of a cluster's CTAs to the token: a histogram of all lists tells in which bin the last kept token lies, that
// bin's tokens are ranked in CTA 0 by comparing all pairs, and the best of the kept is drawn.
//
// Order throughout: by logit after temperature, then by the lower id. What lies within rounding of a list's end is not
// taken as listed. No result depends on a guess, on the order of a list, or on how many CTAs a row has.
#pragma once
#include "sample_share_sm90.cuh"

namespace attnkit::sampling {

ATTNKIT_DEVICE void store_remote(u32 to, u64 x) { asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(to), "l"(x) : "memory"); }
ATTNKIT_DEVICE uint4 load_remote_16(u32 from) {
  uint4 x;
  asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
  return x;
}
ATTNKIT_DEVICE u64 warp_sum_u64(u64 x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

enum Chosen { kWritten, kUndecided };

template <int Type, bool Penalised>
struct CutRow {
  const SampleParams& p;
  CutShared& s;
  float2* const list;
  const Share& h;
  const RowOptions& o;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  int n = 0, total = 0;      // tokens listed by this CTA and by all
  bool nan = false, full = false;
  float most = 0.0f, top = 0.0f;  // the row's largest logit, before and after temperature
  float end = 0.0f;          // all tokens above this (after temperature) are listed
  float least = -kF32Max;    // min-p's
  float per_bin = 0.0f;
  float unit = 0.0f;  // of masses, a power of two: 2^30 to 2^31 of them are the row's

  ATTNKIT_DEVICE void write(int token, bool good) const {
    if (h.rank == 0 && threadIdx.x == 0) p.tokens[h.b] = token, p.valid[h.b] = good, p.state[h.b] = 0;
  }

  ATTNKIT_DEVICE bool all_listed() const { return end == -kF32Max; }
  ATTNKIT_DEVICE int bin_of(float l) const { return static_cast<int>(fminf((top - l) * per_bin, kBins - 1)); }
  // What a token counts for: by number or by mass.
  ATTNKIT_DEVICE u32 weight_of(float l) const { return h.k != 0 ? 1u : static_cast<u32>(exp2_fast((l - top) * kLog2e) * unit); }

  // What every CTA has to say of its share. ``seen``: a lane's largest logit.
  ATTNKIT_DEVICE void meet(const Listing<Type, Penalised>& listing) {
    const float seen = listing.seen;
    const bool odd = __syncthreads_or(seen != seen) != 0;
    const float largest_here = order_value(__reduce_max_sync(0xffffffffu, order_key(seen == seen ? seen : negative_infinity())));
    if (lane == 0) s.tops[warp] = largest_here;
    __syncthreads();
    cluster_wait();
    if (warp == 0) {
      const float largest = order_value(__reduce_max_sync(0xffffffffu, order_key(s.tops[lane % kSampleWarps])));
      float mass = 0.0f;
      if (h.by_mass() && largest > negative_infinity()) {
#pragma unroll 1
        for (int i = lane; i < h.last - h.first; i += 32) mass += s.blocks[i].y * exp2_fast((s.blocks[i].x - largest) * o.rt * kLog2e);
        mass = warp_sum(mass);
      }
      const float claim = listing.short_k() ? fmaxf(listing.claim, listing.guess()) : listing.claim;
      const u32 listed = static_cast<u32>(s.n) | (odd ? 0x80000000u : 0u);
      const uint4 record = make_uint4(listed, __float_as_uint(largest), __float_as_uint(claim), __float_as_uint(mass));
      if (lane < h.size) store_remote(remote_address(&s.about[h.rank], lane), record);
    }
    cluster_sync();
    // A lane looks at one CTA's record.
    const uint4 q = s.about[min(lane, h.size - 1)];
    const bool mine_to_add = lane < h.size;
    const int there = mine_to_add ? static_cast<int>(q.x & 0x7fffffffu) : 0;
    nan = __any_sync(0xffffffffu, (q.x >> 31) != 0);
    full = __any_sync(0xffffffffu, there > p.room);
    total = __reduce_add_sync(0xffffffffu, there);
    most = order_value(__reduce_max_sync(0xffffffffu, order_key(__uint_as_float(q.y))));
    const float bound = order_value(__reduce_max_sync(0xffffffffu, order_key(__uint_as_float(q.z))));
    const bool some = mine_to_add && __uint_as_float(q.y) > negative_infinity();
    const float whole = warp_sum(some ? __uint_as_float(q.w) * exp2_fast((__uint_as_float(q.y) - most) * o.rt * kLog2e) : 0.0f);
    n = s.n;
    top = warm(most, o);
    end = bound == -kF32Max ? bound : warm(bound, o);
    if (h.min_p > 0.0f) least = __fadd_rn(top, h.log_min_p);
    unit = __uint_as_float((284u << 23) - (__float_as_uint(fmaxf(whole, 1.0f)) & 0x7f800000u));
  }

  // The mass of this share, to all; there after the next barrier of the cluster.
  ATTNKIT_DEVICE void tell_whole() const {
    if (!h.by_mass() || warp != 0) return;
    u64 sum = 0;
#pragma unroll 1
    for (int i = lane; i < h.last - h.first; i += 32) {
      const float2 q = s.blocks[i];
      if (q.x > negative_infinity()) sum += static_cast<u64>(q.y * exp2_fast((warm(q.x, o) - top) * kLog2e) * kMassOne);
    }
    sum = warp_sum_u64(sum);
    if (lane < h.size) store_remote(remote_address(&s.wholes[h.rank], lane), sum);
  }

  // Tokens are kept as long as what precedes them weighs less than this.
  ATTNKIT_DEVICE u32 wanted() const {
    if (h.k != 0) return h.k;
    if (!h.by_mass()) return 0xffffffffu;
    const u64 sum = warp_sum_u64(lane < h.size ? s.wholes[lane % kMostParts] : 0);
    const double kept = static_cast<double>(h.top_p) * static_cast<double>(sum);
    const double share = kept * (static_cast<double>(unit) / static_cast<double>(kMassOne));
    return max(1u, static_cast<u32>(ceil(share)));
  }

  // ---- which bin the last kept token lies in ----

  ATTNKIT_DEVICE void count_bins() {
    float span = top - end;
    if (all_listed() || h.k == 0) span = fminf(span, 32.0f);
    per_bin = (kBins - 1) * reciprocal(fmaxf(span, 1e-30f));
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kSampleThreads) {
      const float l = warm(list[i].x, o);
      list[i].x = l;
      atomicAdd(&s.bins[bin_of(l)], weight_of(l));
    }
  }

  // The bin where the sum from the largest token on reaches ``wanted`` (kBins if it does not), the sum before it and its own.
  ATTNKIT_DEVICE Pick pick_bin(u32 wanted) {
    u32 x[4] = {};
#pragma unroll 4
    for (int i = 0; i < h.size; ++i) {
      const uint4 q = load_remote_16(remote_address(&s.bins[4 * threadIdx.x], i));
      x[0] += q.x, x[1] += q.y, x[2] += q.z, x[3] += q.w;
    }
    const u32 mine = x[0] + x[1] + x[2] + x[3];
    u32 upto = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u32 other = __shfl_up_sync(0xffffffffu, upto, step);
      upto += lane >= step ? other : 0;
    }
    if (lane == 31) s.sums[warp] = upto;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSampleWarps; ++i) upto += i < warp ? static_cast<u32>(s.sums[i]) : 0;
    u32 before = upto - mine;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (before < wanted && before + x[i] >= wanted) s.pick = Pick{4 * threadIdx.x + i, before, x[i]};
      before += x[i];
    }
    __syncthreads();
    return s.pick;
  }

  // After pick_bin(): others may still be reading this CTA's bins, which must not end before they have.
  ATTNKIT_DEVICE Chosen leave_undecided() const {
    cluster_sync();
    return kUndecided;
  }

  // ---- the choice ----

  // A token to be ranked, of each lane that has one: kept here until CTA 0 fetches it.
  ATTNKIT_DEVICE void set_aside(bool is, float l, int id) {
    const u32 who = __ballot_sync(0xffffffffu, is);
    if (who == 0) return;
    int at = 0;
    if (lane == 0) at = atomicAdd(&s.n_near, __popc(who));
    at = __shfl_sync(0xffffffffu, at, 0) + __popc(who & ((1u << lane) - 1));
    const u64 mass = h.k != 0 ? static_cast<u64>(exp2_fast((l - top) * kLog2e) * kMassOne) : weight_of(l);
    if (is && at < kNear) s.near[at] = Candidate{pack_best(l, id), mass};
  }

  // After the barrier: how many tokens all CTAs have set aside. CTA 0 then has all of them, if there is room.
  ATTNKIT_DEVICE int fetch() {
    const int there = lane < h.size ? static_cast<int>(load_remote(remote_address(&s.n_near, min(lane, h.size - 1)))) : 0;
    const int all = __reduce_add_sync(0xffffffffu, there);
    if (h.rank == 0) {
      const int before = __reduce_add_sync(0xffffffffu, lane < warp ? there : 0), mine = __shfl_sync(0xffffffffu, there, warp);
      if (all <= kNear && warp != 0) {
#pragma unroll 1
        for (int i = lane; i < mine; i += 32) {
          const uint4 q = load_remote_16(remote_address(&s.near[i], warp));
          s.near[before + i] = Candidate{static_cast<u64>(q.y) << 32 | q.x, static_cast<u64>(q.w) << 32 | q.z};
        }
      }
      __syncthreads();
    }
    cluster_arrive();  // nothing is read of other CTAs any more: the wait is at the end
    return all;
  }

  ATTNKIT_DEVICE u64 drawn(const Candidate& token) const {
    return token.logit() >= least ? pack_best(noisy(token.logit(), token_word(h.seed, h.offset, token.id())), token.id()) : 0;
  }

  ATTNKIT_DEVICE u64 block_sum(u64 x) {
    x = warp_sum_u64(x);
    __syncthreads();
    if (lane == 0) s.sums[warp] = x;
    __syncthreads();
    return warp_sum_u64(lane < kSampleWarps ? s.sums[lane % kSampleWarps] : 0);
  }

  ATTNKIT_DEVICE u64 block_max(u64 x) {
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) s.sums[warp] = x;
    __syncthreads();
    return warp_max(s.sums[lane % kSampleWarps]);
  }

  // Few tokens: all of them, up to bin ``cut``, meet in CTA 0.
  ATTNKIT_DEVICE void choose_near(int cut, bool binned) {
#pragma unroll 1
    for (int i = warp * 32; i < n; i += kSampleThreads) {
      const float2 q = list[min(i + lane, n - 1)];
      const float l = binned ? q.x : warm(q.x, o);
      set_aside(i + lane < n && (binned ? bin_of(l) <= cut : h.k == 0 || l >= end), l, __float_as_int(q.y));
    }
    cluster_sync();
    const int all = fetch();
    if (h.rank == 0) {
      // A thread has two of them at most.
      Candidate first, second;
      u64 mass_first = 0, mass_second = 0, sum = 0;
      int mine = 0;
      rank_all(s.near, all, [&](const Candidate& token, u32 before, u64 mass) {
        if (h.k != 0 && before >= h.k) return;
        sum += token.mass;
        mass = before == 0 ? 0 : max(mass, 1ull);
        if (mine == 0) {
          first = token, mass_first = mass;
        } else {
          second = token, mass_second = mass;
        }
        ++mine;
      });
      double share = h.by_mass() ? wanted() : 1e300;
      if (h.k != 0 && h.top_p < 1.0f) share = static_cast<double>(h.top_p) * static_cast<double>(block_sum(sum));
      u64 best = 0;
      if (mine > 0 && (mass_first == 0 || static_cast<double>(mass_first) < share)) best = drawn(first);
      if (mine > 1 && (mass_second == 0 || static_cast<double>(mass_second) < share)) best = max(best, drawn(second));
      best = block_max(best);
      write(best_id(best), true);
    }
    cluster_wait();
  }

  // Many: each CTA draws among the tokens before bin ``cut``, which weigh ``above``; those of that bin are ranked in CTA 0.
  // Not ``binned``: all that min-p leaves is kept.
  ATTNKIT_DEVICE Chosen choose_far(int cut, u32 above, bool binned) {
    const int segment = (n + kSampleThreads - 1) / kSampleThreads * 32, first = min(n, warp * segment), last = min(n, first + segment);
    int kept = 0;
#pragma unroll 1
    for (int i = first; i < last; i += 32) {
      float2 q = i + lane < last ? list[i + lane] : make_float2(negative_infinity(), 0.0f);
      if (!binned) q.x = warm(q.x, o);
      const int bin = bin_of(q.x);
      const bool keep = bin < cut && q.x >= least;
      set_aside(bin == cut && i + lane < last, q.x, __float_as_int(q.y));
      const u32 who = __ballot_sync(0xffffffffu, keep);
      if (keep) list[first + kept + __popc(who & ((1u << lane) - 1))] = q;
      kept += __popc(who);
    }
    __syncwarp();
    u64 best = 0;
#pragma unroll 1
    for (int i = lane; i < kept; i += 32) {
      const float2 q = list[first + i];
      const int id = __float_as_int(q.y);
      u32 w[4];
      philox_words(h.seed, h.offset, kOfTokens, static_cast<u32>(id) >> 2, w);  // not by a loop: this one turns often
      best = max(best, pack_best(noisy(q.x, id & 2 ? (id & 1 ? w[3] : w[2]) : (id & 1 ? w[1] : w[0])), id));
    }
    return finish(above, best);
  }

  // ``best``: of each thread's draws. The tokens that CTA 0 ranks come after ``above``.
  ATTNKIT_DEVICE Chosen finish(u32 above, u64 best) {
    best = block_max(best);
    if (threadIdx.x == 0) store_remote(remote_address(&s.bests[h.rank], 0), best);
    cluster_sync();
    const int close = fetch();
    if (h.rank == 0 && close <= kNear) {
      best = s.bests[min(lane, h.size - 1)];
      const u32 end = wanted();
      rank_all(s.near, close, [&](const Candidate& token, u32 before, u64 mass) {
        if (above + (h.k != 0 ? before : mass) < end) best = max(best, drawn(token));
      });
      best = block_max(best);
      write(best_id(best), true);
    }
    cluster_wait();
    return close > kNear ? kUndecided : kWritten;
  }

  ATTNKIT_DEVICE Chosen choose() {
    const bool by_count = h.k != 0, floor = all_listed() || (h.min_p > 0.0f && least > end);  // all that min-p leaves is listed
    if (full || most > kF32Max) return kUndecided;
    tell_whole();  // not before: a CTA whose row is not valid has ended
    const bool by_mass = h.by_mass(), free = !by_count && !by_mass;
    if (free && !floor) return kUndecided;
    // A short top-k lies at or above the largest bound of the CTAs, as do few other tokens unless those are many.
    const int room = h.size <= 3 && h.k <= kMostListed ? kNear : all_listed() ? kFew : 0;
    bool few = by_count ? total <= room : by_mass && floor && total <= kFew;
    const bool binned = !few && !free;
    int cut = kBins;
    Pick pick{};
    if (binned) {
      count_bins();
      cluster_sync();
      pick = pick_bin(wanted());
      cut = static_cast<int>(pick.bin);
      // The last bins reach to what is not listed; but all that min-p leaves may lie before them.
      if (cut >= kBins - 2 && !all_listed()) {
        if (!floor || (by_count && h.top_p < 1.0f) || bin_of(least) >= cut) return leave_undecided();
        cut = kBins;
      }
      few = by_count && cut < kBins && pick.need + pick.equal <= (h.top_p < 1.0f ? kNear : kFew);
      if (by_count && h.top_p < 1.0f && !few) return leave_undecided();
    }
    if (!few) return choose_far(cut, pick.need, binned);
    choose_near(cut, binned);
    return kWritten;
  }
};

}  // namespace attnkit::sampling
