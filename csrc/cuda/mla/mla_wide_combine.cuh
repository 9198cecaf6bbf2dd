// Where the pieces of one sequence meet in the wide latent decode.
//
// Each warpgroup has 64 rows and 256 columns of its CTA's piece, and meets only with the warpgroups of the other
// pieces that have the same rows and columns. All publish their sums in a workspace, divided by their weights' sum. Those
// whose group has nothing else to do wait until the last has come, and each adds up its own part of the columns, in the
// order of the pieces. Who has waited in vain leaves its part to the last to arrive, so that two launches which keep
// each other from the multiprocessors come to an end all the same.
//
// All of this runs once a launch, so its instructions come from L2: loops are not unrolled further than loads in flight
// ask for.
#pragma once
#include "../common/convert.cuh"
#include "mla_wide_schedule.cuh"

namespace attnkit {

ATTNKIT_DEVICE int add_release(int* counter, int n) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}

// For counting only: publishes nothing.
ATTNKIT_DEVICE int add_relaxed(int* counter, int n) {
  int old;
  asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}

ATTNKIT_DEVICE int read_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Where one warpgroup's sums of a piece lie. A workspace has some hundred slots of 4096 float4 and 64 float2, a cell's
// two ``cells`` apart: a group publishes at most one piece that ends a sequence (the second) and one that does not. A unit
// is a float4 of one thread of the accumulators: chunk c of thread t has columns 8 c + 2 (t % 4) (+ 1) of rows
// t / 32 * 16 + t % 32 / 4 (x, y) and 8 below (z, w); as f16 it has chunks 2 c and 2 c + 1, two columns a word.
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

  ATTNKIT_DEVICE bool has(int row) const { return row0 + row < p.rows; }  // others pad the block

  ATTNKIT_DEVICE char* place(int row) const {
    const int n = row0 + row, i = n / p.H;
    return p.out + b * p.out_b + i * p.out_i + (n - i * p.H) * p.out_h + column0 * 2;
  }
};

// One warpgroup's meeting. Narrow: sums come as f16, which has 3 bits more than a bf16 output, in half the bytes.
template <int Ctas, bool Bf16>
struct MlaMeeting {
  static constexpr bool Narrow = Bf16;
  static constexpr int Chunks = MlaPartials::Chunks, Values = Narrow ? 4 : 2, Units = Chunks * 128 * 2 / Values;
  const MlaWideParams& p;
  const MlaPartials& partials;
  const MlaRows& rows;
  int index, count, early;  // of the piece; by value, as what lies in shared memory is read again after each load
  int cell0, step;          // piece i's cell is cell0 + i * step
  int half, thread;         // which 256 columns
  int* flag;                // in shared memory, the warpgroup's own
  int barrier;              // a named barrier of its own

  ATTNKIT_DEVICE int cell(int i) const { return cell0 + i * step; }
  ATTNKIT_DEVICE int slot(int i) const { return cell(i) + (i == count - 1 ? partials.cells : 0); }
  ATTNKIT_DEVICE float4* values(int i) const { return partials.values(slot(i)); }
  // A row's: log2 of its sum of weights; what its values are to be multiplied by.
  ATTNKIT_DEVICE float2* weights(int i) const { return partials.weights(slot(i)); }

  ATTNKIT_DEVICE int waiting() const { return count - early; }

  // Two columns, or two and those eight further on, of one row of a unit.
  ATTNKIT_DEVICE static void values_of(const float4& x, int r, float (&v)[Values]) {
    if constexpr (Narrow) {
      const float2 a = unpack(__float_as_uint(r == 0 ? x.x : x.y), false), b = unpack(__float_as_uint(r == 0 ? x.z : x.w), false);
      v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
    } else {
      v[0] = r == 0 ? x.x : x.z, v[1] = r == 0 ? x.y : x.w;
    }
  }

  // Units unit, unit + 128, ... (``units`` of at most Most), pieces part, part + parts, ...: Most x Pieces loads in flight.
  // Threads side by side that share the pieces of their units add up theirs in the end.
  template <int Most, int Pieces>
  ATTNKIT_DEVICE void add_units(int unit, int units, int part, int parts) const {
    const int t = unit % 128, row = t / 32 * 16 + t % 32 / 4;
    float high[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.f, 0.f}, total[2][Most][Values] = {};
#pragma unroll 1
    for (int i0 = part; i0 < count; i0 += parts * Pieces) {
      float4 x[Most][Pieces];
      float2 w[2][Pieces];
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        const int i = i0 + k * parts, at = slot(min(i, count - 1));
        const float2* from = partials.weights(at) + row;
        w[0][k] = w[1][k] = make_float2(negative_infinity(), 0.f);
        if (i < count) w[0][k] = load_l2(from), w[1][k] = load_l2(from + 8);
#pragma unroll
        for (int u = 0; u < Most; ++u) {
          x[u][k] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (i < count && u < units) x[u][k] = load_l2(partials.values(at) + unit + u * 128);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = high[r];
#pragma unroll
        for (int k = 0; k < Pieces; ++k) most = fmaxf(most, w[r][k].x);
        const float base = most == negative_infinity() ? 0.f : most;
        shrink(total[r], sum[r], exp2_fast(high[r] - base));
        high[r] = most;
#pragma unroll
        for (int k = 0; k < Pieces; ++k) {
          const float e = exp2_fast(w[r][k].x - base), by = e * w[r][k].y;
          sum[r] += e;
#pragma unroll
          for (int u = 0; u < Most; ++u) {
            float v[Values];
            values_of(x[u][k], r, v);
#pragma unroll
            for (int c = 0; c < Values; ++c) total[r][u][c] += v[c] * by;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (Most == 1) {
#pragma unroll 1
        for (int d = 1; d < parts; d *= 2) {
          const float most = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], d));
          shrink(total[r], sum[r], exp2_fast(high[r] - (most == negative_infinity() ? 0.f : most)));
          high[r] = most;
          sum[r] += __shfl_xor_sync(~0u, sum[r], d);
#pragma unroll
          for (int c = 0; c < Values; ++c) total[r][0][c] += __shfl_xor_sync(~0u, total[r][0][c], d);
        }
      }
      if (part != 0) continue;
      const float by = rows.finish(row + 8 * r, high[r], sum[r], half == 0 && unit < 128 && t % 4 == 0);
      char* to = rows.place(row + 8 * r) + (unit / 128 * (4 * Values) + 2 * (t % 4)) * 2;
      if (!rows.has(row + 8 * r)) continue;
#pragma unroll
      for (int u = 0; u < Most; ++u) {
        if (u >= units) break;
#pragma unroll
        for (int c = 0; c < Values; c += 2) {
          *reinterpret_cast<u32*>(to + (u * 4 * Values + 4 * c) * 2) = pack<Bf16>(total[r][u][c] * by, total[r][u][c + 1] * by);
        }
      }
    }
  }

  template <int Most>
  ATTNKIT_DEVICE static void shrink(float (&total)[Most][Values], float& sum, float by) {
    sum *= by;
#pragma unroll
    for (int u = 0; u < Most; ++u) {
#pragma unroll
      for (int c = 0; c < Values; ++c) total[u][c] *= by;
    }
  }

  // Adds up the columns that the j-th of those who wait is in charge of.
  ATTNKIT_DEVICE void add_part(int j) const {
    int shares = 1;
    while (shares < 64 && 2 * shares <= waiting()) shares *= 2;
    if (j >= shares) return;
    const int each = Units / shares, end = (j + 1) * each, parts = max(1, 128 / each);
    if (each >= 512) {
#pragma unroll 1
      for (int unit = j * each; unit < end; unit += 1024) add_units<8, 2>(unit + thread, min(8, each / 128), 0, 1);
    } else {
#pragma unroll 1
      for (int unit = j * each; unit < end; unit += 128 / parts) add_units<1, 8>(unit + thread / parts, 1, thread % parts, parts);
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

  // This piece's sums are in the workspace, written by all threads of the warpgroup.
  ATTNKIT_DEVICE int meet() const {
    named_barrier(barrier, 128);
    return tell(thread == 0 ? arrive() : 0);
  }

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

  // Adds up what is this piece's to add, then, for the last to arrive, what others left; the counters are zero again
  // when all have been here.
  ATTNKIT_DEVICE void add_and_leave(int todo) const {
#pragma unroll 1
    for (int other = -1; other < (todo == kLastOfSome ? waiting() : 0); ++other) {
      const int j = other < 0 ? mine() : other;
      if (other < 0 ? todo == kLeaves || j < 0 : j == mine()) continue;
      int* given_up = partials.given_up(cell(max(j, 0) + early));
      if (other >= 0 && tell(thread == 0 ? *reinterpret_cast<volatile int*>(given_up) : 0) == 0) continue;
      add_part(j);
      if (other >= 0 && thread == 0) *given_up = 0;
    }
    named_barrier(barrier, 128);
    if (thread == 0 && add_relaxed(partials.left(cell(0)), 1) == count - 1) {
      *partials.arrived(cell(0)) = 0;
      *partials.left(cell(0)) = 0;
    }
  }
};

}  // namespace attnkit
