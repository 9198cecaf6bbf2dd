// The loops of the CPU sampler over GCC/Clang vectors, built once an instruction set (ATTNKIT_ISA names the namespace).
#pragma once

#include "convert.h"
#include "sampling.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define ATTNKIT_INLINE static inline __attribute__((always_inline))

namespace attnkit::cpu::ATTNKIT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef float FMem __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t IMem __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Bits;  // one bit a lane

constexpr float kMax = 3.402823466e38f;
constexpr float kInf = __builtin_inff();

ATTNKIT_INLINE F fill(float x) { return x - F{}; }
ATTNKIT_INLINE F load_f(const float* p) { return *reinterpret_cast<const FMem*>(p); }
ATTNKIT_INLINE I load_i(const int32_t* p) { return *reinterpret_cast<const IMem*>(p); }
ATTNKIT_INLINE void store_f(float* p, F x) { *reinterpret_cast<FMem*>(p) = x; }

ATTNKIT_INLINE I lane_numbers() {
  I n{};
  UNROLL for (int i = 0; i < kLanes; ++i) n[i] = i;
  return n;
}

// Comparison results (all ones or zeros a lane) as bits.
ATTNKIT_INLINE Bits bits(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<Bits>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<Bits>(_mm_movemask_ps((__m128)mask));
#else
  Bits b = 0;
  for (int i = 0; i < kLanes; ++i) b |= Bits(mask[i] & 1) << i;
  return b;
#endif
}

// Comparisons that are false for NaN, straight to bits.
ATTNKIT_INLINE Bits greater(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  return bits(a > b);
#endif
}

// ---------------------------------------------------------------- preparation

template <class T>
ATTNKIT_INLINE void widen_logits(const T* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

#if defined(__F16C__)
ATTNKIT_INLINE void widen_logits(const f16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) out[i] = to_float(x[i]);
}
#endif

ATTNKIT_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

static bool load(const void* x, int dtype, int64_t n, float* out) {
  if (dtype == kBFloat16) widen_logits(static_cast<const bf16_t*>(x), n, out);
  if (dtype == kFloat16) widen_logits(static_cast<const f16_t*>(x), n, out);
  const float* in = dtype == kFloat32 ? static_cast<const float*>(x) : out;
  I bad{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = load_f(in + i);
    bad |= v != v;
    store_f(out + i, v > fill(kMax) ? fill(kMax) : v);
  }
  bool nan = bits(bad) != 0;
  for (; i < n; ++i) {
    nan |= in[i] != in[i];
    out[i] = in[i] > kMax ? kMax : in[i];
  }
  for (; i < padded(n); ++i) out[i] = -kInf;
  return nan;
}

static void penalise(float* l, int64_t at, int64_t n, const Penalties& p) {
  // Steps of a constant length, over copies where a row's end would be read past: then every loop vectorises.
  constexpr int64_t kStep = 512;
  const float repetition = p.repetition, frequency = p.frequency, presence = p.presence;
  alignas(64) float x[kStep] = {}, change[kStep];
  int32_t counts[kStep];
  uint8_t prompt[kStep];
  for (int64_t i0 = 0; i0 < n; i0 += kStep) {
    const int64_t m = n - i0 < kStep ? n - i0 : kStep, v0 = at + i0;
    std::memcpy(x, l + i0, size_t(m) * 4);
    if (p.counts || p.prompt) {
      std::memset(counts, 0, sizeof counts);
      std::memset(prompt, 0, sizeof prompt);
      if (p.counts) std::memcpy(counts, p.counts + v0, size_t(m) * 4);
      if (p.prompt) std::memcpy(prompt, p.prompt + v0, size_t(m));
      if (repetition != 1.0f)
        for (int64_t i = 0; i < kStep; ++i) {
          const float divided = x[i] / repetition, multiplied = x[i] * repetition;
          const float y = x[i] > 0.0f ? divided : multiplied;
          x[i] = (counts[i] > 0) | (prompt[i] != 0) ? y : x[i];
        }
      // Two loops: product and difference must round apart, and in one they may become a fused operation.
      if (frequency != 0.0f) {
        for (int64_t i = 0; i < kStep; ++i) change[i] = frequency * static_cast<float>(counts[i]);
        __asm__ volatile("" : : "r"(change) : "memory");
        for (int64_t i = 0; i < kStep; ++i) x[i] -= change[i];
      }
      if (presence != 0.0f)
        for (int64_t i = 0; i < kStep; ++i) x[i] -= counts[i] > 0 ? presence : 0.0f;
    }
    if (p.bias)
      for (int64_t i = 0; i < m; ++i) x[i] += p.bias[v0 + i];
    if (p.allowed)
      for (int64_t i = 0; i < m; i += 32) {
        const uint32_t word = static_cast<uint32_t>(p.allowed[(v0 + i) >> 5]);
        for (int j = 0; j < 32; ++j) x[i + j] = (word >> j) & 1u ? x[i + j] : -kInf;
      }
    for (int64_t i = 0; i < kStep; ++i) x[i] = x[i] > kMax ? kMax : x[i];
    std::memcpy(l + i0, x, size_t(m) * 4);
  }
}

static void divide(float* l, int64_t n, float t) {
  const F by = fill(t);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = load_f(l + i);
    F q = v / by;
    q = q > fill(kMax) ? fill(kMax) : q;
    q = q < fill(-kMax) ? fill(-kMax) : q;
    store_f(l + i, v == fill(-kInf) ? v : q);
  }
}

static float top(const float* l, int64_t n) {
  F a = fill(-kInf), b = a;
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const F x = load_f(l + i), y = load_f(l + i + kLanes);
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  a = b > a ? b : a;
  float best = -kInf;
  for (int i = 0; i < kLanes; ++i) best = a[i] > best ? a[i] : best;
  return best;
}

// The lanes of v that `found` names, and their ids, put behind the *count there are; writes whole vectors.
ATTNKIT_INLINE void append(F v, int64_t at, Bits found, float* values, int32_t* ids, int64_t* count) {
#if defined(__AVX512F__)
  // Compressed in a register: the form that compresses to memory is slow on some machines.
  const __mmask16 mask = static_cast<__mmask16>(found);
  const __m512i id = _mm512_add_epi32((__m512i)lane_numbers(), _mm512_set1_epi32(static_cast<int>(at)));
  _mm512_storeu_ps(values + *count, _mm512_maskz_compress_ps(mask, (__m512)v));
  _mm512_storeu_si512(ids + *count, _mm512_maskz_compress_epi32(mask, id));
  *count += __builtin_popcount(found);
#else
  for (; found; found &= found - 1) {
    const int lane = __builtin_ctz(found);
    values[*count] = v[lane];
    ids[(*count)++] = static_cast<int32_t>(at + lane);
  }
#endif
}

static int64_t scan(const float* l, int64_t begin, int64_t n, int64_t at, float above, float* values, int32_t* ids, int64_t room,
                    int64_t* count) {
  const F limit = fill(above);
  int64_t c = *count, i = begin;
  for (; i < n && c + kPad <= room; i += kPad) {
    Bits any = 0;
    UNROLL for (int j = 0; j < kPad / kLanes; ++j) any |= greater(load_f(l + i + j * kLanes), limit);
    if (__builtin_expect(any == 0, 1)) continue;
    for (int64_t j = i; j < i + kPad; j += kLanes) {
      const F v = load_f(l + j);
      append(v, at + j, greater(v, limit), values, ids, &c);
    }
  }
  *count = c;
  return i;
}

static int64_t band(const float* l, int64_t n, float top, float from, float to, float* values, int32_t* ids) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = load_f(l + i);
    const F place = (top - v) * kBinsPerNat;
    const Bits found = bits((place >= fill(from)) & (place < fill(to)) & (v >= fill(-kMax)));
    if (found) append(v, i, found, values, ids, &count);
  }
  return count;
}

// ---------------------------------------------------------------- sums

// e^x for x <= 0, to about 1 ulp; 0 below -87. Cephes' polynomial.
ATTNKIT_INLINE F exp_f(F x) {
  const I tiny = x < fill(-87.0f);
  const F y = tiny ? F{} : x;
  const I n = __builtin_convertvector(y * 1.44269504088896341f - 0.5f, I);  // towards zero, and y <= 0: to nearest
  const F k = __builtin_convertvector(n, F);
  const F r = (y - k * 0.693359375f) - k * -2.12194440e-4f;
  F p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const F e = p * (F)((n + 127) << 23);
  return tiny ? F{} : e;
}

ATTNKIT_INLINE double sum_of(F x) {
  double s = 0.0;
  for (int i = 0; i < kLanes; ++i) s += static_cast<double>(x[i]);
  return s;
}

static double sum_exp(const float* l, int64_t n, float top) {
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kPad) {  // short float sums, joined in double
    F s{};
    UNROLL for (int j = 0; j < kPad / kLanes; ++j) s += exp_f(load_f(l + i + j * kLanes) - top);
    total += sum_of(s);
  }
  return total;
}

static void histogram(const float* l, int64_t n, float top, double* bins) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F d = top - load_f(l + i);
    const F e = d >= F{} ? exp_f(-d) : F{};  // a NaN has no share
    const F place = d * kBinsPerNat;
    const I bin = __builtin_convertvector(place < fill(float(kBins)) ? place : fill(float(kBins - 1)), I);
    UNROLL for (int j = 0; j < kLanes; ++j) bins[bin[j]] += static_cast<double>(e[j]);
  }
}

// ---------------------------------------------------------------- noise

// Both halves of a 32 x 32 bit product, lane by lane.
ATTNKIT_INLINE void multiply(uint32_t a, U b, U* high, U* low) {
#if defined(__AVX512F__)
  const __m512i m = _mm512_set1_epi32(static_cast<int>(a));
  const __m512i even = _mm512_mul_epu32(m, (__m512i)b), odd = _mm512_mul_epu32(m, _mm512_srli_epi64((__m512i)b, 32));
  *high = (U)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = (U)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i m = _mm256_set1_epi32(static_cast<int>(a));
  const __m256i even = _mm256_mul_epu32(m, (__m256i)b), odd = _mm256_mul_epu32(m, _mm256_srli_epi64((__m256i)b, 32));
  *high = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  UNROLL for (int i = 0; i < kLanes; ++i) {
    const uint64_t p = static_cast<uint64_t>(a) * b[i];
    (*high)[i] = static_cast<uint32_t>(p >> 32);
    (*low)[i] = static_cast<uint32_t>(p);
  }
#endif
}

// Philox4x32-10 (Salmon et al. 2011) at counters (c0, offset, offset >> 32, words).
ATTNKIT_INLINE void philox(U c0, Noise noise, Words words, U x[4]) {
  uint32_t k0 = static_cast<uint32_t>(noise.seed), k1 = static_cast<uint32_t>(noise.seed >> 32);
  U c1 = U{} + static_cast<uint32_t>(noise.offset), c2 = U{} + static_cast<uint32_t>(noise.offset >> 32), c3 = U{} + static_cast<uint32_t>(words);
  UNROLL for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, &high0, &low0);
    multiply(0xCD9E8D57u, c2, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  x[0] = c0, x[1] = c1, x[2] = c2, x[3] = c3;
}

// 4 x 4 blocks turned within runs of four lanes: row r of run q becomes word 0..3 of lane 4 q + r.
ATTNKIT_INLINE void turn(U x[4]) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)x[0], b = (__m512i)x[1], c = (__m512i)x[2], d = (__m512i)x[3];
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
  x[0] = (U)_mm512_unpacklo_epi64(ab, cd), x[1] = (U)_mm512_unpackhi_epi64(ab, cd);
  x[2] = (U)_mm512_unpacklo_epi64(AB, CD), x[3] = (U)_mm512_unpackhi_epi64(AB, CD);
#elif defined(__AVX2__)
  const __m256i a = (__m256i)x[0], b = (__m256i)x[1], c = (__m256i)x[2], d = (__m256i)x[3];
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i AB = _mm256_unpackhi_epi32(a, b), CD = _mm256_unpackhi_epi32(c, d);
  x[0] = (U)_mm256_unpacklo_epi64(ab, cd), x[1] = (U)_mm256_unpackhi_epi64(ab, cd);
  x[2] = (U)_mm256_unpacklo_epi64(AB, CD), x[3] = (U)_mm256_unpackhi_epi64(AB, CD);
#else
  U y[4];
  for (int r = 0; r < 4; ++r)
    for (int w = 0; w < 4; ++w) y[r][w] = x[w][r];
  for (int r = 0; r < 4; ++r) x[r] = y[r];
#endif
}

// An upper bound of gumbel_noise(x), a twentieth too high at most where it matters: -log(E) <= -log(u), and
// log2(1 + f) >= f makes log2(u) at least what u's bits, read as a fixed-point number, say.
ATTNKIT_INLINE F bound(U x) {
  const F u = (__builtin_convertvector(x, F) + 0.5f) * 0x1p-32f;
  return (127.0f * 0.6931472f + 1e-3f) - __builtin_convertvector((I)u, F) * (0.6931472f * 0x1p-23f);
}

ATTNKIT_INLINE void consider(float l, uint32_t x, int64_t id, Best* best) {
  const float score = l + gumbel_noise(x);
  if (score > best->score || (score == best->score && id < best->id) || (best->id < 0 && score > -kInf)) {
    best->score = score;
    best->id = id;
  }
}

static void noisy(const float* l, int64_t n, int64_t at, float low, float top, float limit, Noise noise, Best* best) {
  // Lane 4 q + r takes counter (kLanes / 4) r + q, so that turn() yields tokens in their order.
  const U lane = (U)lane_numbers();
  const U counter = (lane & 3u) * uint32_t(kLanes / 4) + (lane >> 2);
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    // Nothing here can win, however lucky: the noise is below 23.
    F highest = load_f(l + i);
    UNROLL for (int j = 1; j < 4; ++j) {
      const F v = load_f(l + i + j * kLanes);
      highest = v > highest ? v : highest;
    }
    const float needed = best->score - 23.0f > low ? best->score - 23.0f : low;
    if (!bits(highest >= fill(needed))) continue;
    U x[4];
    philox(counter + static_cast<uint32_t>((at + i) / 4), noise, kOfTokens, x);
    turn(x);
    UNROLL for (int j = 0; j < 4; ++j) {
      const F v = load_f(l + i + j * kLanes);
      Bits maybe = bits((v >= fill(low)) & (top - v < fill(limit)) & (v + bound(x[j]) >= fill(best->score)));
      for (; __builtin_expect(maybe != 0, 0); maybe &= maybe - 1) {
        const int k = __builtin_ctz(maybe);
        consider(v[k], x[j][k], at + i + j * kLanes + k, best);
      }
    }
  }
}

// A group's largest logits, of four vectors of tokens in each of a piece's chunks; in the order that turn() leaves.
ATTNKIT_INLINE F peaks_of(const float* l) {
  U x[4];
  UNROLL for (int j = 0; j < 4; ++j) {
    F most = load_f(l + j * kLanes);
    UNROLL for (int c = 1; c < 4; ++c) {
      const F v = load_f(l + c * (kPiece / 4) + j * kLanes);
      most = v > most ? v : most;
    }
    x[j] = (U)most;
  }
  turn(x);
  const F a = (F)x[0] > (F)x[1] ? (F)x[0] : (F)x[1], b = (F)x[2] > (F)x[3] ? (F)x[2] : (F)x[3];
  return a > b ? a : b;
}

// One group, its first token at l: the logarithm of its sum and its noise.
static void consider_group(const float* l, float peak, uint32_t x, int64_t id, Best* best, float* inside) {
  if (!(peak > -kInf)) return;
  float values[16];
  for (int c = 0; c < 4; ++c) std::memcpy(values + 4 * c, l + c * (kPiece / 4), 16);
  F sum{};
  UNROLL for (int i = 0; i < 16; i += kLanes) sum += exp_f(load_f(values + i) - peak);
  const int64_t before = best->id;
  consider(peak + logarithm(static_cast<float>(sum_of(sum))), x, id, best);
  if (best->id != before) std::memcpy(inside, values, sizeof values);
}

static void groups(const float* l, int64_t n, int64_t at, Noise noise, Best* best, float* inside) {
  constexpr float kLog16 = 2.7725887f;
  const U lane = (U)lane_numbers();
  const U order = (lane & 3u) * uint32_t(kLanes / 4) + (lane >> 2);
  for (int64_t i = 0; i < n; i += kBlock) {
    for (int g = 0; g < 32; g += kLanes) {
      F peaks[4], highest = fill(-kInf);
      UNROLL for (int piece = 0; piece < 4; ++piece) {
        peaks[piece] = peaks_of(l + i + piece * kPiece + 4 * g);
        highest = peaks[piece] > highest ? peaks[piece] : highest;
      }
      // A group's sum is at most 16 times its largest, the noise below 23.
      if (!bits(highest >= fill(best->score - 23.0f - kLog16))) continue;
      U x[4];
      philox(order + static_cast<uint32_t>((at + i) / kBlock * 32 + g), noise, kOfGroups, x);
      for (int piece = 0; piece < 4; ++piece) {
        Bits maybe = bits(peaks[piece] + kLog16 + 1e-3f + bound(x[piece]) >= fill(best->score));
        for (; __builtin_expect(maybe != 0, 0); maybe &= maybe - 1) {
          const int k = __builtin_ctz(maybe), group = g + static_cast<int>(order[k]);
          const int64_t number = (at + i) / kPiece + piece;
          consider_group(l + i + piece * kPiece + 4 * group, peaks[piece][k], x[piece][k], number * 32 + group, best, inside);
        }
      }
    }
  }
}

static void noisy_list(const float* l, const int32_t* ids, int64_t n, Noise noise, Best* best) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const U id = (U)load_i(ids + i);
    U x[4];
    philox(id >> 2, noise, kOfTokens, x);
    const U word = id & 3u;
    const U mine = word < 2u ? (word == 0u ? x[0] : x[1]) : (word == 2u ? x[2] : x[3]);
    Bits maybe = bits(load_f(l + i) + bound(mine) >= fill(best->score));
    for (; maybe; maybe &= maybe - 1) {
      const int k = __builtin_ctz(maybe);
      if (i + k < n) consider(l[i + k], mine[k], ids[i + k], best);
    }
  }
}

static constexpr SampleOps kOps{load, penalise, divide, top, scan, band, sum_exp, histogram, noisy, groups, noisy_list};

}  // namespace attnkit::cpu::ATTNKIT_ISA
