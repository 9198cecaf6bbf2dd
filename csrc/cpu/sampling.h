// What sampling.cpp and its instruction-set builds share: the loops over a row of logits.
//
// Loops run over blocks padded with -inf to a multiple of kPad, so none has a tail. A block starts at a token id
// that is a multiple of kPad.
#pragma once

#include <cstdint>

namespace attnkit::cpu {

constexpr int64_t kPad = 64;
constexpr int64_t kChunk = 4096;      // logits prepared at a time: 16 KB, in the L1 cache
constexpr int64_t kPiece = 512;       // tokens of 32 groups, 16 each: see grouped() in attnkit/reference.py
constexpr int64_t kBlock = 4 * kPiece;
constexpr int kBins = 512;            // of the histogram over top - l
constexpr float kBinsPerNat = 16.0f;  // bin: the whole part of (top - l) * kBinsPerNat; the last takes all beyond

struct Penalties {
  float repetition, frequency, presence;
  const int32_t* counts;  // this row's, or null; all four likewise
  const uint8_t* prompt;
  const float* bias;
  const int32_t* allowed;  // bit v % 32 of word v / 32
};

// The keys of the noise: see gumbel_noise.
struct Noise {
  uint64_t seed, offset;
};

// Which words: of every token; of every group of tokens; for the choice inside a group.
enum Words : uint32_t { kOfTokens = 0, kOfGroups = 1, kInside = 2 };

// The best score so far and whose it is; id -1: none yet.
struct Best {
  float score;
  int64_t id;
};

// -log(E), E ~ Exp(1) from 32 random bits; never fused, so that every build agrees on the last bit.
float gumbel_noise(uint32_t x);
float logarithm(float x);

struct SampleOps {
  // n logits as float, +inf as the largest float, padded. True if one was NaN.
  bool (*load)(const void* x, int dtype, int64_t n, float* out);
  // Penalties, bias and mask on logits [at, at + n).
  void (*penalise)(float* l, int64_t at, int64_t n, const Penalties& p);
  // l / t within the range of floats; -inf stays.
  void (*divide)(float* l, int64_t n, float t);
  float (*top)(const float* l, int64_t n);
  // Appends to (values, ids) what lies above `above`, from l[begin] on, until n or until fewer than kPad places
  // are left of `room`. Returns where it stopped; ids count from `at`.
  int64_t (*scan)(const float* l, int64_t begin, int64_t n, int64_t at, float above, float* values, int32_t* ids, int64_t room,
                  int64_t* count);
  // Stores the finite logits of bin [from, to) in (values, ids), which hold n + kPad, and returns their number.
  int64_t (*band)(const float* l, int64_t n, float top, float from, float to, float* values, int32_t* ids);
  // The sum of exp(l - top).
  double (*sum_exp)(const float* l, int64_t n, float top);
  // exp(l - top) added to the bin of top - l.
  void (*histogram)(const float* l, int64_t n, float top, double* bins);
  // The best l + noise among l >= low with top - l < limit; token ids count from `at`.
  void (*noisy)(const float* l, int64_t n, int64_t at, float low, float top, float limit, Noise noise, Best* best);
  // The best group of whole blocks, -inf past the end, counted from block at / kBlock; `inside` receives its logits.
  void (*groups)(const float* l, int64_t n, int64_t at, Noise noise, Best* best, float* inside);
  // noisy() over a list of n tokens, every one of them eligible; arrays padded to a multiple of kPad.
  void (*noisy_list)(const float* l, const int32_t* ids, int64_t n, Noise noise, Best* best);
};

extern const SampleOps sample_scalar, sample_avx2, sample_avx512;

}  // namespace attnkit::cpu
