// Where the pieces of one sequence meet in the wide latent decode.
//
// Each warpgroup has 64 rows and 256 columns of its CTA's piece, and meets only with the warpgroups of the other
// pieces that have the same rows and columns. All publish their sums in a workspace, divided by their weights' sum. Those
// whose group has nothing else to do wait until the last has come, and each adds up its own part of the columns, in the
// order of the pieces. Who has waited in vain leaves its part to the last to arrive, so that two launches which keep
// each other from the multiprocessors come to an end all the same.
//
// All of this runs once a launch, so its instructions come from L2, some five cycles each: few of them count for more than
// few loads in flight.
#pragma once
#include "../common/convert.cuh"
#include "mla_wide_schedule.cuh"

namespace attnkit {

// Where one warpgroup's sums of a piece lie. A workspace has some hundred slots of 4096 float4 and 64 float2, a cell's
// two ``cells`` apart: a group publishes at most one piece that ends a sequence (the second) and one that does not. A unit
// is a float4 of one thread of the accumulators. Handed on, sums stay as they are: chunk c of thread t has columns
// 8 c + 2 (t % 4) (+ 1) of rows t / 32 * 16 + t % 32 / 4 (x, y) and 8 below (z, w). Where pieces meet, a slot has rows,
// one after another: MlaMeeting::unit.
struct MlaPartials {
  static constexpr int Chunks = 32;
  static constexpr u32 Bytes = Chunks * 128 * 16;  // of values; all slots together have some 40 MB at most
  const MlaWideParams& p;
  int cells;

  ATTNKIT_DEVICE MlaPartials(const MlaWideParams& params, int ctas) : p(params), cells(params.groups * params.row_blocks * ctas * 2) {}
  ATTNKIT_DEVICE float4* values(int slot) const {
    return reinterpret_cast<float4*>(reinterpret_cast<char*>(p.partial) + slot * Bytes);
  }
  ATTNKIT_DEVICE float2* weights(int slot) const {
    return reinterpret_cast<float2*>(reinterpret_cast<char*>(p.partial) + (2 * cells * Bytes + slot * 512u));
  }
  ATTNKIT_DEVICE int* arrived(int cell) const { return p.counters + cell; }
  ATTNKIT_DEVICE int* left(int cell) const { return p.counters + cells + cell; }
  ATTNKIT_DEVICE int* given_up(int cell) const { return p.counters + 2 * cells + cell; }
};

// The rows of one warpgroup: where they go, and what their sums are multiplied by in the end.
struct MlaRows {
  const MlaWideParams& p;
  int b, row0, column0;

  // n / H; exact for n up to 2^20, and shorter than that.
  ATTNKIT_DEVICE int token(int n) const {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * reciprocal(static_cast<float>(p.H)));
  }

  ATTNKIT_DEVICE float sink(int head) const {
    if (p.sink_type == kF32) return static_cast<const float*>(p.sinks)[head];
    return unpack(static_cast<const u16*>(p.sinks)[head], p.sink_type == kBf16).x;
  }

  // What a row's weighted values are multiplied by, the sink counted in; one caller a row also says its lse.
  ATTNKIT_DEVICE float finish(int row, float high, float sum, bool says_lse) const {
    const int n = row0 + row, i = token(n), head = n - i * p.H;
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
    return none ? 0.f : scale * reciprocal(total);
  }

  ATTNKIT_DEVICE bool has(int row) const { return row0 + row < p.rows; }  // others pad the block

  ATTNKIT_DEVICE char* place(int row) const {
    const int n = row0 + row, i = token(n);
    return p.out + b * p.out_b + i * p.out_i + (n - i * p.H) * p.out_h + column0 * 2;
  }
};

// One warpgroup's meeting. Narrow: sums come as f16, which has 3 bits more than a bf16 output, in half the bytes.
template <int Ctas, bool Bf16>
struct MlaMeeting {
  static constexpr bool Narrow = Bf16;
  static constexpr int Values = Narrow ? 8 : 4;  // of a unit
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

  // Where a thread's k-th unit of a row lies, of which it has columns Wide k + 8 e + 2 (lane % 4) (+ 1), e < Values / 2.
  static constexpr int Units = 256 / (4 * Values), Wide = 4 * Values;  // of a thread and row
  ATTNKIT_DEVICE static int unit(int row, int k, int lane) { return (k / 8 * 64 + row) * 32 + k % 8 * 4 + lane % 4; }

  ATTNKIT_DEVICE static void values_of(const float4& x, float (&v)[Values]) {
    if constexpr (Narrow) {
      const float in[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(__float_as_uint(in[i]), false);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
      }
    } else {
      v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    }
  }

  // The rows that one of those who wait adds up, by warps: 2^parts of them share the pieces of a row.
  struct Share {
    int row, rows;    // this warp's
    int part, parts;  // pieces part, part + 2^parts, ...
  };

  ATTNKIT_DEVICE static float above_none(float high) { return high == negative_infinity() ? 0.f : high; }

  // Row n of the share and those after it, units k0 to k0 + 7 of each: eight loads in flight, of Pieces pieces and of as
  // many rows as that leaves room for. ``sums``: where the warps that share a row leave theirs, [4, 256] floats of shared
  // memory, and what they are relative to and their weights' sum, [4] float2.
  template <int Pieces>
  ATTNKIT_DEVICE void add_rows(const Share& share, float* sums, int n, int k0) const {
    constexpr int Rows = 8 / Pieces;
    const int lane = threadIdx.x & 31, row0 = share.row + n;
    const int mine = lane % 8 / Pieces, row = row0 + mine;  // lane r * Pieces + k has the weight of x[r][k] below
    const char* from = reinterpret_cast<const char*>(partials.values(cell0) + unit(row0, k0, 0) + lane);
    const u32 stride = step * MlaPartials::Bytes, last = partials.cells * MlaPartials::Bytes;
    float total[Rows][Values] = {}, high = negative_infinity(), sum = 0.f;
#pragma unroll 1
    for (int i0 = share.part; i0 < count; i0 += Pieces << share.parts) {
      const int i = i0 + (lane % Pieces << share.parts);
      float2 w = load_l2(weights(min(i, count - 1)) + row);
      float4 x[Rows][Pieces];
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        const int i = i0 + (k << share.parts);
        const char* in = from + (i * stride + (i == count - 1 ? last : 0));
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          x[r][k] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (i < count) x[r][k] = load_l2(reinterpret_cast<const float4*>(in) + r * 32);
        }
      }
      w.x = i < count ? w.x : negative_infinity();
      float most = fmaxf(high, w.x);
#pragma unroll
      for (int d = 1; d < Pieces; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      const float base = above_none(most), shrink = exp2_fast(high - base), e = exp2_fast(w.x - base), by = e * w.y;
      high = most;
      sum = sum * shrink + e;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if constexpr (Pieces == 8) {  // fewer come at once
#pragma unroll
          for (int c = 0; c < Values; ++c) total[r][c] *= shrink;
        }
#pragma unroll
        for (int k = 0; k < Pieces; ++k) {
          const float f = __shfl_sync(~0u, by, r * Pieces + k);
          float v[Values];
          values_of(x[r][k], v);
#pragma unroll
          for (int c = 0; c < Values; ++c) total[r][c] += v[c] * f;
        }
      }
    }
#pragma unroll
    for (int d = 1; d < Pieces; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (Pieces == 8 && share.parts > 0) {
      const int warp = thread / 32;
      float2* to = reinterpret_cast<float2*>(sums + warp * 256 + k0 * 4 * Values) + lane;
#pragma unroll
      for (int c = 0; c < Values; c += 2) to[c * 16] = make_float2(total[0][c], total[0][c + 1]);
      if (lane == 0) reinterpret_cast<float2*>(sums + 1024)[warp] = make_float2(high, sum);
      return;
    }
    const float by = rows.finish(row, high, sum, half == 0 && k0 == 0 && lane < 8 && lane % Pieces == 0);
#pragma unroll
    for (int r = 0; r < Rows; ++r) write(row0 + r, k0, total[r], __shfl_sync(~0u, by, r * Pieces));
  }

  // Columns of one row: Wide (k0 + lane / 4) + 8 e + 2 (lane % 4) (+ 1).
  ATTNKIT_DEVICE void write(int row, int k0, const float (&total)[Values], float by) const {
    const int lane = threadIdx.x & 31;
    if (!rows.has(row)) return;
    char* to = rows.place(row) + (Wide * (k0 + lane / 4) + 2 * (lane % 4)) * 2;
#pragma unroll
    for (int c = 0; c < Values; c += 2) *reinterpret_cast<u32*>(to + 8 * c) = pack<Bf16>(total[c] * by, total[c + 1] * by);
  }

  // What the warps that share rows have left in ``sums``: two columns a thread, of one row or of two.
  ATTNKIT_DEVICE void add_parts(int row0, int parts, const float* sums) const {
    constexpr int Pairs = Values / 2;
    named_barrier(barrier, 128);
    const int u = thread % 32, e = thread / 32;  // the lane that has the columns, and which of its pairs
    const float2* from = reinterpret_cast<const float2*>(sums) + e * 32 + u;
    const float2* weight = reinterpret_cast<const float2*>(sums + 1024);
#pragma unroll 1
    for (int n = 0; n < 4 >> parts; ++n) {
      float2 total = make_float2(0.f, 0.f);
      float high = negative_infinity(), sum = 0.f;
#pragma unroll 1
      for (int i = 0; i < 1 << parts; ++i, from += 128, ++weight) {
        const float2 w = *weight, x = *from;
        const float most = fmaxf(high, w.x), base = above_none(most), mine = exp2_fast(high - base), by = exp2_fast(w.x - base);
        total.x = total.x * mine + x.x * by, total.y = total.y * mine + x.y * by;
        sum = sum * mine + w.y * by, high = most;
      }
      const float by = rows.finish(row0 + n, high, sum, half == 0 && thread == 0);
      if (!rows.has(row0 + n)) continue;
      char* to = rows.place(row0 + n) + (Wide * (e / Pairs * 8 + u / 4) + 8 * (e % Pairs) + 2 * (u % 4)) * 2;
      *reinterpret_cast<u32*>(to) = pack<Bf16>(total.x * by, total.y * by);
    }
  }

  // Adds up the rows that the j-th of those who wait is in charge of. ``sums``: shared memory, nullptr where there is none
  // to be had; then no two warps share a row.
  ATTNKIT_DEVICE void add_part(int j, float* sums) const {
    const int each = 6 - (31 - __clz(min(waiting(), 64)));  // 2^each rows a share
    if (j >> (6 - each)) return;
    const int warp = thread / 32;
    Share share;
    share.parts = sums ? max(0, 2 - each) : 0;
    share.part = warp & ((1 << share.parts) - 1);
    share.rows = 1 << max(0, each - 2);
    const int row = (warp >> share.parts) * share.rows;
    share.row = (j << each) + row;
    if (row >> each == 0) {
#pragma unroll 1
      for (int k0 = 0; k0 < Units; k0 += 8) {
#pragma unroll 1
        for (int n = 0; n < share.rows;) {
          if (count <= 2) {
            add_rows<2>(share, sums, n, k0), n += 4;
          } else if (count <= 4) {
            add_rows<4>(share, sums, n, k0), n += 2;
          } else {
            add_rows<8>(share, sums, n, k0), n += 1;
          }
        }
      }
    }
    if (share.parts > 0) add_parts(j << each, share.parts, sums);
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

  // Which share of the rows is this piece's to add up; negative: it does not wait.
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
  ATTNKIT_DEVICE void add_and_leave(int todo, float* sums) const {
#pragma unroll 1
    for (int other = -1; other < (todo == kLastOfSome ? waiting() : 0); ++other) {
      const int j = other < 0 ? mine() : other;
      if (other < 0 ? todo == kLeaves || j < 0 : j == mine()) continue;
      int* given_up = partials.given_up(cell(max(j, 0) + early));
      if (other >= 0 && tell(thread == 0 ? *reinterpret_cast<volatile int*>(given_up) : 0) == 0) continue;
      add_part(j, sums);
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
