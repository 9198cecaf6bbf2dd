// Paged prefill for sm_90a: ragged query tokens against paged keys and values, in one launch.
//
// Bound by the tensor cores. Two producer warps bring Q, K and V tiles by TMA, a box a page (the pages of a tile
// stand under one another in shared memory); Consumers warpgroups own 64 rows each. The G query heads of a KV head
// are packed into the rows, token by token. Inside a warpgroup the product Q K^T of the next block runs beside the
// softmax of this one, and the warpgroups take turns at the tensor cores (FlashAttention-3, Shah et al. 2024).
// A persistent grid takes work from a counter, each sequence's last and so longest tiles first.
#pragma once
#include "convert.cuh"
#include "prefill_schedule.cuh"
#include "wgmma_sm90.cuh"

namespace attnkit {

// Shape of one build. D and DV are head sizes rounded up to 64s: TMA fills what lies beyond with zeros.
template <int D_, int DV_, bool Bf16_, int Consumers_, int BN_, int Stages_>
struct PrefillShape {
  static constexpr int D = D_, DV = DV_, Consumers = Consumers_, BN = BN_, Stages = Stages_;
  static constexpr bool Bf16 = Bf16_;
  static constexpr int Rows = 64 * Consumers;
  static constexpr int Threads = 128 * (Consumers + 1);
  static constexpr int QBytes = Rows * D * 2, KBytes = BN * D * 2, VBytes = BN * DV * 2;
  static constexpr int ConsumerRegisters = Consumers == 2 ? 240 : 160, ProducerRegisters = Consumers == 2 ? 24 : 32;
  static constexpr int SharedBytes = 1024 + QBytes + Stages * (KBytes + VBytes) + kMostSequences * 4 + 256;
  static_assert(D % 64 == 0 && DV % 64 == 0 && BN % 64 == 0, "tiles are made of 64-column boxes");
};

template <class Shape>
struct PrefillShared {
  u32 q, k, v;  // shared-space addresses, 1024-byte aligned
  u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty;
  int* tiles;   // [B]: tiles of each sequence
  int* work;    // [2]: the counter's answers, -1 at the end

  ATTNKIT_DEVICE explicit PrefillShared(char* raw) {
    const u32 base = (smem_address(raw) + 1023) & ~1023u;
    char* generic = raw + (base - smem_address(raw));
    q = base;
    k = q + Shape::QBytes;
    v = k + Shape::Stages * Shape::KBytes;
    const u32 rest = v + Shape::Stages * Shape::VBytes;
    u32 barrier = rest;
    q_full = barrier, q_empty = barrier + 8, work_full = barrier + 16, work_empty = barrier + 32;
    k_full = barrier + 48, k_empty = k_full + 8 * Shape::Stages;
    v_full = k_empty + 8 * Shape::Stages, v_empty = v_full + 8 * Shape::Stages;
    work = reinterpret_cast<int*>(generic + (rest - base) + 240);
    tiles = reinterpret_cast<int*>(generic + (rest - base) + 256);
  }

  ATTNKIT_DEVICE void init_barriers() const {
    constexpr int warps = 4 * Shape::Consumers;
    mbarrier_init(q_full, 1), mbarrier_init(q_empty, warps);
    for (int i = 0; i < 2; ++i) mbarrier_init(work_full + 8 * i, 1), mbarrier_init(work_empty + 8 * i, warps + 1);
    for (int i = 0; i < Shape::Stages; ++i) {
      mbarrier_init(k_full + 8 * i, 1), mbarrier_init(k_empty + 8 * i, warps);
      mbarrier_init(v_full + 8 * i, 1), mbarrier_init(v_empty + 8 * i, warps);
    }
    mbarrier_init_fence();
  }
};

// A ring's place: which stage, and the parity its barrier waits for.
template <int Stages>
struct Ring {
  int stage = 0;
  u32 parity = 0;
  ATTNKIT_DEVICE void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

template <class Shape>
struct PrefillProducer {
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  Ring<Shape::Stages> ring;
  u32 q_parity = 0;

  // Rows of one box, boxes a tile: a page each, or one part of a page that is larger than a tile.
  ATTNKIT_DEVICE int box_rows() const { return min(1 << p.page_shift, Shape::BN); }

  // One tile of K or V. TMA takes its coordinates from uniform registers, so one lane issues all boxes.
  ATTNKIT_DEVICE void load_tile(const void* map, u32 full, u32 to, int columns, int head, int page, int valid, int slot) {
    const int lane = threadIdx.x % 32, rows = box_rows();
    if (lane == 0) mbarrier_arrive_expect(full, valid * rows * columns * 2);
    for (int i = 0; i < valid; ++i) {
      const int from = __shfl_sync(~0u, page, i);
      if (lane == 0) {
        for (int c = 0; c < columns / 64; ++c) {
          tma_load_4d(to + c * (Shape::BN * 128) + i * rows * 128, map, full, c * 64, head, slot, from);
        }
      }
    }
  }

  ATTNKIT_DEVICE void load_q(const Tile& t) {
    mbarrier_wait(s.q_empty, q_parity ^ 1);
    q_parity ^= 1;
    if (threadIdx.x % 32 == 0) {
      mbarrier_arrive_expect(s.q_full, p.tile_tokens * p.G * Shape::D * 2);
      for (int c = 0; c < Shape::D / 64; ++c) {
        tma_load_3d(s.q + c * (Shape::Rows * 128), &p.q_map, s.q_full, c * 64, t.h * p.G, t.q0 + t.token0);
      }
    }
  }

  // K and V have a warp each, so that neither waits for the other's room. Page ids are read one tile ahead.
  template <bool Keys>
  ATTNKIT_DEVICE void run(const Tile& t) {
    if constexpr (Keys) load_q(t);
    constexpr int columns = Keys ? Shape::D : Shape::DV, bytes = Keys ? Shape::KBytes : Shape::VBytes;
    const u32 to = Keys ? s.k : s.v, full = Keys ? s.k_full : s.v_full, empty = Keys ? s.k_empty : s.v_empty;
    const void* map = Keys ? &p.k_map : &p.v_map;
    const int lane = threadIdx.x % 32, boxes = Shape::BN / box_rows();
    const int* row = p.pages + t.b * p.pages_b;
    const int used = (t.length + (1 << p.page_shift) - 1) >> p.page_shift;
    auto page_of = [&](int block) {
      const int first = (block * Shape::BN) >> p.page_shift;
      return lane < boxes && first + lane < used && block >= t.block_begin ? row[first + lane] : 0;
    };
    int page = page_of(t.block_end - 1);
    for (int block = t.block_end - 1; block >= t.block_begin; --block) {
      const int ahead = page_of(block - 1);
      const int valid = min(boxes, used - ((block * Shape::BN) >> p.page_shift));
      mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
      load_tile(map, full + 8 * ring.stage, to + ring.stage * bytes, columns, t.h, page, valid,
                (block * Shape::BN) & ((1 << p.page_shift) - 1));
      ring.next();
      page = ahead;
    }
  }
};

template <class Shape>
struct PrefillConsumer {
  static constexpr int BN = Shape::BN;
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  const int group, lane;
  Ring<Shape::Stages> k_ring, v_ring;
  u32 q_parity = 0;
  float scores[BN / 2], out[Shape::DV / 2];
  u32 probabilities[BN / 4];
  float top[2], sum[2];      // running maximum (in units of the raw score) and this thread's part of the sum
  int low[2], high[2];       // keys the thread's two rows see: [low, high)

  ATTNKIT_DEVICE void arrive(u32 barrier) const {
    if (lane % 32 == 0) mbarrier_arrive(barrier);
  }

  // Descriptors count addresses in 16 bytes: moving an operand is one addition.
  ATTNKIT_DEVICE void multiply_qk() {
    const u64 q = wgmma_descriptor(s.q + group * (64 * 128), 16, 1024);
    const u64 k = wgmma_descriptor(s.k, 16, 1024) + k_ring.stage * (Shape::KBytes / 16);
    wgmma_hold(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shape::D / 16; ++i) {
      wgmma_ss<Shape::Bf16>(scores, q + i / 4 * (Shape::Rows * 8) + i % 4 * 2, k + i / 4 * (BN * 8) + i % 4 * 2, i > 0);
    }
    wgmma_commit();
  }

  ATTNKIT_DEVICE void multiply_pv() {
    const u64 v = wgmma_descriptor(s.v, BN * 128, 1024) + v_ring.stage * (Shape::VBytes / 16);
    wgmma_hold(out);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BN / 16; ++i) wgmma_rs_transposed<Shape::Bf16>(out, probabilities + 4 * i, v + i * 128, 1);
    wgmma_commit();
  }

  // Slots at and beyond L may hold NaN, and zero times NaN is NaN: their value rows become zero.
  ATTNKIT_DEVICE void clear_values_beyond(int length, int block) {
    const int first = length - block * BN;
    if (first >= BN) return;
    const u32 v = s.v + v_ring.stage * Shape::VBytes;
    constexpr int PerRow = Shape::DV / 8;
    for (int i = group * 128 + lane; i < (BN - first) * PerRow; i += 128 * Shape::Consumers) {
      const int r = first + i / PerRow, unit = i % PerRow;
      store_shared_zeros(v + unit / 8 * (BN * 128) + r * 128 + unit % 8 * 16);
    }
    fence_async_shared();
    named_barrier(5, 128 * Shape::Consumers);
  }

  ATTNKIT_DEVICE void mask(int block) {
    const int column = block * BN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) {
      const int r = i / 2 % 2, key = column + i / 4 * 8 + i % 2;
      if (key < low[r] || key >= high[r]) scores[i] = negative_infinity();
    }
  }

  ATTNKIT_DEVICE void cap() {
    const float inner = 2.0f * kLog2e * p.scale / p.softcap;
    const float outer = p.softcap;
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) scores[i] = outer - 2.0f * outer * reciprocal(1.0f + exp2_fast(scores[i] * inner));
  }

  // scores -> exp2(scores - maximum), in place; leaves in ``decay`` what earlier sums and outputs shrink by.
  ATTNKIT_DEVICE void softmax(float factor, float (&decay)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = top[r];
#pragma unroll
      for (int i = 0; i < BN / 8; ++i) most = fmaxf(most, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float base = most == negative_infinity() ? 0.0f : most * factor;
      decay[r] = exp2_fast(top[r] * factor - base);
      top[r] = most;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < BN / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = scores[4 * i + 2 * r + e];
          x = exp2_fast(fmaf(x, factor, -base));
          total += x;
        }
      }
      sum[r] = sum[r] * decay[r] + total;
    }
  }

  ATTNKIT_DEVICE void round_probabilities() {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) probabilities[i] = pack<Shape::Bf16>(scores[2 * i], scores[2 * i + 1]);
  }

  ATTNKIT_DEVICE void rescale(const float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < Shape::DV / 2; ++i) out[i] *= decay[i / 2 % 2];
  }

  // Named barriers 1 to Consumers pass the tensor cores from one warpgroup to the next.
  ATTNKIT_DEVICE void take_turn() const {
    if constexpr (Shape::Consumers > 1) named_barrier(1 + group, 256);
  }
  ATTNKIT_DEVICE void give_turn() const {
    if constexpr (Shape::Consumers > 1) named_barrier_arrive(1 + (group + 1) % Shape::Consumers, 256);
  }

  ATTNKIT_DEVICE bool needs_mask(const Tile& t, int block) const {
    return (block + 1) * BN > t.full_high || block * BN < t.full_low;
  }

  template <bool Capped>
  ATTNKIT_DEVICE void attend(const Tile& t) {
    const float factor = Capped ? kLog2e : p.scale * kLog2e;
    float decay[2];
    int block = t.block_end - 1;
    mbarrier_wait(s.k_full + 8 * k_ring.stage, k_ring.parity);
    multiply_qk();
    wgmma_wait<0>();
    wgmma_hold(scores);
    arrive(s.k_empty + 8 * k_ring.stage);
    k_ring.next();
    if constexpr (Capped) cap();
    if (needs_mask(t, block)) mask(block);
    softmax(factor, decay);
    round_probabilities();
    mbarrier_wait(s.v_full + 8 * v_ring.stage, v_ring.parity);
    clear_values_beyond(t.length, block);
    for (--block; block >= t.block_begin; --block) {
      mbarrier_wait(s.k_full + 8 * k_ring.stage, k_ring.parity);
      take_turn();
      multiply_qk();
      mbarrier_wait(s.v_full + 8 * v_ring.stage, v_ring.parity);
      multiply_pv();
      give_turn();
      wgmma_wait<1>();
      wgmma_hold(scores);
      arrive(s.k_empty + 8 * k_ring.stage);
      k_ring.next();
      if constexpr (Capped) cap();
      if (needs_mask(t, block)) mask(block);
      softmax(factor, decay);
      wgmma_wait<0>();
      wgmma_hold(out);
      arrive(s.v_empty + 8 * v_ring.stage);
      v_ring.next();
      round_probabilities();
      rescale(decay);
    }
    mbarrier_wait(s.v_full + 8 * v_ring.stage, v_ring.parity);
    multiply_pv();
    wgmma_wait<0>();
    wgmma_hold(out);
    arrive(s.v_empty + 8 * v_ring.stage);
    v_ring.next();
  }

  // The thread's two rows: which token and head each is, and which keys it sees.
  ATTNKIT_DEVICE void run(const Tile& t) {
    int token[2], head[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = group * 64 + lane / 32 * 16 + lane % 32 / 4 + 8 * r;
      const int in_tile = row / p.G;
      token[r] = t.token0 + in_tile;
      head[r] = t.h * p.G + row - in_tile * p.G;
      const bool real = in_tile < p.tile_tokens && token[r] < t.tokens;
      const int at = t.length - t.tokens + token[r];
      high[r] = !real || at < 0 ? 0 : p.causal ? at + 1 : p.window ? min(t.length, at + p.window) : t.length;
      low[r] = p.window ? at - p.window + 1 : 0;
      if (!real) token[r] = -1;
      top[r] = negative_infinity();
      sum[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Shape::DV / 2; ++i) out[i] = 0.0f;
    mbarrier_wait(s.q_full, q_parity);
    q_parity ^= 1;
    if (t.block_end > t.block_begin) {
      if (p.softcap > 0.0f) {
        attend<true>(t);
      } else {
        attend<false>(t);
      }
    }
    arrive(s.q_empty);
    finish(t, token, head);
  }

  ATTNKIT_DEVICE void finish(const Tile& t, const int (&token)[2], const int (&head)[2]) {
    const float unit = p.softcap > 0.0f ? 1.0f : p.scale;  // what a raw score is times to be a logit
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      float logit = top[r] * unit;
      if (p.sinks != nullptr && token[r] >= 0) {
        const float sink = load_sink(p, head[r]);
        const float most = fmaxf(logit, sink), base = most == negative_infinity() ? 0.0f : most;
        const float shrink = exp2_fast((logit - base) * kLog2e);
        total = total * (logit == negative_infinity() ? 0.0f : shrink) + exp2_fast((sink - base) * kLog2e);
        const float weight = (total > 0.0f ? 1.0f / total : 0.0f) * (logit == negative_infinity() ? 0.0f : shrink);
        scale_row(r, weight * p.out_scale);
        logit = most;
      } else {
        scale_row(r, (total > 0.0f ? 1.0f / total : total == 0.0f ? 0.0f : total) * p.out_scale);
      }
      if (p.lse != nullptr && lane % 4 == 0 && token[r] >= 0) {
        p.lse[static_cast<i64>(t.q0 + token[r]) * (p.Hkv * p.G) + head[r]] =
            total > 0.0f ? logit + log2_fast(total) * kLn2 : total == 0.0f ? negative_infinity() : total;
      }
      store_row(t, r, token[r], head[r]);
    }
  }

  ATTNKIT_DEVICE void scale_row(int r, float weight) {
#pragma unroll
    for (int i = 0; i < Shape::DV / 8; ++i) {
      out[4 * i + 2 * r] *= weight;
      out[4 * i + 2 * r + 1] *= weight;
    }
  }

  // Four threads hold a row's columns two by two; they trade so that each stores 16 bytes in one piece.
  ATTNKIT_DEVICE void store_row(const Tile& t, int r, int token, int head) const {
    const int me = lane % 4;
    char* row = p.out + static_cast<i64>(t.q0 + token) * p.out_t + head * p.out_h;
#pragma unroll
    for (int i = 0; i < Shape::DV / 32; ++i) {
      u32 own[4], got[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] = pack<Shape::Bf16>(out[16 * i + 4 * j + 2 * r], out[16 * i + 4 * j + 2 * r + 1]);
      auto pick = [&](int j) { return j & 2 ? (j & 1 ? own[3] : own[2]) : (j & 1 ? own[1] : own[0]); };
      u32 received[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) received[k] = __shfl_xor_sync(~0u, pick(me ^ k), k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // word j comes from thread j, which is k = j ^ me away
        const int k = j ^ me;
        got[j] = k & 2 ? (k & 1 ? received[3] : received[2]) : (k & 1 ? received[1] : received[0]);
      }
      const int column = 32 * i + 8 * me;
      if (token >= 0 && column < p.Dv) *reinterpret_cast<uint4*>(row + column * 2) = make_uint4(got[0], got[1], got[2], got[3]);
    }
  }
};

// Rows at and beyond cu_q[B] belong to nobody; they are padding of a captured batch and become zero.
ATTNKIT_DEVICE void clear_padding(const PrefillParams& p) {
  const i64 heads = p.Hkv * p.G, units = p.Dv / 8;
  const i64 first = p.cu_q[p.B], count = (p.T - first) * heads;
  const int step = gridDim.x * blockDim.x;
  for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < count * units; i += step) {
    const i64 row = i / units, token = first + row / heads;
    *reinterpret_cast<uint4*>(p.out + token * p.out_t + row % heads * p.out_h + i % units * 16) = make_uint4(0, 0, 0, 0);
    if (p.lse != nullptr && i % units == 0) p.lse[first * heads + row] = negative_infinity();
  }
}

// The first producer warp looks up a tile and tells the other warps its index, -1 at the end.
template <class Shape>
ATTNKIT_DEVICE bool hand_out(const PrefillShared<Shape>& s, const WorkLine& line, Ring<2>& slot, int index, Tile& t) {
  const bool more = line.find(index, Shape::BN, t);
  mbarrier_wait(s.work_empty + 8 * slot.stage, slot.parity ^ 1);
  if (threadIdx.x % 32 == 0) {
    s.work[slot.stage] = more ? index : -1;
    mbarrier_arrive(s.work_full + 8 * slot.stage);
  }
  slot.next();
  return more;
}

template <class Shape>
ATTNKIT_DEVICE bool next_work(const PrefillShared<Shape>& s, const WorkLine& line, Ring<2>& slot, Tile& t) {
  mbarrier_wait(s.work_full + 8 * slot.stage, slot.parity);
  const int index = *reinterpret_cast<volatile int*>(s.work + slot.stage);
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(s.work_empty + 8 * slot.stage);
  slot.next();
  return index >= 0 && line.find(index, Shape::BN, t);
}

template <class Shape>
ATTNKIT_DEVICE void prefill(const PrefillParams& p) {
  extern __shared__ char raw[];
  const PrefillShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) s.init_barriers();
  for (int b = threadIdx.x; b < p.B; b += blockDim.x) s.tiles[b] = tiles_of(p, b);
  if (p.cu_q[p.B] < p.T) clear_padding(p);
  __syncthreads();
  WorkLine line(p, s.tiles);
  Ring<2> slot;
  if (warp >= 4 * Shape::Consumers) {
    registers_lower<Shape::ProducerRegisters>();
    PrefillProducer<Shape> producer{p, s};
    Tile t;
    if (warp == 4 * Shape::Consumers) {
      int index = blockIdx.x;
      while (hand_out(s, line, slot, index, t)) {
        producer.template run<true>(t);
        index = line.take();
      }
      line.leave();
    } else if (warp == 4 * Shape::Consumers + 1) {
      while (next_work(s, line, slot, t)) producer.template run<false>(t);
    }
  } else {
    registers_raise<Shape::ConsumerRegisters>();
    PrefillConsumer<Shape> consumer{p, s, warp / 4, static_cast<int>(threadIdx.x % 128)};
    if (Shape::Consumers > 1 && consumer.group == Shape::Consumers - 1) consumer.give_turn();
    Tile t;
    while (next_work(s, line, slot, t)) consumer.run(t);
  }
}

}  // namespace attnkit
