// What the parts of CPU attention share: one call (Problem), one piece of its work (Task), one build of the kernel (Isa).
//
// Letters as everywhere: B sequences, Hq/Hkv heads, G = Hq/Hkv, D/Dv head sizes, P pages of S tokens, W table width, L KV length.
// A sequence with n query tokens has n * G rows a KV head; row r is token r / G, head kvh * G + r % G. All rows of a task
// share every K and V tile that is read, so decode (few rows, KV split into chunks) and prefill (many rows) are one kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnkit {

// latent8: rows of an fp8 latent cache, 512 e4m3 values, a float for each 128 of them, 64 bf16; only a cache's.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, e4m3 = 4, latent8 = 5 };

struct Problem {
  DType q_type, kv_type;
  int64_t B, T, Q, Hq, Hkv, G, D, Dv, P, S, W;  // Q 0: ragged queries (cu_q); S 0: no pages, keys ragged (cu_k)
  int64_t q_stride[3], out_stride[3];           // sequence, token, head; in elements
  int64_t k_stride[3], v_stride[3];             // page, slot, head; in elements
  int64_t pages_stride, tree_stride[3];
  int64_t window;  // 0: none
  float scale, softcap, out_scale;
  bool causal;
  bool values_in_keys;  // MLA: v is the first Dv columns of k

  const char *q, *k, *v;
  char* out;
  float* lse;  // contiguous, or null
  const int32_t *pages, *lens, *cu_q, *cu_k;
  const float *sinks, *k_scale, *v_scale;  // null where absent
  int64_t k_scale_stride, v_scale_stride;
  const bool* tree;
};

// Rows [row0, row0 + rows) of one KV head of one sequence over keys [key_lo, key_hi).
struct Task {
  int32_t b, kv_head;
  int32_t n, L;         // queries and keys of the sequence
  int64_t token0;       // first query token of the sequence (ragged), else 0
  int64_t key0;         // first key of the sequence (ragged keys), else 0
  int32_t row0, rows;
  int32_t key_lo, key_hi;
  float* partial;       // where an unfinished result goes (partial_floats() of them), or null: the task is whole
};

// Rows that one task may hold, a multiple of every build's register block.
constexpr int kMaxRows = 192;

// A partial is rows of (max, sum), then rows x Dv of the numerator.
static inline size_t partial_floats(int64_t rows, int64_t Dv) { return size_t(rows) * size_t(Dv + 2); }

struct Isa {
  const char* name;
  size_t (*scratch_bytes)(const Problem&);
  // `next`, the task this thread takes after this one (or null), is only looked at to fetch its first keys ahead.
  void (*attend)(const Problem&, const Task&, const Task* next, char* scratch);
  // Joins `count` partials, each partial_floats() after the one before, in order, and writes the rows of `task`.
  void (*combine)(const Problem&, const Task& task, const float* partials, int count);
};

extern const Isa attention_base;
#if defined(__x86_64__)
extern const Isa attention_avx2, attention_avx512;
#endif

}  // namespace attnkit
