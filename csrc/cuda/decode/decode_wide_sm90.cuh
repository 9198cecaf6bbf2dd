// Paged decode where more than 16 rows share a KV head (several query tokens, or large groups): the rows on
// the M side of wgmma, 64 at a time, one warpgroup. Keys and values are read from shared memory once for all
// rows, which mma.sync would have to do once for each 16. 16-bit caches only: wgmma takes no 8-bit operand
// beside a 16-bit one.
#pragma once
#include "../common/convert.cuh"
#include "decode_combine.cuh"
#include "decode_load.cuh"
#include "../common/wgmma_sm90.cuh"

namespace attnkit {

template <int D_, int DV_, int KvType_, int CtasPerSm_>
struct DecodeWideShape {
  static constexpr int D = D_, DV = DV_, KvType = KvType_, CtasPerSm = CtasPerSm_;
  static constexpr bool Bf16 = KvType == kBf16, Wide = true;
  static constexpr int Heads = 1, Cluster = 1;
  static constexpr bool Charge = false, Share = false;
  static constexpr int Rows = 64, T = 64, ElementBytes = 2;
  static constexpr int ConsumerWarps = 4, Consumers = 128, Producers = 2, Threads = Consumers + 32 * Producers;
  static constexpr int RowK = D * 2, RowV = DV * 2, SwizzleK = 128, SwizzleV = 128;
  static constexpr int StageBytes = T * (RowK + RowV), QBytes = Rows * RowK;
  static constexpr int QSlots = 1;  // so that at D = 128 two CTAs with three stages each just fit
  static constexpr int FixedBytes = QBytes + 512;
  static_assert(D % 64 == 0 && DV % 64 == 0, "head size");
};

template <class Shape>
struct DecodeWideConsumer {
  static constexpr int D = Shape::D, DV = Shape::DV, T = Shape::T;
  static constexpr bool Bf16 = Shape::Bf16;

  const DecodeParams& p;
  const DecodeShared& shared;
  int lane, warp;
  float sums[DV / 2];  // O: rows lane / 4 (+ 8) of the warp's 16, columns 8 j + 2 (lane % 4) (+ 1)
  float high[2], sum[2];
  float factor;
  int token[2];        // query token of this lane's two rows
  bool used;           // whether any row of this warp is one

  ATTNKIT_DEVICE DecodeWideConsumer(const DecodeParams& params, const DecodeShared& s) : p(params), shared(s) {
    lane = threadIdx.x & 31;
    warp = threadIdx.x >> 5;
  }

  ATTNKIT_DEVICE void begin(const Piece& piece) {
    const float k_scale = p.k_scale ? *reinterpret_cast<const float*>(p.k_scale + piece.h * p.k_scale_h) : 1.f;
    factor = p.scale * k_scale * (p.softcap > 0.f ? 1.f : kLog2e);
    used = warp * 16 < min(p.block_rows, p.Q * p.G - piece.block * p.block_rows);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      token[j] = (piece.block * p.block_rows + warp * 16 + lane / 4 + j * 8) * p.g_magic >> 20;
      high[j] = negative_infinity();
      sum[j] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) sums[i] = 0.f;
  }

  ATTNKIT_DEVICE void scores(float (&s)[T / 2], u32 k_tile) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const u64 q = wgmma_descriptor(shared.q + k / 4 * (Shape::Rows * 128) + k % 4 * 32, 0, 1024);
      const u64 keys = wgmma_descriptor(k_tile + k / 4 * (T * 128) + k % 4 * 32, 0, 1024);
      wgmma_ss<Bf16>(s, q, keys, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(s);
  }

  ATTNKIT_DEVICE void mask(float (&s)[T / 2], const Piece& piece, int key0) const {
    const int recent = piece.length - p.Q;
    u32 bits[2] = {};
    if (p.tree) {
      for (int i = 0; i < p.Q; ++i) {
        const bool sees = lane < p.Q && p.tree[piece.b * p.tree_b + i * p.tree_i + lane * p.tree_j] != 0;
        const u32 seen = __ballot_sync(~0u, sees);
        bits[0] = token[0] == i ? seen : bits[0];
        bits[1] = token[1] == i ? seen : bits[1];
      }
    }
#pragma unroll
    for (int e = 0; e < T / 2; ++e) {
      const int j = e >> 1 & 1, key = key0 + e / 4 * 8 + (lane & 3) * 2 + (e & 1), at = recent + token[j];
      bool seen = key <= at;
      if (p.tree) seen = key < recent || (key < piece.length && (bits[j] >> (key - recent) & 1));
      seen = seen && at >= 0 && (p.window == 0 || key > at - p.window);
      if (!seen) s[e] = negative_infinity();
    }
  }

  // Scores to weights with the rows' running maximum, then to the A fragments of P; O is scaled along.
  ATTNKIT_DEVICE void weights(float (&s)[T / 2], u32 (&w)[T / 4]) {
    float rescale[2];
    bool moved = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float most = s[2 * j];
#pragma unroll
      for (int i = 0; i < T / 8; ++i) most = fmaxf(most, fmaxf(s[4 * i + 2 * j], s[4 * i + 2 * j + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      most = fmaxf(most, high[j]);
      const float base = most == negative_infinity() ? 0.f : most;
      rescale[j] = exp2_fast(high[j] - base);
      moved = moved || most != high[j];
      high[j] = most;
      float added = 0.f;
#pragma unroll
      for (int i = 0; i < T / 8; ++i) {
        s[4 * i + 2 * j] = exp2_fast(s[4 * i + 2 * j] - base);
        s[4 * i + 2 * j + 1] = exp2_fast(s[4 * i + 2 * j + 1] - base);
        added += s[4 * i + 2 * j] + s[4 * i + 2 * j + 1];
      }
      sum[j] = sum[j] * rescale[j] + added;
    }
#pragma unroll
    for (int i = 0; i < T / 4; ++i) w[i] = pack<Bf16>(s[2 * i], s[2 * i + 1]);
    if (__any_sync(~0u, moved)) {
#pragma unroll
      for (int i = 0; i < DV / 2; ++i) sums[i] *= rescale[i >> 1 & 1];
    }
  }

  ATTNKIT_DEVICE void add_values(const u32 (&w)[T / 4], u32 v_tile) {
    wgmma_hold(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < T / 16; ++k) {
      wgmma_rs_transposed<Bf16>(sums, w + 4 * k, wgmma_descriptor(v_tile + k * 2048, T * 128, 1024), 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sums);
  }

  // Weight 0 times a value nobody wrote may be NaN: values outside the sequence become zeros.
  ATTNKIT_DEVICE void clear_values(const Piece& piece, int key0, u32 v_tile) const {
    for (int i = threadIdx.x; i < T * 8; i += Shape::Consumers) {
      const int key = key0 + i / 8;
      if (key >= piece.low && key < piece.length) continue;
      for (int plane = 0; plane < DV / 64; ++plane) store_shared_zeros(v_tile + plane * T * 128 + i * 16);
    }
    fence_async_shared();
    named_barrier(1, Shape::Consumers);
  }

  ATTNKIT_DEVICE void tile(const Piece& piece, int key0, u32 k_tile) {
    float s[T / 2];
    u32 w[T / 4];
    scores(s, k_tile);
    if (used) {
      const bool capped = p.softcap > 0.f;
      const float twice = 2.f * kLog2e * p.softcap_inverse;
#pragma unroll
      for (int e = 0; e < T / 2; ++e) {
        float x = s[e] * factor;
        if (capped) x = kLog2e * p.softcap * (1.f - 2.f * reciprocal(1.f + exp2_fast(x * twice)));
        s[e] = x;
      }
      const bool inside = key0 + T <= piece.length - p.Q + 1 && (p.window == 0 || key0 > piece.length - 1 - p.window);
      if (!inside) mask(s, piece, key0);
      weights(s, w);
    } else {
#pragma unroll
      for (int i = 0; i < T / 4; ++i) w[i] = 0;
    }
    const u32 v_tile = k_tile + T * Shape::RowK;
    if (key0 < piece.low || key0 + T > piece.length) clear_values(piece, key0, v_tile);
    add_values(w, v_tile);
  }

  ATTNKIT_DEVICE void finish(const Piece& piece) {
    const RowOutput output(p, piece, Shape::Rows, DV);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      sum[j] += __shfl_xor_sync(~0u, sum[j], 1);
      sum[j] += __shfl_xor_sync(~0u, sum[j], 2);
    }
    // Lanes 2 i and 2 i + 1 trade halves: the even one gets four columns of row lane / 4, the odd one of row + 8.
    const bool odd = lane & 1, whole = piece.count == 1;
    const int row = warp * 16 + lane / 4 + (odd ? 8 : 0), column0 = (lane & 2) * 2;
    const bool valid = row < output.rows;
    const float row_high = odd ? high[1] : high[0], row_sum = odd ? sum[1] : sum[0];
    float by = 1.f;
    char* to = nullptr;
    if (valid && whole) {
      by = output.finish(row, row_high, row_sum, (lane & 2) == 0);
      to = output.place(row) + column0 * 2;
    } else if (valid) {
      const int slot = piece.slot(piece.index);
      if ((lane & 2) == 0) output.weights(slot, 0)[row] = make_float2(row_high, row_sum);
      to = reinterpret_cast<char*>(output.values(slot) + row * DV + column0);
    }
#pragma unroll
    for (int i = 0; i < DV / 8; ++i) {
      const float x = __shfl_xor_sync(~0u, odd ? sums[4 * i] : sums[4 * i + 2], 1);
      const float y = __shfl_xor_sync(~0u, odd ? sums[4 * i + 1] : sums[4 * i + 3], 1);
      const float4 value = odd ? make_float4(x, y, sums[4 * i + 2], sums[4 * i + 3]) : make_float4(sums[4 * i], sums[4 * i + 1], x, y);
      if (valid && whole) output.write(to + i * 16, value, by);
      if (valid && !whole) *reinterpret_cast<float4*>(to + i * 32) = value;
    }
    if (piece.count > 1) combine<Shape>(p, piece, output, shared.scratch);
  }

  ATTNKIT_DEVICE void run() {
    int stage = 0, phase = 0;
    for (int pieces = 0;; ++pieces) {
      mbarrier_wait(shared.q_full, pieces & 1);
      const Piece& piece = shared.pieces[0];
      const int tiles = piece.tiles;
      if (tiles == 0) break;
      begin(piece);
      if (threadIdx.x == 0) prefetch_counters<Shape>(p, piece);
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        mbarrier_wait(shared.full + 8 * stage, phase);
        tile(piece, (piece.tile + t) * T, shared.ring + stage * Shape::StageBytes);
        if (lane == 0) mbarrier_arrive(shared.empty + 8 * stage);
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      const Piece done = piece;
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.q_empty);
      finish(done);
    }
  }
};

}  // namespace attnkit
