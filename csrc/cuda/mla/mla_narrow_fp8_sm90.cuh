// Absorbed latent decode for few query rows over an fp8 cache: 656 bytes a token, which are 512 e4m3 values, four float32
// scales of 128 values each, and 64 bf16 of rope. Memory bound as the 16-bit build; what is new is that no value is
// widened more often than needed:
//
// Scores. K goes to the tensor cores as e4m3. q is split into two e4m3 terms, q = 2^e (high + low / 16), which hold the
// 8 significant bits of bf16 exactly, as twice the columns. Each 128 values have sums of their own, which get their scale
// in float32 (and need it: the tensor core adds e4m3 products up in some 14 bits).
// Output. V has to be transposed, which wgmma does not do for bytes: ldmatrix turns pairs of columns, they become f16
// (exactly) in registers, and the scales go into four copies of P. Those are f16 and relative to sigma, a power of two
// that follows the largest scale as the reference follows the largest score.
//
// Tokens of a page are contiguous, so a box of them is one bulk copy; rows of 41 x 16 bytes need no swizzle.
#pragma once
#include "../common/e4m3.cuh"
#include "mla_narrow_common.cuh"

namespace attnkit {

template <int NR_, int Stages_>
struct MlaFp8Shape {
  static constexpr int C = 512, R = 64, NR = NR_, Stages = Stages_;
  static constexpr bool PairedColumns = true, Bf16 = true;
  static constexpr int Rows = 8 * NR, T = 64, CtasPerSm = 1, Planes = C / 64, Blocks = C / 128;
  static constexpr int ScaleAt = C, RopeAt = C + 4 * Blocks, TokenBytes = RopeAt + 2 * R;
  static constexpr int StageBytes = T * TokenBytes, StageGroups = 1, StagePitch = C + 4, HalfPitch = 2 * C + 16;
  static constexpr int QPlaneBytes = 2 * Rows * 128, PBytes = Rows * 128;
  // Threads 0 to 127 multiply weights and values, the next 128 make the weights; then the producers, a warpgroup too.
  static constexpr int Consumers = 128, Threads = 384;
};

struct MlaFp8Shared {
  u32 ring, q, q_rope, p;     // [Stages, T, TokenBytes], [Blocks, 2 Rows, 128], [Rows, 128], [2, Blocks, Rows, 128]
  u32 full, empty;            // [Stages]
  u32 p_full, p_empty;        // [2]
  u32 totals_full, totals_empty, piece_full, piece_empty;
  float* exchange;            // [4, Rows], then [4]
  float* up;                  // [Rows]: 2^(e - 8)
  float* rescale;             // [2, Rows], with each set of P^T: what earlier sums are multiplied by; then [2]: whether
  float2* totals;             // [Rows], then sigma
  float* output;              // [8, StagePitch], or f16 [Rows] in HalfPitch bytes and [2, Rows]: the output on its way
  int* scratch;               // the walker's
  MlaPart* piece;
  int* flag;
};

// One warp loads tiles; the other says which pieces they belong to, so that loading never waits for that.
template <class Shape>
struct MlaFp8Producer : MlaBoxes<Shape::T> {
  static constexpr int T = Shape::T;
  using Boxes = MlaBoxes<T>;
  using Boxes::p, Boxes::lane, Boxes::box_shift, Boxes::boxes;

  const MlaFp8Shared& shared;

  ATTNKIT_DEVICE MlaFp8Producer(const DecodeParams& params, const MlaFp8Shared& s) : Boxes(params), shared(s) {}

  ATTNKIT_DEVICE void run_tiles(Walker<T>& walker) {
    const i64 page_bytes = p.k_scale_h;  // this kernel's use of the field
    const u64 policy = evict_first_policy();
    Boxes::template each_tile<Shape::Stages, Piece>(
        walker, [](Piece&) {},
        [&](const Piece& piece, const int* pages, int tile, int page, int stage, int phase) {
          const int token0 = tile * T, tokens = min(piece.length - token0, T);
          const int first = max(piece.low - token0, 0) >> box_shift;
          const int last = (tokens + (1 << box_shift) - 1) >> box_shift;
          const int slot = token0 & ((1 << p.page_shift) - 1);
          const u32 to = shared.ring + stage * Shape::StageBytes, full = shared.full + 8 * stage;
          mbarrier_wait(shared.empty + 8 * stage, phase);
          if (elect_one()) mbarrier_arrive_expect(full, max(tokens - (first << box_shift), 0) * Shape::TokenBytes);
          for (int box = first; box < last; ++box) {
            const int from = boxes <= 32 ? __shfl_sync(~0u, page, box) : pages[(token0 >> p.page_shift) + box];
            if (elect_one()) {
              const int at = box << box_shift;
              mla_bulk_load(to + at * Shape::TokenBytes, p.k + from * page_bytes + slot * Shape::TokenBytes,
                            min(tokens - at, 1 << box_shift) * Shape::TokenBytes, full, policy);
            }
          }
        });
  }

  ATTNKIT_DEVICE void run_pieces(Walker<T>& walker) {
    MlaPart piece;
    for (int pieces = 0;; ++pieces) {
      const bool more = walker.next(piece);
      if (more) piece.find_waiting(walker);
      if (!more) piece.tiles = 0;
      mbarrier_wait(shared.piece_empty, (pieces & 1) ^ 1);
      if (lane == 0) {
        *shared.piece = piece;
        mbarrier_arrive(shared.piece_full);
      }
      __syncwarp();
      if (!more) break;
    }
  }
};

ATTNKIT_DEVICE void store_shared_16(u32 to, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

ATTNKIT_DEVICE void store_shared_8(u32 to, const u32 (&x)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x[0]), "r"(x[1]) : "memory");
}

template <class Shape>
struct MlaFp8Weigher {
  static constexpr int NR = Shape::NR, T = Shape::T, Blocks = Shape::Blocks;

  const DecodeParams& p;
  const MlaFp8Shared& shared;
  MlaScores<Shape, 2> rows;
  int thread;
  int set;                  // of P^T: two take turns
  u32 p_rows;
  float up[NR][2];
  float sigma, sigma_inverse;
  float scales[2][Blocks];  // of this thread's tokens: lane / 4 and 8 more

  ATTNKIT_DEVICE MlaFp8Weigher(const DecodeParams& params, const MlaFp8Shared& s)
      : p(params), shared(s), rows(params, s.exchange), thread(threadIdx.x - 128), set(0) {}

  // q as two e4m3 terms and its rope part, swizzled for wgmma. 8 threads a row, which take 8 columns each at a time.
  ATTNKIT_DEVICE void load_q(const Piece& piece) {
    const int part = thread & 7;
#pragma unroll 1
    for (int row = thread >> 3; row < Shape::Rows; row += 16) {
      uint4 x[9];  // the last is of the rope part
#pragma unroll
      for (int k = 0; k < 9; ++k) x[k] = make_uint4(0, 0, 0, 0);
      if (row < p.block_rows) {
        const int i = row * p.g_magic >> 20;
        const uint4* from = reinterpret_cast<const uint4*>(p.q + piece.b * p.q_b + i * p.q_i + (row - i * p.G) * p.q_h);
#pragma unroll
        for (int k = 0; k < 9; ++k) x[k] = from[part + 8 * k];
      }
      float most = 0.f;
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        const float2 v = unpack((&x[0].x)[k], true);
        most = fmaxf(most, fmaxf(fabsf(v.x), fabsf(v.y)));
      }
#pragma unroll
      for (int d = 1; d < 8; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      // 2^e > most, from the exponent bits; kept away from the ends so that its inverse is a number too
      const int e = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 126, -100), 100);
      const float down = __uint_as_float(static_cast<u32>(127 + 8 - e) << 23);
      const bool finite = most < -negative_infinity();
      if (part == 0) shared.up[row] = finite ? __uint_as_float(static_cast<u32>(127 - 8 + e) << 23) : __uint_as_float(0x7fffffffu);
      const u32 words[4] = {x[8].x, x[8].y, x[8].z, x[8].w};
      store_shared_16(shared.q_rope + row * 128 + (part ^ (row & 7)) * 16, words);
      // Rolled: this runs once a piece, and its instructions have to be fetched first.
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        u32 high[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float2 v = unpack((&x[0].x)[j], true);
          v.x *= down, v.y *= down;
          const u32 near = pack_e4m3(v.x, v.y);
          const float2 got = unpack(e4m3x2_to_f16x2(static_cast<u16>(near)), false);
          high[j / 2] |= near << 16 * (j & 1);
          low[j / 2] |= pack_e4m3((v.x - got.x) * 16.f, (v.y - got.y) * 16.f) << 16 * (j & 1);
        }
#pragma unroll
        for (int i = 0; i < 7; ++i) x[i] = x[i + 1];
        const int unit = (k & 1) * 4 + part / 2;
        const u32 at = shared.q + k / 2 * Shape::QPlaneBytes + row * 128 + (unit ^ (row & 7)) * 16 + (part & 1) * 8;
        store_shared_8(at, high);
        store_shared_8(at + Shape::Rows * 128, low);
      }
    }
    fence_async_shared();
    named_barrier(2, 128);
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) up[n][j] = shared.up[n * 8 + (rows.lane & 3) * 2 + j];
    }
  }

  // Adds block b's products, which have landed, to S^T; those of the rope part (b = -1) are there already.
  ATTNKIT_DEVICE void fold(float (&s)[4 * NR], float (&part)[8 * NR], int b) {
    if (b < 0) {
      wgmma_hold(s);
#pragma unroll
      for (int i = 0; i < 4 * NR; ++i) s[i] *= __uint_as_float(0x7f000000u - __float_as_uint(up[i / 4][i & 1]));
    } else {
      wgmma_hold(part);
#pragma unroll
      for (int i = 0; i < 4 * NR; ++i) s[i] += scales[i >> 1 & 1][b] * (part[i] + part[4 * NR + i] * 0.0625f);
    }
  }

  // S^T of the tile. A block's sums and registers are waited for while the next block's products run, where there are
  // registers for that.
  ATTNKIT_DEVICE void scores(float (&s)[4 * NR], u32 tile) {
    constexpr int Ahead = NR <= 2 ? 1 : 0, Buffers = Ahead + 1;
    const u32 at = tile + (rows.warp * 16 + (rows.lane & 15)) * Shape::TokenBytes + (rows.lane >> 4) * 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 x = load_shared<float4>(tile + (rows.warp * 16 + rows.lane / 4 + j * 8) * Shape::TokenBytes + Shape::ScaleAt);
      scales[j][0] = x.x, scales[j][1] = x.y, scales[j][2] = x.z, scales[j][3] = x.w;
    }
    u32 a[Buffers][4][4];
    float part[Buffers][8 * NR];
#pragma unroll
    for (int b = -1; b < Blocks; ++b) {
      const int now = (b + 1) % Buffers;
#pragma unroll
      for (int k = 0; k < 4; ++k) load_matrix_x4(a[now][k], at + (b < 0 ? Shape::RopeAt : b * 128) + k * 32);
      if (b < 0) {
        wgmma_hold(s);
      } else {
        wgmma_hold(part[now]);
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (b < 0) {
          wgmma_rs_narrow<true>(s, a[now][k], wgmma_descriptor(shared.q_rope + k * 32, 0, 1024), k > 0);
        } else {
          wgmma_rs_e4m3(part[now], a[now][k], wgmma_descriptor(shared.q + b * Shape::QPlaneBytes + k * 32, 0, 1024), k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<Ahead>();
      if (b >= Ahead - 1) fold(s, part[(b + 1 - Ahead) % Buffers], b - Ahead);
    }
    wgmma_wait<0>();
    if constexpr (Ahead == 1) fold(s, part[Blocks % Buffers], Blocks - 1);
#pragma unroll
    for (int i = 0; i < 4 * NR; ++i) s[i] *= up[i / 4][i & 1];
  }

  // Weight 0 times what nobody wrote may be NaN: tokens outside the sequence become zeros.
  ATTNKIT_DEVICE void clear_tokens(const Piece& piece, int key0, u32 tile) {
    for (int i = thread; i < T * (Shape::C / 16); i += 128) {
      const int row = i / (Shape::C / 16), key = key0 + row;
      if (key >= piece.low && key < piece.length) continue;
      store_shared_zeros(tile + row * Shape::TokenBytes + i % (Shape::C / 16) * 16);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = key0 + rows.warp * 16 + rows.lane / 4 + j * 8;
#pragma unroll
      for (int b = 0; b < Blocks; ++b) scales[j][b] = key >= piece.low && key < piece.length ? scales[j][b] : 0.f;
    }
  }

  ATTNKIT_DEVICE void store_weights(const float (&s)[4 * NR], float (&added)[NR][2]) {
    float x[NR][4];
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = rows.weight(s, n, e);
      added[n][0] = x[n][0] + x[n][2];
      added[n][1] = x[n][1] + x[n][3];
    }
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const float first = scales[0][b] * sigma_inverse, second = scales[1][b] * sigma_inverse;
      u32 w[2 * NR];
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        w[2 * n] = pack_f16(x[n][0] * first, x[n][1] * first);
        w[2 * n + 1] = pack_f16(x[n][2] * second, x[n][3] * second);
      }
      rows.store_rows(p_rows + b * Shape::PBytes, w);
    }
    fence_async_shared();
  }

  ATTNKIT_DEVICE float largest_scale() const {
    float most = 0.f;
#pragma unroll
    for (int b = 0; b < Blocks; ++b) most = fmaxf(most, fmaxf(scales[0][b], scales[1][b]));
    return most;
  }

  // A new reference and a new sigma: the largest scale so far, rounded up to a power of two. The other warpgroup is told
  // what becomes of its sums.
  ATTNKIT_DEVICE void raise(const float (&s)[4 * NR]) {
    float most = largest_scale();
#pragma unroll
    for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    float* all = shared.exchange + 4 * Shape::Rows;
    if (rows.lane == 0) all[rows.warp] = most;
    float rescale[NR][2];
    rows.raise(s, rescale);  // a barrier is in there
    most = fmaxf(fmaxf(all[0], all[1]), fmaxf(all[2], all[3]));
    const u32 exponent = min(max((__float_as_uint(most) + 0x7fffffu) >> 23, 27u), 227u);
    const float raised = fmaxf(sigma, __uint_as_float(exponent << 23));
    sigma_inverse = __uint_as_float(0x7f000000u - __float_as_uint(raised));
    if (rows.warp == 0 && rows.lane < 4) {
#pragma unroll
      for (int n = 0; n < NR; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) shared.rescale[set * Shape::Rows + n * 8 + rows.lane * 2 + j] = rescale[n][j] * sigma * sigma_inverse;
      }
    }
    sigma = raised;
  }

  ATTNKIT_DEVICE void weights(float (&s)[4 * NR], const Piece& piece, int key0, u32 tile) {
    rows.logits(s, piece, key0);
    if (rows.edge(piece, key0)) clear_tokens(piece, key0, tile);
    float added[NR][2];
    // 2^8 x 2^7 is what f16 holds
    const bool raised = any_of_warpgroup<2>(rows.above(s) || largest_scale() * sigma_inverse > 128.f);
    if (raised) raise(s);
    store_weights(s, added);
    rows.add(added);
    if (thread == 0) shared.rescale[2 * Shape::Rows + set] = raised ? 1.f : 0.f;
  }

  ATTNKIT_DEVICE void run() {
    int stage = 0, phase = 0, turn = 1;
    for (int pieces = 0;; ++pieces) {
      mbarrier_wait(shared.piece_full, pieces & 1);
      const MlaPart piece = *shared.piece;
      __syncwarp();
      if (rows.lane == 0) mbarrier_arrive(shared.piece_empty);
      if (piece.tiles == 0) break;
      load_q(piece);
      rows.begin();
      sigma = sigma_inverse = 0.f;
#pragma unroll 1
      for (int t = 0; t < piece.tiles; ++t) {
        const u32 tile = shared.ring + stage * Shape::StageBytes;
        mbarrier_wait(shared.full + 8 * stage, phase);
        float s[4 * NR];
        scores(s, tile);
        p_rows = shared.p + set * Blocks * Shape::PBytes;
        mbarrier_wait(shared.p_empty + 8 * set, turn);
        weights(s, piece, (piece.tile + t) * T, tile);
        __syncwarp();
        if (rows.lane == 0) mbarrier_arrive(shared.p_full + 8 * set);
        turn ^= set;
        set ^= 1;
        if (++stage == Shape::Stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      mbarrier_wait(shared.totals_empty, (pieces & 1) ^ 1);
      named_barrier(2, 128);  // the last tile's maxima are read
      rows.publish(shared.totals);
      if (thread == 0) shared.totals[Shape::Rows].x = sigma;
      __syncwarp();
      if (rows.lane == 0) mbarrier_arrive(shared.totals_full);
    }
  }
};

template <class Shape>
struct MlaFp8Adder {
  static constexpr int NR = Shape::NR, Blocks = Shape::Blocks;

  const DecodeParams& p;
  const MlaFp8Shared& shared;
  MlaValues<Shape> output;

  ATTNKIT_DEVICE MlaFp8Adder(const DecodeParams& params, const MlaFp8Shared& s) : p(params), shared(s), output(params) {}

  // O^T += V^T P^T, some tokens of a block of 128 columns after the other; the next are widened while these products run.
  // Columns 128 b + 32 warp + 16 h + (0, 2, ... 14, 1, 3, ... 15) are the warp's rows of product 2 b + h.
  ATTNKIT_DEVICE void add_values(u32 tile, u32 p_rows) {
    constexpr int Steps = NR <= 2 ? 4 : 2;  // of 16 tokens
    const u32 at = tile + (output.lane & 15) * Shape::TokenBytes + output.warp * 32 + (output.lane >> 4) * 16;
    u32 a[2][Steps][2][4];
#pragma unroll
    for (int c = 0; c < Blocks * 4 / Steps; ++c) {
      const int b = c * Steps / 4, k0 = c * Steps % 4;
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        u32 r[4];
        load_matrix_x4_transposed(r, at + (k0 + k) * 16 * Shape::TokenBytes + b * 128);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          widen<kE4m3, 0, 2, 1, 3>(r[2 * h], a[c & 1][k][h][0], a[c & 1][k][h][1]);
          widen<kE4m3, 0, 2, 1, 3>(r[2 * h + 1], a[c & 1][k][h][2], a[c & 1][k][h][3]);
        }
      }
      wgmma_hold(output.values[2 * b]);
      wgmma_hold(output.values[2 * b + 1]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        const u64 weights = wgmma_descriptor(p_rows + b * Shape::PBytes + (k0 + k) * 32, 0, 1024);
        wgmma_rs_narrow<false>(output.values[2 * b], a[c & 1][k][0], weights, 1);
        wgmma_rs_narrow<false>(output.values[2 * b + 1], a[c & 1][k][1], weights, 1);
      }
      wgmma_commit();
      if (c > 0) wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Shape::Planes; ++m) wgmma_hold(output.values[m]);
  }

  ATTNKIT_DEVICE void run() {
    int stage = 0, set = 0, phase = 0;
    for (int pieces = 0;; ++pieces) {
      mbarrier_wait(shared.piece_full, pieces & 1);
      const MlaPart piece = *shared.piece;
      __syncwarp();
      if (output.lane == 0) mbarrier_arrive(shared.piece_empty);
      if (piece.tiles == 0) break;
      output.begin(piece);
#pragma unroll 1
      for (int t = 0; t < piece.tiles; ++t) {
        mbarrier_wait(shared.p_full + 8 * set, phase);
        if (shared.rescale[2 * Shape::Rows + set] != 0.f) {
          float by[NR][2];
#pragma unroll
          for (int n = 0; n < NR; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) by[n][j] = shared.rescale[set * Shape::Rows + n * 8 + (output.lane & 3) * 2 + j];
          }
          output.rescale(by);
        }
        add_values(shared.ring + stage * Shape::StageBytes, shared.p + set * Blocks * Shape::PBytes);
        if (output.lane == 0) {
          mbarrier_arrive(shared.empty + 8 * stage);
          mbarrier_arrive(shared.p_empty + 8 * set);
        }
        phase ^= set;
        set ^= 1;
        if (++stage == Shape::Stages) stage = 0;
      }
      mbarrier_wait(shared.totals_full, pieces & 1);
      output.finish(piece, shared.totals, shared.totals[Shape::Rows].x, shared.output, shared.flag);
      __syncwarp();
      if (output.lane == 0) mbarrier_arrive(shared.totals_empty);
      named_barrier(1, Shape::Consumers);  // the flag is free for the next piece
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void mla_narrow_fp8(const DecodeParams& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  MlaFp8Shared shared;
  shared.q = smem_address(memory);
  shared.q_rope = shared.q + Shape::Blocks * Shape::QPlaneBytes;
  shared.p = shared.q_rope + Shape::PBytes;
  shared.ring = shared.p + 2 * Shape::Blocks * Shape::PBytes;
  unsigned char* after = memory + (shared.ring - shared.q) + Shape::Stages * Shape::StageBytes;
  shared.full = smem_address(after);
  shared.empty = shared.full + 8 * Shape::Stages;
  shared.p_full = shared.empty + 8 * Shape::Stages;
  shared.p_empty = shared.p_full + 16;
  shared.totals_full = shared.p_empty + 16;
  shared.totals_empty = shared.totals_full + 8;
  shared.piece_full = shared.totals_empty + 8;
  shared.piece_empty = shared.piece_full + 8;
  shared.scratch = reinterpret_cast<int*>(after + 192);
  shared.piece = reinterpret_cast<MlaPart*>(after + 256);
  shared.flag = reinterpret_cast<int*>(after + 320);
  shared.up = reinterpret_cast<float*>(after + 448);
  shared.totals = reinterpret_cast<float2*>(after + 576);
  shared.rescale = reinterpret_cast<float*>(after + 848);
  shared.exchange = reinterpret_cast<float*>(after + 1120);
  shared.output = reinterpret_cast<float*>(after + 1664);
  static_assert(16 * Shape::Stages + 64 <= 192 && sizeof(MlaPart) <= 64, "room for the barriers");
  static_assert(Shape::Rows <= 32, "room for the rows' numbers");

  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::Stages; ++i) {
      mbarrier_init(shared.full + 8 * i, 1);
      mbarrier_init(shared.empty + 8 * i, 4);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared.p_full + 8 * i, 4);
      mbarrier_init(shared.p_empty + 8 * i, 4);
    }
    mbarrier_init(shared.totals_full, 4);
    mbarrier_init(shared.totals_empty, 4);
    mbarrier_init(shared.piece_full, 1);
    mbarrier_init(shared.piece_empty, 8);
    mbarrier_init_fence();
  }
  __syncthreads();
  launch_dependents();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Walker<Shape::T> walker(p);
  if (warp < 4) mla_prefetch(p, 2 * (Shape::C + Shape::R));
  if (p.B > 32) {
    wait_for_previous_grid();
    walker.place_many(shared.scratch, Shape::Threads);
  }
  if (warp < 4) {
    registers_raise<232>();
    wait_for_previous_grid();
    MlaFp8Adder<Shape> adder(p, shared);
    adder.run();
  } else if (warp < 8) {
    registers_raise<232>();
    wait_for_previous_grid();
    MlaFp8Weigher<Shape> weigher(p, shared);
    weigher.run();
  } else {
    registers_lower<40>();
    if (warp > 9) return;
    if (p.B <= 32) mla_place_ahead<Shape::T, 0>(p, walker);
    MlaFp8Producer<Shape> producer(p, shared);
    if (warp == 8) {
      producer.run_tiles(walker);
    } else {
      producer.run_pieces(walker);
    }
  }
}

}  // namespace attnkit
