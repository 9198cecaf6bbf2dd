// What the builds of the latent decode kernel for few rows share: the rows' softmax, the output, and what loads tiles.
#pragma once
#include "../common/wgmma_sm90.cuh"
#include "mla_narrow_meeting.cuh"

namespace attnkit {

// ---- PTX that only these kernels use ----

// A run of bytes (a multiple of 16) from global to shared memory, with an L2 policy.
ATTNKIT_DEVICE void mla_bulk_load(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings a box into L2 only.
ATTNKIT_DEVICE void mla_prefetch_box(const void* map, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// The same to global memory. After mla_bulk_store_wait the bytes are there for whoever is told so.
ATTNKIT_DEVICE void mla_bulk_store(void* to, u32 from, u32 bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to), "r"(from), "r"(bytes)
      : "memory");
}

ATTNKIT_DEVICE void mla_bulk_store_wait() { asm volatile("cp.async.bulk.wait_group 0;\nfence.proxy.async;" ::: "memory"); }

// ---- the computing warpgroup ----

// True in all 128 threads of barrier ``id`` if it is in any.
template <int Id>
ATTNKIT_DEVICE bool any_of_warpgroup(bool mine) {
  u32 any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.cta.red.or.pred q, %2, 128, p;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any) : "r"(static_cast<u32>(mine)), "n"(Id) : "memory");
  return any != 0;
}

// Weights are taken relative to a reference that follows the row's maximum only when a score is more than 2^Slack
// above it. Until then nothing has to be rescaled, and the warps need not agree on a maximum.
constexpr float kMlaSlack = 8.f;

// The softmax of a warpgroup. S^T: tokens 16 warp + lane / 4 (+ 8) by rows 8 n + 2 (lane % 4) (+ 1), element
// 4 n + 2 (+ 8?) + (+ 1?). Barrier: the warpgroup's.
template <class Shape, int Barrier>
struct MlaScores {
  static constexpr int NR = Shape::NR, T = Shape::T;

  const DecodeParams& p;
  int lane, warp;
  float* exchange;                // [4, Rows] floats of shared memory: the warps' maxima
  float high[NR][2], sum[NR][2];  // the reference; this thread's part of the sum
  float factor;
  int token[NR][2];               // query token of this lane's rows

  ATTNKIT_DEVICE MlaScores(const DecodeParams& params, float* shared) : p(params), exchange(shared) {
    lane = threadIdx.x & 31;
    warp = threadIdx.x >> 5 & 3;
    factor = p.scale * (p.softcap > 0.f ? 1.f : kLog2e);
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) token[n][j] = (n * 8 + (lane & 3) * 2 + j) * p.g_magic >> 20;
    }
  }

  ATTNKIT_DEVICE void begin() {
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        high[n][j] = negative_infinity();
        sum[n][j] = 0.f;
      }
    }
  }

  // Which of the last Q keys query token i sees, bit j for key L - Q + j; every lane of the warp calls this.
  ATTNKIT_DEVICE u32 tree_bits(const Piece& piece, int i) const {
    const bool seen = lane < p.Q && p.tree[piece.b * p.tree_b + i * p.tree_i + lane * p.tree_j] != 0;
    return __ballot_sync(~0u, seen);
  }

  ATTNKIT_DEVICE void mask(float (&s)[4 * NR], const Piece& piece, int key0) const {
    const int recent = piece.length - p.Q;  // the first of the last Q keys, and query token 0's position
    u32 bits[NR][2] = {};
    if (p.tree) {
      for (int i = 0; i < p.Q; ++i) {
        const u32 seen = tree_bits(piece, i);
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          bits[n][0] = token[n][0] == i ? seen : bits[n][0];
          bits[n][1] = token[n][1] == i ? seen : bits[n][1];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = key0 + warp * 16 + lane / 4 + (e >> 1) * 8;
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        const int i = token[n][e & 1], at = recent + i;
        bool seen = key <= at;
        if (p.tree) seen = key < recent || (key < piece.length && (bits[n][e & 1] >> (key - recent) & 1));
        seen = seen && at >= 0 && (p.window == 0 || key > at - p.window);
        if (!seen) s[4 * n + e] = negative_infinity();
      }
    }
  }

  // Products to logits in units of log2, -inf where a row does not see the key.
  ATTNKIT_DEVICE void logits(float (&s)[4 * NR], const Piece& piece, int key0) const {
    const bool capped = p.softcap > 0.f;
    const float twice = 2.f * kLog2e * p.softcap_inverse;
#pragma unroll
    for (int i = 0; i < 4 * NR; ++i) {
      float x = s[i] * factor;
      // cap * tanh(x / cap), by exp so that it is exact to a few ulps of the cap
      if (capped) x = kLog2e * p.softcap * (1.f - 2.f * reciprocal(1.f + exp2_fast(x * twice)));
      s[i] = x;
    }
    const bool inside = key0 + T <= piece.length - p.Q + 1 && (p.window == 0 || key0 > piece.length - 1 - p.window);
    if (!inside) mask(s, piece, key0);
  }

  ATTNKIT_DEVICE static bool edge(const Piece& piece, int key0) { return key0 < piece.low || key0 + T > piece.length; }

  ATTNKIT_DEVICE bool above(const float (&s)[4 * NR]) const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4 * NR; ++i) any = any || s[i] > high[i / 4][i & 1] + kMlaSlack;
    return any;
  }

  // The references become the maxima; ``rescale``: what this makes of values summed up before, by lane % 4's rows.
  ATTNKIT_DEVICE void raise(const float (&s)[4 * NR], float (&rescale)[NR][2]) {
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = fmaxf(s[4 * n + j], s[4 * n + j + 2]);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 4));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 8));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
        if (lane < 4) exchange[warp * Shape::Rows + n * 8 + lane * 2 + j] = most;
      }
    }
    named_barrier(Barrier, 128);
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = high[n][j];
#pragma unroll
        for (int w = 0; w < 4; ++w) most = fmaxf(most, exchange[w * Shape::Rows + n * 8 + (lane & 3) * 2 + j]);
        rescale[n][j] = exp2_fast(high[n][j] - (most == negative_infinity() ? 0.f : most));
        high[n][j] = most;
        sum[n][j] *= rescale[n][j];
      }
    }
  }

  // Adds a tile's weights to this thread's sums.
  ATTNKIT_DEVICE void add(const float (&added)[NR][2]) {
#pragma unroll
    for (int n = 0; n < NR; ++n) {
      sum[n][0] += added[n][0];
      sum[n][1] += added[n][1];
    }
  }

  // (reference, sum) of each row over all tokens of the piece to ``totals`` [Rows]; the warpgroup's barrier is to follow.
  ATTNKIT_DEVICE void publish(float2* totals) {
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[n][j] += __shfl_xor_sync(~0u, sum[n][j], 4);
        sum[n][j] += __shfl_xor_sync(~0u, sum[n][j], 8);
        sum[n][j] += __shfl_xor_sync(~0u, sum[n][j], 16);
        if (lane < 4) exchange[warp * Shape::Rows + n * 8 + lane * 2 + j] = sum[n][j];
      }
    }
    named_barrier(Barrier, 128);
    if (warp == 0 && lane < 4) {
#pragma unroll
      for (int n = 0; n < NR; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = n * 8 + lane * 2 + j;
          float total = 0.f;
#pragma unroll
          for (int w = 0; w < 4; ++w) total += exchange[w * Shape::Rows + row];
          totals[row] = make_float2(high[n][j], total);
        }
      }
    }
  }

  // Element e of row group n to its weight.
  ATTNKIT_DEVICE float weight(const float (&s)[4 * NR], int n, int e) const {
    // Nothing seen yet: subtract 0, so that exp2(-inf) gives the zeros.
    const float base = high[n][e & 1] == negative_infinity() ? 0.f : high[n][e & 1];
    return exp2_fast(s[4 * n + e] - base);
  }

  // 16 tokens of each row from fragments w to P^T at ``to``: rows of 128 bytes, tokens contiguous, as wgmma's b reads it.
  ATTNKIT_DEVICE void store_rows(u32 to, const u32 (&w)[2 * NR]) const {
    const int row = lane & 7;
    const u32 at = to + row * 128 + ((warp * 2 + (lane >> 3 & 1)) ^ row) * 16;
    if constexpr (NR == 1) {
      store_matrix_x2_transposed(at, w[0], w[1]);
    } else {
#pragma unroll
      for (int n = 0; n < NR; n += 2) {
        store_matrix_x4_transposed(at + (n + (lane >> 4)) * 1024, w[2 * n], w[2 * n + 1], w[2 * n + 2], w[2 * n + 3]);
      }
    }
  }

};

// The output of a warpgroup of threads 0 to 127. O^T: 64 columns a plane by rows as in MlaScores.
template <class Shape>
struct MlaValues {
  static constexpr int NR = Shape::NR;

  const DecodeParams& p;
  int lane, warp;
  float values[Shape::Planes][4 * NR];

  ATTNKIT_DEVICE explicit MlaValues(const DecodeParams& params) : p(params) {
    lane = threadIdx.x & 31;
    warp = threadIdx.x >> 5;
  }

  ATTNKIT_DEVICE void begin(const Piece& piece) {
#pragma unroll
    for (int m = 0; m < Shape::Planes; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * NR; ++i) values[m][i] = 0.f;
    }
    if (threadIdx.x == 0 && piece.count > 1) {  // cold in a graph of many launches: asked for now, there in time
      const int fan = mla_fan(piece.count);
      prefetch_l2(p.counters + p.slots + piece.slot0);
      if (piece.count > fan) prefetch_l2(p.counters + piece.slot(piece.index / fan * fan));
    }
  }

  ATTNKIT_DEVICE void rescale(const float (&by)[NR][2]) {
#pragma unroll
    for (int m = 0; m < Shape::Planes; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * NR; ++i) values[m][i] *= by[i / 4][i & 1];
    }
  }

  // 8-row groups n0 and on to shared memory [8 StageGroups, C + 4].
  ATTNKIT_DEVICE void stage_rows(float* stage, int n0, float by) const {
    float* to = stage + (lane & 3) * 2 * Shape::StagePitch + (Shape::PairedColumns ? warp * 32 + lane / 4 * 2 : warp * 16 + lane / 4);
#pragma unroll
    for (int i = 0; i < NR; ++i) {
      if (i < n0 || i >= n0 + Shape::StageGroups) continue;
#pragma unroll
      for (int m = 0; m < Shape::Planes; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = values[m][4 * i + j] * by, y = values[m][4 * i + 2 + j] * by;
          float* at = to + ((i - n0) * 8 + j) * Shape::StagePitch;
          if constexpr (Shape::PairedColumns) {
            *reinterpret_cast<float2*>(at + m / 2 * 128 + m % 2 * 16) = make_float2(x, y);
          } else {
            at[m * 64] = x;
            at[m * 64 + 8] = y;
          }
        }
      }
    }
  }

  // Values divided by their weights' sum to shared memory as f16, rows HalfPitch bytes apart. True where f16 does not hold them.
  ATTNKIT_DEVICE bool stage_halves(u32 to, const float (&by)[NR][2]) const {
    u32 most = 0;
    const auto packed = [&](float x, float y) {
      const u32 pair = pack_f16(x, y);
      asm("max.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(most) : "r"(pair));
      return pair;
    };
    if constexpr (Shape::PairedColumns) {
      to += (lane & 3) * 2 * Shape::HalfPitch + (warp * 32 + lane / 4 * 2) * 2;
#pragma unroll
      for (int m = 0; m < Shape::Planes; ++m) {
#pragma unroll
        for (int i = 0; i < NR; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const u32 x = packed(values[m][4 * i + j] * by[i][j], values[m][4 * i + 2 + j] * by[i][j]);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + (i * 8 + j) * Shape::HalfPitch + m / 2 * 256 + m % 2 * 32), "r"(x) : "memory");
          }
        }
      }
    } else {
      // A fragment has 8 columns by 8 rows; stored transposed, rows are contiguous.
      to += ((lane >> 4) * 8 + (lane & 7)) * Shape::HalfPitch + (warp * 16 + (lane >> 3 & 1) * 8) * 2;
#pragma unroll
      for (int m = 0; m < Shape::Planes; ++m) {
        u32 w[2 * NR];
#pragma unroll
        for (int i = 0; i < 2 * NR; ++i) w[i] = packed(values[m][2 * i] * by[i / 2][0], values[m][2 * i + 1] * by[i / 2][1]);
        if constexpr (NR == 1) {
          store_matrix_x2_transposed(to + m * 128, w[0], w[1]);
        } else {
#pragma unroll
          for (int i = 0; i < NR; i += 2) {
            store_matrix_x4_transposed(to + m * 128 + i * 8 * Shape::HalfPitch, w[2 * i], w[2 * i + 1], w[2 * i + 2], w[2 * i + 3]);
          }
        }
      }
    }
    return (most & 0x7fff) >= 0x7c00 || (most >> 16 & 0x7fff) >= 0x7c00;
  }

  // A power of two for each row, by which f16 holds it. ``most``: [Rows] of shared memory.
  ATTNKIT_DEVICE void scale_down(float (&by)[NR][2], float* ups, int* most) const {
    if (threadIdx.x < Shape::Rows) most[threadIdx.x] = 0;
    named_barrier(1, Shape::Consumers);
#pragma unroll 1
    for (int i = 0; i < NR; ++i) {
#pragma unroll 1
      for (int j = 0; j < 2; ++j) {
        float high = 0.f;
#pragma unroll
        for (int n = 0; n < NR; ++n) {
#pragma unroll
          for (int m = 0; m < Shape::Planes; ++m) {
            if (n == i) high = fmaxf(high, fmaxf(fabsf(j ? values[m][4 * n + 1] : values[m][4 * n]), fabsf(j ? values[m][4 * n + 3] : values[m][4 * n + 2])));
          }
        }
        float mine = 0.f;
#pragma unroll
        for (int n = 0; n < NR; ++n) mine = n == i ? (j ? by[n][1] : by[n][0]) : mine;
        atomicMax(most + i * 8 + (lane & 3) * 2 + j, __float_as_int(high * mine));
      }
    }
    named_barrier(1, Shape::Consumers);
#pragma unroll
    for (int i = 0; i < NR; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = i * 8 + (lane & 3) * 2 + j, down = max(0, (most[row] >> 23) - 127 - 14);
        by[i][j] *= __int_as_float((127 - down) << 23);
        ups[row] = __int_as_float((127 + down) << 23);
      }
    }
    named_barrier(1, Shape::Consumers);
  }

  // This piece's sums to the workspace, as MlaSharing wants them.
  ATTNKIT_DEVICE void publish_halves(const RowOutput& output, int slot, const float2* totals, float given, float* stage) const {
    float* ups = stage + Shape::Rows * Shape::HalfPitch / 4;
    float by[NR][2];
#pragma unroll
    for (int i = 0; i < NR; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float sum = totals[i * 8 + (lane & 3) * 2 + j].y;
        by[i][j] = sum == 0.f ? 0.f : given * reciprocal(sum);
      }
    }
    const u32 to = smem_address(stage);
    float up = 1.f;
    const int row = threadIdx.x;
#pragma unroll 1
    for (bool again = false;; again = true) {
      const bool large = stage_halves(to, by);
      fence_async_shared();
      if (!any_of_warpgroup<1>(large) || again) break;
      scale_down(by, ups, reinterpret_cast<int*>(ups + Shape::Rows));
      up = ups[row % Shape::Rows];
    }
    if (row >= output.rows) return;
    mla_bulk_store(reinterpret_cast<char*>(output.values(slot)) + row * Shape::C * 2, to + row * Shape::HalfPitch, Shape::C * 2);
    const float2 total = totals[row];
    output.weights(slot, 0)[row] = make_float2(total.y == 0.f ? negative_infinity() : total.x + log2_fast(total.y), up);
  }

  // The output, or this piece's partial sums, and then perhaps the sum of all pieces; by way of shared memory, so that
  // whole rows are written. ``by``: a factor for the values.
  ATTNKIT_DEVICE void finish(const MlaPart& piece, const float2* totals, float by, float* stage, int* flag) {
    const RowOutput output(p, piece, Shape::Rows, Shape::C);
    const int slot = piece.slot(piece.index);
    if (Shape::Bf16 && piece.waiting > 0) {
      publish_halves(output, slot, totals, by, stage);
      mla_bulk_store_wait();
      return MlaSharing<Shape>{p, piece, output, flag, stage}.run();
    }
#pragma unroll
    for (int n0 = 0; n0 < NR; n0 += Shape::StageGroups) {
      stage_rows(stage, n0, by);
      fence_async_shared();
      named_barrier(1, Shape::Consumers);
      const int row0 = n0 * 8, here = min(8 * Shape::StageGroups, output.rows - row0);
      if (piece.count > 1) {
        if (static_cast<int>(threadIdx.x) < here) {
          const int row = row0 + threadIdx.x;
          mla_bulk_store(output.values(slot) + row * Shape::C, smem_address(stage + threadIdx.x * Shape::StagePitch), Shape::C * 4);
          output.weights(slot, 0)[row] = totals[row];
        }
        if (n0 + Shape::StageGroups < NR) tma_store_wait_read<0>();
      } else {
        constexpr int Units = Shape::C / 4;
#pragma unroll 1
        for (int unit = threadIdx.x; unit < here * Units; unit += Shape::Consumers) {
          const int at = unit / Units, row = row0 + at, column = unit % Units * 4;
          const float4 value = *reinterpret_cast<const float4*>(stage + at * Shape::StagePitch + column);
          output.write(output.place(row) + column * 2, value, output.finish(row, totals[row].x, totals[row].y, column == 0));
        }
      }
      if (n0 + Shape::StageGroups < NR) named_barrier(1, Shape::Consumers);
    }
    if (piece.count > 1) mla_bulk_store_wait();
    if (!Shape::Bf16 && piece.waiting > 0) {
      MlaSharing<Shape>{p, piece, output, flag, stage}.run();
    } else if (piece.count > 1) {
      mla_combine<Shape>(p, piece, output, flag);
    }
  }
};

// What loads tiles, whatever the cache's form: a tile's tokens come in boxes, which are all of one page.
template <int T>
struct MlaBoxes {
  const DecodeParams& p;
  int lane, box_shift, boxes;  // tokens in a box: 2^box_shift; boxes of a tile

  ATTNKIT_DEVICE explicit MlaBoxes(const DecodeParams& params) : p(params) {
    lane = threadIdx.x & 31;
    box_shift = min(p.page_shift, 6);
    boxes = T >> box_shift;
  }

  // The page of this lane's box of a tile; 0 where the box holds no visible key: its table entry may be garbage.
  ATTNKIT_DEVICE int page_of(const Piece& piece, const int* pages, int tile) const {
    const int token = tile * T + ((lane & (boxes - 1)) << box_shift);
    return token < piece.length && token + (1 << box_shift) > piece.low ? pages[token >> p.page_shift] : 0;
  }

  // All tiles of all pieces by way of a ring: bring(piece, pages, tile, page, stage, phase). ``P`` is what the walker finds,
  // found(piece) what else is to be known of it.
  template <int Stages, class P, class Found, class Bring>
  ATTNKIT_DEVICE void each_tile(Walker<T>& walker, const Found& found, const Bring& bring) const {
    P piece;
    int stage = 0, phase = 1;
    while (walker.next(piece)) {
      found(piece);
      const int* pages = p.pages + piece.b * p.pages_b;
      int page = page_of(piece, pages, piece.tile);
#pragma unroll 1
      for (int tile = piece.tile; tile < piece.tile + piece.tiles; ++tile) {
        const int next_page = page_of(piece, pages, tile + 1);
        bring(piece, pages, tile, page, stage, phase);
        page = next_page;
        if (++stage == Stages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
  }
};

// The table and q are read once lens are known; meanwhile they come closer. Every CTA asks for its part of the lines.
ATTNKIT_DEVICE void mla_prefetch(const DecodeParams& p, int q_bytes) {
  const u32 lines = (p.table_width + 31) / 32, i = threadIdx.x * gridDim.x + blockIdx.x;
  const u32 b = i / lines;
  if (b < static_cast<u32>(p.B)) prefetch_l2(p.pages + b * p.pages_b + (i - b * lines) * 32);
  const u32 row_lines = (q_bytes + 127) / 128, n = i / row_lines, rows = p.Q * p.G, sequence = n / rows, row = n - sequence * rows;
  if (sequence < static_cast<u32>(p.B)) {
    const int token = row * p.g_magic >> 20;
    prefetch_l2(p.q + sequence * p.q_b + token * p.q_i + (row - token * p.G) * p.q_h + (i - n * row_lines) * 128);
  }
}

// Divides the work by lens that the previous grid may still change, waits for it, and divides again if it did. What seem
// to be the CTA's first tiles are asked of L2 meanwhile, past L1; a page that is none lies outside of the map. Planes: of
// the cache's map, 0 where there is none. For a warp that walks, and at most 32 sequences.
template <int T, int Planes>
ATTNKIT_DEVICE void mla_place_ahead(const DecodeParams& p, Walker<T>& walker) {
  const int lane = threadIdx.x & 31, box_shift = min(p.page_shift, 6), boxes = T >> box_shift, slot_mask = (1 << p.page_shift) - 1;
#pragma unroll 1
  for (bool ahead = true;; ahead = false) {
    walker.place_few();
    if (!ahead) return;
    const int ordinal = walker.position - walker.start + lane / boxes;
    const int token = (walker.low / T + ordinal) * T + ((lane & (boxes - 1)) << box_shift);
    if (lane < 2 * boxes && ordinal < min(walker.tiles, walker.end - walker.start) && token < walker.length) {
      const int page = load_l2(p.pages + walker.b * p.pages_b + (token >> p.page_shift));
#pragma unroll 1
      for (int plane = 0; plane < Planes; ++plane) mla_prefetch_box(&p.k_map, plane * 64, token & slot_mask, 0, page);
    }
    __syncwarp();
    wait_for_previous_grid();
    if (!__any_sync(~0u, walker.stale(lane))) return;
  }
}

}  // namespace attnkit
