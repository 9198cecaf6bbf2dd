// w8a8_gemm with AVX2: int8 widened to int16 (vpmaddubsw would saturate), e4m3 widened to float.
#include <immintrin.h>

#define ATTNKIT_ISA avx2
#include "gemm_kernel.h"

namespace attnkit::cpu::avx2 {

ATTNKIT_INLINE __m128i sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

ATTNKIT_INLINE __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

struct Int8 {
  static constexpr int MR = 3, NR = 4;
  static constexpr int64_t kStep = 16, kBlockK = 2048;
  static constexpr int64_t kDirectRows = 0;
  using Elem = int16_t;
  using Right = int16_t;
  using Acc = uint32_t;

  static void convert(const int8_t* x, int64_t n, int16_t* to) {
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + k),
                         _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k))));
    if (k < n)
      for (int64_t end = k + 16; k < end; ++k) to[k] = k < n ? x[k] : int16_t(0);
  }

  static uint32_t pack(const int8_t* a, int64_t K, int16_t* to) {
    convert(a, K, to);
    return 0;
  }

  template <int mr, bool>
  static __attribute__((noinline)) void tile(const int16_t* a, int64_t sa, const char* right, int64_t sw, int64_t k, uint32_t* acc, Ahead) {
    const int16_t* w = reinterpret_cast<const int16_t*>(right);
    sw /= int64_t(sizeof(int16_t));
    __m256i s[mr][NR];
    UNROLL for (int i = 0; i < mr; ++i)
      UNROLL for (int j = 0; j < NR; ++j) s[i][j] = _mm256_setzero_si256();
    for (int64_t t = 0; t < k; t += 16)
      UNROLL for (int i = 0; i < mr; ++i) {
        const __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(a + i * sa + t));
        UNROLL for (int j = 0; j < NR; ++j)
          s[i][j] = _mm256_add_epi32(
              s[i][j], _mm256_madd_epi16(left, _mm256_load_si256(reinterpret_cast<const __m256i*>(w + j * sw + t))));
      }
    UNROLL for (int i = 0; i < mr; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + i * NR), sums(s[i][0], s[i][1], s[i][2], s[i][3]));
  }
};

struct E4m3 {
  static constexpr int MR = 3, NR = 4;
  static constexpr int64_t kStep = 16, kBlockK = 1024;
  static constexpr int64_t kDirectRows = 0;
  using Elem = float;
  using Right = float;
  using Acc = float;

  // As fp16 with its exponent still e4m3's: 2^8 too small, subnormals included. NaN is 0x7f.
  static void convert(const int8_t* x, int64_t n, float* to) {
    const __m128i magnitude = _mm_set1_epi16(0x3f80);
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
      const __m128i v = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + k))), 7);
      const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(v, magnitude), magnitude);
      const __m128i h = _mm_or_si128(_mm_and_si128(v, _mm_set1_epi16(int16_t(0xbf80))), _mm_and_si128(nan, _mm_set1_epi16(0x7fff)));
      _mm256_store_ps(to + k, _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f)));
    }
    for (; k < (n + 15) / 16 * 16; ++k) to[k] = k < n ? e4m3_to_float(static_cast<uint8_t>(x[k])) : 0.0f;
  }

  template <int mr, bool>
  static __attribute__((noinline)) void tile(const float* a, int64_t sa, const char* right, int64_t sw, int64_t k, float* acc, Ahead) {
    const float* w = reinterpret_cast<const float*>(right);
    sw /= int64_t(sizeof(float));
    __m256 s[mr][NR];
    UNROLL for (int i = 0; i < mr; ++i)
      UNROLL for (int j = 0; j < NR; ++j) s[i][j] = _mm256_setzero_ps();
    for (int64_t t = 0; t < k; t += 8)
      UNROLL for (int i = 0; i < mr; ++i) {
        const __m256 left = _mm256_load_ps(a + i * sa + t);
        UNROLL for (int j = 0; j < NR; ++j) s[i][j] = _mm256_fmadd_ps(left, _mm256_load_ps(w + j * sw + t), s[i][j]);
      }
    UNROLL for (int i = 0; i < mr; ++i) _mm_storeu_ps(acc + i * NR, sums(s[i][0], s[i][1], s[i][2], s[i][3]));
  }
};

}  // namespace attnkit::cpu::avx2

namespace attnkit::cpu {
const GemmOps gemm_avx2 = avx2::Gemm<avx2::Int8, avx2::E4m3>::ops;
}
