// Where many pieces of one head meet: the CTAs that come last wait for one another, and each adds up columns of its own.
//
// Nothing is counted between the last piece's last tile and the output: a piece's place in the workspace is cleared when the piece
// begins, what is written there is never +0, and who needs it reads until it is there. That is one way through L2. Who comes last is
// settled before, while the last tiles are on their way, by a counter of the head.
//
// Who waits must know that all others run, or launches which keep one another from the multiprocessors would never end. So it waits
// for all to have come, for a while; who has waited in vain leaves its share to the one that comes last of all.
//
// Of the parameters, chunk_least says how many units of four columns a CTA has to add up at least, and chunk_most how often it looks
// whether all have come.
#pragma once
#include "decode_combine.cuh"
#include "decode_load.cuh"

namespace attnkit {

// What is written is there when it is not +0: -0 stands for that.
ATTNKIT_DEVICE float never_zero(float x) { return __float_as_uint(x) == 0 ? __uint_as_float(0x80000000u) : x; }
ATTNKIT_DEVICE bool is_there(float x) { return __float_as_uint(x) != 0; }

ATTNKIT_DEVICE void publish(float4* to, const float4& v) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(never_zero(v.x)), "f"(never_zero(v.y)),
               "f"(never_zero(v.z)), "f"(never_zero(v.w))
               : "memory");
}

ATTNKIT_DEVICE void publish(float2* to, const float2& v) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(never_zero(v.x)), "f"(never_zero(v.y)) : "memory");
}

// Reads where ``wanted``, and leaves the value as it is elsewhere.
ATTNKIT_DEVICE void look(float4& v, const float4* from, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "@p ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
      : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w) : "l"(from), "r"(static_cast<u32>(wanted)) : "memory");
}

ATTNKIT_DEVICE void look(float2& v, const float2* from, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "@p ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];\n}"
      : "+f"(v.x), "+f"(v.y) : "l"(from), "r"(static_cast<u32>(wanted)) : "memory");
}

// A head's counter has fields: how many pieces have come that may wait, whether the one whose CTA goes on has, how many of those who
// wait have left, and how many have given up. One thread of a CTA uses it.
template <class Shape>
struct ShareGate {
  static constexpr int kCame = 1, kPassed = 1 << 10, kAll = 2047, kLeft = 1 << 11, kGaveUp = 1 << 21, kMask = 1023;
  const DecodeParams& p;

  ATTNKIT_DEVICE int* counter(const ShareTask& task) const { return p.counters + task.slot0; }
  ATTNKIT_DEVICE int* gave_up(const ShareTask& task, int share) const { return p.counters + p.slots + task.slot(share); }
  ATTNKIT_DEVICE static bool all_came(const ShareTask& task, int count) { return (count & kAll) == task.wanted; }

  ATTNKIT_DEVICE int add(const ShareTask& task, int n) const {
    const int now = add_release(counter(task), n) + n;
    if (all_came(task, now) && (now >> 11 & kMask) == task.waiting) *counter(task) = 0;  // nobody else will look
    return now;
  }

  // A piece whose CTA goes on.
  ATTNKIT_DEVICE void pass(ShareTask& task) const {
    const int now = add(task, kPassed);
    task.takes_over = all_came(task, now) && now >> 21;
  }

  // A CTA's last piece: the last ones to come have a share each. Returns whether it has yet to be said that this one has left.
  ATTNKIT_DEVICE bool come(ShareTask& task) const {
    int now = add(task, kCame);
    task.takes_over = all_came(task, now) && now >> 21;
    const int share = (now & kMask) - 1 - (task.wanted & kMask) + task.waiting;
    if (share < 0) return false;
    bool all = all_came(task, now);
    for (int i = 0; !all && i < p.chunk_most; ++i) all = all_came(task, read_acquire(counter(task)));
    if (all) {
      task.share = share;
      return true;
    }
    *gave_up(task, share) = 1;
    now = add(task, kLeft + kGaveUp);
    if (!all_came(task, now)) return false;
    task.share = share;  // the last came just now, and may not have seen it
    *gave_up(task, share) = 0;
    return false;
  }

  ATTNKIT_DEVICE void leave(const ShareTask& task) const { add(task, kLeft); }
};

// Adding up, by all consumer threads of a CTA. ``memory``: a stage of the ring that nobody uses any more.
template <class Shape>
struct ShareMeeting {
  static constexpr int Units = Shape::DV / 4, Threads = Shape::Consumers, Batch = 6;
  const DecodeParams& p;
  float4* sums;     // [Threads]
  float2* weights;  // [Threads]

  ATTNKIT_DEVICE ShareMeeting(const DecodeParams& params, unsigned char* memory)
      : p(params), sums(reinterpret_cast<float4*>(memory)), weights(reinterpret_cast<float2*>(memory + Threads * 16)) {}

  // Four columns of a row: weighted values relative to 2^high, and the weights' sum.
  struct Sum {
    float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
    float high = negative_infinity(), sum = 0.f;

    ATTNKIT_DEVICE void scale_to(float most) {
      const float by = exp2_fast(high - (most == negative_infinity() ? 0.f : most));
      value = make_float4(value.x * by, value.y * by, value.z * by, value.w * by);
      sum *= by;
      high = most;
    }
    ATTNKIT_DEVICE void add(const float4& v, const float2& w) {
      const float by = exp2_fast(w.x - (high == negative_infinity() ? 0.f : high));
      value = make_float4(value.x + v.x * by, value.y + v.y * by, value.z + v.z * by, value.w + v.w * by);
      sum += w.y * by;
    }
  };

  // Pieces first, first + step, ...: waits for each of them.
  ATTNKIT_DEVICE void add_pieces(Sum& total, const Piece& piece, const RowOutput& output, int unit, int first, int step) const {
    const int row = unit / Units;
#pragma unroll 1
    for (int i0 = first; i0 < piece.count; i0 += step * Batch) {
      float4 x[Batch];
      float2 w[Batch];
      const float4* values[Batch];
      const float2* row_weights[Batch];
      u32 missing = 0;
#pragma unroll
      for (int e = 0; e < Batch; ++e) {
        const int i = i0 + e * step, slot = piece.slot(i);
        x[e] = make_float4(0.f, 0.f, 0.f, 0.f);
        w[e] = make_float2(negative_infinity(), 0.f);
        values[e] = reinterpret_cast<const float4*>(output.values(slot)) + unit;
        row_weights[e] = output.weights(slot, 0) + row;
        missing |= (i < piece.count) << e;
      }
      while (missing) {
#pragma unroll
        for (int e = 0; e < Batch; ++e) {
          look(x[e], values[e], missing >> e & 1);
          look(w[e], row_weights[e], missing >> e & 1);
        }
#pragma unroll
        for (int e = 0; e < Batch; ++e) {
          const bool columns = is_there(x[e].x) && is_there(x[e].y) && is_there(x[e].z) && is_there(x[e].w);
          if (columns && is_there(w[e].x) && is_there(w[e].y)) missing &= ~(1u << e);
        }
      }
      float most = total.high;
#pragma unroll
      for (int e = 0; e < Batch; ++e) most = fmaxf(most, w[e].x);
      total.scale_to(most);
#pragma unroll
      for (int e = 0; e < Batch; ++e) total.add(x[e], w[e]);
    }
  }

  // Over a warp's lanes that have the same unit.
  ATTNKIT_DEVICE static void add_lanes(Sum& total, int width) {
    float most = total.high;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      if (d >= width) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    }
    if (width < 32) total.scale_to(most);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      if (d < width) break;
      total.value.x += __shfl_xor_sync(~0u, total.value.x, d);
      total.value.y += __shfl_xor_sync(~0u, total.value.y, d);
      total.value.z += __shfl_xor_sync(~0u, total.value.z, d);
      total.value.w += __shfl_xor_sync(~0u, total.value.w, d);
      total.sum += __shfl_xor_sync(~0u, total.sum, d);
    }
  }

  // Units first and on, ``width`` of them, a power of two: a thread has a unit and, where there are more threads, some of the pieces.
  ATTNKIT_DEVICE void add_units(const Piece& piece, const RowOutput& output, int first, int width) const {
    const int thread = threadIdx.x, units = output.rows * Units, unit = first + (thread & (width - 1)), row = min(unit, units - 1) / Units;
    char* to = output.place(row) + unit % Units * 8;
    Sum total;
    add_pieces(total, piece, output, min(unit, units - 1), thread / width, Threads / width);
    __syncwarp();
    add_lanes(total, width);
    if (width < Threads) {
      constexpr int Warps = Threads / 32;
      const int apart = max(width, 32);
      if (thread % 32 < width) {
        sums[thread] = total.value;
        weights[thread] = make_float2(total.high, total.sum);
      }
      named_barrier(1, Threads);
      if (thread >= width) return;
      float2 w[Warps];
      total = Sum();
#pragma unroll
      for (int k = 0; k < Warps; ++k) {
        w[k] = thread + k * apart < Threads ? weights[thread + k * apart] : make_float2(negative_infinity(), 0.f);
        total.high = fmaxf(total.high, w[k].x);
      }
#pragma unroll
      for (int k = 0; k < Warps; ++k) {
        if (thread + k * apart < Threads) total.add(sums[thread + k * apart], w[k]);
      }
    }
    if (unit >= units) return;
    output.write(to, total.value, output.finish(row, total.high, total.sum, unit % Units == 0));
  }

  ATTNKIT_DEVICE void add(const ShareTask& task, int share) const {
    const RowOutput output(p, task, Shape::Rows, Shape::DV);
    const int units = output.rows * Units;
    int each = 1;
    while (task.waiting * each < units) each *= 2;
    const int last = min((share + 1) * each, units), width = min(each, Threads);
#pragma unroll 1
    for (int first = share * each; first < last; first += width) add_units(task, output, first, width);
  }
};

// The place of a piece, by all consumers, when it begins: none of its values is there yet. With a CTA's last one it is said that
// all its places are cleared.
template <class Shape>
ATTNKIT_DEVICE void clear_place(const DecodeParams& p, const DecodeShared& shared, const Piece& piece, bool last) {
  if (piece.count > 1) {
    const RowOutput output(p, piece, Shape::Rows, Shape::DV);
    const int slot = piece.slot(piece.index);
    float4* values = reinterpret_cast<float4*>(output.values(slot));
    for (int i = threadIdx.x; i < output.rows * (Shape::DV / 4); i += Shape::Consumers) values[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (threadIdx.x < output.rows) output.weights(slot, 0)[threadIdx.x] = make_float2(0.f, 0.f);
  }
  __syncwarp();
  if (last && threadIdx.x % 32 == 0) mbarrier_arrive(shared.cleared);
}

// All consumers, when a CTA's last piece has been written: its share, and those that others have left.
template <class Shape>
ATTNKIT_DEVICE void share(const DecodeParams& p, const DecodeShared& shared, unsigned char* memory) {
  mbarrier_wait(shared.told, 0);
  const ShareMeeting<Shape> meeting(p, memory);
  const ShareGate<Shape> gate{p};
#pragma unroll 1
  for (int k = 0; k < 2; ++k) {
    const ShareTask& task = shared.tasks[k];
    const int others = task.takes_over ? task.waiting : 0;
#pragma unroll 1
    for (int i = task.share >= 0 ? -1 : 0; i < others; ++i) {
      if (i >= 0 && load_l2(gate.gave_up(task, i)) == 0) continue;
      meeting.add(task, i < 0 ? task.share : i);
      if (others > 0) named_barrier(1, Shape::Consumers);
      if (i >= 0 && threadIdx.x == 0) *gate.gave_up(task, i) = 0;
    }
  }
}

}  // namespace attnkit
