// A row of any filters but top-p alone, by one CTA. Its tokens are listed as far as peaks tell where they are (a longer top-k, min-p), or
// it is read again and again. The k-th key by radix, then draws among the tokens from a key on: where top-p refuses one, the next
// is drawn from those before it.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

constexpr int kTopkThreads = 512, kTopkWarps = kTopkThreads / 32;

struct AnyShared {
  u32 counted[2][256];
  u64 bests[kTopkWarps];
  u64 own;  // the key of who is drawn
  u32 sums[kTopkWarps], bin, need, equal;
  u32 reached;  // of a score (see Draw)
};

// A row's numbers besides RawOptions.
struct TopkOptions {
  float share, ratio;
  i64 given;
  u32 k;  // 0: the row has no short top-k

  ATTNKIT_DEVICE TopkOptions(const SampleParams& p, int b)
      : share(option(p.top_p, p.top_p_value, b)),
        ratio(option(p.min_p, p.min_p_value, b)),
        given(option(p.top_k, p.top_k_value, b)),
        k(listed_k(given, option(p.temperature, p.temperature_value, b), p.V)) {}
};

struct Between {
  u64 low, high;  // the former surely at most, the latter surely not below
};

// What a token weighs, the largest being one: whole numbers, so that no order of adding shows.
ATTNKIT_DEVICE u64 whole_mass(float logit, float top) { return static_cast<u64>(exp2_fast((logit - top) * kLog2e) * kMassOne); }

// ``Listed``: its tokens are, as keys.
template <int Type, bool Penalised, bool Listed>
struct AnyRow {
  const SampleParams& p;
  AnyShared& s;
  const RowPointers& r;
  const RowOptions& o;
  const u64 seed, offset;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  const u64* list = nullptr;  // of keys
  int listed = 0;

  // f(key) of all listed tokens, or all of the row; every thread as often. Some are on their way.
  template <class F>
  ATTNKIT_DEVICE void for_all(F&& f) const {
    if constexpr (Listed) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < listed; i += kTopkThreads) f(list[i]);
    } else {
      for_row(f);
    }
  }
  template <class F>
  ATTNKIT_DEVICE void for_row(F&& f) const {
    for_chunks([&](const float (&x)[4], int v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (v + i < p.V) f(pack_best(x[i], v + i));
      }
    });
  }
  // f(four logits, the first's id) of all of the row; -inf past its end.
  template <class F>
  ATTNKIT_DEVICE void for_chunks(F&& f) const {
    constexpr int kAhead = 4, kStep = 4 * kTopkThreads;
#pragma unroll 1
    for (int at = 0; at < p.V; at += kAhead * kStep) {
      const int v = at + 4 * static_cast<int>(threadIdx.x);
      ChunkAsked<Type, Penalised> chunks[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) chunks[u].ask(r, v + u * kStep, p.V);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        float x[4];
        chunks[u].use(x, r, o, v + u * kStep, p.V);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = o.tempered ? tempered(x[i], o) : fminf(x[i], kF32Max);
        f(x, v + u * kStep);
      }
    }
  }
  ATTNKIT_DEVICE static float logit_of(u64 key) { return order_value(high_word(key)); }

  // ---- over all threads ----

  ATTNKIT_DEVICE u64 most_of(u64 x) const {
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) s.bests[warp] = x;
    __syncthreads();
    return warp_max(s.bests[lane % kTopkWarps]);
  }
  ATTNKIT_DEVICE u64 sum_of(u64 x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    __syncthreads();
    if (lane == 0) s.bests[warp] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < kTopkWarps; ++i) x += s.bests[i];
    return x;
  }

  // ---- the draw ----

  // The least of the k first keys of ``keys``, but for bits below ``end`` and last ones that do not matter.
  template <class Keys>
  ATTNKIT_DEVICE u64 find_last(u32 k, int end, const Keys& keys) const {
    u64 prefix = 0;
    u32 need = k;
#pragma unroll 1
    for (int shift = 56; shift >= end; shift -= 8) {
      u32* const counted = s.counted[shift / 8 & 1];
      __syncthreads();
      if (threadIdx.x < 256) counted[threadIdx.x] = 0;
      __syncthreads();
      keys.for_all([&](u64 key) {
        if (key >> shift >> 8 == prefix >> shift >> 8) atomicAdd(&counted[key >> shift & 255], 1u);
      });
      __syncthreads();
      const u32 bin = 255 - threadIdx.x, mine = threadIdx.x < 256 ? counted[bin & 255] : 0, before = sum_before(mine, s.sums);
      if (before < need && before + mine >= need) s.bin = bin, s.need = need - before, s.equal = mine;
      __syncthreads();
      prefix |= static_cast<u64>(s.bin) << shift;
      need = s.need;
      if (s.equal == need) break;
    }
    return prefix;
  }

  // The key of the best draw of the tokens from key ``last`` and logit ``least`` on; 0 if there is none. ``mass``: what this thread has
  // of them, not exactly; of listed ones it is not summed up.
  ATTNKIT_DEVICE u64 draw_from(u64 last, float least, float top, float& mass) const {
    u64 best = 0, own = 0;
    if constexpr (!Listed) {
      __syncthreads();
      if (threadIdx.x == 0) s.reached = 0;
      __syncthreads();
      Draw draw(1.0f, &s.reached);
      const Philox noise(seed, offset, kOfTokens);
      // What is of key ``last`` and before it; that may be none of a number.
      const float end = order_value(max(high_word(last), order_key(negative_infinity())));
      const u32 end_id = 0xffffffffu - static_cast<u32>(last);
      for_chunks([&](const float (&x)[4], int v) {
        float kept[4];
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool is = (x[i] > end) | ((x[i] == end) & (static_cast<u32>(v + i) <= end_id));
          kept[i] = is & (x[i] >= least) ? x[i] : negative_infinity();
          mass += exp2_fast((kept[i] - top) * kLog2e);
        }
        noise.words(static_cast<u32>(v) >> 2, w);
        __syncwarp();
        draw.four(kept, w, v, [](float logit) { return logit; });
      });
      __syncwarp();
      best = draw.packed();
      own = pack_best(draw.raw, draw.id);
    } else {
      for_all([&](u64 key) {
        if (key < last || logit_of(key) < least) return;
        const int id = best_id(key);
        u32 w[4];
        philox_words(seed, offset, kOfTokens, static_cast<u32>(id) >> 2, w);
        const u64 score = pack_best(noisy(logit_of(key), one_of(w, id)), id);
        if (score > best) best = score, own = key;
      });
    }
    const u64 most = most_of(best);
    if (most == 0) return 0;
    if (best == most) s.own = own;
    __syncthreads();
    return s.own;
  }

  // The id that is drawn, -1 if min-p leaves none (where it is more than 1). ``k``: 0 for all; ``top``: the largest logit, a number. By all threads.
  ATTNKIT_DEVICE int draw(u32 k, float share, float ratio, float top, Between enough) const {
    return finish(k, k != 0 ? find_last(k, 0, *this) : 1, share, ratio, top, 0, enough);
  }

  // What must precede a token for top-p to leave it out, exactly.
  ATTNKIT_DEVICE u64 enough_of(u32 k, u64 last, float share, float top) const {
    u64 mass = 0;
    const auto add = [&](u64 key) { mass += key >= last ? whole_mass(logit_of(key), top) : 0; };
    if (k != 0) {
      for_all(add);
    } else {
      for_row(add);
    }
    return static_cast<u64>(ceil(static_cast<double>(share) * static_cast<double>(sum_of(mass))));
  }

  // The same where the key of the k-th is known. ``first``: the key of who is drawn first, if that is known and is one of the k first;
  // ``enough``: between which numbers what top-p wants is, if that is known of a row without top-k; else zeros.
  ATTNKIT_DEVICE int finish(u32 k, u64 last, float share, float ratio, float top, u64 first, Between enough) const {
    const float least = ratio > 0.0f ? __fadd_rn(top, logf(ratio)) : -kF32Max;
    if (share < 1.0f && enough.high == 0) enough.low = enough.high = enough_of(k, last, share, top);
#pragma unroll 1
    while (true) {
      float mass = 0.0f;
      const u64 own = first >= last ? first : draw_from(last, least, top, mass);
      if (share >= 1.0f || own == 0) return own == 0 ? -1 : best_id(own);
      // Where all that min-p keeps is less than top-p wants none is left out.
      if (!Listed && sum_of(static_cast<u64>(mass * (1.0001f * kMassOne))) < enough.low) return best_id(own);
      u64 heavier = 0;
      bool any = false;
      if constexpr (Listed) {
        for_all([&](u64 key) {
          if (key > own) heavier += whole_mass(logit_of(key), top), any = true;
        });
      } else {
        const Place place{logit_of(own), best_id(own)};
        for_chunks([&](const float (&x)[4], int v) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (place.after(x[i], v + i)) heavier += whole_mass(x[i], top), any = true;
          }
        });
      }
      const bool precedes = __syncthreads_or(any) != 0;
      const u64 before = sum_of(heavier);
      if (precedes && before >= enough.low && before < enough.high) enough.low = enough.high = enough_of(k, 1, share, top);
      if (before < enough.low || !precedes) return best_id(own);
      last = own + 1;
    }
  }

  // The row's largest logit after temperature, of all threads' before it; NaN if one is.
  ATTNKIT_DEVICE float top_of(float most) const {
    if (__syncthreads_or(most != most) != 0) return __uint_as_float(0x7fffffffu);
    return warm(order_value(high_word(most_of(pack_best(most, 0)))), o);
  }
};

}  // namespace attnkit::sampling
