// Reading: rows of a KV cache (any page size, strides, dtype) into the dense tiles that the register-blocked loops take.
//
// The unit of a tile is a 32-bit word: one float, or two bf16 that are neighbours along the contracted dimension, as
// AVX512-BF16's dot product takes them (K and Q pair along D, V and P along keys).
//   K tile  [keys][kKeyStride] units, a row as it lies in the cache
//   V tile  [Dv / kColumns][keys / kPair][kColumns] units
//   Q tile  [row group][D / kPair][rows of the group] units
#pragma once

#include "attention_simd.h"

namespace attnkit {
namespace ATTNKIT_ISA {

constexpr int kTile = 64;  // keys

using LoadKeys = void (*)(const char* const* rows, int count, int64_t D, uint32_t* tile);
using LoadValues = void (*)(const char* const* rows, int count, int padded, int64_t Dv, uint32_t* tile);

// Multiply-add over units of one float.
struct MacF32 {
  static constexpr int kPair = 1;
  static constexpr int kExpDegree = 6;
  static constexpr int kDotBlock = 32;  // units of a dot product summed at once: its rounding grows with blocks, not with D
  static constexpr int64_t kKeyStride = 592;  // >= 576; an odd number of cache lines, so rows spread over all cache sets
  template <int L> ATTNKIT_INLINE F<L> mac(F<L> acc, U<L> a, U<L> b) { return acc + (F<L>)a * (F<L>)b; }
  template <int L> ATTNKIT_INLINE void store_pair(uint32_t* to, F<L> p0, F<L> p1, int64_t stride) {
    store_u<L>(to, (U<L>)p0);
    store_u<L>(to + stride, (U<L>)p1);
  }
};

template <DType T> static void load_keys_f32(const char* const* rows, int count, int64_t D, uint32_t* tile) {
  for (int j = 0; j < count; j++) row_to_float<T>(rows[j], (float*)(tile + j * MacF32::kKeyStride), D);
}

template <DType T>
static void load_values_f32(const char* const* rows, int count, int padded, int64_t Dv, uint32_t* tile) {
  for (int j = 0; j < padded; j++) {
    for (int64_t c = 0; c < Dv; c += kColumns) {
      uint32_t* to = tile + c * padded + int64_t(j) * kColumns;
      if (j < count)
        row_to_float<T>(rows[j] + c * size_of(T), (float*)to, Dv - c < kColumns ? Dv - c : kColumns);
      else
        memset(to, 0, sizeof(uint32_t) * kColumns);
    }
  }
}

template <DType T> static void load_query_f32(const char* const* rows, int count, int width, int64_t D, uint32_t* tile) {
  float row[576];
  for (int r = 0; r < width; r++) {
    row_to_float<T>(rows[r < count ? r : count - 1], row, D);
    for (int64_t d = 0; d < D; d++) memcpy(tile + d * width + r, row + d, 4);
  }
}

#if defined(__AVX512BF16__)
// Multiply-add over pairs of bf16, accumulated in float.
struct MacBf16 {
  static constexpr int kPair = 2;
  static constexpr int kExpDegree = 5;
  static constexpr int kDotBlock = 288;
  static constexpr int64_t kKeyStride = 304;  // >= 576 / 2; an odd number of cache lines
  template <int L> ATTNKIT_INLINE F<L> mac(F<L> acc, U<L> a, U<L> b) {
    if constexpr (L == 16) return (F<L>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    if constexpr (L == 8) return (F<L>)_mm256_dpbf16_ps((__m256)acc, (__m256bh)a, (__m256bh)b);
  }
  // Rounds to bf16 and puts p0 in the low half of each word, p1 in the high one.
  template <int L> ATTNKIT_INLINE void store_pair(uint32_t* to, F<L> p0, F<L> p1, int64_t) {
    if constexpr (L == 16) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
      store_u<16>(to, (U<16>)_mm512_or_si512(low, high));
    }
    if constexpr (L == 8) {
      const __m256i both = (__m256i)_mm256_cvtne2ps_pbh((__m256)p1, (__m256)p0);
      const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(both));
      const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(both, 1)), 16);
      store_u<8>(to, (U<8>)_mm256_or_si256(low, high));
    }
  }
};

// Up to 32 numbers as bf16; int8 and e4m3 are exact in it.
template <DType T> ATTNKIT_INLINE __m512i load_bf16(const char* p, __mmask32 mask) {
  if constexpr (T == DType::bf16) return _mm512_maskz_loadu_epi16(mask, p);
  const __m256i bytes = _mm256_maskz_loadu_epi8(mask, p);
  if constexpr (T == DType::i8) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  const __m512i x = _mm512_cvtepi8_epi16(bytes);
  const __m512i mag = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_and_si512(x, _mm512_set1_epi16(short(0x8000)));
  __m512i value = _mm512_add_epi16(_mm512_slli_epi16(mag, 4), _mm512_set1_epi16(120 << 7));
  // 0 to 7 times 2^-9: the exponents have no bias to shift, so look them up.
  const __m512i subnormal = _mm512_broadcast_i32x4(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epi16_mask(mag, _mm512_set1_epi16(8)), mag, subnormal);
  value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(mag, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(value, sign);
}

ATTNKIT_INLINE __mmask32 first(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

template <DType T> static void load_keys_bf16(const char* const* rows, int count, int64_t D, uint32_t* tile) {
  for (int j = 0; j < count; j++) {
    uint16_t* to = (uint16_t*)(tile + j * MacBf16::kKeyStride);
    for (int64_t d = 0; d < D; d += 32) {
      const __mmask32 mask = first(D - d);
      _mm512_storeu_si512(to + d, load_bf16<T>(rows[j] + d * size_of(T), mask));  // a row's stride leaves room for its tail
    }
  }
}

template <DType T>
static void load_values_bf16(const char* const* rows, int count, int padded, int64_t Dv, uint32_t* tile) {
  uint16_t order[64];
  for (int i = 0; i < 32; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(32 + i);
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + 32);
  const int pairs = padded / 2;
  for (int j = 0; j < pairs; j++) {
    const __mmask32 has0 = 2 * j < count ? ~0u : 0, has1 = 2 * j + 1 < count ? ~0u : 0;
    const char* row0 = has0 ? rows[2 * j] : rows[0];
    const char* row1 = has1 ? rows[2 * j + 1] : rows[0];
    for (int64_t d = 0; d < Dv; d += 32) {
      const __mmask32 mask = first(Dv - d);
      const __m512i a = load_bf16<T>(row0 + d * size_of(T), mask & has0);
      const __m512i b = load_bf16<T>(row1 + d * size_of(T), mask & has1);
      uint32_t* to = tile + (d & ~int64_t(kColumns - 1)) * pairs + j * kColumns + (d & (kColumns - 1));
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

static void load_query_bf16(const char* const* rows, int count, int width, int64_t D, uint32_t* tile) {
  for (int r = 0; r < width; r++) {
    const char* row = rows[r < count ? r : count - 1];
    for (int64_t u = 0; u < D / 2; u++) memcpy(tile + u * width + r, row + 4 * u, 4);
  }
}
#endif  // __AVX512BF16__

// ---- rows of an fp8 latent cache, which are widened before the loaders see them

constexpr int kLatent = 512, kLatentBlock = 128, kLatentRope = 64, kLatentRow = kLatent + kLatentRope;

static void widen_latent(const char* row, float* to) {
  for (int b = 0; b < kLatent / kLatentBlock; b++) {
    float scale;
    memcpy(&scale, row + kLatent + 4 * b, 4);
    float* block = to + b * kLatentBlock;
    row_to_float<DType::e4m3>(row + b * kLatentBlock, block, kLatentBlock);
    for (int i = 0; i < kLatentBlock; i++) block[i] *= scale;
  }
  row_to_float<DType::bf16>(row + kLatent + 4 * (kLatent / kLatentBlock), to + kLatent, kLatentRope);
}

// Rows as numbers of type T (f32 or bf16), one after the other at ``to``, and where they lie.
template <DType T> static void widen_latents(const char* const* rows, int count, char* to, const char** widened) {
  for (int j = 0; j < count; j++) {
    char* at = to + int64_t(j) * kLatentRow * size_of(T);
    widened[j] = at;
    if constexpr (T == DType::f32) {
      widen_latent(rows[j], (float*)at);
    } else {
      float row[kLatentRow];
      widen_latent(rows[j], row);
      store_scaled(row, 1.0f, at, T, kLatentRow);
    }
  }
}

static inline int tile_keys(const Task& t, int64_t at) {
  const int64_t left = t.key_hi - at;
  return int(left < 0 ? 0 : (left < kTile ? left : kTile));
}

// Where the rows of the keys of the tile that begins at key `at` lie; returns how many there are. The table is read only where
// the task has a key.
static int find_tile(const Problem& p, const Task& t, int64_t at, const char** k, const char** v) {
  const int count = tile_keys(t, at);
  const int64_t size = size_of(p.kv_type), k_head = t.kv_head * p.k_stride[2], v_head = t.kv_head * p.v_stride[2];
  if (p.S == 0) {
    for (int j = 0; j < count; j++) {
      k[j] = p.k + (k_head + (t.key0 + at + j) * p.k_stride[1]) * size;
      v[j] = p.v + (v_head + (t.key0 + at + j) * p.v_stride[1]) * size;
    }
    return count;
  }
  const int32_t* table = p.pages + t.b * p.pages_stride;
  int64_t page = at / p.S, slot = at % p.S;
  for (int j = 0; j < count; page++, slot = 0) {
    const char* k_at = p.k + (table[page] * p.k_stride[0] + k_head) * size;
    const char* v_at = p.v + (table[page] * p.v_stride[0] + v_head) * size;
    for (; slot < p.S && j < count; slot++, j++) {
      k[j] = k_at + slot * p.k_stride[1] * size;
      v[j] = v_at + slot * p.v_stride[1] * size;
    }
  }
  return count;
}

// The next tile's rows on their way to the cache while this one is computed: a few lines at a time, since a burst longer than
// the core's miss buffers would stall it, and into L2, since L1 holds what is being computed.
class Ahead {
 public:
  Ahead(const char* const* k, int64_t k_bytes, const char* const* v, int64_t v_bytes, int count, int slots)
      : row_(k), row_end_(k + count), v_(v), bytes_(k_bytes), v_bytes_(v_bytes), count_(count) {
    lines_ = int((count * ((k_bytes + 63) / 64 + (v_bytes + 63) / 64) + slots - 1) / slots);
  }

  inline __attribute__((always_inline)) void step() {
    for (int i = 0; i < lines_; i++) {
      if (at_ >= end_ && !next()) return;
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
    }
  }

 private:
  bool next() {
    if (row_ == row_end_) {
      if (v_bytes_ == 0) return false;
      row_ = v_, row_end_ = v_ + count_, bytes_ = v_bytes_, v_bytes_ = 0;
      if (row_ == row_end_) return false;
    }
    at_ = *row_++;
    end_ = at_ + bytes_;
    at_ -= uintptr_t(at_) & 63;
    return true;
  }

  const char *const *row_, *const *row_end_, *const *v_;
  int64_t bytes_, v_bytes_;
  int count_, lines_;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace ATTNKIT_ISA
}  // namespace attnkit
