// What a warpgroup that attends is made of: its registers and rings, its two products, its turns at the
// tensor cores, and which rows it has.
#pragma once
#include "../common/convert.cuh"
#include "prefill_items.cuh"
#include "../common/wgmma_sm90.cuh"

namespace attnkit {

// Rows: what happens to the scores (prefill_softmax.cuh).
template <class Shape, class Rows>
struct PrefillProducts {
  static constexpr int BN = Shape::BN;
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  const int group, lane;
  Ring<Shape::Stages> k_ring, v_ring;
  Ring<Shape::QStages> q_ring;
  Items<Shape> items;
  Rows rows;
  float scores[BN / 2], out[Shape::DV / 2];
  u32 probabilities[BN / 4];

  ATTNKIT_DEVICE void arrive(u32 barrier) const {
    if (lane % 32 == 0) mbarrier_arrive(barrier);
  }

  ATTNKIT_DEVICE void release_k() {
    arrive(s.k_empty + 8 * k_ring.stage);
    k_ring.next();
  }
  ATTNKIT_DEVICE void release_v() {
    arrive(s.v_empty + 8 * v_ring.stage);
    v_ring.next();
  }
  ATTNKIT_DEVICE void release_q() {
    arrive(s.q_empty + 8 * q_ring.stage);
    q_ring.next();
  }
  ATTNKIT_DEVICE void wait_k() const { mbarrier_wait(s.k_full + 8 * k_ring.stage, k_ring.parity); }
  ATTNKIT_DEVICE void wait_v() const { mbarrier_wait(s.v_full + 8 * v_ring.stage, v_ring.parity); }
  ATTNKIT_DEVICE void wait_q() const { mbarrier_wait(s.q_full + 8 * q_ring.stage, q_ring.parity); }

  // Named barriers 1 to Consumers pass the tensor cores from one warpgroup to the next.
  ATTNKIT_DEVICE void take_turn() const {
    if constexpr (Shape::Consumers > 1) named_barrier(1 + group, 256);
  }
  ATTNKIT_DEVICE void give_turn() const {
    if constexpr (Shape::Consumers > 1) named_barrier_arrive(1 + (group + 1) % Shape::Consumers, 256);
  }

  // Descriptors count addresses in 16 bytes, in their lower half: moving an operand is one addition of 32 bits. Every instruction
  // in the loop takes its turn from the tensor cores.
  static ATTNKIT_DEVICE u64 moved(u64 descriptor, u32 by) {
    u64 r;
    asm("{\n.reg .b32 lo, hi;\nmov.b64 {lo, hi}, %1;\nadd.u32 lo, lo, %2;\nmov.b64 %0, {lo, hi};\n}" : "=l"(r) : "l"(descriptor), "r"(by));
    return r;
  }

  ATTNKIT_DEVICE void multiply_qk() {
    const u64 q = wgmma_descriptor(s.q + group * (64 * 128), 16, 1024) + q_ring.stage * (Shape::QBytes / 16);
    const u64 k = wgmma_descriptor(s.k, 16, 1024) + k_ring.stage * (Shape::KBytes / 16);
    wgmma_hold(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shape::D / 16; ++i) {
      wgmma_ss<Shape::Bf16>(scores, moved(q, i / 4 * (Shape::Rows * 8) + i % 4 * 2), moved(k, i / 4 * (BN * 8) + i % 4 * 2), i > 0);
    }
    wgmma_commit();
  }

  // The same product by each warp for itself, where the raw scores are gone.
  ATTNKIT_DEVICE void multiply_qk_again() {
    const int me = lane % 32;
    const u32 q = s.q + q_ring.stage * Shape::QBytes + (group * 64 + lane / 32 * 16 + me % 16) * 128;
    const u32 k = s.k + k_ring.stage * Shape::KBytes + me % 8 * 128;
    float(&tiles)[BN / 8][4] = reinterpret_cast<float(&)[BN / 8][4]>(scores);
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) scores[i] = 0.f;
#pragma unroll 1
    for (int n = 0; n < Shape::D / 32; ++n) {  // units of 16 bytes, four of which are 32 columns
      u32 a[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_matrix_x4(a[j], q + n / 2 * (Shape::Rows * 128) + ((n % 2 * 4 + 2 * j + me / 16) ^ (me % 8)) * 16);
      }
      const u32 from = k + n / 2 * (BN * 128) + ((n % 2 * 4 + me / 8) ^ (me % 8)) * 16;
#pragma unroll
      for (int i = 0; i < BN / 8; ++i) {
        u32 b[4];
        load_matrix_x4(b, from + i * 1024);
        mma_16x8x16<Shape::Bf16>(tiles[i], a[0], b[0], b[1]);
        mma_16x8x16<Shape::Bf16>(tiles[i], a[1], b[2], b[3]);
      }
    }
  }

  // Keys: of a narrow block, the first 64. The sum starts anew where ``accumulate`` is 0, whatever ``out`` holds.
  template <int Keys>
  ATTNKIT_DEVICE void multiply_pv(int accumulate) {
    const u64 v = wgmma_descriptor(s.v, BN * 128, 1024) + v_ring.stage * (Shape::VBytes / 16);
    wgmma_hold(out);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Keys / 16; ++i) {
      wgmma_rs_transposed<Shape::Bf16>(out, probabilities + 4 * i, moved(v, i * 128), i > 0 ? 1 : accumulate);
    }
    wgmma_commit();
  }

  ATTNKIT_DEVICE void rescale(const float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < Shape::DV / 2; ++i) out[i] *= decay[i / 2 % 2];
  }

  // Slots at and beyond L may hold NaN, and zero times NaN is NaN: their value rows become zero.
  ATTNKIT_DEVICE void clear_values_beyond(const Tile& t) {
    const int first = t.length - (t.block_end - 1) * BN, width = t.value_width(BN);
    if (first >= width) return;
    const u32 v = s.v + v_ring.stage * Shape::VBytes;
    constexpr int PerRow = Shape::DV / 8;
    for (int i = group * 128 + lane; i < (width - first) * PerRow; i += 128 * Shape::Consumers) {
      const int r = first + i / PerRow, unit = i % PerRow;
      store_shared_zeros(v + unit / 8 * (BN * 128) + r * 128 + unit % 8 * 16);
    }
    fence_async_shared();
    named_barrier(5, 128 * Shape::Consumers);
  }

  // The thread's two rows: which token and head each is, and which keys it sees.
  struct Place {
    int token[2], head[2];
  };
  ATTNKIT_DEVICE Place place_rows(const Tile& t) {
    Place at;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = group * 64 + lane / 32 * 16 + lane % 32 / 4 + 8 * r;
      const int in_tile = row * p.g_magic >> 20;
      at.token[r] = t.token0 + in_tile;
      at.head[r] = t.h * p.G + row - in_tile * p.G;
      const bool real = in_tile < p.tile_tokens && at.token[r] < t.tokens;
      const int key = t.length - t.tokens + at.token[r];
      rows.high[r] = !real || key < 0 ? 0 : p.causal ? key + 1 : p.window ? min(t.length, key + p.window) : t.length;
      rows.low[r] = p.window ? key - p.window + 1 : 0;
      if (!real) at.token[r] = -1;
    }
    return at;
  }

  // Where the pieces of a tile meet. Each thread leaves its part of the outputs, maxima and sums in the workspace and
  // the warpgroup that comes last adds the parts of all up, in the order of the pieces; true there. unit(r) times a row's maximum
  // is a logit in log2.
  template <class Unit>
  ATTNKIT_DEVICE bool meet(const Tile& t, const Unit& unit) {
    constexpr int Units = Shape::DV / 8;
    float4* values = reinterpret_cast<float4*>(p.partial);
    float4* weights = values + static_cast<i64>(p.slots) * (Shape::Consumers * 128 * Units);
    auto mine = [&](int piece) { return static_cast<i64>(t.slot0 + piece) * Shape::Consumers + group; };
    float4* to = values + mine(t.piece) * (128 * Units) + lane;
#pragma unroll
    for (int i = 0; i < Units; ++i) to[i * 128] = make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    rows.top[0] *= unit(0);  // the pieces meet in logits
    rows.top[1] *= unit(1);
    weights[mine(t.piece) * 128 + lane] = make_float4(rows.top[0], rows.top[1], rows.sum[0], rows.sum[1]);
    int* counter = p.counters + 2 + mine(0);
    named_barrier(6 + group, 128);
    if (lane == 0) {
      const bool last = add_release(counter, 1) == t.pieces - 1;
      if (last) *counter = 0;
      s.last[group] = last;
    }
    named_barrier(6 + group, 128);
    if (s.last[group] == 0) return false;
    rows.clear();
    for (int i = 0; i < t.pieces; ++i) {
      const float4 w = load_l2(weights + mine(i) * 128 + lane);
      rows.top[0] = fmaxf(rows.top[0], w.x);
      rows.top[1] = fmaxf(rows.top[1], w.y);
    }
#pragma unroll
    for (int i = 0; i < Shape::DV / 2; ++i) out[i] = 0.f;
    constexpr int Batch = Units < 16 ? Units : 16, Together = Shape::DV == 256 ? 1 : 2;  // pieces whose values are on their way at once
#pragma unroll 1
    for (int piece0 = 0; piece0 < t.pieces; piece0 += Together) {
      float by[Together][2];
#pragma unroll
      for (int n = 0; n < Together; ++n) {
        float4 w = make_float4(negative_infinity(), negative_infinity(), 0.f, 0.f);
        if (piece0 + n < t.pieces) w = load_l2(weights + mine(piece0 + n) * 128 + lane);
        by[n][0] = w.x == negative_infinity() ? 0.f : exp2_fast(w.x - rows.top[0]);
        by[n][1] = w.y == negative_infinity() ? 0.f : exp2_fast(w.y - rows.top[1]);
        rows.sum[0] = fmaf(w.z, by[n][0], rows.sum[0]);
        rows.sum[1] = fmaf(w.w, by[n][1], rows.sum[1]);
      }
#pragma unroll
      for (int first = 0; first < Units; first += Batch) {
        float4 got[Together][Batch];
#pragma unroll
        for (int n = 0; n < Together; ++n) {
          const float4* from = values + mine(min(piece0 + n, t.pieces - 1)) * (128 * Units) + lane;
#pragma unroll
          for (int i = 0; i < Batch; ++i) got[n][i] = load_l2(from + (first + i) * 128);
        }
#pragma unroll
        for (int n = 0; n < Together; ++n) {
#pragma unroll
          for (int i = 0; i < Batch; ++i) {
            float* to = out + 4 * (first + i);
            to[0] = fmaf(got[n][i].x, by[n][0], to[0]);
            to[1] = fmaf(got[n][i].y, by[n][0], to[1]);
            to[2] = fmaf(got[n][i].z, by[n][1], to[2]);
            to[3] = fmaf(got[n][i].w, by[n][1], to[3]);
          }
        }
      }
    }
    return true;
  }
};

}  // namespace attnkit
