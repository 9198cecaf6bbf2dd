// Paged decode for sm_90a: 1 to 16 query tokens a sequence over a paged cache, in one launch.
//
// Memory bound, so all of it serves one stream of loads. Producer warps bring tiles of T keys and values into a ring
// by TMA, a box a page (any page size and stride). Consumer warps each own 16 keys of every tile and all rows: S^T = K q^T
// with the keys on the M side of mma.sync and the G * Q rows on its N side, so rows are padded to a multiple of 8 only;
// then O^T = V^T P^T. Warps keep their own running maximum and meet once a piece. Pieces of one head that lie in
// several CTAs meet in a workspace; who arrives last adds them up in a fixed order, or where they are many, the last to arrive
// together. Where a cluster of CTAs has a head, they meet in their shared memory instead.
#pragma once
#include "../common/convert.cuh"
#include "decode_cluster.cuh"
#include "decode_combine.cuh"
#include "decode_load.cuh"
#include "decode_share.cuh"

namespace attnkit {

// Shape of one build. Rows of a block: 8 * NR * WR. Consumer warps: WR row groups x WT key groups, each
// warp with MT x 16 keys of a tile and NR x 8 rows. With Heads = 2 a tile holds two KV heads, slot by slot, so that
// memory is read 256 bytes at a time where a head's row has 128; each of the two row groups has one of them.
// Cluster: CTAs that have a head together. Charge: work is divided with what a short head costs besides its tiles. Share: several
// CTAs add up the pieces of a head.
template <int D_, int DV_, int KvType_, int NR_, int WR_, int WT_, int MT_, int CtasPerSm_, int Heads_, int Cluster_, bool Charge_, bool Share_>
struct DecodeShape {
  static constexpr int D = D_, DV = DV_, KvType = KvType_, NR = NR_, WR = WR_, WT = WT_, MT = MT_;
  static constexpr int CtasPerSm = CtasPerSm_, Heads = Heads_, Cluster = Cluster_;
  static constexpr bool Charge = Charge_, Share = Share_;
  static constexpr bool Bytes = KvType == kE4m3 || KvType == kInt8;  // computed in f16
  static constexpr bool Bf16 = KvType == kBf16, Wide = false;
  static constexpr int QSlots = 2;
  static constexpr int Rows = 8 * NR * WR;
  static constexpr int T = 16 * WT * MT;
  static constexpr int ConsumerWarps = WR * WT;
  static constexpr int Consumers = 32 * ConsumerWarps;
  // A lone CTA's first tiles are waited for, so two warps issue the keys' boxes and two the values'. Where two CTAs share a
  // multiprocessor, or have more rows, the registers are the consumers'.
  static constexpr int Producers = CtasPerSm == 1 && Rows == 8 ? 4 : 2;
  static constexpr int Threads = Consumers + 32 * Producers;
  static constexpr int ElementBytes = Bytes ? 1 : 2;
  // A row of K or V lies in planes of Swizzle bytes, each plane [T][Swizzle] as TMA swizzles it.
  ATTNKIT_DEVICE static constexpr int swizzle(int bytes) { return bytes % 128 == 0 ? 128 : bytes % 64 == 0 ? 64 : 32; }
  static constexpr int RowK = D * ElementBytes, RowV = DV * ElementBytes;
  static constexpr int SwizzleK = swizzle(RowK), SwizzleV = swizzle(RowV);
  static constexpr int StageBytes = T * Heads * (RowK + RowV);
  static constexpr int PitchQ = D * 2 + (D / 8 % 2 == 0 ? 16 : 0);  // an odd number of 16-byte units: no bank conflicts
  static constexpr int QBytes = Rows * PitchQ;
  // Q stays in registers unless it would take more than 32 of them.
  static constexpr bool QInRegisters = NR * (D / 8) <= 32;
  // Warps meet in the stage of a piece's last tile: as many columns at a time as it holds.
  ATTNKIT_DEVICE static constexpr int meet_columns() {
    int columns = 16;
    while (DV % (2 * columns) == 0 && 2 * columns * WT * Rows * 4 <= StageBytes) columns *= 2;
    return columns;
  }
  static constexpr int MeetColumns = meet_columns();
  // CTAs of a cluster that add up columns, each its own: a power of two.
  static constexpr int Owners = Cluster >= 16 ? 16 : Cluster >= 8 ? 8 : Cluster >= 4 ? 4 : Cluster >= 2 ? 2 : 1;
  static constexpr int InboxBytes = Cluster == 1 ? 0 : Cluster * Rows * (DV / Owners * 4 + 16);
  static constexpr int FixedBytes = 512 + 2 * QBytes + WT * Rows * 8 + InboxBytes + Share * 128;  // 512: barriers, the walker's scratch
  static_assert(MeetColumns * WT * Rows * 4 <= StageBytes, "a tile holds a pass of the meeting");
  static_assert(D % 16 == 0 && DV % MeetColumns == 0 && MeetColumns % 16 == 0, "head size");

  // Which of a block's rows stands in a place: where two heads share it, each has 8 places for its Q * G / 2.
  ATTNKIT_DEVICE static int row_of(const DecodeParams& p, int place) {
    if constexpr (Heads == 1) return place;
    const int group = p.G / Heads, i = (place & 7) / group;
    return i < p.Q ? i * p.G + place / 8 * group + (place & 7) - i * group : p.Q * p.G;
  }
  ATTNKIT_DEVICE static int place_of(const DecodeParams& p, int row) {
    if constexpr (Heads == 1) return row;
    const int group = p.G / Heads, i = row * p.g_magic >> 20, at = row - i * p.G, head = at >= group;
    return head * 8 + i * group + at - head * group;
  }

  static_assert(Heads == 1 || (WR == Heads && NR == 1), "a row group a head");
  static_assert(!Bytes || (D % 32 == 0 && DV % 32 == 0 && QInRegisters), "8-bit caches need head sizes of 32s");
};

template <class Shape>
struct DecodeConsumer {
  static constexpr int D = Shape::D, DV = Shape::DV, NR = Shape::NR, MT = Shape::MT, T = Shape::T;
  static constexpr bool Bf16 = Shape::Bf16;
  static constexpr int KSteps = D / 16, Columns = DV / 16;

  const DecodeParams& p;
  const DecodeShared& shared;
  int lane, warp, row_group, key_group, box_shift;
  u32 q_fragment[Shape::QInRegisters ? NR : 1][Shape::QInRegisters ? KSteps : 1][2];
  u32 q_rows;                // shared address of this piece's Q
  float sums[Columns][NR][4];  // O^T: columns of V down, rows of q across
  float high[NR][2], sum[NR][2], factor[NR][2];
  int token[NR][2];          // query token of this lane's rows

  ATTNKIT_DEVICE DecodeConsumer(const DecodeParams& params, const DecodeShared& s) : p(params), shared(s) {
    lane = threadIdx.x & 31;
    warp = threadIdx.x >> 5;
    row_group = warp / Shape::WT;
    key_group = warp % Shape::WT;
    box_shift = min(p.page_shift, 31 - __clz(T));
  }

  // q into registers; for an 8-bit cache as f16, each row scaled by a power of two so that it fits.
  ATTNKIT_DEVICE void load_q() {
    const u32 rows = q_rows + row_group * NR * 8 * Shape::PitchQ;
    if constexpr (Shape::Bytes) {
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        float most = 0.f;
        const u32 row = rows + (n * 8 + lane / 4) * Shape::PitchQ + (lane & 3) * 8;
#pragma unroll
        for (int k = 0; k < KSteps; ++k) {
          asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(q_fragment[n][k][0]), "=r"(q_fragment[n][k][1]) : "r"(row + k * 32));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float2 x = unpack(q_fragment[n][k][j], p.io_bf16);
            most = fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y)));
          }
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        // 2^e >= most, from the exponent bits; kept away from the ends so that its inverse is a number too
        const int e = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 126, -100), 100);
        const float down = __uint_as_float(static_cast<u32>(127 - e) << 23);
        const float up = __uint_as_float(static_cast<u32>(127 + e) << 23);
#pragma unroll
        for (int k = 0; k < KSteps; ++k) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float2 x = unpack(q_fragment[n][k][j], p.io_bf16);
            q_fragment[n][k][j] = pack_f16(x.x * down, x.y * down);
          }
        }
        // row r of these 8 lives in lanes 4r; this lane's rows of S are 2 (lane % 4) and the next
        factor[n][0] *= __shfl_sync(~0u, up, (lane & 3) * 8);
        factor[n][1] *= __shfl_sync(~0u, up, (lane & 3) * 8 + 4);
      }
    } else if constexpr (Shape::QInRegisters) {
      const u32 row = rows + (lane & 7) * Shape::PitchQ + (lane >> 3 & 1) * 16;
#pragma unroll
      for (int n = 0; n < NR; ++n) {
#pragma unroll
        for (int k = 0; k < KSteps; ++k) {
          asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                       : "=r"(q_fragment[n][k][0]), "=r"(q_fragment[n][k][1]) : "r"(row + n * 8 * Shape::PitchQ + k * 32) : "memory");
        }
      }
    }
  }

  ATTNKIT_DEVICE void begin(const Piece& piece) {
    const int head = Shape::Heads == 1 ? piece.h : piece.h * Shape::Heads + row_group;
    const float k_scale = p.k_scale ? *reinterpret_cast<const float*>(p.k_scale + head * p.k_scale_h) : 1.f;
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = piece.block * p.block_rows + Shape::row_of(p, (row_group * NR + n) * 8 + (lane & 3) * 2 + j);
        token[n][j] = row * p.g_magic >> 20;
        factor[n][j] = p.scale * k_scale * (p.softcap > 0.f ? 1.f : kLog2e);
        high[n][j] = negative_infinity();
        sum[n][j] = 0.f;
      }
    }
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
#pragma unroll
      for (int n = 0; n < NR; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[c][n][j] = 0.f;
      }
    }
  }

  // Where a tile has 16-byte unit ``unit`` of a plane of the row of this warp's head for a key: its boxes stand one after
  // another, in each its planes, in each slots and heads; TMA swizzles units by the address's bits.
  template <int Row, int Swizzle>
  ATTNKIT_DEVICE u32 place(int key, int plane, int unit) const {
    const int in_box = key & ((1 << box_shift) - 1), head = Shape::Heads == 1 ? 0 : row_group;
    const u32 at = ((key - in_box) * Row + (plane * Swizzle << box_shift) + in_box * Swizzle) * Shape::Heads + head * Swizzle;
    return at + (unit ^ (at >> 7 & (Swizzle / 16 - 1))) * 16;
  }

  // The same for every plane of a row.
  template <int Row, int Swizzle>
  ATTNKIT_DEVICE void places(u32 (&at)[Row / Swizzle], u32 tile, int key, int unit) const {
#pragma unroll
    for (int plane = 0; plane < Row / Swizzle; ++plane) at[plane] = tile + place<Row, Swizzle>(key, plane, unit);
  }

  // From there, where ``unit`` was 0 or 1, to the i-th 32 bytes of the row.
  template <int Swizzle, int Planes>
  ATTNKIT_DEVICE static u32 step(const u32 (&at)[Planes], int i) {
    constexpr int Each = Swizzle / 32;
    return at[i / Each] ^ (i % Each * 32);
  }

  // S^T of this warp's keys: s[m][n] holds keys lane / 4 (+ 8) by rows 2 (lane % 4) (+ 1).
  ATTNKIT_DEVICE void scores(float (&s)[MT][NR][4], u32 k_tile) {
    constexpr int Chains = MT * NR <= 2 ? 2 : 1;  // one chain of dependent mma would be all latency
    float part[Chains][MT][NR][4];
#pragma unroll
    for (int i = 0; i < Chains * MT * NR * 4; ++i) (&part[0][0][0][0])[i] = 0.f;
    u32 at[MT][Shape::RowK / Shape::SwizzleK];
#pragma unroll
    for (int m = 0; m < MT; ++m) places<Shape::RowK, Shape::SwizzleK>(at[m], k_tile, (key_group * MT + m) * 16 + (lane & 15), lane >> 4);
    const u32 q_row = q_rows + (row_group * NR * 8 + (lane & 7) + (lane >> 4) * 8) * Shape::PitchQ + (lane >> 3 & 1) * 16;
    constexpr int Step = Shape::Bytes ? 2 : 1;
#pragma unroll
    for (int k = 0; k < KSteps; k += Step) {
      u32 b[NR][2];
      if constexpr (!Shape::QInRegisters) {
#pragma unroll
        for (int n = 0; n < NR; n += 2) {
          u32 r[4];
          load_matrix_x4(r, q_row + n * 8 * Shape::PitchQ + k * 32);
          b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        u32 a[Step][4];
        if constexpr (Shape::Bytes) {
          u32 r[4];
          load_matrix_x4(r, step<Shape::SwizzleK>(at[m], k / 2));
          widen<Shape::KvType, 0, 1, 2, 3>(r[0], a[0][0], a[0][2]);
          widen<Shape::KvType, 0, 1, 2, 3>(r[1], a[0][1], a[0][3]);
          widen<Shape::KvType, 0, 1, 2, 3>(r[2], a[1][0], a[1][2]);
          widen<Shape::KvType, 0, 1, 2, 3>(r[3], a[1][1], a[1][3]);
        } else {
          load_matrix_x4(a[0], step<Shape::SwizzleK>(at[m], k));
        }
#pragma unroll
        for (int j = 0; j < Step; ++j) {
#pragma unroll
          for (int n = 0; n < NR; ++n) {
            if constexpr (Shape::QInRegisters) {
              mma_16x8x16<Bf16>(part[(k + j) % Chains][m][n], a[j], q_fragment[n][k + j][0], q_fragment[n][k + j][1]);
            } else {
              mma_16x8x16<Bf16>(part[(k + j) % Chains][m][n], a[j], b[n][0], b[n][1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < MT * NR * 4; ++i) {
      (&s[0][0][0])[i] = Chains == 2 ? (&part[0][0][0][0])[i] + (&part[Chains - 1][0][0][0])[i] : (&part[0][0][0][0])[i];
    }
  }

  // Which of the last Q keys query token i sees, bit j for key L - Q + j; every lane of the warp calls this.
  ATTNKIT_DEVICE u32 tree_bits(const Piece& piece, int i) const {
    const bool seen = lane < p.Q && p.tree[piece.b * p.tree_b + i * p.tree_i + lane * p.tree_j] != 0;
    return __ballot_sync(~0u, seen);
  }

  ATTNKIT_DEVICE void mask(float (&s)[MT][NR][4], const Piece& piece, int key0) const {
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
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = key0 + (key_group * MT + m) * 16 + lane / 4 + (e >> 1) * 8;
#pragma unroll
        for (int n = 0; n < NR; ++n) {
          const int i = token[n][e & 1], at = recent + i;
          bool seen = key <= at;
          if (p.tree) seen = key < recent || (key < piece.length && (bits[n][e & 1] >> (key - recent) & 1));
          seen = seen && at >= 0 && (p.window == 0 || key > at - p.window);
          if (!seen) s[m][n][e] = negative_infinity();
        }
      }
    }
  }

  // Scores to weights, in place, with this warp's running maximum; then to the B fragments of P^T.
  ATTNKIT_DEVICE void weights(float (&s)[MT][NR][4], u32 (&w)[MT][NR][2]) {
    float rescale[NR][2];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = s[0][n][j];
#pragma unroll
        for (int m = 0; m < MT; ++m) most = fmaxf(most, fmaxf(s[m][n][j], s[m][n][j + 2]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 4));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 8));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
        most = fmaxf(most, high[n][j]);
        // Nothing seen yet: subtract 0, so that exp2(-inf) gives the zeros.
        const float base = most == negative_infinity() ? 0.f : most;
        rescale[n][j] = exp2_fast(high[n][j] - base);
        moved = moved || most != high[n][j];
        high[n][j] = most;
        float added = 0.f;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          s[m][n][j] = exp2_fast(s[m][n][j] - base);
          s[m][n][j + 2] = exp2_fast(s[m][n][j + 2] - base);
          added += s[m][n][j] + s[m][n][j + 2];
        }
        sum[n][j] = sum[n][j] * rescale[n][j] + added;
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NR; ++n) {
        w[m][n][0] = transpose_8x8(pack<Bf16>(s[m][n][0], s[m][n][1]));
        w[m][n][1] = transpose_8x8(pack<Bf16>(s[m][n][2], s[m][n][3]));
      }
    }
    if (__any_sync(~0u, moved)) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
#pragma unroll
        for (int n = 0; n < NR; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[c][n][j] *= rescale[n][j & 1];
        }
      }
    }
  }

  // O^T += V^T P^T over this warp's keys.
  ATTNKIT_DEVICE void add_values(const u32 (&w)[MT][NR][2], u32 v_tile) {
    if constexpr (Shape::Bytes) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        u32 at[Shape::RowV / Shape::SwizzleV];
        places<Shape::RowV, Shape::SwizzleV>(at, v_tile, (key_group * MT + m) * 16 + (lane & 15), lane >> 4);
#pragma unroll
        for (int c = 0; c < Columns; c += 2) {
          u32 r[4], a[2][4];
          load_matrix_x4_transposed(r, step<Shape::SwizzleV>(at, c / 2));
          // a 16-bit transpose of byte pairs: even columns to the upper 8 rows of the tile, odd to the lower
          widen<Shape::KvType, 0, 2, 1, 3>(r[0], a[0][0], a[0][1]);
          widen<Shape::KvType, 0, 2, 1, 3>(r[1], a[0][2], a[0][3]);
          widen<Shape::KvType, 0, 2, 1, 3>(r[2], a[1][0], a[1][1]);
          widen<Shape::KvType, 0, 2, 1, 3>(r[3], a[1][2], a[1][3]);
#pragma unroll
          for (int n = 0; n < NR; ++n) {
            mma_16x8x16<Bf16>(sums[c][n], a[0], w[m][n][0], w[m][n][1]);
            mma_16x8x16<Bf16>(sums[c + 1][n], a[1], w[m][n][0], w[m][n][1]);
          }
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        u32 at[Shape::RowV / Shape::SwizzleV];
        places<Shape::RowV, Shape::SwizzleV>(at, v_tile, (key_group * MT + m) * 16 + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
#pragma unroll
        for (int c = 0; c < Columns; ++c) {
          u32 a[4];
          load_matrix_x4_transposed(a, step<Shape::SwizzleV>(at, c));
#pragma unroll
          for (int n = 0; n < NR; ++n) mma_16x8x16<Bf16>(sums[c][n], a, w[m][n][0], w[m][n][1]);
        }
      }
    }
  }

  ATTNKIT_DEVICE void tile(const Piece& piece, int key0, u32 k_tile) {
    float s[MT][NR][4];
    u32 w[MT][NR][2];
    scores(s, k_tile);
    const bool capped = p.softcap > 0.f;
    const float twice = 2.f * kLog2e * p.softcap_inverse;
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          float x = s[m][n][e] * factor[n][e & 1];
          // cap * tanh(x / cap), by exp so that it is exact to a few ulps of the cap
          if (capped) x = kLog2e * p.softcap * (1.f - 2.f * reciprocal(1.f + exp2_fast(x * twice)));
          s[m][n][e] = x;
        }
      }
    }
    const bool inside = key0 + T <= piece.length - p.Q + 1 && (p.window == 0 || key0 > piece.length - 1 - p.window);
    if (!inside) mask(s, piece, key0);
    weights(s, w);
    const u32 v_tile = k_tile + T * Shape::Heads * Shape::RowK;
    if (key0 < piece.low || key0 + T > piece.length) clear_values(piece, key0, v_tile);
    add_values(w, v_tile);
  }

  // Weight 0 times a value nobody wrote may be NaN: this warp's values outside the sequence become zeros.
  ATTNKIT_DEVICE void clear_values(const Piece& piece, int key0, u32 v_tile) const {
    constexpr int Units = Shape::SwizzleV / 16, Planes = Shape::RowV / Shape::SwizzleV;
    for (int i = lane; i < MT * 16 * Units; i += 32) {
      const int row = key_group * MT * 16 + i / Units;
      if (key0 + row >= piece.low && key0 + row < piece.length) continue;
      for (int plane = 0; plane < Planes; ++plane) {
        store_shared_zeros(v_tile + place<Shape::RowV, Shape::SwizzleV>(row, plane, i % Units));
      }
    }
    fence_async_shared();  // before TMA writes there again
    __syncwarp();
  }

  // The key groups' (max, sum) of each row meet: ``factor`` becomes what this lane's sums count by. Returns, in lane k, what the
  // sum of this warp's k-th row is multiplied by.
  ATTNKIT_DEVICE float meet_rows(const Piece& piece, const RowOutput& output, const WarpRows<Shape>& rows) {
    float2* meet = reinterpret_cast<float2*>(shared.meet);
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[n][j] += __shfl_xor_sync(~0u, sum[n][j], 4);
        sum[n][j] += __shfl_xor_sync(~0u, sum[n][j], 8);
        sum[n][j] += __shfl_xor_sync(~0u, sum[n][j], 16);
        const int row = (row_group * NR + n) * 8 + (lane & 3) * 2 + j;
        if (lane < 4) meet[key_group * Shape::Rows + row] = make_float2(high[n][j], sum[n][j]);
      }
    }
    named_barrier(1, Shape::Consumers);  // and nobody reads the last tile any more
#pragma unroll
    for (int n = 0; n < NR; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = (row_group * NR + n) * 8 + (lane & 3) * 2 + j;
        float most = negative_infinity();
#pragma unroll
        for (int g = 0; g < Shape::WT; ++g) most = fmaxf(most, meet[g * Shape::Rows + row].x);
        factor[n][j] = exp2_fast(high[n][j] - (most == negative_infinity() ? 0.f : most));
      }
    }
    const int k = lane / Shape::Owners;  // in a cluster a lane has a row and one owner of columns, whom it tells
    if (k >= rows.count) return 1.f;
    const int n = rows.row(k), place = Shape::place_of(p, n);
    float most = negative_infinity(), total = 0.f;
#pragma unroll
    for (int g = 0; g < Shape::WT; ++g) most = fmaxf(most, meet[g * Shape::Rows + place].x);
#pragma unroll
    for (int g = 0; g < Shape::WT; ++g) {
      const float2 one = meet[g * Shape::Rows + place];
      total += one.y * exp2_fast(one.x - (most == negative_infinity() ? 0.f : most));
    }
    if constexpr (Shape::Cluster > 1) {
      ClusterMeeting<Shape>(shared).send_weight(lane % Shape::Owners, n, most, total);
      return 1.f;
    } else {
      if (piece.count == 1) return output.finish(n, most, total, true);
      float2* to = output.weights(piece.slot(piece.index), 0) + n;
      if constexpr (Shape::Share) {
        publish(to, make_float2(most, total));
      } else {
        *to = make_float2(most, total);
      }
      return 1.f;
    }
  }

  // The key groups' sums meet in the last tile's stage and leave as output, or as one partial of the head. A row's columns are
  // swizzled, so that the lanes of a store, which have four rows, hit banks of their own.
  ATTNKIT_DEVICE void finish(const Piece& piece, int stage) {
    constexpr int Pitch = Shape::MeetColumns, Each = Pitch / 16, Units = Pitch / 4;
    const RowOutput output(p, piece, Shape::Rows, DV);
    const WarpRows<Shape> rows(output.rows);
    float* meet = reinterpret_cast<float*>(shared.tiles + stage * Shape::StageBytes);
    const float row_scale = meet_rows(piece, output, rows);
    const int odd = (lane & 3) * 8 & (Pitch - 1);  // of this lane's rows
#pragma unroll
    for (int pass = 0; pass < DV / Pitch; ++pass) {
      if (pass > 0) named_barrier(1, Shape::Consumers);
#pragma unroll
      for (int c = 0; c < Each; ++c) {
#pragma unroll
        for (int n = 0; n < NR; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int row = (row_group * NR + n) * 8 + (lane & 3) * 2 + (j & 1);
            const int column = c * 16 + (Shape::Bytes ? lane / 4 * 2 + (j >> 1) : lane / 4 + (j >> 1) * 8);
            meet[(key_group * Shape::Rows + row) * Pitch + (column ^ odd)] = sums[pass * Each + c][n][j] * factor[n][j & 1];
          }
        }
      }
      named_barrier(1, Shape::Consumers);
#pragma unroll 2
      for (int at = 0; at < WarpRows<Shape>::Most * Units; at += 32) {
        const int k = (at + lane) / Units, column = (at + lane) % Units * 4;
        const float by = __shfl_sync(~0u, row_scale, k);
        if (k >= rows.count) continue;
        const int n = rows.row(k), place = Shape::place_of(p, n);
        const float* from = meet + place * Pitch + (column ^ ((place >> 1 & 3) * 8 & (Pitch - 1)));
        float4 total = *reinterpret_cast<const float4*>(from);
#pragma unroll
        for (int g = 1; g < Shape::WT; ++g) {
          const float4 more = *reinterpret_cast<const float4*>(from + g * Shape::Rows * Pitch);
          total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
        }
        if constexpr (Shape::Cluster > 1) {
          ClusterMeeting<Shape>(shared).send(n, pass * Pitch + column, total);
        } else if (piece.count == 1) {
          output.write(output.place(n) + (pass * Pitch + column) * 2, total, by);
        } else {
          float4* to = reinterpret_cast<float4*>(output.values(piece.slot(piece.index))) + (n * DV + pass * Pitch + column) / 4;
          if constexpr (Shape::Share) {
            publish(to, total);
          } else {
            *to = total;
          }
        }
      }
    }
    if constexpr (Shape::Cluster > 1) return;
    fence_async_shared();  // before TMA writes there again
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.empty + 8 * stage);
    if constexpr (!Shape::Share) {
      if (piece.count > 1) combine<Shape>(p, piece, output, shared.scratch);
    }
  }

  // A CTA of a cluster has one piece at the most; those that have none add up columns too.
  ATTNKIT_DEVICE void run_in_cluster() {
    const ClusterMeeting<Shape> meeting(shared);
    mbarrier_wait(shared.q_full, 0);
    const Piece& piece = shared.pieces[0];
    const RowOutput output(p, piece, Shape::Rows, DV);
    if (threadIdx.x == 0) meeting.expect(piece.count, output.rows);
    if (piece.tiles > 0) {
      begin(piece);
      q_rows = shared.q;
      load_q();
      int stage = 0, phase = 0, last = 0;
#pragma unroll 1
      for (int t = 0; t < piece.tiles; ++t) {
        mbarrier_wait(shared.full + 8 * stage, phase);
        tile(piece, (piece.tile + t) * T, shared.ring + stage * Shape::StageBytes);
        __syncwarp();
        last = stage;
        if (lane == 0 && t < piece.tiles - 1) mbarrier_arrive(shared.empty + 8 * stage);
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      finish(piece, last);
    }
    meeting.receive(piece, output);
  }

  ATTNKIT_DEVICE void run() {
    if constexpr (Shape::Cluster > 1) return run_in_cluster();
    int stage = 0, phase = 0;
    for (int pieces = 0;; ++pieces) {
      const int q_slot = pieces & 1;
      mbarrier_wait(shared.q_full + 8 * q_slot, pieces >> 1 & 1);
      const Piece& piece = shared.pieces[q_slot];
      const int tiles = piece.tiles;
      if (tiles == 0) {
        if constexpr (Shape::Share) {
          if (pieces > 0) share<Shape>(p, shared, shared.tiles + stage * Shape::StageBytes);
        }
        break;
      }
      begin(piece);
      if constexpr (Shape::Share) {
        clear_place<Shape>(p, shared, piece, shared.is_last[q_slot] != 0);
      } else {
        if (threadIdx.x == 0) prefetch_counters<Shape>(p, piece);
      }
      q_rows = shared.q + q_slot * Shape::QBytes;
      load_q();
      int last = 0;
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        mbarrier_wait(shared.full + 8 * stage, phase);
        tile(piece, (piece.tile + t) * T, shared.ring + stage * Shape::StageBytes);
        __syncwarp();
        last = stage;
        if (lane == 0 && t < tiles - 1) mbarrier_arrive(shared.empty + 8 * stage);
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      const Piece done = piece;
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.q_empty + 8 * q_slot);
      finish(done, last);
    }
  }
};

}  // namespace attnkit
