// Where the pieces of one head meet: partial sums in a workspace, added up by the CTA (narrow builds: by the warps) that arrive last.
#pragma once
#include "../common/convert.cuh"
#include "decode_schedule.cuh"

namespace attnkit {

ATTNKIT_DEVICE void uncount_arrivals(int* counter, int by) {
  asm volatile("red.add.relaxed.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(-by) : "memory");
}

// Where the rows of one piece go.
struct RowOutput {
  const DecodeParams& p;
  int b, h, row0, rows, all_rows, columns;

  ATTNKIT_DEVICE RowOutput(const DecodeParams& params, const Piece& piece, int slot_rows, int dv) : p(params) {
    b = piece.b;
    h = piece.h;
    row0 = piece.block * p.block_rows;
    rows = min(p.block_rows, p.Q * p.G - row0);
    all_rows = slot_rows;
    columns = dv;
  }

  ATTNKIT_DEVICE float* values(int slot) const { return p.partial + static_cast<i64>(slot) * all_rows * columns; }

  // level 0: a piece's; level 1: those of a group, whose values stand in its first piece's slot
  ATTNKIT_DEVICE float2* weights(int slot, int level) const {
    float2* all = reinterpret_cast<float2*>(p.partial + static_cast<i64>(p.slots) * all_rows * columns);
    return all + (static_cast<i64>(level) * p.slots + slot) * all_rows;
  }

  ATTNKIT_DEVICE float sink(int head) const {
    if (p.sink_type == kF32) return static_cast<const float*>(p.sinks)[head];
    return unpack(static_cast<const u16*>(p.sinks)[head], p.sink_type == kBf16).x;
  }

  // What a row's weighted values are multiplied by, the sink counted in; one caller a row also says its lse.
  ATTNKIT_DEVICE float finish(int row, float high, float sum, bool says_lse) const {
    const int n = row0 + row, i = n * p.g_magic >> 20, head = h * p.G + n - i * p.G;
    float over = high, total = sum, scale = 1.f;
    if (p.sinks) {
      const float other = sink(head) * kLog2e;
      over = fmaxf(high, other);
      const float base = over == negative_infinity() ? 0.f : over;
      scale = exp2_fast(high - base);
      total = sum * scale + exp2_fast(other - base);
    }
    float out_scale = p.out_scale;
    if (p.v_scale) {
      const int kv_head = p.heads > 1 ? head / (p.G / p.heads) : h;
      out_scale *= *reinterpret_cast<const float*>(p.v_scale + kv_head * p.v_scale_h);
    }
    const bool none = over == negative_infinity();
    if (p.lse && says_lse) {
      p.lse[(static_cast<i64>(b) * p.Q + i) * (p.Hkv * p.G) + head] = none ? negative_infinity() : (over + log2_fast(total)) * kLn2;
    }
    return none ? 0.f : scale * out_scale * reciprocal(total);
  }

  ATTNKIT_DEVICE char* place(int row) const {
    const int n = row0 + row, i = n * p.g_magic >> 20;
    return p.out + b * p.out_b + i * p.out_i + (h * p.G + n - i * p.G) * p.out_h;
  }

  ATTNKIT_DEVICE void write(char* to, const float4& value, float by) const {
    uint2 packed;
    if (p.io_bf16) {
      packed = make_uint2(pack_bf16(value.x * by, value.y * by), pack_bf16(value.z * by, value.w * by));
    } else {
      packed = make_uint2(pack_f16(value.x * by, value.y * by), pack_f16(value.z * by, value.w * by));
    }
    *reinterpret_cast<uint2*>(to) = packed;
  }
};

// How many pieces are added up at once; more meet in groups first, so that several CTAs share the reading.
// Pieces of many rows are large: 32 KB at 64 rows and D = 128.
template <class Shape>
struct Meeting {
  static constexpr bool Large = Shape::Rows > 16;
  static constexpr int Most = Large ? 8 : 32;
  // Narrow builds' warps arrive each for itself, in a byte of a counter of its own, with the rows that they add up.
  static constexpr int Words = Shape::Wide ? 1 : (Shape::ConsumerWarps + 3) / 4;

  ATTNKIT_DEVICE static int fan(int count) { return Large && count <= 256 ? 8 : 16; }
};

// The rows of a block that one warp writes and adds up: warp, warp + ConsumerWarps, ...
template <class Shape>
struct WarpRows {
  static constexpr int Most = Shape::Rows / Shape::ConsumerWarps, Step = Shape::ConsumerWarps;
  int first, count;

  ATTNKIT_DEVICE explicit WarpRows(int rows) {
    first = threadIdx.x >> 5;
    count = (rows - first + Step - 1) / Step;
  }
  ATTNKIT_DEVICE int row(int k) const { return first + min(k, count - 1) * Step; }
};

// Which pieces meet: first, first + step, ... (count of them), of the ones themselves (level 0) or of groups' sums (1).
struct Meet {
  int first, step, count, level;
  bool last;  // into the output, not into a group's sum

  ATTNKIT_DEVICE int slot(const Piece& piece, int i) const { return piece.slot(first + min(i, count - 1) * step); }
};

// By how much a piece's sums of a row count, in a lane for each of Group pieces (``weight``: its (max, sum)); what the row comes to
// is left behind by the first of them.
template <int Group>
ATTNKIT_DEVICE float share_of_piece(const Piece& piece, const RowOutput& output, const Meet& meet, int row, float2 weight, bool says_lse) {
  float most = weight.x;
#pragma unroll
  for (int d = Group / 2; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  const float by = exp2_fast(weight.x - (most == negative_infinity() ? 0.f : most));  // none has seen a key: zeros
  float sum = weight.y * by;
#pragma unroll
  for (int d = Group / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const bool first = threadIdx.x % Group == 0;
  if (meet.last) return by * output.finish(row, most, sum, first && says_lse);
  if (first) output.weights(meet.slot(piece, 0), meet.level + 1)[row] = make_float2(most, sum);
  return by;
}

// Adds up the pieces that meet, in their order: R rows at a time, a lane four columns of each and E pieces at once, so that R * E
// loads are in flight. Lane r * Group + i knows by how much piece i counts in row r. All this runs once and waits for its
// instructions, so what is beyond the last row or piece is not left out: the last one is read again, for nothing.
template <class Shape, int R, int E>
ATTNKIT_DEVICE void add_rows(const Piece& piece, const RowOutput& output, const WarpRows<Shape>& rows, const Meet& meet) {
  constexpr int Group = 32 / R, Units = Shape::DV / 4, PieceBytes = Shape::Rows * Shape::DV * 4;
  const int lane = threadIdx.x & 31, i = lane % Group;
  // The first may stand apart, the others stand at equal distances.
  const char* first = reinterpret_cast<const char*>(output.values(meet.slot(piece, 0)));
  const char* second = reinterpret_cast<const char*>(output.values(piece.slot(meet.first + meet.step)));
  const int apart = meet.step * piece.step * PieceBytes, others = meet.count - 2;
#pragma unroll 1
  for (int k = 0; k < rows.count; k += R) {
    const int mine = rows.row(k + lane / Group);
#pragma unroll 1
    for (int unit = lane; unit < (Units + 31) / 32 * 32; unit += 32) {
      float4 parts[R][E];
      auto load = [&](int i0) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int at = (rows.row(k + r) * Units + (Units % 32 == 0 ? unit : min(unit, Units - 1))) * 16;
#pragma unroll
          for (int e = 0; e < E; ++e) {
            const char* from = i0 + e == 0 ? first : second + static_cast<i64>(min(i0 + e - 1, others)) * apart;
            parts[r][e] = load_l2(reinterpret_cast<const float4*>(from + at));
          }
        }
      };
      float2 weight = load_l2(output.weights(meet.slot(piece, i), meet.level) + mine);
      load(0);
      if (i >= meet.count) weight = make_float2(negative_infinity(), 0.f);
      const u64 to = reinterpret_cast<u64>(output.place(mine));
      const float by = share_of_piece<Group>(piece, output, meet, mine, weight, unit < 32);
      float4 total[R];
#pragma unroll
      for (int r = 0; r < R; ++r) total[r] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
      for (int i0 = 0;;) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float factor = __shfl_sync(~0u, by, r * Group + i0 + e);
            total[r].x += parts[r][e].x * factor;
            total[r].y += parts[r][e].y * factor;
            total[r].z += parts[r][e].z * factor;
            total[r].w += parts[r][e].w * factor;
          }
        }
        i0 += E;
        if (i0 >= meet.count) break;
        load(i0);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        char* out = reinterpret_cast<char*>(__shfl_sync(~0u, to, r * Group));
        if (k + r >= rows.count || unit >= Units) continue;
        if (meet.last) {
          output.write(out + unit * 8, total[r], 1.f);
        } else {
          reinterpret_cast<float4*>(output.values(meet.slot(piece, 0)))[rows.row(k + r) * Units + unit] = total[r];
        }
      }
    }
  }
}

// Counters are cold in a graph of many launches: asked for when a piece begins, they are there when it ends.
template <class Shape>
ATTNKIT_DEVICE void prefetch_counters(const DecodeParams& p, const Piece& piece) {
  constexpr int Words = Meeting<Shape>::Words;
  if (piece.count == 1) return;
  prefetch_l2(p.counters + (p.slots + piece.slot0) * Words);
  const int fan = Meeting<Shape>::fan(piece.count);
  if (piece.count > Meeting<Shape>::Most) prefetch_l2(p.counters + piece.slot(piece.index / fan * fan) * Words);
}

// True in the CTA (narrow builds: the warp) that is the last of ``count`` to arrive; the counter is zero again after that.
template <class Shape>
ATTNKIT_DEVICE bool arrives_last(int* counter, int count, int* flag) {
  if constexpr (Shape::Wide) {
    named_barrier(1, Shape::Consumers);  // the partial is written, and the flag's last reader is done
    if (threadIdx.x == 0) {
      const bool last = add_release(counter, 1) == count - 1;
      if (last) *counter = 0;
      *flag = last;
    }
    named_barrier(1, Shape::Consumers);
    return *flag != 0;
  } else {
    const int warp = threadIdx.x >> 5, shift = warp % 4 * 8;
    int before = 0;
    __syncwarp();
    if ((threadIdx.x & 31) == 0) {
      before = add_release(counter + warp / 4, 1 << shift);
      if ((before >> shift & 255) == count - 1) uncount_arrivals(counter + warp / 4, count << shift);
    }
    before = __shfl_sync(~0u, before, 0);
    __syncwarp();
    return (before >> shift & 255) == count - 1;
  }
}

template <class Shape>
ATTNKIT_DEVICE void combine(const DecodeParams& p, const Piece& piece, const RowOutput& output, int* flag) {
  constexpr int Words = Meeting<Shape>::Words, Wider = Shape::CtasPerSm == 1 && Shape::Rows == 8 ? 2 : 1;
  const WarpRows<Shape> rows(output.rows);
  if (!Shape::Wide && rows.count <= 0) return;
  const bool grouped = piece.count > Meeting<Shape>::Most;
  const int fan = Meeting<Shape>::fan(piece.count);
  const int first = grouped ? piece.index / fan * fan : 0;
  Meet meet = {first, 1, grouped ? min(fan, piece.count - first) : piece.count, 0, !grouped};
  int* meeting = p.counters + (p.slots + piece.slot0) * Words;
  int* counter = grouped ? p.counters + piece.slot(first) * Words : meeting;
#pragma unroll 1
  while (arrives_last<Shape>(counter, meet.count, flag)) {
    if (meet.count > 16 || rows.count == 1) {
      add_rows<Shape, 1, 16>(piece, output, rows, meet);
    } else if (WarpRows<Shape>::Most == 2 || meet.count > 8) {
      add_rows<Shape, 2, 8 * Wider>(piece, output, rows, meet);
    } else {
      add_rows<Shape, 4, 4 * Wider>(piece, output, rows, meet);
    }
    if (meet.last) break;
    meet = {0, fan, (piece.count + fan - 1) / fan, 1, true};
    counter = meeting;
  }
}

}  // namespace attnkit
