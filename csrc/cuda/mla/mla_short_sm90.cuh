// Absorbed latent decode (MLA) for many query rows where there are two tiles of 64 keys a CTA at most: few sequences, not long.
//
// Such a call is a chain of waits: lens, the table, the tiles, the scores, the sums, and the meeting of all pieces. So nothing
// here goes round: a CTA has 64 query rows and one piece of one sequence, all of its tiles and q have a place in shared memory
// of their own, and sixteen warps share what is to be done. Two warpgroups make scores, one a tile; all four multiply weights
// with values, 128 columns each; then all warps publish, and all add up. The code is short, as what runs once comes from L2.
#pragma once
#include "mla_short_meeting.cuh"
#include "mla_short_schedule.cuh"
#include "mla_short_widener.cuh"

namespace attnkit {

template <int Ctas_, bool Fp8_>
struct MlaShortShape {
  static constexpr int Ctas = Ctas_;  // of a cluster: 64 rows each, the same keys
  static constexpr bool Fp8 = Fp8_;   // the cache of 656 bytes a token
  static constexpr int C = 512, R = 64, Rows = 64, T = 64, Tiles = 2;
  static constexpr int Planes = (C + R) / 64, PlaneBytes = T * 128, TileBytes = Planes * PlaneBytes;
  static constexpr int Threads = 512, Loaders = 4;  // warps that load, the last ones
  static constexpr int SharedBytes = (Tiles + 1) * TileBytes + 2048 + 1024;
};

// What the warps share. Weights of a tile take the place of its rope plane.
template <class Shape>
struct MlaShortShared {
  u32 tiles, q;         // [2, 9, 64, 128], [9, 64, 128]
  u32 full, ready;      // barriers: [3, 3] of the tiles and q (planes 0 to 3, 4 to 7, rope); [2]: a tile's weights are there
  u32 settled;          // barrier: what the first tile's weights are relative to is known
  float *top, *sum;     // [2, 64]: what weights are relative to, as a power of two, and their sum
  float* decay;         // [64]: what the first tile's sums shrink by when the second's come
  int* flag;
  char* raw;

  ATTNKIT_DEVICE explicit MlaShortShared(char* raw) : raw(raw) {
    tiles = smem_address(raw);
    q = tiles + Shape::Tiles * Shape::TileBytes;
    char* rest = raw + (Shape::Tiles + 1) * Shape::TileBytes;
    full = smem_address(rest), ready = full + 8 * 9, settled = ready + 16;
    top = reinterpret_cast<float*>(rest + 128);
    sum = top + 128, decay = sum + 128;
    flag = reinterpret_cast<int*>(decay + 64);
  }

  ATTNKIT_DEVICE u32 tile(int t) const { return tiles + t * Shape::TileBytes; }
  ATTNKIT_DEVICE u32 weights(int t) const { return tile(t) + 8 * Shape::PlaneBytes; }
  ATTNKIT_DEVICE u32 full_of(int t, int part) const { return full + 8 * (3 * t + part); }  // t = 2: of q

  ATTNKIT_DEVICE void init_barriers() const {
    for (int i = 0; i < 9; ++i) mbarrier_init(full + 8 * i, i % 3 == 2 ? 1 : 4);
    for (int i = 0; i < 3; ++i) mbarrier_init(ready + 8 * i, 4);  // settled among them
    mbarrier_init_fence();
  }
};

template <class Shape>
struct MlaShort {
  static constexpr int T = Shape::T, Ctas = Shape::Ctas, PlaneBytes = Shape::PlaneBytes;
  const MlaWideParams& p;
  const MlaShortShared<Shape>& s;
  const int row0, warp, lane;
  MlaShortPiece piece;
  float out[64];  // this warpgroup's 128 columns

  ATTNKIT_DEVICE int group() const { return warp / 4; }
  ATTNKIT_DEVICE int row() const { return warp % 4 * 16 + lane / 4; }  // and 8 below

  ATTNKIT_DEVICE void load_q(int plane, int part) const {
    const int first = p.q_heads < p.rows ? row0 / p.q_heads : 0, head = row0 - first * p.q_heads;
    mbarrier_arrive_expect(s.full_of(2, part), PlaneBytes);
    tma_load_4d(s.q + plane * PlaneBytes, &p.q_map, s.full_of(2, part), plane * 64, head, first, piece.b);
  }

  // Of an fp8 cache each CTA widens all.
  ATTNKIT_DEVICE void load_and_widen() const {
    if (warp >= 7) {
      if (elect_one()) load_q((warp + 1) % 9, (warp + 1) % 9 / 4);
      __syncwarp();
    }
    const int t = warp / 8, row = warp % 8 * 8;
    if (t < piece.tiles) MlaShortWidener{p, piece.b, piece.length, piece.low, (piece.tile + t) * T + row, row, s.tile(t)}.run();
    __syncthreads();
  }

  ATTNKIT_DEVICE void wait_tile(int t, int part) const {
    if constexpr (!Shape::Fp8) mbarrier_wait(s.full_of(t, part), 0);
  }

  ATTNKIT_DEVICE bool loads() const { return !Shape::Fp8 && warp >= Shape::Threads / 32 - Shape::Loaders; }
  // Each CTA loads its share of a tile's keys, for both: this many boxes, as a power of two, from this one on.
  ATTNKIT_DEVICE int share_shift() const { return 6 - p.box_shift - (Ctas - 1); }
  ATTNKIT_DEVICE int first_box() const { return Ctas > 1 ? cluster_rank() << share_shift() : 0; }

  // A lane's box of the share in all tiles.
  ATTNKIT_DEVICE int page() const {
    const int shift = share_shift(), box = first_box() + (lane & ((1 << shift) - 1));
    const int token = (piece.tile + (lane >> shift)) * T + (box << p.box_shift);
    if (lane >= piece.tiles << shift || token >= piece.length) return 0;
    return load_l2(p.pages + piece.b * p.pages_b + (token >> p.page_shift));
  }

  // The last warps load: each every fourth plane, so that planes are asked for in the order that the scores need them.
  ATTNKIT_DEVICE void load(int page) const {
    const int shift = p.box_shift, mine_shift = share_shift(), mine = 1 << mine_shift, box0 = first_box();
    const u64 policy = evict_first_policy();
#pragma unroll 1
    for (int t = 0; t < piece.tiles; ++t) {
      const int key0 = (piece.tile + t) * T, valid = max(0, min((piece.length - key0 + (1 << shift) - 1) >> shift, T >> shift));
      if (t > 0) mbarrier_wait(s.full_of(2, 0), 0);  // the first tile is to come first
#pragma unroll 1
      for (int plane = warp - (Shape::Threads / 32 - Shape::Loaders); plane < Shape::Planes; plane += Shape::Loaders) {
        const int part = plane / 4;
        if (elect_one()) {
          if (t == 0) load_q(plane, part);
          mbarrier_arrive_expect(s.full_of(t, part), valid * 128 << shift);
        }
#pragma unroll 1
        for (int box = 0; box < min(mine, valid - box0); ++box) {
          const int from = __shfl_sync(~0u, page, (t << mine_shift) + box);
          const int slot = (key0 + ((box0 + box) << shift)) & ((1 << p.page_shift) - 1);
          const u32 to = s.tile(t) + plane * PlaneBytes + (128 * (box0 + box) << shift);
          if (elect_one()) {
            if constexpr (Ctas > 1) {
              tma_load_3d_multicast(to, &p.kv_map, s.full_of(t, part), plane * 64, slot, from, (1 << Ctas) - 1, policy);
            } else {
              tma_load_3d(to, &p.kv_map, s.full_of(t, part), plane * 64, slot, from, policy);
            }
          }
        }
        __syncwarp();
      }
    }
  }

  ATTNKIT_DEVICE void multiply_keys(int t, float (&scores)[32]) const {
    const u64 q = mla_operand(s.q), keys = mla_operand(s.tile(t));
    constexpr int Plane = PlaneBytes / 16;
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = 0.f;
#pragma unroll
    for (int step = 0; step < Shape::Planes * 4; ++step) {
      if (step % 16 == 0) mbarrier_wait(s.full_of(2, step / 16), 0), wait_tile(t, step / 16);
      if (step == 0) {
        wgmma_hold(scores);
        wgmma_fence();
      }
      wgmma_ss<true>(scores, q + step / 4 * Plane + step % 4 * 2, keys + step / 4 * Plane + step % 4 * 2, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(scores);
  }

  ATTNKIT_DEVICE void mask(int t, float (&scores)[32]) const {
    const int tile = piece.tile + t, column = tile * T + lane % 4 * 2;
    if (p.window == 0 && tile * T + T <= piece.length - p.Q + 1) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = min((row0 + row() + 8 * r) / p.H, p.Q - 1);
      const int at = piece.length - p.Q + token - column, from = p.window > 0 ? at - p.window : -1 - column;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * i + e > at || 8 * i + e <= from) scores[4 * i + 2 * r + e] = negative_infinity();
        }
      }
    }
  }

  // What this tile's weights are relative to. The second's follow the first's, unless they are 2^8 ahead.
  ATTNKIT_DEVICE void settle_top(int t, const float (&scores)[32], float factor, float (&top)[2]) const {
    float most[2] = {negative_infinity(), negative_infinity()};
#pragma unroll
    for (int i = 0; i < 32; i += 2) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fmaxf(scores[i], scores[i + 1]));
    if (t > 0) mbarrier_wait(s.settled, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      top[r] = most[r] == negative_infinity() ? most[r] : most[r] * factor;
      if (t == 0) {
        if (lane % 4 == 0) s.top[row() + 8 * r] = top[r];
        continue;
      }
      const float before = s.top[row() + 8 * r];
      float decay = 1.f;
      if (before != negative_infinity()) {
        const float up = top[r] > before + 8.f ? ceilf(top[r] - before) : 0.f;
        top[r] = before + up, decay = exp2_fast(-up);
      }
      if (lane % 4 == 0) s.decay[row() + 8 * r] = decay, s.top[64 + row() + 8 * r] = top[r];
    }
    __syncwarp();
    if (t == 0 && lane == 0) mbarrier_arrive(s.settled);
  }

  ATTNKIT_DEVICE void weigh(int t) const {
    float scores[32], top[2], sum[2] = {0.f, 0.f};
    const float factor = p.scale * kLog2e;
    multiply_keys(t, scores);
    mask(t, scores);
    settle_top(t, scores, factor, top);
    named_barrier(1 + group(), 128);  // all four warps have read the rope plane
    const float base[2] = {top[0] == negative_infinity() ? 0.f : top[0], top[1] == negative_infinity() ? 0.f : top[1]};
    const int row16 = warp % 4 * 16 + lane % 16;
    const u32 to = s.weights(t) + row16 * 128 + ((lane / 16 ^ (row16 & 7)) << 4);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      float* x = scores + 8 * step;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = exp2_fast(fmaf(x[i], factor, -base[i / 2 % 2]));
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i / 2 % 2] += x[i];
      store_matrix_x4(to ^ step * 32, pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      if (lane % 4 == 0) s.sum[64 * t + row() + 8 * r] = sum[r];
    }
    fence_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.ready + 8 * t);
  }

  // Slots outside the sequence may hold NaN, and zero times NaN is NaN: their rows become zero.
  ATTNKIT_DEVICE void clear_outside(int t) const {
    const int from = piece.low - (piece.tile + t) * T, end = piece.length - (piece.tile + t) * T;
    if (from <= 0 && end >= T) return;
#pragma unroll 1
    for (int i = threadIdx.x & 127; i < T * 16; i += 128) {
      const int key = i / 8 % T;
      if (key < from || key >= end) store_shared_zeros(s.tile(t) + 2 * group() * PlaneBytes + i * 16);
    }
    fence_async_shared();
    named_barrier(1 + group(), 128);
  }

  ATTNKIT_DEVICE void multiply_values() {
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] = 0.f;
#pragma unroll 1
    for (int t = 0; t < piece.tiles; ++t) {
      mbarrier_wait(s.ready + 8 * t, 0);
      wait_tile(t, group() / 2);
      if (t > 0) {
        const float by0 = s.decay[row()], by1 = s.decay[row() + 8];
        if (__any_sync(~0u, by0 != 1.f || by1 != 1.f)) {
#pragma unroll
          for (int i = 0; i < 64; i += 4) out[i] *= by0, out[i + 1] *= by0, out[i + 2] *= by1, out[i + 3] *= by1;
        }
      }
      if constexpr (!Shape::Fp8) clear_outside(t);
      const u64 weights = mla_operand(s.weights(t)), values = mla_operand(s.tile(t) + 2 * group() * PlaneBytes);
      wgmma_hold(out);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < T / 16; ++step) wgmma_ss_transposed<true>(out, weights + step * 2, values + step * 128, 1);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_hold(out);
    }
  }

  // A row's: what its weights are relative to, and their sum.
  ATTNKIT_DEVICE float2 total(int r) const {
    const int n = row() + 8 * r;
    if (piece.tiles == 1) return make_float2(s.top[n], s.sum[n]);
    return make_float2(s.top[64 + n], s.sum[n] * s.decay[n] + s.sum[64 + n]);
  }

  ATTNKIT_DEVICE void write() const {
    const MlaRows rows{p, piece.b, row0, 128 * group()};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 sums = total(r);
      const float by = rows.finish(row() + 8 * r, sums.x, sums.y, group() == 0 && lane % 4 == 0);
      if (!rows.has(row() + 8 * r)) continue;
      char* to = rows.place(row() + 8 * r) + lane % 4 * 4;
#pragma unroll
      for (int i = 0; i < 16; ++i) *reinterpret_cast<u32*>(to + 16 * i) = pack_bf16(out[4 * i + 2 * r] * by, out[4 * i + 2 * r + 1] * by);
    }
  }

  // ``page``: page() of the warps that load.
  ATTNKIT_DEVICE void run(int page) {
    if constexpr (Shape::Fp8) {
      load_and_widen();
    } else if (loads()) {
      load(page);
    }
    if (group() < piece.tiles) weigh(group());
    multiply_values();
    if (piece.count == 1) return write();
    const int ctas = p.row_blocks * Ctas;
    const MlaShortMeeting meeting{
        p, piece.b, row0, piece.index, piece.count, piece.first * ctas + row0 / 64, ctas, p.groups * ctas, s.raw, s.flag, warp,
    };
    meeting.publish(out, total(0), total(1));
    meeting.meet_and_add();
  }
};

template <class Shape>
ATTNKIT_DEVICE void mla_short(const MlaWideParams& p) {
  extern __shared__ __align__(1024) char raw[];
  const MlaShortShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = Shape::Ctas > 1 ? cluster_rank() : 0;
  if (threadIdx.x == 0) s.init_barriers();
  if (!Shape::Fp8 && threadIdx.x == 32) tma_prefetch_map(&p.kv_map);
  if (threadIdx.x == 64) tma_prefetch_map(&p.q_map);
  if (warp == 3 && lane * 32 < p.B) prefetch_l2(p.lens + lane * 32);
  if (warp == 4 && rank == 0) {
    const int lines = ((p.capacity >> p.page_shift) + 31) >> 5, line = (lane * gridDim.z + blockIdx.z) * gridDim.y + blockIdx.y;
    if (line < p.B * lines) prefetch_l2(p.pages + line / lines * p.pages_b + line % lines * 32);
  }
  if (Shape::Ctas > 1) {
    cluster_meet();
  } else {
    __syncthreads();
  }
  launch_dependents();
  MlaShort<Shape> short_one{p, s, static_cast<int>(blockIdx.y * Shape::Ctas + rank) * Shape::Rows, warp, lane};
  bool found;
  int page = 0;
  // Several sequences' pieces are found by lens that the grid before may still change, and found again if it did.
#pragma unroll 1
  for (bool ahead = p.B > 1 && p.B <= 32;; ahead = false) {
    if (!ahead) wait_for_previous_grid();
    found = short_one.piece.find(p, blockIdx.z);
    if (ahead) wait_for_previous_grid();
    if (found && short_one.loads()) page = short_one.page();
    if (!ahead || !short_one.piece.stale(p)) break;
  }
  if (found) short_one.run(page);
}

}  // namespace attnkit
