// The wide latent decode's warpgroup that makes weights: scores by wgmma, their exponentials, and the hand-over.
#pragma once
#include "mla_wide_shared.cuh"

namespace attnkit {

// In the order of the program: between the stores of weights that are ready.
ATTNKIT_DEVICE float exp2_ordered(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class Shape>
struct MlaWideScorer {
  static constexpr int T = Shape::T, Parts = Shape::Parts;
  static constexpr float kAhead = 8.0f;
  static constexpr int Held = Shape::Held, Steps = (Shape::C + Shape::R) / 16;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int lane, warp;
  MlaRing<Shape::Stages> ring;
  u32 q[4 * Held];
  float scores[T / 2];
  float top[2], sum[2];  // the power of two that weights are relative to; this thread's part of the sum
  u32 mine;              // this lane's place in the first rope plane, as store_matrix_x4 has it for columns 0 to 15
  u32 dirty = 0;         // a bit a rope plane: its decays are not all zero
  u32 read_parity = 0;   // of s.read
  int row0;              // the CTA's first query row

  ATTNKIT_DEVICE void arrive(u32 barrier) const {
    if (lane == 0) mbarrier_arrive(barrier + 8 * ring.stage);
  }

  // Where lane l's row of four 8 x 8 matrices lies: 16 rows of this warp, 16 columns from 16 ``step`` on of a plane.
  ATTNKIT_DEVICE u32 matrix_row(u32 plane, int step) const {
    const int row = warp * 16 + lane % 16, unit = 2 * step + lane / 16;
    return plane + row * 128 + ((unit ^ (row & 7)) << 4);
  }

  ATTNKIT_DEVICE void wait_part(int part) const { mbarrier_wait(s.full + 8 * (Parts * ring.stage + part), ring.parity); }
  ATTNKIT_DEVICE void wait_rope() const { mbarrier_wait(s.rope_full + 8 * ring.rope(), ring.rope_parity()); }

  ATTNKIT_DEVICE void load_q() {
    const u32 from = s.ring + ring.stage * Shape::StageBytes;
#pragma unroll
    for (int step = 0; step < Held; ++step) {
      if (step == 16) wait_part(1);
      load_matrix_x4(reinterpret_cast<u32(&)[4]>(q[4 * step]), matrix_row(from + step / 4 * Shape::PlaneBytes, step % 4));
    }
    wait_rope();
    // Each warp copies its own 16 rows of what is left; its products with the old ones are done. The one step lies in
    // blocks of 8 rows and 8 columns, the planes as they came.
#pragma unroll
    for (int step = Held; step < Steps; ++step) {
      const u32 plane = step < 32 ? from + step / 4 * Shape::PlaneBytes : s.rope + ring.rope() * Shape::PlaneBytes;
      const u32 to = step == Held ? s.q + lane / 16 * 1024 + (warp * 16 + lane % 16) * 16
                                  : matrix_row(s.q + Shape::StepBytes + (step - 28) / 4 * Shape::PlaneBytes, step % 4);
      u32 r[4];
      load_matrix_x4(r, matrix_row(plane, step % 4));
      store_matrix_x4(to, r[0], r[1], r[2], r[3]);
    }
    fence_async_shared();
    named_barrier(1, 128);
  }

  // ``held``: a stage that the adders may begin with when this has been issued, or before if there is a wait in it.
  ATTNKIT_DEVICE void multiply(int held) {
    const u64 keys = mla_operand(s.ring + ring.stage * Shape::StageBytes), rope = mla_operand(s.rope + ring.rope() * Shape::PlaneBytes);
    const u64 rest = mla_operand(s.q + Shape::StepBytes);
    const u64 lone = static_cast<u64>((s.q & 0x3ffff) >> 4 | 1024 >> 4 << 16) | static_cast<u64>(128 >> 4) << 32;
    constexpr int Plane = Shape::PlaneBytes / 16;
    wgmma_hold(scores);
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
      if (step == 0) wait_part(0);
      if (step == 16) wait_part(1);
      if (step == 32 && held >= 0 && !mbarrier_test(s.rope_full + 8 * ring.rope(), ring.rope_parity())) let_go(held), held = -1;
      if (step == 32) wait_rope();
      if (step == 0) wgmma_fence();
      const u64 b = step < 32 ? keys + step / 4 * Plane + step % 4 * 2 : rope + step % 4 * 2;
      if (step < Held) {
        wgmma_rs<Shape::Bf16>(scores, q + 4 * step, b, step > 0);
      } else if (step == Held) {
        wgmma_ss<Shape::Bf16>(scores, lone, b, 1);
      } else {
        wgmma_ss<Shape::Bf16>(scores, rest + (step - 28) / 4 * Plane + step % 4 * 2, b, 1);
      }
    }
    if (held >= 0) let_go(held);
    wgmma_commit();
  }

  ATTNKIT_DEVICE void mask(const MlaPiece& piece, int tile) {
    u32 lane;  // asked for anew: rows divided by H are not to be kept in registers for all tiles
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int column = tile * T + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = min((row0 + warp * 16 + lane / 4 + 8 * r) / p.H, p.Q - 1);
      const int at = piece.length - p.Q + token - column, low = p.window > 0 ? at - p.window : -1 - column;
#pragma unroll
      for (int i = 0; i < T / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * i + e > at || 8 * i + e <= low) scores[4 * i + 2 * r + e] = negative_infinity();
        }
      }
    }
  }

  ATTNKIT_DEVICE void cap() {
    const float inner = 2.0f * kLog2e * p.scale / p.softcap, outer = p.softcap;
#pragma unroll
    for (int i = 0; i < T / 2; ++i) scores[i] = outer - 2.0f * outer * reciprocal(1.0f + exp2_fast(scores[i] * inner));
  }

  // Moves what weights are relative to, to the maximum at first and then by whole powers of two.
  ATTNKIT_DEVICE void move(float (&most)[2], float factor, float (&decay)[2]) {
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      const float other0 = __shfl_xor_sync(~0u, most[0], d), other1 = __shfl_xor_sync(~0u, most[1], d);
      most[0] = fmaxf(most[0], other0), most[1] = fmaxf(most[1], other1);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float high = most[r] == negative_infinity() ? most[r] : most[r] * factor;
      if (top[r] == negative_infinity()) {
        top[r] = high;
      } else if (high > top[r] + kAhead) {
        const float up = ceilf(high - top[r]);
        decay[r] = -up;
        top[r] += up;
        sum[r] *= exp2_fast(-up);
      }
    }
  }

  // Only where a row has moved, or had when the plane was used before.
  ATTNKIT_DEVICE void tell_decay(bool moved, const float (&decay)[2]) {
    const u32 bit = 1u << ring.rope();
    if (!moved && (dirty & bit) == 0) return;
    dirty = moved ? dirty | bit : dirty & ~bit;
    if (lane % 4 == 0) {
      signed char* to = s.decay + ring.rope() * 64 + warp * 16 + lane / 4;
      to[0] = static_cast<signed char>(fmaxf(decay[0], -127.0f)), to[8] = static_cast<signed char>(fmaxf(decay[1], -127.0f));
    }
  }

  // Scores to weights, and these to the rope plane. What they are relative to follows the maximum only when it is more
  // than 2^8 behind: then outputs rarely have to be rescaled, which is exact, and most tiles need no maximum over all
  // their columns.
  ATTNKIT_DEVICE void weigh(float factor) {
    // Scores above zero are ordered as integers, too, and those come three at a time. Where others count, all are looked at
    // in each tile.
    float decay[2] = {0.0f, 0.0f};
    int above[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < T / 2; i += 2) {
      int& most = above[i / 2 % 2];
      most = max(max(most, __float_as_int(scores[i])), __float_as_int(scores[i + 1]));
    }
    const bool ahead = __int_as_float(above[0]) * factor > top[0] + kAhead || __int_as_float(above[1]) * factor > top[1] + kAhead;
    const bool moved = __any_sync(~0u, ahead || fminf(top[0], top[1]) < -kAhead);
    if (moved) {
      float most[2] = {negative_infinity(), negative_infinity()};
#pragma unroll
      for (int i = 0; i < T / 2; i += 2) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fmaxf(scores[i], scores[i + 1]));
      move(most, factor, decay);
    }
    tell_decay(moved, decay);
    const float base[2] = {top[0] == negative_infinity() ? 0.0f : top[0], top[1] == negative_infinity() ? 0.0f : top[1]};
    // All four warps have read the rope plane that the weights are written to.
    mbarrier_wait(s.read, read_parity);
    read_parity ^= 1;
    const u32 to = mine + ring.rope() * Shape::PlaneBytes;
    float total[2][2] = {};
#pragma unroll
    for (int step = 0; step < 5; ++step) {  // exponentials of a step are under way while those of the one before are packed
      if (step < 4) {
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[8 * step + i] = exp2_ordered(fmaf(scores[8 * step + i], factor, -base[i / 2 % 2]));
      }
      if (step == 0) continue;
      const float* x = scores + 8 * (step - 1);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i / 2 % 2][i % 2] += x[i];
      store_matrix_x4(to ^ (step - 1) * 32, pack<Shape::Bf16>(x[0], x[1]), pack<Shape::Bf16>(x[2], x[3]), pack<Shape::Bf16>(x[4], x[5]),
                      pack<Shape::Bf16>(x[6], x[7]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += total[r][0] + total[r][1];
  }

  ATTNKIT_DEVICE void tell_totals() const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (lane % 4 == 0) s.totals[warp * 16 + lane / 4 + 8 * r] = make_float2(top[r], total);
    }
  }

  // Lets the adders begin with the tile before this one.
  ATTNKIT_DEVICE void let_go(int stage) const {
    if (lane == 0) mbarrier_arrive(s.go + 8 * stage);
  }

  // One tile, the ``last`` of its piece or not. ``held``: the stage of a tile that the adders may not yet begin with.
  template <bool Capped, bool Masked>
  ATTNKIT_DEVICE void step(const MlaPiece& piece, int tile, bool last, int& held) {
    const float factor = Capped ? kLog2e : p.scale * kLog2e;
    if (held >= 0 && !mbarrier_test(s.full + 8 * Parts * ring.stage, ring.parity)) {
      let_go(held);  // nothing to issue yet: no reason to make them wait
      held = -1;
    }
    multiply(held);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(s.read);
    wgmma_hold(scores);
    if constexpr (Capped) cap();
    if constexpr (Masked) mask(piece, tile);
    weigh(factor);
    if (last) tell_totals();
    fence_async_shared();
    __syncwarp();
    arrive(s.scored);
    held = ring.stage;
    ring.next();
  }

  template <bool Capped>
  ATTNKIT_DEVICE void run() {
    mine = matrix_row(s.rope, 0);
    if (lane < 8) reinterpret_cast<u32*>(s.decay)[lane / 4 * 16 + warp * 4 + lane % 4] = 0;  // of this warp's rows
#pragma unroll
    for (int i = 0; i < T / 2; ++i) scores[i] = 0.0f;
#pragma unroll 1
    for (int n = 0;; n = (n + 1) & 3) {
      wait_part(0);
      const MlaPiece& piece = s.pieces[n];
      if (piece.tiles == 0) break;
      load_q();
      arrive(s.scored);
      arrive(s.go);
      ring.next();
      top[0] = top[1] = negative_infinity();
      sum[0] = sum[1] = 0.0f;
      // The same in all lanes, and known to be.
      int held = -1, tile = __shfl_sync(~0u, piece.tile, 0);
      const int end = tile + __shfl_sync(~0u, piece.tiles, 0), length = __shfl_sync(~0u, piece.length, 0);
      // Tiles that all rows see all of: those in between.
      const int full_end = Capped ? 0 : min(max(length - p.Q + 1, 0) / T, end);
      const int full_begin = p.window > 0 ? (max(length - 1 - p.window, -1) + T) / T : 0;
#pragma unroll 1
      for (; tile < min(full_begin, end); ++tile) step<Capped, true>(piece, tile, tile == end - 1, held);
#pragma unroll 1
      for (; tile < full_end; ++tile) step<Capped, false>(piece, tile, tile == end - 1, held);
#pragma unroll 1
      for (; tile < end; ++tile) step<Capped, true>(piece, tile, tile == end - 1, held);
      let_go(held);
      for (int sums = piece.takes_over() ? 2 : 0; sums > 0; --sums) {
        wait_part(0);
        arrive(s.scored);
        arrive(s.go);
        ring.next();
      }
    }
    arrive(s.scored);
  }
};

}  // namespace attnkit
