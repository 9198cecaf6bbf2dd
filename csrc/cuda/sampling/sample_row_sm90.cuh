// What the sampling kernels share: a row's options, its logits four at a time with penalties and temperature,
// and the noise: Philox4x32-10 (Salmon et al., SC 2011) keyed by seed, counted by token or group of tokens and by offset,
// then Gumbel-max. attnkit/reference.py says which row draws how.
#pragma once
#include "../common/convert.cuh"

namespace attnkit::sampling {

constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr int kSampleTile = 4 * kSampleThreads;  // tokens: four neighbours a thread
constexpr float kF32Max = 3.4028234663852886e38f;

// Mirrors PARAMS in attnkit/backends/cuda/sampling.py. Strides are bytes between rows.
struct SampleParams {
  const char* logits;
  const i64* seeds;
  const char* counts;
  const char* prompt;
  const char* bias;
  const char* allowed;
  const float* temperature;
  const i64* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition;
  const float* presence;
  const float* frequency;
  const i64* offset;
  i64* tokens;
  u8* valid;
  int* state;
  float* peaks;
  float* chosen;
  i64* top_ids;
  i64 logits_b, counts_b, prompt_b, bias_b, allowed_b;
  i64 offset_value, top_k_value;
  int B, V, blocks, columns, left, room;
  float temperature_value, top_p_value, min_p_value, repetition_value, presence_value, frequency_value;
};

ATTNKIT_DEVICE u32 lane_id() { return threadIdx.x & 31; }

// The larger; NaN if either is.
ATTNKIT_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// u32 that orders as x does; both zeros are one. 0 is below every number.
ATTNKIT_DEVICE u32 order_key(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

ATTNKIT_DEVICE float order_value(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Larger for the larger score, then for the lower id. 0: no token. All ones: a NaN was seen.
ATTNKIT_DEVICE u64 pack_best(float score, int id) {
  return static_cast<u64>(order_key(score)) << 32 | (0xffffffffu - static_cast<u32>(id));
}
ATTNKIT_DEVICE int best_id(u64 best) { return static_cast<int>(0xffffffffu - static_cast<u32>(best)); }
constexpr u64 kNaNSeen = ~0ull;

ATTNKIT_DEVICE u64 warp_max(u64 x) {
  const u32 high = static_cast<u32>(x >> 32), most = __reduce_max_sync(0xffffffffu, high);
  return static_cast<u64>(most) << 32 | __reduce_max_sync(0xffffffffu, high == most ? static_cast<u32>(x) : 0u);
}

template <class T>
ATTNKIT_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sum of x over the CTA's threads before this one; all call. ``sums``: a place a warp.
template <class Sum, int Warps>
ATTNKIT_DEVICE u32 sum_before(u32 x, Sum (&sums)[Warps]) {
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  u32 sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, sum, step);
    sum += lane >= step ? other : 0;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Warps; ++i) sum += i < warp ? static_cast<u32>(sums[i]) : 0;
  return sum - x;
}

// One of four in registers, by the last two bits of ``at``.
template <class T>
ATTNKIT_DEVICE T one_of(const T (&x)[4], int at) {
  return at & 2 ? (at & 1 ? x[3] : x[2]) : (at & 1 ? x[1] : x[0]);
}

// ---- logits ----

// A row's numbers, from tensors where those come.
struct RowOptions {
  float t, rt, repetition, rr, presence, frequency;  // rt, rr: reciprocals
  bool cold, tempered;
};

// An option of row b, without a branch: all of a row's loads are under way together, before those of its logits.
ATTNKIT_DEVICE float option(const float* p, float value, int b) {
  asm volatile("{\n.reg .pred given;\nsetp.ne.u64 given, %1, 0;\n@given ld.global.f32 %0, [%2];\n}" : "+f"(value) : "l"(p), "l"(p + b));
  return value;
}
ATTNKIT_DEVICE i64 option(const i64* p, i64 value, int b) {
  asm volatile("{\n.reg .pred given;\nsetp.ne.u64 given, %1, 0;\n@given ld.global.s64 %0, [%2];\n}" : "+l"(value) : "l"(p), "l"(p + b));
  return value;
}

// The same as they are in memory.
struct RawOptions {
  float t, repetition, presence, frequency;
  i64 seed, offset;

  ATTNKIT_DEVICE RawOptions() {}
  ATTNKIT_DEVICE RawOptions(const SampleParams& p, int b)
      : t(option(p.temperature, p.temperature_value, b)),
        repetition(option(p.repetition, p.repetition_value, b)),
        presence(option(p.presence, p.presence_value, b)),
        frequency(option(p.frequency, p.frequency_value, b)),
        seed(option(p.seeds, 0, b)),
        offset(option(p.offset, p.offset_value, b)) {}

  ATTNKIT_DEVICE RowOptions use() const {
    RowOptions o;
    o.cold = t == 0.0f;
    o.t = o.cold ? 1.0f : fmaxf(t, 1e-30f);
    o.rt = __fdiv_rn(1.0f, o.t);
    o.tempered = o.t != 1.0f;
    o.repetition = repetition;
    o.rr = __fdiv_rn(1.0f, repetition);
    o.presence = presence;
    o.frequency = frequency;
    return o;
  }
};

constexpr int kMostListed = 128;                    // longest top-k that sample_topk_sm90.cuh takes
constexpr float kMassOne = 1099511627776.0f;      // 2^40: masses are integers, so that no order of adding shows
constexpr float kRounding = 4.76837158203125e-07f;  // more than a division and its inverse can move a float

// The k of a row that sample_topk_sm90.cuh takes, 1 for a greedy row; 0 for other rows.
ATTNKIT_DEVICE u32 listed_k(i64 k, float temperature, int V) {
  if (temperature == 0.0f) return 1;
  return k > 0 && k < V && k <= kMostListed ? static_cast<u32>(k) : 0;
}

// Where row b of each tensor lies, and whether four neighbours can be read at once.
struct RowPointers {
  const char *logits, *counts, *prompt, *bias, *allowed;
  bool logits_wide, wide;
};

template <int Type>
ATTNKIT_DEVICE RowPointers row_pointers(const SampleParams& p, int b) {
  RowPointers r;
  r.logits = p.logits + b * p.logits_b;
  r.counts = p.counts == nullptr ? nullptr : p.counts + b * p.counts_b;
  r.prompt = p.prompt == nullptr ? nullptr : p.prompt + b * p.prompt_b;
  r.bias = p.bias == nullptr ? nullptr : p.bias + b * p.bias_b;
  r.allowed = p.allowed == nullptr ? nullptr : p.allowed + b * p.allowed_b;
  r.logits_wide = (reinterpret_cast<u64>(r.logits) & (Type == kF32 ? 15 : 7)) == 0;
  r.wide = (reinterpret_cast<u64>(r.counts) & 15) == 0 && (reinterpret_cast<u64>(r.prompt) & 3) == 0;
  return r;
}

// Four logits as they are in memory.
template <int Type>
struct alignas(Type == kF32 ? 16 : 8) Raw {
  u32 w[Type == kF32 ? 4 : 2];
};

// The same in shared memory.
template <int Type>
ATTNKIT_DEVICE Raw<Type> load_raw(u32 from) {
  Raw<Type> x;
  if constexpr (Type == kF32) {
    const uint4 wide = load_shared<uint4>(from);
    x = Raw<Type>{{wide.x, wide.y, wide.z, wide.w}};
  } else {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "r"(from) : "memory");
  }
  return x;
}
template <int Type>
ATTNKIT_DEVICE void store_raw(u32 to, const Raw<Type>& x) {
  if constexpr (Type == kF32) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3]) : "memory");
  } else {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x.w[0]), "r"(x.w[1]) : "memory");
  }
}

// Four of a row's logits, one by one; -inf past the end.
template <int Type>
ATTNKIT_DEVICE Raw<Type> load_four_guarded(const char* row, int v, int V) {
  Raw<Type> r;
  if constexpr (Type == kF32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r.w[i] = v + i < V ? reinterpret_cast<const u32*>(row)[v + i] : 0xff800000u;
  } else {
    const u32 none = Type == kBf16 ? 0xff80u : 0xfc00u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 low = v + 2 * i < V ? reinterpret_cast<const u16*>(row)[v + 2 * i] : none;
      const u32 high = v + 2 * i + 1 < V ? reinterpret_cast<const u16*>(row)[v + 2 * i + 1] : none;
      r.w[i] = low | high << 16;
    }
  }
  return r;
}

template <int Type>
ATTNKIT_DEVICE void widen_four(const Raw<Type>& r, float (&x)[4]) {
  if constexpr (Type == kF32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(r.w[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 two = unpack(r.w[i], Type == kBf16);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

// What comes with four logits besides themselves.
struct Extras {
  int counts[4];
  u32 prompt, allowed;
};

ATTNKIT_DEVICE void load_counts(int (&counts)[4], const RowPointers& r, int v, int V) {
  if (r.counts != nullptr) {
    if (r.wide && v + 4 <= V) {
      const int4 n = *(reinterpret_cast<const int4*>(r.counts) + v / 4);
      counts[0] = n.x, counts[1] = n.y, counts[2] = n.z, counts[3] = n.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) counts[i] = v + i < V ? *(reinterpret_cast<const int*>(r.counts) + v + i) : 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) counts[i] = 0;
  }
}

ATTNKIT_DEVICE void load_masks(Extras& e, const RowPointers& r, int v, int V) {
  e.prompt = 0;
  if (r.prompt != nullptr) {
    if (r.wide && v + 4 <= V) {
      e.prompt = *(reinterpret_cast<const u32*>(r.prompt) + v / 4);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) e.prompt |= v + i < V ? static_cast<u32>(*(reinterpret_cast<const u8*>(r.prompt) + v + i)) << 8 * i : 0;
    }
  }
  e.allowed = 0xfu;
  if (r.allowed != nullptr) e.allowed = v < V ? *(reinterpret_cast<const u32*>(r.allowed) + v / 32) >> (v & 31) : 0;
}

ATTNKIT_DEVICE void load_extras(Extras& e, const RowPointers& r, int v, int V) {
  load_counts(e.counts, r, v, V);
  load_masks(e, r, v, V);
}

// x / t rounded once, by its reciprocal and Markstein's correction (1990).
ATTNKIT_DEVICE float divide(float x, float t, float reciprocal) {
  const float q = __fmul_rn(x, reciprocal);
  return fabsf(q) < kF32Max ? __fmaf_rn(__fmaf_rn(-q, t, x), reciprocal, q) : q;
}

// Penalties, bias and mask, each rounded by itself as the reference rounds. A raw NaN stays, one made here is -inf.
ATTNKIT_DEVICE float penalised(float raw, int count, bool prompt, const RowOptions& o) {
  const bool drawn = count > 0;
  float y = fminf(raw, kF32Max);
  const float repeated = y > 0.0f ? divide(y, o.repetition, o.rr) : __fmul_rn(y, o.repetition);
  y = drawn || prompt ? repeated : y;
  y = __fsub_rn(y, __fmul_rn(o.frequency, static_cast<float>(count)));
  y = __fsub_rn(y, drawn ? o.presence : 0.0f);
  return raw == raw ? (y == y ? y : negative_infinity()) : raw;
}
ATTNKIT_DEVICE float biased(float x, float bias) {
  const float y = __fadd_rn(fminf(x, kF32Max), bias);
  return x == x ? (y == y ? y : negative_infinity()) : x;
}
ATTNKIT_DEVICE float masked(float x, bool allowed) { return !allowed && x == x ? negative_infinity() : x; }
ATTNKIT_DEVICE void penalise(float (&x)[4], const Extras& e, const RowPointers& r, const RowOptions& o, int v, int V) {
  u32 some = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) some |= e.counts[i] != 0 ? 1u << i : 0;
  if (e.prompt != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) some |= (e.prompt >> 8 * i & 0xff) != 0 ? 1u << i : 0;
  }
  // One by one: they are few.
#pragma unroll 1
  for (; some != 0; some &= some - 1) {
    const int i = __ffs(some) - 1;
    const float y = penalised(one_of(x, i), one_of(e.counts, i), (e.prompt >> 8 * i & 0xff) != 0, o);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = j == i ? y : x[j];
  }
  if (r.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = v + i < V ? biased(x[i], *(reinterpret_cast<const float*>(r.bias) + v + i)) : x[i];
  }
  if ((e.allowed & 15) != 15) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = masked(x[i], (e.allowed >> i & 1) != 0);
  }
}

// After temperature: at most the largest float.
ATTNKIT_DEVICE float tempered(float x, const RowOptions& o) { return fminf(divide(x, o.t, o.rt), kF32Max); }
// The same without work where temperature is 1. NaN stays.
ATTNKIT_DEVICE float warm(float x, const RowOptions& o) {
  if (o.tempered) x = divide(x, o.t, o.rt);
  return x > kF32Max ? kF32Max : x;
}

// How many of a row's tokens bulk copies may bring: they move multiples of 16 bytes.
template <int Type>
ATTNKIT_DEVICE int copied_tokens(const char* row, int V) {
  return (reinterpret_cast<u64>(row) & 15) == 0 ? V & -(Type == kF32 ? 4 : 8) : 0;
}

// Contiguous bytes, a multiple of 16, both ends aligned to 16; first out of L2.
ATTNKIT_DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// ---- noise ----

ATTNKIT_DEVICE u32 high_word(u64 x) { return static_cast<u32>(x >> 32); }

constexpr u32 kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// Which words: of every token; of every group of tokens; for the choice inside a group.
enum Noise : u32 { kOfTokens = 0, kOfGroups = 1, kInside = 2 };

// A product of all 64 bits. The compiler's own adds a zero to its upper half.
ATTNKIT_DEVICE u64 wide_product(u32 a, u32 b) {
  u64 r;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(r) : "r"(a), "r"(b));
  return r;
}

// The four words of one counter.
ATTNKIT_DEVICE void philox_words(u64 seed, u64 offset, Noise noise, u32 counter, u32 (&w)[4]) {
  u32 k0 = static_cast<u32>(seed), k1 = high_word(seed);
  u32 c0 = counter, c1 = static_cast<u32>(offset), c2 = high_word(offset), c3 = noise;
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const u64 a = wide_product(kPhiloxM0, c0), b = wide_product(kPhiloxM1, c2);
    c0 = high_word(b) ^ c1 ^ k0;
    c1 = static_cast<u32>(b);
    c2 = high_word(a) ^ c3 ^ k1;
    c3 = static_cast<u32>(a);
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

// The words of many counters of a row. What the first two rounds have in common for all of them is worked out once.
struct alignas(16) Philox {
  u32 k1, x1, x2, l3, keys[16];

  ATTNKIT_DEVICE Philox() {}
  ATTNKIT_DEVICE Philox(u64 seed, u64 offset, Noise noise) {
    const u32 k0 = static_cast<u32>(seed);
    k1 = high_word(seed);
    const u64 second = wide_product(kPhiloxM1, high_word(offset));
    const u64 first = wide_product(kPhiloxM0, high_word(second) ^ static_cast<u32>(offset) ^ k0);
    x1 = static_cast<u32>(second) ^ (k0 + kPhiloxW0);
    x2 = high_word(first) ^ (k1 + kPhiloxW1);
    l3 = static_cast<u32>(first);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) keys[2 * i] = k0 + (i + 2) * kPhiloxW0, keys[2 * i + 1] = k1 + (i + 2) * kPhiloxW1;
    k1 ^= noise;
  }

  // In registers that a warp shares: a reduction's result is known to be the same in all lanes.
  ATTNKIT_DEVICE Philox of_warp() const {
    const auto shared = [](u32 x) { return __reduce_or_sync(0xffffffffu, x); };
    Philox same;
    same.k1 = shared(k1), same.x1 = shared(x1), same.x2 = shared(x2), same.l3 = shared(l3);
#pragma unroll
    for (int i = 0; i < 16; ++i) same.keys[i] = shared(keys[i]);
    return same;
  }

  ATTNKIT_DEVICE void words(u32 counter, u32 (&w)[4]) const {
    const u64 one = wide_product(kPhiloxM0, counter);
    const u64 two = wide_product(kPhiloxM1, high_word(one) ^ k1);
    u32 c0 = high_word(two) ^ x1, c1 = static_cast<u32>(two), c2 = static_cast<u32>(one) ^ x2, c3 = l3;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u64 a = wide_product(kPhiloxM0, c0), b = wide_product(kPhiloxM1, c2);
      c0 = high_word(b) ^ c1 ^ keys[2 * i];
      c1 = static_cast<u32>(b);
      c2 = high_word(a) ^ c3 ^ keys[2 * i + 1];
      c3 = static_cast<u32>(a);
    }
    w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
  }

  ATTNKIT_DEVICE u32 word(int id) const {
    u32 w[4];
    words(static_cast<u32>(id) >> 2, w);
    return id & 2 ? (id & 1 ? w[3] : w[2]) : (id & 1 ? w[1] : w[0]);
  }
};

ATTNKIT_DEVICE float uniform(u32 word) {
  return fminf(__fmul_rn(__fadd_rn(__uint2float_rn(word), 0.5f), 2.3283064365386963e-10f), 0.999999940395355224609375f);
}

// E = -log(1 - u), exponential; a series keeps small E exact, where the winners are.
ATTNKIT_DEVICE float exponential(u32 word) {
  const float u = uniform(word);
  float e = __fadd_rn(0.25f, divide(u, 5.0f, 0.2f));
  e = __fadd_rn(0.3333333333333333f, __fmul_rn(u, e));
  e = __fadd_rn(0.5f, __fmul_rn(u, e));
  e = __fmul_rn(u, __fadd_rn(1.0f, __fmul_rn(u, e)));
  return u < 0.02f ? e : -__fmul_rn(log2_fast(__fsub_rn(1.0f, u)), kLn2);
}

// l - log(e).
ATTNKIT_DEVICE float less_log(float l, float e) { return __fsub_rn(l, __fmul_rn(log2_fast(e), kLn2)); }
ATTNKIT_DEVICE float noisy(float l, u32 word) { return less_log(l, exponential(word)); }

// A lane's best draw so far, and a floor: a score that the CTA has reached already. E >= u, so a token's score is at
// most l - log(u): logarithms are taken only where that can exceed the floor.
struct Draw {
  float best, raw;  // raw: before temperature
  int id;
  float scale, shift;  // may win: u <= 2^(x scale + shift)
  bool nan;
  u32 floor_key;      // order_key of the floor, 0 at first
  const u32 reached;  // where the CTA's is, in shared memory

  ATTNKIT_DEVICE Draw(float per_logit, u32* shared)
      : best(negative_infinity()), raw(0.0f), id(0), scale(per_logit * kLog2e), shift(-negative_infinity()), nan(false), floor_key(0),
        reached(kept_address(shared)) {}

  // Hidden from the compiler, which would work it out again for every use.
  ATTNKIT_DEVICE static u32 kept_address(const void* shared) {
    u32 address;
    asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(smem_address(shared)));
    return address;
  }

  ATTNKIT_DEVICE void set_floor(u32 key) {
    const float score = order_value(key);
    floor_key = key;
    shift = (fabsf(score) * 1e-6f + 1e-3f - score) * kLog2e;
  }

  // What other warps have reached.
  ATTNKIT_DEVICE void refresh() {
    u32 key;
    asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(key) : "r"(reached));
    if (key > floor_key) set_floor(key);
  }

  // 1 + u, cut to 23 bits.
  ATTNKIT_DEVICE static float one_and(u32 word) { return __uint_as_float(__funnelshift_r(word, 0x7f, 9)); }

  // False only where the token cannot win. x counts ``per_logit`` of a logit.
  ATTNKIT_DEVICE bool hope(float x, u32 word) const {
    // The cut of 1 + u is a number that 1 + 2^(..) cannot round below where u does not exceed 2^(..).
    return !(one_and(word) > 1.0f + exp2_fast(__fmaf_rn(x, scale, shift)));
  }

  // Four tokens from id v on; logit_of(x) is x after temperature. Converged warps only.
  template <class F>
  ATTNKIT_DEVICE void four(const float (&x)[4], const u32 (&w)[4], int v, F&& logit_of) {
    refresh();
    if (floor_key == 0) first_floor(x, w);
    const bool any = hope(x[0], w[0]) | hope(x[1], w[1]) | hope(x[2], w[2]) | hope(x[3], w[3]);
    if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float l = logit_of(x[i]), score = noisy(l, w[i]);
      nan = nan || l != l;
      if (score > best) best = score, id = v + i, raw = x[i];
    }
    const u32 top = __reduce_max_sync(0xffffffffu, order_key(best));
    // Scores of -inf raise nothing.
    if (top > floor_key && top > order_key(negative_infinity())) {
      set_floor(top);
      if (elect_one()) asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(reached), "r"(top) : "memory");
    }
  }

  // u <= 1/2 gives E <= 1.3863 u, and so a score that is surely reached.
  ATTNKIT_DEVICE void first_floor(const float (&x)[4], const u32 (&w)[4]) {
    float top = negative_infinity();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = one_and(w[i]) - (1.0f - 2.384185791015625e-07f);
      if (u < 0.5f) top = fmaxf(top, __fmaf_rn(x[i], scale, -log2_fast(u)));
    }
    top = order_value(__reduce_max_sync(0xffffffffu, order_key(top)));
    if (fabsf(top) < kF32Max) set_floor(order_key((top - fabsf(top) * 1e-6f - 0.475f) * kLn2 - 1e-3f));
  }

  ATTNKIT_DEVICE u64 packed() const { return nan ? kNaNSeen : best > negative_infinity() ? pack_best(best, id) : 0; }
};

}  // namespace attnkit::sampling
