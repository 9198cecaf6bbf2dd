// w8a8_gemm with AVX-512: VNNI for int8; for e4m3 bf16 dot products (where the machine has them) or float.
#include <immintrin.h>

#define ATTNKIT_ISA avx512
#include "gemm_kernel.h"

namespace attnkit::cpu::avx512 {

ATTNKIT_INLINE __mmask64 first(int64_t n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// The sums of four vectors of 16 lanes.
ATTNKIT_INLINE __m128i sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

ATTNKIT_INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

template <int rows>
ATTNKIT_INLINE void bring(Ahead ahead, int64_t byte) {
  UNROLL for (int i = 0; i < rows; ++i) _mm_prefetch(ahead.at + i * ahead.stride + byte, _MM_HINT_T1);
}

// vpdpbusd multiplies unsigned by signed: w ^ 0x80 is w + 128, and start = -128 * sum(a) takes the excess back.
struct Int8 {
  static constexpr int MR = 6, NR = 4;
  static constexpr int64_t kStep = 64, kBlockK = 2048, kDirectRows = 12;
  using Elem = int8_t;
  using Right = int8_t;
  using Acc = uint32_t;

  static uint32_t pack(const int8_t* a, int64_t K, int8_t* to) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < K; k += 64) {
      __m512i x = _mm512_maskz_loadu_epi8(first(K - k), a + k);
      sum = _mm512_dpbusd_epi32(sum, ones, x);
      _mm512_store_si512(to + k, x);
    }
    return 0u - 128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum));
  }

  static void convert(const int8_t* w, int64_t n, int8_t* to) {
    const __m512i flip = _mm512_set1_epi8(-128);
    for (int64_t k = 0; k < n; k += 64)
      _mm512_store_si512(to + k, _mm512_xor_si512(_mm512_maskz_loadu_epi8(first(n - k), w + k), flip));
  }

  template <int mr, bool direct>
  static __attribute__((noinline)) void tile(const int8_t* a, int64_t sa, const char* w, int64_t sw, int64_t k,
                                             uint32_t* acc, Ahead ahead) {
    typedef int Lanes __attribute__((vector_size(64)));  // as the instruction has it: GCC spills sums held as __m512i
    const __m512i flip = _mm512_set1_epi8(-128);
    Lanes s[mr][NR];
    UNROLL for (int i = 0; i < mr; ++i)
      UNROLL for (int j = 0; j < NR; ++j) s[i][j] = Lanes{};
    const int8_t* a3 = a + 3 * sa;
    const char* w2 = w + 2 * sw;
    for (int64_t t = 0; t < k; t += 64) {
      const __mmask64 have = first(k - t);
      __m512i right[NR];
      bring<direct ? NR : 2>(ahead, t);
      UNROLL for (int j = 0; j < NR; ++j) {
        const char* at = (j < 2 ? w + j * sw : w2 + (j - 2) * sw) + t;
        right[j] = direct ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(have, at), flip) : _mm512_load_si512(at);
      }
      UNROLL for (int i = 0; i < mr; ++i) {
        const __m512i left = _mm512_load_si512((i < 3 ? a + i * sa : a3 + (i - 3) * sa) + t);
        UNROLL for (int j = 0; j < NR; ++j) s[i][j] = (Lanes)_mm512_dpbusd_epi32((__m512i)s[i][j], right[j], left);
      }
    }
    UNROLL for (int i = 0; i < mr; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + i * NR),
                       sums((__m512i)s[i][0], (__m512i)s[i][1], (__m512i)s[i][2], (__m512i)s[i][3]));
  }
};

// The low and the high byte of each of e4m3's 128 magnitudes as bf16.
struct Bf16Table {
  alignas(64) uint8_t low[128], high[128];
  constexpr Bf16Table() : low(), high() {
    for (int b = 0; b < 128; ++b) {
      int e = b >> 3, m = b & 7, bits = 0;
      if (b == 127) {
        bits = 0x7fc0;
      } else if (e) {
        bits = ((e + 120) << 7) | (m << 4);
      } else if (m) {
        const int top = m >= 4 ? 2 : m >= 2 ? 1 : 0;  // m * 2^-9 = 1.x * 2^(top - 9)
        bits = ((118 + top) << 7) | ((m << (7 - top)) & 0x7f);
      }
      low[b] = uint8_t(bits & 0xff);
      high[b] = uint8_t(bits >> 8);
    }
  }
};
static constexpr Bf16Table table;

// e4m3 widened to bf16, which holds it exactly, by two look-ups of 128 bytes; products are exact in float.
// The look-ups leave 64 elements in an order of their own, the same for a and w.
struct E4m3Bf16 {
  static constexpr int MR = 6, NR = 4;
  static constexpr int64_t kStep = 64, kBlockK = 4096, kDirectRows = 12;
  using Elem = uint16_t;
  using Right = uint16_t;
  using Acc = float;

  struct Wide {
    __m512i first, second;
  };
  // Only functions with this attribute may use VBMI: the rest of the file also serves machines without it.
  __attribute__((target("avx512vbmi"), always_inline)) static inline Wide widen(__m512i v, __m512i l0, __m512i l1, __m512i h0,
                                                                               __m512i h1) {
    const __m512i low = _mm512_permutex2var_epi8(l0, v, l1);
    const __m512i high = _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(h0, v, h1), v, _mm512_set1_epi8(-128), 0xf8);
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};  // high | (v & sign)
  }

  __attribute__((target("avx512vbmi"))) static void convert(const int8_t* x, int64_t n, uint16_t* to) {
    const __m512i l0 = _mm512_load_si512(table.low), l1 = _mm512_load_si512(table.low + 64);
    const __m512i h0 = _mm512_load_si512(table.high), h1 = _mm512_load_si512(table.high + 64);
    for (int64_t k = 0; k < n; k += 64) {
      const Wide v = widen(_mm512_maskz_loadu_epi8(first(n - k), x + k), l0, l1, h0, h1);
      _mm512_store_si512(to + k, v.first);
      _mm512_store_si512(to + k + 32, v.second);
    }
  }

  template <int mr, bool direct>
  __attribute__((target("avx512vbmi"), noinline)) static void tile(const uint16_t* a, int64_t sa, const char* w, int64_t sw,
                                                                   int64_t k, float* acc, Ahead ahead) {
    const __m512i l0 = _mm512_load_si512(table.low), l1 = _mm512_load_si512(table.low + 64);
    const __m512i h0 = _mm512_load_si512(table.high), h1 = _mm512_load_si512(table.high + 64);
    __m512 s[mr][NR];
    UNROLL for (int i = 0; i < mr; ++i)
      UNROLL for (int j = 0; j < NR; ++j) s[i][j] = _mm512_setzero_ps();
    const uint16_t* a3 = a + 3 * sa;
    const char* w2 = w + 2 * sw;
    const int64_t end = (k + 63) / 64 * 64;  // a group of 64 is complete only with both its halves
    for (int64_t t = 0; t < end; t += direct ? 64 : 32) {
      bring<direct ? NR : 2>(ahead, direct ? t : 2 * t);
      if constexpr (direct) {
        const __mmask64 have = first(k - t);
        UNROLL for (int j = 0; j < NR; ++j) {
          const char* at = (j < 2 ? w + j * sw : w2 + (j - 2) * sw) + t;
          const Wide v = widen(_mm512_maskz_loadu_epi8(have, at), l0, l1, h0, h1);
          UNROLL for (int i = 0; i < mr; ++i) {
            const uint16_t* left = (i < 3 ? a + i * sa : a3 + (i - 3) * sa) + t;
            s[i][j] = _mm512_dpbf16_ps(s[i][j], (__m512bh)_mm512_load_si512(left), (__m512bh)v.first);
            s[i][j] = _mm512_dpbf16_ps(s[i][j], (__m512bh)_mm512_load_si512(left + 32), (__m512bh)v.second);
          }
        }
      } else {
        __m512bh right[NR];
        UNROLL for (int j = 0; j < NR; ++j)
          right[j] = (__m512bh)_mm512_load_si512((j < 2 ? w + j * sw : w2 + (j - 2) * sw) + 2 * t);
        UNROLL for (int i = 0; i < mr; ++i) {
          const __m512bh left = (__m512bh)_mm512_load_si512((i < 3 ? a + i * sa : a3 + (i - 3) * sa) + t);
          UNROLL for (int j = 0; j < NR; ++j) s[i][j] = _mm512_dpbf16_ps(s[i][j], left, right[j]);
        }
      }
    }
    UNROLL for (int i = 0; i < mr; ++i) _mm_storeu_ps(acc + i * NR, sums(s[i][0], s[i][1], s[i][2], s[i][3]));
  }
};

struct E4m3Float {
  static constexpr int MR = 6, NR = 4;
  static constexpr int64_t kStep = 64, kBlockK = 768, kDirectRows = 0;
  using Elem = float;
  using Right = float;
  using Acc = float;

  // As fp16 with its exponent still e4m3's: 2^8 too small, subnormals included. NaN is 0x7f.
  static void convert(const int8_t* x, int64_t n, float* to) {
    const __m256i magnitude = _mm256_set1_epi16(0x3f80);
    for (int64_t k = 0; k < (n + 63) / 64 * 64; k += 16) {
      const __mmask16 have = n - k >= 16 ? 0xffff : n > k ? __mmask16((1u << (n - k)) - 1) : 0;
      const __m256i v = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_maskz_loadu_epi8(have, x + k)), 7);
      __m256i h = _mm256_and_si256(v, _mm256_set1_epi16(int16_t(0xbf80)));
      h = _mm256_mask_mov_epi16(h, _mm256_cmpeq_epi16_mask(_mm256_and_si256(v, magnitude), magnitude), _mm256_set1_epi16(0x7fff));
      _mm512_store_ps(to + k, _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256.0f)));
    }
  }

  template <int mr, bool>
  static __attribute__((noinline)) void tile(const float* a, int64_t sa, const char* right, int64_t sw, int64_t k, float* acc,
                                             Ahead) {
    const float* w = reinterpret_cast<const float*>(right);
    sw /= int64_t(sizeof(float));
    __m512 s[mr][NR];
    UNROLL for (int i = 0; i < mr; ++i)
      UNROLL for (int j = 0; j < NR; ++j) s[i][j] = _mm512_setzero_ps();
    for (int64_t t = 0; t < k; t += 16)
      UNROLL for (int i = 0; i < mr; ++i)
        UNROLL for (int j = 0; j < NR; ++j)
          s[i][j] = _mm512_fmadd_ps(_mm512_load_ps(a + i * sa + t), _mm512_load_ps(w + j * sw + t), s[i][j]);
    UNROLL for (int i = 0; i < mr; ++i) _mm_storeu_ps(acc + i * NR, sums(s[i][0], s[i][1], s[i][2], s[i][3]));
  }
};

}  // namespace attnkit::cpu::avx512

namespace attnkit::cpu {
const GemmOps gemm_avx512 = avx512::Gemm<avx512::Int8, avx512::E4m3Float>::ops;
const GemmOps gemm_avx512_bf16 = avx512::Gemm<avx512::Int8, avx512::E4m3Bf16>::ops;
}  // namespace attnkit::cpu
