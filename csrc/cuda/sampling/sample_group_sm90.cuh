// Groups of 16 tokens. One draw from all tokens of a row needs noise for a group instead of every token: see draw_of_all
// in attnkit/reference.py. The same groups' largest logits (peaks) tell where a row's first tokens are.
//
// Group 32 P + l lies in piece P (512 tokens): four neighbours of lane l in each of four chunks of 128 tokens. So a warp's
// 16-byte reads are contiguous and no lane needs another's tokens. Four pieces are a block.
#pragma once
#include "sample_row_sm90.cuh"

namespace attnkit::sampling {

constexpr int kChunk = 128, kPiece = 4 * kChunk, kBlock = 4 * kPiece;

ATTNKIT_DEVICE int first_of_group(int group) { return group / 32 * kPiece + group % 32 * 4; }

template <int Type>
ATTNKIT_DEVICE u32 max_pairs(u32 a, u32 b) {
  u32 r;
  if constexpr (Type == kBf16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
}

// The largest of a chunk's four logits; NaN if there is one.
template <int Type>
ATTNKIT_DEVICE float peak_of(const Raw<Type>& raw) {
  if constexpr (Type == kF32) {
    const u32(&w)[4] = raw.w;
    return max_nan(max_nan(__uint_as_float(w[0]), __uint_as_float(w[1])), max_nan(__uint_as_float(w[2]), __uint_as_float(w[3])));
  } else {
    const float2 two = unpack(max_pairs<Type>(raw.w[0], raw.w[1]), Type == kBf16);
    return max_nan(two.x, two.y);
  }
}

// The largest of a group's logits; NaN if there is one.
template <int Type>
ATTNKIT_DEVICE float peak_of(const Raw<Type> (&raw)[4]) {
  if constexpr (Type == kF32) {
    float most[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) most[c] = peak_of<Type>(raw[c]);
    return max_nan(max_nan(most[0], most[1]), max_nan(most[2], most[3]));
  } else {
    u32 most = max_pairs<Type>(raw[0].w[0], raw[0].w[1]);
#pragma unroll
    for (int c = 1; c < 4; ++c) most = max_pairs<Type>(most, max_pairs<Type>(raw[c].w[0], raw[c].w[1]));
    const float2 two = unpack(most, Type == kBf16);
    return max_nan(two.x, two.y);
  }
}

// The peaks of a lane's four groups of a block, as they are in memory.
template <int Type>
ATTNKIT_DEVICE Raw<Type> peaks_of(const Raw<Type> (&raw)[4][4]) {
  if constexpr (Type == kF32) {
    return {{__float_as_uint(peak_of<Type>(raw[0])), __float_as_uint(peak_of<Type>(raw[1])), __float_as_uint(peak_of<Type>(raw[2])),
             __float_as_uint(peak_of<Type>(raw[3]))}};
  } else {
    u32 most[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      most[u] = max_pairs<Type>(raw[u][0].w[0], raw[u][0].w[1]);
#pragma unroll
      for (int c = 1; c < 4; ++c) most[u] = max_pairs<Type>(most[u], max_pairs<Type>(raw[u][c].w[0], raw[u][c].w[1]));
    }
    Raw<Type> peaks;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 a = most[2 * i], b = most[2 * i + 1];
      peaks.w[i] = max_pairs<Type>(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
    }
    return peaks;
  }
}

// The largest of each of a group's chunks, 16 bits each: rounded if they are of float32.
template <int Type>
ATTNKIT_DEVICE uint2 chunk_peaks(const Raw<Type> (&raw)[4]) {
  if constexpr (Type == kF32) {
    float most[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) most[c] = peak_of<Type>(raw[c]);
    return make_uint2(pack_bf16(most[0], most[1]), pack_bf16(most[2], most[3]));
  } else {
    u32 two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 a = max_pairs<Type>(raw[2 * i].w[0], raw[2 * i].w[1]), b = max_pairs<Type>(raw[2 * i + 1].w[0], raw[2 * i + 1].w[1]);
      two[i] = max_pairs<Type>(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
    }
    return make_uint2(two[0], two[1]);
  }
}

// The sum of exp of a lane's tokens after temperature, over that of a logit which none exceeds by much.
struct LaneMass {
  static constexpr float kFar = 40.0f;
  const bool wanted;
  const float scale;
  float of = negative_infinity(), sum = 0.0f;

  ATTNKIT_DEVICE void reach(float x) {
    if (!((x - of) * scale > kFar)) return;
    sum *= exp2_fast((of - x) * scale);
    of = x;
  }
  ATTNKIT_DEVICE float mass(float x) const { return exp2_fast((x - of) * scale); }
  // The same is exp2 of a logit by ``scale`` and this, which rounds a millionth of a large logit away.
  ATTNKIT_DEVICE float shift() const { return of > negative_infinity() ? -of * scale : 0.0f; }
  // What weighs ``its`` over a logit.
  ATTNKIT_DEVICE void take(float logit, float its) {
    if (its == 0.0f) return;
    reach(logit);
    sum += its * mass(logit);
  }
  // In units of what ``top`` weighs, which is after temperature.
  ATTNKIT_DEVICE float over(float top) const { return sum > 0.0f ? sum * exp2_fast(__fmaf_rn(of, scale, -top * kLog2e)) : sum; }
};

// A lane's largest logit and its id; the lowest on ties. Where groups are drawn: its best group's score and number.
struct Best {
  float best = negative_infinity(), seen = negative_infinity();  // seen: NaN once there was one
  int id = 0;

  // Greedy; ``v`` is the group's first id.
  template <int Type>
  ATTNKIT_DEVICE void largest(const Raw<Type> (&raw)[4], int v) {
    const float peak = peak_of<Type>(raw), most = fminf(peak, kF32Max);
    seen = max_nan(seen, peak);
    if (most > best) {
      best = most;
#pragma unroll
      for (int c = 3; c >= 0; --c) {
        float x[4];
        widen_four<Type>(raw[c], x);
#pragma unroll
        for (int i = 3; i >= 0; --i) id = fminf(x[i], kF32Max) == most ? v + c * kChunk + i : id;
      }
    }
  }

  ATTNKIT_DEVICE u64 packed() const { return seen != seen ? kNaNSeen : best > negative_infinity() ? pack_best(best, id) : 0; }
};

// The floor: a score that the CTA has reached in a row. ``tag`` grows from row to row, so a late warp's counts for nothing.
struct Floor {
  u32 address, tag;
  u32 key = 0;
  float shift = -negative_infinity();  // a group may win: u <= 2^(peak scale + shift)

  ATTNKIT_DEVICE Floor(const u64* shared, int row) : address(Draw::kept_address(shared)), tag(static_cast<u32>(row) + 1) {}

  // A group's sum is at most 16 times its largest; E >= u.
  ATTNKIT_DEVICE void set(u32 k) {
    const float score = order_value(k);
    key = k;
    shift = (fabsf(score) * 1e-6f + 2e-3f - score) * kLog2e + 4.0f;
  }
  ATTNKIT_DEVICE void refresh() {
    u32 low, high;
    asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(address));
    if (high == tag && low > key) set(low);
  }
  ATTNKIT_DEVICE void raise(float best) {
    const u32 top = __reduce_max_sync(0xffffffffu, order_key(best));
    if (top > key && top > order_key(negative_infinity())) {
      set(top);
      if (elect_one()) asm volatile("red.shared.max.u64 [%0], %1;" ::"r"(address), "l"(static_cast<u64>(tag) << 32 | top) : "memory");
    }
  }
};

// Tries a group whose word is given. Converged warps only.
template <int Type>
ATTNKIT_DEVICE void try_group(Best& best, Floor& floor, const Raw<Type> (&raw)[4], int group, u32 word, const RowOptions& o) {
  const float peak = peak_of<Type>(raw), scale = o.rt * kLog2e;
  best.seen = max_nan(best.seen, peak);
  floor.refresh();
  const bool hope = !(Draw::one_and(word) > 1.0f + exp2_fast(__fmaf_rn(peak, scale, floor.shift)));
  if (!__any_sync(0xffffffffu, hope)) return;
  const float base = peak > negative_infinity() ? fminf(peak, kF32Max) : 0.0f;
  float sums[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float x[4];
    widen_four<Type>(raw[c], x);
    sums[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c] += exp2_fast((fminf(x[i], kF32Max) - base) * scale);
  }
  const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const float score = noisy(__fadd_rn(warm(base, o), __fmul_rn(log2_fast(sum), kLn2)), word);
  if (score > best.best) best.best = score, best.id = group;
  floor.raise(best.best);
}

// The share of a group's sum that names its token. Rounding must not make it the whole sum, which no token exceeds.
ATTNKIT_DEVICE float share_of(u32 word, float all) {
  return fminf(__fmul_rn(uniform(word), all), __uint_as_float(__float_as_uint(all) - 1));
}

// The token of a group, from its logits: lane c holds chunk c % 4's. One warp; ``x``: the token's logit.
ATTNKIT_DEVICE int choose_inside(float (&four)[4], int group, u64 seed, u64 offset, const RowOptions& o, float& x) {
  const int chunk = static_cast<int>(lane_id()) & 3;
  float most = negative_infinity(), to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = fminf(four[i], kF32Max), most = fmaxf(most, four[i]);
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = sum = __fadd_rn(sum, exp2_fast((four[i] - most) * (o.rt * kLog2e)));
  float before = 0.0f, all = 0.0f;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (c == chunk) before = all;
    all = __fadd_rn(all, __shfl_sync(0xffffffffu, sum, c));
  }
  u32 w[4];
  philox_words(seed, offset, kInside, static_cast<u32>(group), w);
  const float reach = share_of(w[0], all);
  int at = 4;
#pragma unroll
  for (int i = 3; i >= 0; --i) at = __fadd_rn(before, to[i]) > reach ? i : at;
  const u32 holder = __ffs(__ballot_sync(0xffffffffu, at < 4)) - 1;
  x = at == 0 ? four[0] : at == 1 ? four[1] : at == 2 ? four[2] : four[3];
  x = __shfl_sync(0xffffffffu, x, holder & 31);
  at = __shfl_sync(0xffffffffu, at, holder & 31);
  return first_of_group(group) + static_cast<int>(holder & 3) * kChunk + (at & 3);
}

// A place in the order: tokens before it have a larger logit, or the same and a lower id.
struct Place {
  float logit;
  int id;
  ATTNKIT_DEVICE bool after(float l, int v) const { return l > logit || (l == logit && v < id); }
};

// The earliest token so far: minus the logarithm of its time, its logit before temperature.
struct Earliest {
  float best = negative_infinity(), raw = 0.0f;
  int id = 0;
};

// A lane's group: the first of its tokens before ``end`` to arrive. See draw_by_arrival in attnkit/reference.py. ``chunk(c, x)``
// gives four of its logits, ``base`` is the largest. In loops, rolled up: this runs seldom.
template <class Chunk>
ATTNKIT_DEVICE void try_arrivals(Earliest& mine, Chunk&& chunk, float base, int group, u32 word, u64 seed, u64 offset,
                                 const RowOptions& o, const Place& end) {
  const float scale = o.rt * kLog2e, peak = warm(base, o);
  float all = 0.0f, before = 0.0f;
#pragma unroll 1
  for (int c = 0; c < 4; ++c) {
    float x[4], sum = 0.0f;
    chunk(c, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = __fadd_rn(sum, exp2_fast((fminf(x[i], kF32Max) - base) * scale));
    all = __fadd_rn(all, sum);
  }
  u32 w[4];
  philox_words(seed, offset, kInside, static_cast<u32>(group), w);
  const float reach = share_of(w[0], all), time = __fmul_rn(exponential(word), reciprocal(all));
  float earliest = -negative_infinity(), raw = 0.0f;
  int id = 0;
  bool found = false;
#pragma unroll 1
  for (int c = 0; c < 4; ++c) {
    const int v = first_of_group(group) + c * kChunk;
    float x[4], sum = 0.0f;
    chunk(c, x);
    philox_words(seed, offset, kOfTokens, static_cast<u32>(v) >> 2, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float mass = exp2_fast((fminf(x[i], kF32Max) - base) * scale);
      sum = __fadd_rn(sum, mass);
      const bool first = !found && __fadd_rn(before, sum) > reach;
      const float wait = first ? 0.0f : __fmul_rn(exponential(w[i]), reciprocal(mass));
      const float at = __fadd_rn(time, wait);
      found = found || first;
      if (at < earliest && x[i] > negative_infinity() && end.after(warm(x[i], o), v + i)) earliest = at, id = v + i, raw = x[i];
    }
    before = __fadd_rn(before, sum);
  }
  const float score = less_log(peak, earliest);
  if (score > mine.best) mine.best = score, mine.id = id, mine.raw = raw;
}

// Four neighbours on their way from memory; from V on there are none, which takes no read.
template <int Type, bool Penalised>
struct ChunkAsked {
  Raw<Type> raw;
  Extras e;

  // ``more``: there may be more than logits.
  ATTNKIT_DEVICE void ask(const RowPointers& r, int v, int V, bool more = true) {
    if (r.logits_wide && v + 4 <= V) {
      raw = reinterpret_cast<const Raw<Type>*>(r.logits)[v / 4];
    } else {
      raw = load_four_guarded<Type>(r.logits, v, V);
    }
    if constexpr (Penalised) {
      if (more) {
        load_extras(e, r, v, V);
      } else {
        e = Extras{{0, 0, 0, 0}, 0, 15};
      }
    }
  }
  // After penalties.
  ATTNKIT_DEVICE void use(float (&x)[4], const RowPointers& r, const RowOptions& o, int v, int V) const {
    widen_four<Type>(raw, x);
    if constexpr (Penalised) penalise(x, e, r, o, v, V);
  }
};

// A group's chunk c % 4 in lane c, from memory, after penalties.
template <int Type, bool Penalised>
ATTNKIT_DEVICE void load_chunk(float (&x)[4], const RowPointers& r, const RowOptions& o, int v, int V) {
  ChunkAsked<Type, Penalised> chunk;
  chunk.ask(r, v, V);
  chunk.use(x, r, o, v, V);
}

}  // namespace attnkit::sampling
