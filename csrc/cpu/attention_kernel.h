// CPU attention for one instruction set: the file that includes this one defines ATTNKIT_ISA (a namespace) and ATTNKIT_ISA_NAME.
//
// One task walks its keys in tiles (online softmax: Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022):
//   S^T [keys][rows] = K . Q^T   rows in the vector lanes, keys broadcast: K needs no transpose, softmax no horizontal step
//   P   = e^(S - max)            rounded to pairs where the multiply-add takes bf16
//   O   = O * alpha + P . V      summed over a tile in registers, then added once: error grows with tiles, not keys
// Everything a row computes is independent of the rows beside it, so a sequence's bits do not depend on its neighbours.
#pragma once

#include <math.h>

#include "attention_tiles.h"

namespace attnkit {
namespace ATTNKIT_ISA {

constexpr float kInf = __builtin_inff();
constexpr int kAheadEvery = 8;    // steps of an inner loop between two looks ahead
constexpr int kGroupVectors = 3;  // vectors of rows in a K.Q^T register block
constexpr int kMaxBlockRows = 6;  // rows in a P.V register block
// Keys in a K.Q^T register block: with 32 vector registers twice what fits 16.
#if defined(__AVX512F__)
constexpr int block_keys(int vectors) { return vectors == 1 ? 16 : 8; }
#else
constexpr int block_keys(int vectors) { return vectors == 1 ? 8 : 4; }
#endif

// ---------------------------------------------------------------- register blocks

// s [keys][RV * L] = scale * (K tile . Q tile); top [RV * L] becomes the largest score of each row.
template <class Mac, int L, int RV>
static void scores(const uint32_t* k, const uint32_t* q, int units, int keys, float scale, float* s, float* top, Ahead& ahead) {
  constexpr int NK = block_keys(RV), width = RV * L;
  F<L> best[RV];
  for (int r = 0; r < RV; r++) best[r] = splat<L>(-kInf);
  for (int j = 0; j < keys; j += NK) {
    const uint32_t* row = k + j * Mac::kKeyStride;
    const uint32_t* qu = q;
    for (int u0 = 0; u0 < units; u0 += Mac::kDotBlock) {
      const int u1 = units - u0 < Mac::kDotBlock ? units : u0 + Mac::kDotBlock;
      F<L> acc[NK][RV] = {};
      for (int u = u0; u < u1; u++, qu += width) {
        if (u % kAheadEvery == 0) ahead.step();
        U<L> b[RV];
        ATTNKIT_UNROLL for (int r = 0; r < RV; r++) b[r] = load_u<L>(qu + r * L);
        ATTNKIT_UNROLL for (int i = 0; i < NK; i++) {
          const U<L> a = splat_u<L>(row[i * Mac::kKeyStride + u]);
          ATTNKIT_UNROLL for (int r = 0; r < RV; r++) acc[i][r] = Mac::template mac<L>(acc[i][r], a, b[r]);
        }
      }
      ATTNKIT_UNROLL for (int i = 0; i < NK; i++) {
        ATTNKIT_UNROLL for (int r = 0; r < RV; r++) {
          float* to = s + (j + i) * width + r * L;
          F<L> x = acc[i][r];
          if (u0 != 0) x += load<L>(to);
          if (u1 == units) {
            x = x * scale;
            best[r] = vmax<L>(best[r], x);
          }
          store<L>(to, x);
        }
      }
    }
  }
  for (int r = 0; r < RV; r++) store<L>(top + r * L, best[r]);
}

// o [RM][CV * kLanes] = o * alpha + P . V over one tile.
template <class Mac, int RM, int CV>
static void values(const uint32_t* p, int64_t p_stride, const uint32_t* v, int steps, float* o, int64_t o_stride,
                   const float* alpha, Ahead& ahead) {
  constexpr int L = kLanes;
  F<L> acc[RM][CV] = {};
  for (int j = 0; j < steps; j++, p += p_stride, v += kColumns) {
    if (j % kAheadEvery == 0) ahead.step();
    U<L> b[CV];
    ATTNKIT_UNROLL for (int c = 0; c < CV; c++) b[c] = load_u<L>(v + c * L);
    ATTNKIT_UNROLL for (int r = 0; r < RM; r++) {
      const U<L> a = splat_u<L>(p[r]);
      ATTNKIT_UNROLL for (int c = 0; c < CV; c++) acc[r][c] = Mac::template mac<L>(acc[r][c], a, b[c]);
    }
  }
  ATTNKIT_UNROLL for (int r = 0; r < RM; r++) {
    ATTNKIT_UNROLL for (int c = 0; c < CV; c++) {
      float* to = o + r * o_stride + c * L;
      store<L>(to, load<L>(to) * alpha[r] + acc[r][c]);
    }
  }
}

template <class Mac, int CV>
static void values_rows(int rows, const uint32_t* p, int64_t p_stride, const uint32_t* v, int steps, float* o,
                        int64_t o_stride, const float* alpha, Ahead& ahead) {
  const int blocks = (rows + kMaxBlockRows - 1) / kMaxBlockRows;
  for (int i = 0, r = 0; i < blocks; i++) {
    const int take = rows * (i + 1) / blocks - r;
    switch (take) {
      case 1: values<Mac, 1, CV>(p + r, p_stride, v, steps, o + r * o_stride, o_stride, alpha + r, ahead); break;
      case 2: values<Mac, 2, CV>(p + r, p_stride, v, steps, o + r * o_stride, o_stride, alpha + r, ahead); break;
      case 3: values<Mac, 3, CV>(p + r, p_stride, v, steps, o + r * o_stride, o_stride, alpha + r, ahead); break;
      case 4: values<Mac, 4, CV>(p + r, p_stride, v, steps, o + r * o_stride, o_stride, alpha + r, ahead); break;
      case 5: values<Mac, 5, CV>(p + r, p_stride, v, steps, o + r * o_stride, o_stride, alpha + r, ahead); break;
      default: values<Mac, 6, CV>(p + r, p_stride, v, steps, o + r * o_stride, o_stride, alpha + r, ahead); break;
    }
    r += take;
  }
}

// ---------------------------------------------------------------- rows and scratch

struct Row {
  int32_t token, head;
};

ATTNKIT_INLINE Row row_of(const Problem& p, const Task& t, int r) {
  const int64_t at = t.row0 + r;
  return {int32_t(at / p.G), int32_t(t.kv_head * p.G + at % p.G)};
}

// Keys [lo, hi) that a query token may see, a tree mask aside.
ATTNKIT_INLINE void visible(const Problem& p, const Task& t, int32_t token, int32_t* lo, int32_t* hi) {
  const int64_t at = int64_t(t.L) - t.n + token;
  int64_t first = p.window ? at - p.window + 1 : 0, last = t.L;
  if (p.causal && !p.tree) last = at + 1;
  if (!p.causal && p.window && at + p.window < last) last = at + p.window;
  *lo = int32_t(at < 0 ? 0 : (first > 0 ? first : 0));
  *hi = int32_t(at < 0 ? 0 : last);
}

struct Scratch {
  uint32_t *q, *k, *v, *prob, *tree;
  float *s, *o, *top, *sum, *alpha;
  int32_t *lo, *hi;
  char* rows;  // an fp8 latent cache's rows of a tile, widened
  size_t bytes;

  template <class T> void take(T*& p, char* base, size_t count) {
    p = (T*)(base + bytes);
    bytes += (count * sizeof(T) + 127) & ~size_t(127);
  }
  Scratch(const Problem& p, char* base) : bytes(0) {
    const size_t padded_Dv = size_t((p.Dv + kColumns - 1) / kColumns * kColumns);
    take(q, base, kMaxRows * p.D);
    take(k, base, kTile * MacF32::kKeyStride);
    take(v, base, kTile * padded_Dv);
    take(prob, base, kTile * kMaxRows);
    take(s, base, kTile * kGroupVectors * kLanes);
    take(o, base, kMaxRows * padded_Dv);
    take(top, base, kMaxRows);
    take(sum, base, kMaxRows);
    take(alpha, base, kMaxRows);
    take(lo, base, kMaxRows);
    take(hi, base, kMaxRows);
    take(tree, base, kMaxRows);
    take(rows, base, p.kv_type == DType::latent8 ? size_t(kTile) * kLatentRow * sizeof(float) : 0);
  }
};

static size_t scratch_bytes(const Problem& p) { return Scratch(p, nullptr).bytes; }

// What the rows of one task see, and whether a tile of keys needs masking for any of them.
struct Sight {
  int32_t max_lo, min_hi, tree_from;
  bool plain(int64_t from, int64_t to) const { return from >= max_lo && to <= min_hi && to <= tree_from; }
};

static Sight prepare_rows(const Problem& p, const Task& t, int padded, Scratch& x) {
  Sight sight = {0, INT32_MAX, p.tree ? t.L - t.n : INT32_MAX};
  for (int r = 0; r < padded; r++) {
    const Row row = row_of(p, t, r < t.rows ? r : t.rows - 1);
    visible(p, t, row.token, x.lo + r, x.hi + r);
    if (x.hi[r] > t.key_hi) x.hi[r] = t.key_hi;  // the last tile is padded beyond the task's keys
    if (x.lo[r] > sight.max_lo) sight.max_lo = x.lo[r];
    if (x.hi[r] < sight.min_hi) sight.min_hi = x.hi[r];
    uint32_t bits = 0;
    if (p.tree) {
      const bool* seen = p.tree + t.b * p.tree_stride[0] + row.token * p.tree_stride[1];
      for (int i = 0; i < t.n; i++) bits |= uint32_t(seen[i * p.tree_stride[2]]) << i;
    }
    x.tree[r] = bits;
    x.top[r] = -kInf;
    x.sum[r] = 0;
  }
  return sight;
}

// ---------------------------------------------------------------- softmax

// Soft cap (s = cap * tanh(s), scale already folded) and masks over a tile's scores of L rows; returns their maximum.
template <int L>
static F<L> mask_scores(const Scratch& x, int row, const Sight& sight, int64_t at, int keys, float cap, bool masked, float* s,
                        int stride) {
  const I<L> lo = (I<L>)load_u<L>((const uint32_t*)x.lo + row), hi = (I<L>)load_u<L>((const uint32_t*)x.hi + row);
  const U<L> tree = load_u<L>(x.tree + row);
  F<L> best = splat<L>(-kInf);
  for (int j = 0; j < keys; j++) {
    F<L> value = load<L>(s + j * stride);
    if (cap != 0) value = tanhv<L>(value) * cap;
    if (masked) {
      const int32_t key = int32_t(at) + j;
      I<L> seen = (lo <= key) & (hi > key);
      const int32_t bit = key - sight.tree_from;
      if (bit >= 0 && bit < 32) seen &= -(I<L>)((tree >> bit) & 1u);
      value = seen ? value : splat<L>(-kInf);
    }
    best = vmax<L>(best, value);
    store<L>(s + j * stride, value);
  }
  return best;
}

// Probabilities of a tile for L rows, the running maximum and sum, and alpha, what the rows' O shrinks by.
template <class Mac, int L>
static void softmax(const Scratch& x, int row, F<L> best, const float* s, int stride, int keys, uint32_t* prob,
                    int64_t prob_stride) {
  const F<L> before = load<L>(x.top + row), top = vmax<L>(before, best);
  const F<L> base = top == -kInf ? F<L>{} : top;
  const F<L> alpha = expv<L, 6>(before - base);
  F<L> sum0 = {}, sum1 = {};
  for (int j = 0; j < keys; j += 2) {
    const F<L> p0 = expv<L, Mac::kExpDegree>(load<L>(s + j * stride) - base);
    const F<L> p1 = expv<L, Mac::kExpDegree>(load<L>(s + (j + 1) * stride) - base);
    sum0 += p0;
    sum1 += p1;
    Mac::template store_pair<L>(prob + j / Mac::kPair * prob_stride, p0, p1, prob_stride);
  }
  store<L>(x.top + row, top);
  store<L>(x.alpha + row, alpha);
  store<L>(x.sum + row, load<L>(x.sum + row) * alpha + (sum0 + sum1));
}

// ---------------------------------------------------------------- results

// One finished row: o [Dv] with maximum score `top` and `sum` of e^(score - top).
static void write_row(const Problem& p, const Task& t, int r, float top, float sum, const float* o) {
  const Row row = row_of(p, t, r);
  const int64_t b = p.Q ? t.b : 0, token = t.token0 + row.token;
  char* to = p.out + (b * p.out_stride[0] + token * p.out_stride[1] + row.head * p.out_stride[2]) * size_of(p.q_type);
  const float sink = p.sinks ? p.sinks[row.head] : -kInf;
  double lse = sink;
  if (sum == 0) {
    memset(to, 0, size_t(p.Dv) * size_of(p.q_type));
  } else {
    float keep = 1;
    if (sink != -kInf) {
      const float higher = sink > top ? sink : top;
      keep = expf(top - higher);
      sum = sum * keep + expf(sink - higher);
      top = higher;
    }
    lse = top == kInf ? top : top + log(double(sum));
    const float v_scale = p.v_scale ? p.v_scale[t.kv_head * p.v_scale_stride] : 1.0f;
    store_scaled(o, keep / sum * (p.out_scale * v_scale), to, p.q_type, p.Dv);
  }
  if (p.lse) p.lse[(b * p.Q + token) * p.Hq + row.head] = float(lse);
}

static void write_partial(const Problem& p, const Task& t, const Scratch& x, int64_t o_stride) {
  memcpy(t.partial, x.top, sizeof(float) * t.rows);
  memcpy(t.partial + t.rows, x.sum, sizeof(float) * t.rows);
  for (int r = 0; r < t.rows; r++)
    memcpy(t.partial + 2 * t.rows + r * p.Dv, x.o + r * o_stride, sizeof(float) * size_t(p.Dv));
}

static void combine(const Problem& p, const Task& t, const float* partials, int count) {
  const size_t step = partial_floats(t.rows, p.Dv);
  float o[576];
  for (int r = 0; r < t.rows; r++) {
    float top = -kInf, sum = 0;
    for (int c = 0; c < count; c++) top = partials[c * step + r] > top ? partials[c * step + r] : top;
    memset(o, 0, sizeof(float) * size_t(p.Dv));
    for (int c = 0; c < count; c++) {
      const float* part = partials + c * step;
      const float part_sum = part[t.rows + r];
      if (part_sum == 0) continue;  // saw no key: nothing of it may count, a NaN in its O least of all
      const float weight = expf(part[r] - top);
      const float* from = part + 2 * t.rows + r * p.Dv;
      sum += part_sum * weight;
      for (int64_t d = 0; d < p.Dv; d++) o[d] += from[d] * weight;
    }
    write_row(p, t, r, top, sum, o);
  }
}

// ---------------------------------------------------------------- one task

struct Loaders {
  LoadKeys keys;
  LoadValues values;
  void (*query)(const char* const* rows, int count, int width, int64_t D, uint32_t* tile);
  void (*widen)(const char* const* rows, int count, char* to, const char** widened);  // null: rows are loaded as they lie
};

template <class Mac, int L>
static void score_group(int vectors, const Scratch& x, const uint32_t* q, int units, int keys, float scale, float* top,
                        Ahead& ahead) {
  if (L == kLanes && vectors == 3)
    scores<Mac, kLanes, 3>(x.k, q, units, keys, scale, x.s, top, ahead);
  else if (L == kLanes && vectors == 2)
    scores<Mac, kLanes, 2>(x.k, q, units, keys, scale, x.s, top, ahead);
  else
    scores<Mac, L, 1>(x.k, q, units, keys, scale, x.s, top, ahead);
}

// O of every row over a tile of `steps` V units a column.
template <class Mac>
static void add_values(int rows, int64_t Dv, const Scratch& x, int64_t p_stride, int steps, int64_t o_stride, Ahead& ahead) {
  constexpr int most = kColumnVectors, fewer = kColumnVectors > 2 ? 3 : 2;
  for (int64_t c = 0; c < Dv; c += kColumns) {
    const uint32_t* v = x.v + c * steps;
    if (Dv - c > kColumns - kLanes)
      values_rows<Mac, most>(rows, x.prob, p_stride, v, steps, x.o + c, o_stride, x.alpha, ahead);
    else if (Dv - c > kLanes)
      values_rows<Mac, fewer>(rows, x.prob, p_stride, v, steps, x.o + c, o_stride, x.alpha, ahead);
    else
      values_rows<Mac, 1>(rows, x.prob, p_stride, v, steps, x.o + c, o_stride, x.alpha, ahead);
  }
}

// Rows in groups of at most kGroupVectors vectors, as even as they come.
struct Groups {
  int vectors, count;
  int begin(int g) const { return vectors * g / count; }
};

template <class Mac, int L>
static void load_queries(const Problem& p, const Task& t, const Groups& groups, const Loaders& loaders, uint32_t* q) {
  const char* rows[kGroupVectors * kLanes];
  for (int g = 0; g < groups.count; g++) {
    const int from = groups.begin(g) * L, width = groups.begin(g + 1) * L - from;
    const int count = t.rows - from < width ? t.rows - from : width;
    for (int r = 0; r < count; r++) {
      const Row row = row_of(p, t, from + r);
      const int64_t at = (p.Q ? t.b : 0) * p.q_stride[0] + (t.token0 + row.token) * p.q_stride[1] + row.head * p.q_stride[2];
      rows[r] = p.q + at * size_of(p.q_type);
    }
    loaders.query(rows, count, width, p.D, q + from * (p.D / Mac::kPair));
  }
}

// How often the loops over a tile ask for lines of the next one.
template <class Mac> static int ahead_slots(const Groups& groups, int rows, int64_t o_stride, int keys, int units) {
  const int dots = groups.count * (keys / block_keys(groups.begin(1))) * ((units + kAheadEvery - 1) / kAheadEvery);
  const int blocks = int(o_stride / kColumns) * ((rows + kMaxBlockRows - 1) / kMaxBlockRows);
  return dots + blocks * (keys / Mac::kPair / kAheadEvery);
}

template <class Mac, int L>
static void attend_rows(const Problem& p, const Task& t, const Task* after, const Loaders& loaders, char* memory) {
  Scratch x(p, memory);
  const int vectors = (t.rows + L - 1) / L, padded_rows = vectors * L, units = int(p.D / Mac::kPair);
  const Groups groups = {vectors, (vectors + kGroupVectors - 1) / kGroupVectors};
  const int64_t o_stride = (p.Dv + kColumns - 1) / kColumns * kColumns, element = size_of(p.kv_type);
  const Sight sight = prepare_rows(p, t, padded_rows, x);
  const float k_scale = p.k_scale ? p.k_scale[t.kv_head * p.k_scale_stride] : 1.0f;
  const float scale = float(double(p.scale) * k_scale / (p.softcap != 0 ? p.softcap : 1.0));
  if (t.key_lo < t.key_hi) load_queries<Mac, L>(p, t, groups, loaders, x.q);
  memset(x.o, 0, sizeof(float) * size_t(t.rows * o_stride));

  const char *k_rows[2][kTile], *v_rows[2][kTile];  // of this tile and the next
  find_tile(p, t, t.key_lo, k_rows[0], v_rows[0]);
  int now = 0;
  for (int64_t at = t.key_lo; at < t.key_hi; at += kTile, now ^= 1) {
    const int count = tile_keys(t, at), keys = (count + 15) & ~15;
    const char* widened[kTile];
    if (loaders.widen) loaders.widen(k_rows[now], count, x.rows, widened);
    loaders.keys(loaders.widen ? widened : k_rows[now], count, p.D, x.k);
    loaders.values(loaders.widen ? widened : v_rows[now], count, keys, p.Dv, x.v);
    const bool last = at + kTile >= t.key_hi;
    const Task* source = last ? after : &t;
    const int next = source ? find_tile(p, *source, last ? after->key_lo : at + kTile, k_rows[now ^ 1], v_rows[now ^ 1]) : 0;
    Ahead ahead(k_rows[now ^ 1], p.D * element, v_rows[now ^ 1], p.values_in_keys ? 0 : p.Dv * element, next,
                ahead_slots<Mac>(groups, t.rows, o_stride, keys, units));
    const bool masked = !sight.plain(at, at + keys);
    for (int g = 0; g < groups.count; g++) {
      const int first = groups.begin(g), take = groups.begin(g + 1) - first;
      float top[kGroupVectors * kLanes];
      score_group<Mac, L>(take, x, x.q + int64_t(first) * L * units, units, keys, scale, top, ahead);
      for (int i = 0; i < take; i++) {
        const int row = (first + i) * L;
        float* s = x.s + i * L;
        F<L> best = load<L>(top + i * L);
        if (masked || p.softcap != 0) best = mask_scores<L>(x, row, sight, at, keys, p.softcap, masked, s, take * L);
        softmax<Mac, L>(x, row, best, s, take * L, keys, x.prob + row, padded_rows);
      }
    }
    add_values<Mac>(t.rows, p.Dv, x, padded_rows, keys / Mac::kPair, o_stride, ahead);
  }
  if (t.partial) return write_partial(p, t, x, o_stride);
  for (int r = 0; r < t.rows; r++) write_row(p, t, r, x.top[r], x.sum[r], x.o + r * o_stride);
}

template <DType T> static Loaders loaders_f32(DType q) {
  auto query = load_query_f32<DType::f32>;
  if (q == DType::bf16) query = load_query_f32<DType::bf16>;
  if (q == DType::f16) query = load_query_f32<DType::f16>;
  return {load_keys_f32<T>, load_values_f32<T>, query, nullptr};
}

static void attend(const Problem& p, const Task& t, const Task* after, char* scratch) {
#if defined(__AVX512BF16__)
  if (p.q_type == DType::bf16) {
    Loaders l = {load_keys_bf16<DType::bf16>, load_values_bf16<DType::bf16>, load_query_bf16, nullptr};
    if (p.kv_type == DType::i8) l = {load_keys_bf16<DType::i8>, load_values_bf16<DType::i8>, load_query_bf16, nullptr};
    if (p.kv_type == DType::e4m3) l = {load_keys_bf16<DType::e4m3>, load_values_bf16<DType::e4m3>, load_query_bf16, nullptr};
    if (p.kv_type == DType::latent8) l.widen = widen_latents<DType::bf16>;
    if (t.rows <= 8) return attend_rows<MacBf16, 8>(p, t, after, l, scratch);
    return attend_rows<MacBf16, kLanes>(p, t, after, l, scratch);
  }
#endif
  Loaders l = loaders_f32<DType::f32>(p.q_type);
  if (p.kv_type == DType::bf16) l = loaders_f32<DType::bf16>(p.q_type);
  if (p.kv_type == DType::f16) l = loaders_f32<DType::f16>(p.q_type);
  if (p.kv_type == DType::i8) l = loaders_f32<DType::i8>(p.q_type);
  if (p.kv_type == DType::e4m3) l = loaders_f32<DType::e4m3>(p.q_type);
  if (p.kv_type == DType::latent8) l.widen = widen_latents<DType::f32>;
#if defined(__AVX512F__)
  if (t.rows <= 8) return attend_rows<MacF32, 8>(p, t, after, l, scratch);
#endif
  attend_rows<MacF32, kLanes>(p, t, after, l, scratch);
}

}  // namespace ATTNKIT_ISA

const Isa ATTNKIT_ISA_RECORD = {ATTNKIT_ISA_NAME, ATTNKIT_ISA::scratch_bytes, ATTNKIT_ISA::attend, ATTNKIT_ISA::combine};

}  // namespace attnkit
