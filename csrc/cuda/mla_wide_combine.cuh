// Where the pieces of one sequence meet in the wide latent decode.
//
// Each warpgroup has 64 rows and 256 columns of its CTA's piece, and meets only with the warpgroups of the other
// pieces that have the same rows and columns. All publish their sums in a workspace. Those whose group has nothing else
// to do wait until the last has come, and each adds up its own part of the columns, in the order of the pieces. Who
// has waited in vain leaves its part to the last to arrive, so that two launches which keep each other from the
// multiprocessors come to an end all the same.
#pragma once
#include "convert.cuh"
#include "mla_wide_schedule.cuh"

namespace attnkit {

ATTNKIT_DEVICE int add_release(int* counter, int n) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}

ATTNKIT_DEVICE int read_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Where one warpgroup's sums of a piece lie. A workspace has some hundred slots of 4096 float4 and 64 float2, two a
// cell: a group publishes at most one piece that ends a sequence (slot 1) and one that does not.
struct MlaPartials {
  static constexpr int Chunks = 32;
  const MlaWideParams& p;
  int cells;

  ATTNKIT_DEVICE MlaPartials(const MlaWideParams& params, int ctas) : p(params), cells(params.groups * params.row_blocks * ctas * 2) {}
  ATTNKIT_DEVICE float4* values(int slot) const { return reinterpret_cast<float4*>(p.partial) + static_cast<u32>(slot) * (Chunks * 128); }
  ATTNKIT_DEVICE float2* weights(int slot) const {
    return reinterpret_cast<float2*>(p.partial) + (static_cast<u32>(2 * cells) * (Chunks * 256) + static_cast<u32>(slot) * 64);
  }
  ATTNKIT_DEVICE int* arrived(int cell) const { return p.counters + cell; }
  ATTNKIT_DEVICE int* left(int cell) const { return p.counters + cells + cell; }
  ATTNKIT_DEVICE int* given_up(int cell) const { return p.counters + 2 * cells + cell; }
};

// The rows of one warpgroup: where they go, and what their sums are multiplied by in the end.
struct MlaRows {
  const MlaWideParams& p;
  int b, row0, column0;

  ATTNKIT_DEVICE float sink(int head) const {
    if (p.sink_type == kF32) return static_cast<const float*>(p.sinks)[head];
    return unpack(static_cast<const u16*>(p.sinks)[head], p.sink_type == kBf16).x;
  }

  // What a row's weighted values are multiplied by, the sink counted in; one caller a row also says its lse.
  ATTNKIT_DEVICE float finish(int row, float high, float sum, bool says_lse) const {
    const int n = row0 + row, i = n / p.H, head = n - i * p.H;
    float over = high, total = sum, scale = 1.f;
    if (n >= p.rows) return 0.f;
    if (p.sinks) {
      const float other = sink(head) * kLog2e;
      over = fmaxf(high, other);
      const float base = over == negative_infinity() ? 0.f : over;
      scale = exp2_fast(high - base);
      total = sum * scale + exp2_fast(other - base);
    }
    const bool none = over == negative_infinity() && total == total;  // scores that are NaN must not pass for none
    if (p.lse && says_lse) {
      p.lse[(static_cast<i64>(b) * p.Q + i) * p.H + head] = none ? negative_infinity() : (over + log2_fast(total)) * kLn2;
    }
    return none ? 0.f : scale / total;
  }

  // Null for a row that pads the block.
  ATTNKIT_DEVICE char* place(int row) const {
    const int n = row0 + row, i = n / p.H;
    return n < p.rows ? p.out + b * p.out_b + i * p.out_i + (n - i * p.H) * p.out_h + column0 * 2 : nullptr;
  }
};

// One warpgroup's meeting. A unit is the float4 of one thread of the accumulators: chunk c of thread t has columns
// 8 c + 2 (t % 4) (+ 1) of rows t / 32 * 16 + t % 32 / 4 (x, y) and 8 below (z, w).
template <int Ctas, bool Bf16>
struct MlaMeeting {
  static constexpr int Chunks = MlaPartials::Chunks;
  const MlaWideParams& p;
  const MlaPartials& partials;
  const MlaRows& rows;
  int index, count, early;  // of the piece; by value, as what lies in shared memory is read again after each load
  int cell0, step;          // piece i's cell is cell0 + i * step
  int half, thread;         // which 256 columns
  int* flag;                // in shared memory, the warpgroup's own
  int barrier;              // a named barrier of its own

  ATTNKIT_DEVICE int cell(int i) const { return cell0 + i * step; }
  ATTNKIT_DEVICE int slot(int i) const { return 2 * cell(i) + (i == count - 1); }
  ATTNKIT_DEVICE float4* values(int i) const { return partials.values(slot(i)); }
  ATTNKIT_DEVICE float2* weights(int i) const { return partials.weights(slot(i)); }

  ATTNKIT_DEVICE int waiting() const { return count - early; }

  ATTNKIT_DEVICE void write(int chunk, int t, const float4& value, float by0, float by1) const {
    const int row = t / 32 * 16 + t % 32 / 4, column = 8 * chunk + 2 * (t % 4);
    char *to0 = rows.place(row), *to1 = rows.place(row + 8);
    if (to0) *reinterpret_cast<u32*>(to0 + column * 2) = pack<Bf16>(value.x * by0, value.y * by0);
    if (to1) *reinterpret_cast<u32*>(to1 + column * 2) = pack<Bf16>(value.z * by1, value.w * by1);
  }

  // What each of at most four pieces' values of the thread's row r are multiplied by; one caller a row says its lse.
  ATTNKIT_DEVICE void weigh(int r, bool says, float (&by)[4]) const {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    float sums[4], high = negative_infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 w = i < count ? load_l2(weights(i) + row) : make_float2(negative_infinity(), 0.f);
      by[i] = w.x, sums[i] = w.y;
      high = fmaxf(high, w.x);
    }
    const float base = high == negative_infinity() ? 0.f : high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      by[i] = exp2_fast(by[i] - base);
      sum += sums[i] * by[i];
    }
    const float over = rows.finish(row, high, sum, half == 0 && says && thread % 4 == 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) by[i] *= over;
  }

  // At most four pieces: several chunks are loaded at once.
  ATTNKIT_DEVICE void add_few(int chunk, int end) const {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float by[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) weigh(r, chunk == 0, by[r]);
    char *to0 = rows.place(row), *to1 = rows.place(row + 8);
    constexpr int Batch = 4;
#pragma unroll 1
    for (; chunk < end; chunk += Batch) {
      float4 parts[Batch][4];
#pragma unroll
      for (int c = 0; c < Batch; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          parts[c][i] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (i < count && chunk + c < end) parts[c][i] = load_l2(values(i) + (chunk + c) * 128 + thread);
        }
      }
#pragma unroll
      for (int c = 0; c < Batch; ++c) {
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total.x += parts[c][i].x * by[0][i];
          total.y += parts[c][i].y * by[0][i];
          total.z += parts[c][i].z * by[1][i];
          total.w += parts[c][i].w * by[1][i];
        }
        const int column = 8 * (chunk + c) + 2 * (thread % 4);
        if (to0 && chunk + c < end) *reinterpret_cast<u32*>(to0 + column * 2) = pack<Bf16>(total.x, total.y);
        if (to1 && chunk + c < end) *reinterpret_cast<u32*>(to1 + column * 2) = pack<Bf16>(total.z, total.w);
      }
    }
  }

  // Any number of pieces, for one unit; Parts neighbouring threads share the pieces of a unit.
  ATTNKIT_DEVICE void add_many(int unit, int part, int parts) const {
    constexpr int Batch = 8;
    const int t = unit % 128, row = t / 32 * 16 + t % 32 / 4;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    float high[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.f, 0.f};
    auto add = [&](const float4& x, const float2& w0, const float2& w1) {
      const float most0 = fmaxf(high[0], w0.x), base0 = most0 == negative_infinity() ? 0.f : most0;
      const float most1 = fmaxf(high[1], w1.x), base1 = most1 == negative_infinity() ? 0.f : most1;
      const float old0 = exp2_fast(high[0] - base0), new0 = exp2_fast(w0.x - base0);
      const float old1 = exp2_fast(high[1] - base1), new1 = exp2_fast(w1.x - base1);
      total.x = total.x * old0 + x.x * new0;
      total.y = total.y * old0 + x.y * new0;
      total.z = total.z * old1 + x.z * new1;
      total.w = total.w * old1 + x.w * new1;
      sum[0] = sum[0] * old0 + w0.y * new0;
      sum[1] = sum[1] * old1 + w1.y * new1;
      high[0] = most0, high[1] = most1;
    };
#pragma unroll 1
    for (int i0 = part; i0 < count; i0 += parts * Batch) {
      float4 x[Batch];
      float2 w0[Batch], w1[Batch];
#pragma unroll
      for (int k = 0; k < Batch; ++k) {
        const int i = i0 + k * parts;
        x[k] = make_float4(0.f, 0.f, 0.f, 0.f);
        w0[k] = w1[k] = make_float2(negative_infinity(), 0.f);
        if (i < count) {
          x[k] = load_l2(values(i) + unit);
          w0[k] = load_l2(weights(i) + row);
          w1[k] = load_l2(weights(i) + row + 8);
        }
      }
#pragma unroll
      for (int k = 0; k < Batch; ++k) add(x[k], w0[k], w1[k]);
    }
#pragma unroll 1
    for (int d = 1; d < parts; d *= 2) {
      float4 x;
      float2 w0, w1;
      x.x = __shfl_xor_sync(~0u, total.x, d), x.y = __shfl_xor_sync(~0u, total.y, d);
      x.z = __shfl_xor_sync(~0u, total.z, d), x.w = __shfl_xor_sync(~0u, total.w, d);
      w0.x = __shfl_xor_sync(~0u, high[0], d), w0.y = __shfl_xor_sync(~0u, sum[0], d);
      w1.x = __shfl_xor_sync(~0u, high[1], d), w1.y = __shfl_xor_sync(~0u, sum[1], d);
      add(x, w0, w1);
    }
    if (part == 0) {
      const bool says = half == 0 && unit < 128 && t % 4 == 0;
      const float by0 = rows.finish(row, high[0], sum[0], says), by1 = rows.finish(row + 8, high[1], sum[1], says);
      write(unit / 128, t, total, by0, by1);
    }
  }

  // Two who wait, and four pieces at most: each of the two keeps its half of the columns in registers.
  ATTNKIT_DEVICE bool keeps_own() const { return mine() >= 0 && waiting() == 2 && count <= 4; }

  // Adds up the columns that the j-th of those who wait is in charge of.
  ATTNKIT_DEVICE void add_part(int j) const {
    const int sharing = waiting(), parts = sharing >= 128 ? 4 : sharing >= 64 ? 2 : 1;
    if (parts > 1) {
      if (j < Chunks * parts) add_many(j * (128 / parts) + thread / parts, thread % parts, parts);
      return;
    }
    const int shares = min(sharing, Chunks), begin = j * Chunks / shares, end = (j + 1) * Chunks / shares;
    if (j >= shares) return;
    if (count <= 4) {
      add_few(begin, end);
    } else {
#pragma unroll 1
      for (int c = begin; c < end; ++c) add_many(c * 128 + thread, 0, 1);
    }
  }

  ATTNKIT_DEVICE int tell(int value) const {  // thread 0's value to all
    if (thread == 0) *flag = value;
    named_barrier(barrier, 128);
    const int told = *reinterpret_cast<volatile int*>(flag);
    named_barrier(barrier, 128);
    return told;
  }

  enum { kLeaves, kAdds, kLast, kLastOfSome, kGivesUp };

  // Thread 0: says that this piece is published, and finds out what is left to do. The counter's low half counts the
  // pieces that have come, its high half those who gave up waiting.
  ATTNKIT_DEVICE int arrive() const {
    int* arrived = partials.arrived(cell(0));
    const int old = add_release(arrived, 1);
    if ((old & 0xffff) == count - 1) return old >> 16 ? kLastOfSome : kLast;
    if (mine() < 0) return kLeaves;
    for (int i = 0; i < p.patience; ++i) {
      if ((read_acquire(arrived) & 0xffff) == count) return kAdds;
    }
    return kGivesUp;
  }

  // Which part of the columns is this piece's to add up; negative: it does not wait.
  ATTNKIT_DEVICE int mine() const { return index - early; }

  // What others need of this piece's sums is in the workspace, written by all threads of the warpgroup.
  ATTNKIT_DEVICE int meet() const {
    named_barrier(barrier, 128);
    return tell(thread == 0 ? arrive() : 0);
  }

  // All of this piece's sums are in the workspace.
  ATTNKIT_DEVICE int give_up() const {
    int todo = kLeaves;
    named_barrier(barrier, 128);
    if (thread == 0) {
      int* given_up = partials.given_up(cell(index));
      *given_up = 1;
      if ((add_release(partials.arrived(cell(0)), 1 << 16) & 0xffff) == count) {
        *given_up = 0;  // the last came just now, and did not see us give up
        todo = kAdds;
      }
    }
    return tell(todo);
  }

  // Does what others left; the counters are zero again when all have been here.
  ATTNKIT_DEVICE void leave(int todo) const {
#pragma unroll 1
    for (int other = 0; todo == kLastOfSome && other < waiting(); ++other) {
      int* given_up = partials.given_up(cell(other + early));
      if (other == mine() || tell(thread == 0 ? *reinterpret_cast<volatile int*>(given_up) : 0) == 0) continue;
      add_part(other);
      if (thread == 0) *given_up = 0;
    }
    named_barrier(barrier, 128);
    if (thread == 0 && add_release(partials.left(cell(0)), 1) == count - 1) {
      *partials.arrived(cell(0)) = 0;
      *partials.left(cell(0)) = 0;
    }
  }
};

}  // namespace attnkit
