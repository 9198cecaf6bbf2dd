// Where the pieces of one head meet: partial sums in a workspace, added up by the CTA that arrives last.
#pragma once
#include "../common/convert.cuh"
#include "decode_schedule.cuh"

namespace attnkit {

// Four columns of one row over some keys: weighted values relative to 2^high, and the weights' sum.
struct Running {
  float4 value = {0.f, 0.f, 0.f, 0.f};
  float high = negative_infinity(), sum = 0.f;

  // Adds N partials, each with its (high, sum). One maximum for all keeps the chain of dependent steps short.
  template <int N>
  ATTNKIT_DEVICE void add(const float4 (&parts)[N], const float2 (&weights)[N]) {
    float most = high;
#pragma unroll
    for (int i = 0; i < N; ++i) most = fmaxf(most, weights[i].x);
    const float base = most == negative_infinity() ? 0.f : most;  // none has seen a key
    const float mine = exp2_fast(high - base);
    high = most;
    sum *= mine;
    value = make_float4(value.x * mine, value.y * mine, value.z * mine, value.w * mine);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float by = exp2_fast(weights[i].x - base);
      sum += weights[i].y * by;
      value.x += parts[i].x * by;
      value.y += parts[i].y * by;
      value.z += parts[i].z * by;
      value.w += parts[i].w * by;
    }
  }
};

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

  ATTNKIT_DEVICE void write(int row, int column, const Running& total) const {
    write(place(row) + column * 2, total.value, finish(row, total.high, total.sum, column == 0));
  }

  ATTNKIT_DEVICE void store_partial(int slot, int row, int column, const Running& total) const {
    *reinterpret_cast<float4*>(values(slot) + row * columns + column) = total.value;
    if (column == 0) weights(slot, 0)[row] = make_float2(total.high, total.sum);
  }
};

// How many pieces one CTA adds up; more meet in groups of Fan first, so that several CTAs share the reading.
// Wide pieces are large: 32 KB at 64 rows and D = 128.
template <class Shape>
struct Meeting {
  static constexpr int Fan = Shape::Rows > 16 ? 8 : 16, Most = Shape::Rows > 16 ? 8 : 32;
};

// Adds pieces first, first + step, ... (count of them), in that order, to a group's sum or to the output.
// A thread takes Units groups of four columns and Each pieces at a time, so that many loads are in flight at once.
// The loops stay rolled: unrolled, they take registers from the loop over tiles.
template <class Shape, int Units, int Each>
ATTNKIT_DEVICE void add_pieces(const Piece& piece, const RowOutput& output, int first, int step, int count, int level, bool last) {
  const int in_row = output.columns / 4, all = output.rows * in_row;
#pragma unroll 1
  for (int unit0 = threadIdx.x; unit0 < all; unit0 += Units * Shape::Consumers) {
    Running total[Units];
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += Each) {
      float4 parts[Units][Each];
      float2 weights[Units][Each];
#pragma unroll
      for (int u = 0; u < Units; ++u) {
        const int unit = unit0 + u * Shape::Consumers, row = unit / in_row;
#pragma unroll
        for (int i = 0; i < Each; ++i) {
          parts[u][i] = make_float4(0.f, 0.f, 0.f, 0.f);
          weights[u][i] = make_float2(negative_infinity(), 0.f);
          if (i0 + i < count && unit < all) {
            const int slot = piece.slot(first + (i0 + i) * step);
            parts[u][i] = load_l2(reinterpret_cast<const float4*>(output.values(slot)) + unit);
            weights[u][i] = load_l2(output.weights(slot, level) + row);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < Units; ++u) total[u].add(parts[u], weights[u]);
    }
#pragma unroll
    for (int u = 0; u < Units; ++u) {
      const int unit = unit0 + u * Shape::Consumers, row = unit / in_row, column = (unit - row * in_row) * 4;
      if (unit >= all) break;
      if (last) {
        output.write(row, column, total[u]);
      } else {
        const int slot = piece.slot(first);
        reinterpret_cast<float4*>(output.values(slot))[unit] = total[u].value;
        if (column == 0) output.weights(slot, level + 1)[row] = make_float2(total[u].high, total[u].sum);
      }
    }
  }
}

// Counters are cold in a graph of many launches: asked for when a piece begins, they are there when it ends.
template <class Shape>
ATTNKIT_DEVICE void prefetch_counters(const DecodeParams& p, const Piece& piece) {
  if (piece.count == 1) return;
  prefetch_l2(p.counters + p.slots + piece.slot0);
  if (piece.count > Meeting<Shape>::Most) prefetch_l2(p.counters + piece.slot(piece.index / Meeting<Shape>::Fan * Meeting<Shape>::Fan));
}

// True in the CTA that is the last of ``count`` to arrive; the counter is zero again after that.
template <class Shape>
ATTNKIT_DEVICE bool arrives_last(int* counter, int count, int* flag) {
  named_barrier(1, Shape::Consumers);  // the partial is written, and the flag's last reader is done
  if (threadIdx.x == 0) {
    const bool last = count_arrival(counter) == count - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  named_barrier(1, Shape::Consumers);
  return *flag != 0;
}

template <class Shape>
ATTNKIT_DEVICE void combine(const DecodeParams& p, const Piece& piece, const RowOutput& output, int* flag) {
  const bool grouped = piece.count > Meeting<Shape>::Most;
  int first = grouped ? piece.index / Meeting<Shape>::Fan * Meeting<Shape>::Fan : 0, step = 1;
  int count = grouped ? min(Meeting<Shape>::Fan, piece.count - first) : piece.count;
  int* meeting = p.counters + p.slots + piece.slot0;
  int* counter = grouped ? p.counters + piece.slot(first) : meeting;
#pragma unroll 1
  for (int level = 0; arrives_last<Shape>(counter, count, flag); ++level) {
    const bool last = !grouped || level == 1;
    if (count <= 8 && output.rows * output.columns > 4 * Shape::Consumers) {
      add_pieces<Shape, 4, 4>(piece, output, first, step, count, level, last);
    } else if (count <= 8) {
      add_pieces<Shape, 1, 8>(piece, output, first, step, count, level, last);
    } else {
      add_pieces<Shape, 1, 16>(piece, output, first, step, count, level, last);
    }
    if (last) break;
    first = 0;
    step = Meeting<Shape>::Fan;
    count = (piece.count + Meeting<Shape>::Fan - 1) / Meeting<Shape>::Fan;
    counter = meeting;
  }
}

}  // namespace attnkit
