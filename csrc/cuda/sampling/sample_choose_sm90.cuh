// From what the CTAs of a cluster have listed to the token. Top-p alone: the tokens that arrive early, in order of time, are
// weighed by what precedes them; the first that top-p keeps is drawn. With min-p: the best draw among the listed tokens that
// min-p keeps; where top-p refuses it, the best of those before it. Where what is listed does not suffice, the row is read again.
//
// Order throughout: by logit after temperature, then by the lower id. Masses are whole multiples of a power of two, so that
// no order of adding shows. No result depends on a guess, on the order of a list, or on how many CTAs a row has.
#pragma once
#include "sample_share_sm90.cuh"

namespace attnkit::sampling {

template <int Type>
struct CutRow {
  const SampleParams& p;
  CutShared& s;
  float2* const list;
  const Share& h;
  const RowOptions& o;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  int n = 0;  // tokens that this lane has listed
  int turn = 0;
  bool nan = false, listed = true;  // no list ran over
  float most = 0.0f, top = 0.0f;    // the row's largest logit, before and after temperature
  float end = 0.0f;                 // all tokens from this on (after temperature) are listed
  float unit = 0.0f;                // of masses, a power of two: 2^30 to 2^31 of them are the row's
  u32 wanted = 0;                   // tokens are kept as long as what precedes them weighs less
  Place probes[kProbes];
  u32 above[kProbes];               // what precedes them

  ATTNKIT_DEVICE void write(int token, bool good) const {
    if (h.rank == 0 && threadIdx.x == 0) p.tokens[h.b] = token, p.valid[h.b] = good;
  }

  // ---- what the CTAs tell each other ----

  ATTNKIT_DEVICE void meet(const Listing<Type>& listing) {
    const float seen = listing.seen;
    const bool odd = __syncthreads_or(seen != seen) != 0, over = __syncthreads_or(listing.ran_over()) != 0;
    n = static_cast<int>(listing.to - smem_address(list)) / (kSampleThreads * 8);
    const float largest_here = order_value(__reduce_max_sync(0xffffffffu, order_key(seen == seen ? seen : negative_infinity())));
    if (lane == 0) s.tops[warp] = largest_here;
    float floor = -negative_infinity();
    if (h.by_arrival()) {
      if (s.n_early <= kMostEarly) {
        const float time = listing.awaited * reciprocal(listing.known_mass()), from = warm(listing.reference, o);
        floor = less_log(from, time) + fabsf(from) * 1e-6f + 1e-3f;
      }
      find_arrivals(floor);
    }
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
      const uint4 about = make_uint4(__float_as_uint(largest), __float_as_uint(listing.claim), __float_as_uint(mass), odd + 2 * over);
      if (lane < h.size) store_remote(remote_address(&s.about[h.rank], lane), about);
    } else if (warp == 1 && h.by_arrival()) {
      tell_arrivals(floor);
    }
    cluster_sync();
    // A lane looks at one CTA's record.
    const uint4 q = s.about[min(lane, h.size - 1)];
    nan = __any_sync(0xffffffffu, (q.w & 1) != 0);
    listed = !__any_sync(0xffffffffu, (q.w & 2) != 0);
    const float here = __uint_as_float(q.x);
    most = order_value(__reduce_max_sync(0xffffffffu, order_key(here)));
    const float bound = order_value(__reduce_max_sync(0xffffffffu, order_key(__uint_as_float(q.y))));
    const bool some = lane < h.size && here > negative_infinity();
    const float whole = warp_sum(some ? __uint_as_float(q.z) * exp2_fast((here - most) * o.rt * kLog2e) : 0.0f);
    top = warm(most, o);
    end = fabsf(bound) < kF32Max ? warm(bound, o) : bound;
    unit = __uint_as_float((284u << 23) - (__float_as_uint(fmaxf(whole, 1.0f)) & 0x7f800000u));
    wanted = max(1u, static_cast<u32>(ceil(static_cast<double>(h.top_p) * static_cast<double>(whole) * static_cast<double>(unit))));
  }

  // The tokens of the early groups that arrive before ``floor`` says: those are all of this share that do.
  // See draw_by_arrival in attnkit/reference.py. Four lanes take a group, each one of its chunks.
  ATTNKIT_DEVICE void find_arrivals(float floor) {
    const int groups = min(s.n_early, kMostEarly), chunk = lane & 3;
#pragma unroll 1
    for (int i = 8 * warp; i < groups; i += 8 * kSampleWarps) {
      const bool is = i + lane / 4 < groups;
      const EarlyGroup& group = s.early[min(i + lane / 4, groups - 1)];
      const float4 held = reinterpret_cast<const float4*>(group.x)[chunk];
      const float x[4] = {fminf(held.x, kF32Max), fminf(held.y, kF32Max), fminf(held.z, kF32Max), fminf(held.w, kF32Max)};
      float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      float mass[4], to[4], sum = 0.0f, before = 0.0f, all = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = sum = __fadd_rn(sum, mass[j] = exp2_fast((x[j] - most) * (o.rt * kLog2e)));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (c == chunk) before = all;
        all = __fadd_rn(all, __shfl_sync(0xffffffffu, sum, (lane & ~3) + c));
      }
      u32 w[4];
      philox_words(h.seed, h.offset, kInside, static_cast<u32>(group.number), w);
      const float reach = share_of(w[0], all), time = __fmul_rn(exponential(group.word), reciprocal(all)), peak = warm(most, o);
      int first = 4;
#pragma unroll
      for (int j = 3; j >= 0; --j) first = __fadd_rn(before, to[j]) > reach ? j : first;
      const u32 reached = __ballot_sync(0xffffffffu, first < 4) >> (lane & ~3) & 15;
      if (chunk != __ffs(reached) - 1) first = 4;
      const int id = first_of_group(group.number) + chunk * kChunk;
      philox_words(h.seed, h.offset, kOfTokens, static_cast<u32>(id) >> 2, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float wait = j == first ? 0.0f : __fmul_rn(exponential(w[j]), reciprocal(mass[j]));
        const float score = less_log(peak, __fadd_rn(time, wait));
        if (is && score >= floor && x[j] > negative_infinity()) {
          const int at = atomicAdd(&s.n_arrivals, 1);
          if (at < kMostArrivals) s.arrivals[at] = Arrival{score, warm(x[j], o), id + j};
        }
      }
    }
  }

  // One warp: the earliest to all CTAs.
  ATTNKIT_DEVICE void tell_arrivals(float floor) {
    const int found = s.n_arrivals, count = min(found, kMostArrivals);
    if (found > kMostArrivals) floor = -negative_infinity();
#pragma unroll 1
    for (int i = lane; i < count; i += 32) {
      const Arrival mine = s.arrivals[i];
      const u64 key = pack_best(mine.score, mine.id);
      int before = count <= kTold ? i : 0;
#pragma unroll 1
      for (int j = 0; j < count && count > kTold; ++j) before += pack_best(s.arrivals[j].score, s.arrivals[j].id) > key;
      if (before >= kTold) continue;
      if (count > kTold && before == kTold - 1) floor = fmaxf(floor, mine.score);
      const uint4 record = make_uint4(__float_as_uint(mine.score), __float_as_uint(mine.logit), static_cast<u32>(mine.id), 0);
#pragma unroll 1
      for (int cta = 0; cta < h.size; ++cta) store_remote(remote_address(&s.told[h.rank * kTold + before], cta), record);
    }
    __syncwarp();
    floor = order_value(__reduce_max_sync(0xffffffffu, order_key(floor)));
    if (lane < h.size) store_remote(remote_address(&s.floors[h.rank], lane), make_float2(floor, __int_as_float(min(count, kTold))));
  }

  // ---- what precedes a token ----

  ATTNKIT_DEVICE u32 mass_of(float l) const { return __float2uint_rn(exp2_fast((l - top) * kLog2e) * unit); }

  // Without branches: what is added depends on every token.
  ATTNKIT_DEVICE void add(float x, int id) {
    const float l = tempered(x, o);
    const u32 mass = mass_of(l);
#pragma unroll
    for (int q = 0; q < kProbes; ++q) {
      asm("{\n.reg .pred is;\n"
          "setp.lt.s32 is, %2, %4;\n"
          "setp.eq.and.f32 is, %1, %3, is;\n"
          "setp.gt.or.f32 is, %1, %3, is;\n"
          "@is add.u32 %0, %0, %5;\n}"
          : "+r"(above[q]) : "f"(l), "r"(id), "f"(probes[q].logit), "r"(probes[q].id), "r"(mass));
    }
  }

  // All that precedes the probes; of the listed tokens alone, unless ``all``.
  ATTNKIT_DEVICE void weigh(bool all) {
#pragma unroll
    for (int q = 0; q < kProbes; ++q) above[q] = 0;
    if (all) {
      weigh_row();
    } else {
      // Four at a time, as often for all lanes, so that what they wait for overlaps.
      const int longest = __reduce_max_sync(0xffffffffu, n);
#pragma unroll 1
      for (int i = 0; i < longest; i += 4) {
        float2 token[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          token[u] = i + u < n ? list[(i + u) * kSampleThreads + threadIdx.x] : make_float2(negative_infinity(), 0.0f);
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) add(token[u].x, __float_as_int(token[u].y));
      }
    }
    __syncwarp();
    u32 mine = 0;
#pragma unroll
    for (int q = 0; q < kProbes; ++q) {
      const u32 sum = __reduce_add_sync(0xffffffffu, above[q]);
      mine = lane % kProbes == q ? sum : mine;
    }
    // Three in turn: the next is zero before any CTA adds to it, and nobody reads that one now.
    const int now = turn % 3, next = (turn + 1) % 3;
    if (threadIdx.x < kProbes) s.above[next][threadIdx.x] = 0;
    if (lane < h.size * kProbes) add_remote(remote_address(&s.above[now][lane % kProbes], lane / kProbes), mine);
    cluster_sync();
#pragma unroll
    for (int q = 0; q < kProbes; ++q) above[q] = s.above[now][q];
    ++turn;
  }

  // The share of the row, read again: f(logits of a lane's group after penalties, its first id).
  template <class F>
  ATTNKIT_DEVICE void for_share(F&& f) const {
    const RowPointers r = row_pointers<Type>(p, h.b);
    const int last = h.end * kBlock;
    Fetched<Type, false> fetched;
    int v = h.from * kBlock + 4 * lane;
    if (v < last) fetched.ask(r, v, p.V);
#pragma unroll 1
    for (; v < last; v += kPiece) {
      Raw<Type> held[4];
      fetched.use(held, r, o, v, p.V);
      if (v + kPiece < last) fetched.ask(r, v + kPiece, p.V);
      f(held, v);
    }
  }

  ATTNKIT_DEVICE void weigh_row() {
    for_share([&](const Raw<Type>(&held)[4], int v) {
      // Of equal logits those with lower ids come first: all of a piece or none, but where the probe itself is.
      float from[kProbes];
      bool here = false;
#pragma unroll
      for (int q = 0; q < kProbes; ++q) {
        here = here || probes[q].id / kPiece == v / kPiece;
        // The number before; that before zero is not minus zero.
        const float below = order_value(order_key(probes[q].logit) - (probes[q].logit == 0.0f ? 2 : 1));
        from[q] = probes[q].id > v ? below : probes[q].logit;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<Type>(held[c], x);
        if (here) {
#pragma unroll
          for (int i = 0; i < 4; ++i) add(x[i], v + c * kChunk + i);
          continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float l = tempered(x[i], o);
          const u32 mass = mass_of(l);
#pragma unroll
          for (int q = 0; q < kProbes; ++q) {
            asm("{\n.reg .pred is;\nsetp.gt.f32 is, %1, %2;\n@is add.u32 %0, %0, %3;\n}" : "+r"(above[q]) : "f"(l), "f"(from[q]), "r"(mass));
          }
        }
      }
    });
  }

  // ---- the choice: false if what is listed does not suffice ----

  ATTNKIT_DEVICE bool choose_by_arrival() {
    constexpr int kMine = kMostParts * kTold / 32;
    const float2 told = s.floors[min(lane, h.size - 1)];
    const float floor = order_value(__reduce_max_sync(0xffffffffu, order_key(told.x)));
    u64 keys[kMine];
    float logits[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int at = 32 * i + lane, cta = at / kTold;
      const Arrival one = s.told[at];
      const int count = __shfl_sync(0xffffffffu, __float_as_int(told.y), min(cta, h.size - 1));
      keys[i] = cta < h.size && at % kTold < count && one.score >= floor ? pack_best(one.score, one.id) : 0;
      logits[i] = one.logit;
    }
    bool all = !listed || !(end < -negative_infinity());
    u64 last = ~0ull;
#pragma unroll 1
    while (true) {
      const u64 before = last;
      Place mine{negative_infinity(), 0};
      int found = 0;
#pragma unroll 1
      for (int q = 0; q < kProbes; ++q) {
        u64 best = 0;
        float logit = 0.0f;
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          if (keys[i] < last && keys[i] > best) best = keys[i], logit = logits[i];
        }
        last = warp_max(best);
        if (last == 0) break;
        logit = __shfl_sync(0xffffffffu, logit, __ffs(__ballot_sync(0xffffffffu, best == last)) - 1);
        if (lane == q) mine = Place{logit, best_id(last)};
        ++found;
      }
#pragma unroll
      for (int q = 0; q < kProbes; ++q) {
        probes[q] = Place{__shfl_sync(0xffffffffu, mine.logit, q), __shfl_sync(0xffffffffu, mine.id, q)};
      }
      if (found == 0) return false;
      weigh(all);
      int token = -1;
      bool unknown = false;
#pragma unroll
      for (int q = kProbes - 1; q >= 0; --q) {
        if (q < found && above[q] < wanted) token = probes[q].id, unknown = !all && probes[q].logit < end;
      }
      if (unknown) {
        all = true, last = before;
      } else if (token >= 0) {
        write(token, true);
        return true;
      }
    }
  }

  ATTNKIT_DEVICE float least() const { return h.min_p > 0.0f ? __fadd_rn(top, h.log_min_p) : -kF32Max; }

  // Of this lane's listed tokens from ``from`` on, those before ``end``: the best draw and its logit.
  ATTNKIT_DEVICE u64 best_listed(float from, const Place& end, float& logit) const {
    u64 best = 0;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const float2 token = list[i * kSampleThreads + threadIdx.x];
      const float l = warm(token.x, o);
      const int id = __float_as_int(token.y);
      if (!(l >= from) || !end.after(l, id)) continue;
      u32 w[4];
      philox_words(h.seed, h.offset, kOfTokens, static_cast<u32>(id) >> 2, w);
      const u64 key = pack_best(noisy(l, id & 2 ? (id & 1 ? w[3] : w[2]) : (id & 1 ? w[1] : w[0])), id);
      if (key > best) best = key, logit = l;
    }
    return best;
  }

  // The same of the share of the row, read again; where top-p alone holds back, the first to arrive.
  ATTNKIT_DEVICE u64 best_of_row(float from, const Place& end, float& logit) const {
    float4* const own = reinterpret_cast<float4*>(list) + 4 * threadIdx.x;
    const auto chunk = [&](int c, float(&x)[4]) { x[0] = own[c].x, x[1] = own[c].y, x[2] = own[c].z, x[3] = own[c].w; };
    Earliest mine;
    for_share([&](const Raw<Type>(&held)[4], int v) {
      const float peak = fminf(peak_of<Type>(held), kF32Max);
      if (peak == negative_infinity()) return;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        widen_four<Type>(held[c], x);
        own[c] = make_float4(x[0], x[1], x[2], x[3]);
      }
      u32 w[4];
      if (h.by_arrival()) {
        const int number = v / kPiece;
        philox_words(h.seed, h.offset, kOfGroups, static_cast<u32>(number / 4 * 32 + lane), w);
        const u32 word = number & 2 ? (number & 1 ? w[3] : w[2]) : (number & 1 ? w[1] : w[0]);
        // A group's sum is at most 16 times its largest; E >= u.
        const float hope = warm(peak, o) - log2_fast(uniform(word)) * kLn2 + 2.78f;
        if (hope + fabsf(hope) * 1e-6f >= mine.best) try_arrivals(mine, chunk, peak, number * 32 + lane, word, h.seed, h.offset, o, end);
        return;
      }
#pragma unroll 1
      for (int c = 0; c < 4; ++c) {
        float x[4];
        chunk(c, x);
        philox_words(h.seed, h.offset, kOfTokens, static_cast<u32>(v + c * kChunk) >> 2, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int id = v + c * kChunk + i;
          const float l = warm(x[i], o), score = noisy(l, w[i]);
          if (score > mine.best && l >= from && end.after(l, id)) mine.best = score, mine.id = id, mine.raw = x[i];
        }
      }
    });
    logit = warm(mine.raw, o);
    return mine.best > negative_infinity() ? pack_best(mine.best, mine.id) : 0;
  }

  // The best of all lanes' and its logit; ``half``: of the room for what warps tell, in turn.
  ATTNKIT_DEVICE u64 best_of_all(u64 best, float& logit, int half) {
    __syncwarp();
    u64 all = warp_max(best);
    logit = __shfl_sync(0xffffffffu, logit, __ffs(__ballot_sync(0xffffffffu, best == all)) - 1);
    Arrival* const to = &s.told[half * kMostParts * kSampleWarps];
    const uint4 record = make_uint4(high_word(all), static_cast<u32>(all), __float_as_uint(logit), 0);
    if (lane < h.size) store_remote(remote_address(&to[h.rank * kSampleWarps + warp], lane), record);
    cluster_sync();
    best = 0;
#pragma unroll 1
    for (int i = lane; i < h.size * kSampleWarps; i += 32) {
      const uint4 q = *reinterpret_cast<const uint4*>(&to[i]);
      const u64 key = static_cast<u64>(q.x) << 32 | q.y;
      if (key > best) best = key, logit = __uint_as_float(q.z);
    }
    __syncwarp();
    all = warp_max(best);
    logit = __shfl_sync(0xffffffffu, logit, __ffs(__ballot_sync(0xffffffffu, best == all)) - 1);
    return all;
  }

  // Among the listed tokens, or ``all``: the best draw; where top-p refuses it, the best of those before it, and so on.
  ATTNKIT_DEVICE bool choose_best(bool all) {
    if (!all && !(h.by_mass() || least() >= end)) return false;
    const float from = all ? least() : fmaxf(least(), end);
    Place place{negative_infinity(), 0};
#pragma unroll 1
    for (int half = 0;; half ^= 1) {
      float logit = 0.0f;
      u64 best = all ? best_of_row(from, place, logit) : best_listed(from, place, logit);
      best = best_of_all(best, logit, half);
      if (best == 0) return false;
      place = Place{logit, best_id(best)};
      bool kept = true;
      if (h.by_mass()) {
        // All that is listed, too: top-p's end must be among it, or min-p's.
        probes[0] = place, probes[1] = Place{end, 0x7fffffff}, probes[2] = probes[3] = Place{-negative_infinity(), 0};
        weigh(all);
        if (!all && least() < end && above[1] < wanted) return false;
        kept = above[0] < wanted;
      }
      if (kept) {
        write(place.id, true);
        return true;
      }
    }
  }

  // +inf counts as the largest number: what else there is weighs nothing.
  ATTNKIT_DEVICE void weigh_infinities() {
    top = warm(kF32Max, o), unit = 256.0f;
#pragma unroll
    for (int q = 0; q < kProbes; ++q) probes[q] = Place{negative_infinity(), 0};
    weigh(true);
    wanted = max(1u, static_cast<u32>(ceil(static_cast<double>(h.top_p) * above[0])));
  }

  ATTNKIT_DEVICE void choose() {
    bool all = !listed;
    if (most > kF32Max) {
      weigh_infinities();
      all = true;
    } else if (h.by_arrival()) {
      if (choose_by_arrival()) return;
      cluster_sync();  // what was told has been read
      all = true;
    }
#pragma unroll 1
    while (!choose_best(all)) {
      cluster_sync();
      all = true;
    }
  }
};

}  // namespace attnkit::sampling
