// Where the pieces of one sequence meet in the latent decode for few rows: partial sums in a workspace, added up by the last to
// arrive or, where there is more to add, by all whose CTAs have nothing else to do.
#pragma once
#include "../common/convert.cuh"
#include "../decode/decode_combine.cuh"
#include "../decode/decode_schedule.cuh"

namespace attnkit {

// True in the CTA that is the last of ``count`` to arrive; the counter is zero again after that.
ATTNKIT_DEVICE bool mla_arrives_last(int* counter, int count, int* flag) {
  named_barrier(1, 128);  // the partial is written, and the flag's last reader is done
  if (threadIdx.x == 0) {
    const bool last = add_release(counter, 1) == count - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  named_barrier(1, 128);
  return *flag != 0;
}

// A piece is 16 to 64 KB and a CTA reads some 64 KB a microsecond, so several CTAs share the adding up of many: groups
// of ``fan`` first.
ATTNKIT_DEVICE int mla_fan(int count) {
  int fan = count <= 9 ? 9 : 3;
  while (fan * fan < count) ++fan;
  return fan;
}

// 4 x Each columns of one row over some tokens: weighted values relative to 2^high, and the weights' sum.
template <int Each>
struct MlaSum {
  float4 value[Each];
  float high = negative_infinity(), sum = 0.f;

  ATTNKIT_DEVICE MlaSum() {
#pragma unroll
    for (int u = 0; u < Each; ++u) value[u] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  // Adds the pieces in ``slots``, less than Batch perhaps: those from ``count`` on are left out. All are asked for at once.
  // ``at``: the first columns' place in a piece; the others follow ``apart`` floats after one another.
  template <int Batch, class Slot>
  ATTNKIT_DEVICE void add(const RowOutput& output, int level, int row, int at, int apart, int count, const Slot& slot_of) {
    float4 parts[Each][Batch];
    float2 weights[Batch];
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      const int slot = slot_of(min(i, count - 1));
      const float* from = output.values(slot) + at;
      weights[i] = load_l2(output.weights(slot, level) + row);
#pragma unroll
      for (int u = 0; u < Each; ++u) {
        parts[u][i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (i < count) parts[u][i] = load_l2(reinterpret_cast<const float4*>(from + u * apart));
      }
    }
    float most = high;
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      if (i >= count) weights[i] = make_float2(negative_infinity(), 0.f);
      most = fmaxf(most, weights[i].x);
    }
    const float base = most == negative_infinity() ? 0.f : most;  // none has seen a token
    const float mine = exp2_fast(high - base);
    high = most;
    sum *= mine;
#pragma unroll
    for (int u = 0; u < Each; ++u) value[u] = make_float4(value[u].x * mine, value[u].y * mine, value[u].z * mine, value[u].w * mine);
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      const float by = exp2_fast(weights[i].x - base);
      sum += weights[i].y * by;
#pragma unroll
      for (int u = 0; u < Each; ++u) {
        value[u].x += parts[u][i].x * by;
        value[u].y += parts[u][i].y * by;
        value[u].z += parts[u][i].z * by;
        value[u].w += parts[u][i].w * by;
      }
    }
  }

  ATTNKIT_DEVICE void write(const RowOutput& output, int row, int column, int apart) const {
    const float by = output.finish(row, high, sum, column == 0);
    char* to = output.place(row) + column * 2;
#pragma unroll
    for (int u = 0; u < Each; ++u) output.write(to + u * apart * 2, value[u], by);
  }
};

// Adds pieces first, first + step, ... (count of them), in that order; 16 threads a row. Up to 32 loads a thread are in
// flight: their latency is all that this takes, and the accumulators' registers are free by now.
template <class Shape>
ATTNKIT_DEVICE void mla_add_pieces(const Piece& piece, const RowOutput& output, int first, int step, int count, int level, bool last) {
  constexpr int Each = Shape::C / 64, Batch = 4;
  const int column = threadIdx.x % 16 * 4;
#pragma unroll 1
  for (int row = threadIdx.x / 16; row < output.rows; row += Shape::Consumers / 16) {
    const int at = row * Shape::C + column;
    MlaSum<Each> total;
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += Batch) {
      total.template add<Batch>(output, level, row, at, 64, count - i0, [&](int i) { return piece.slot(first + (i0 + i) * step); });
    }
    if (last) {
      total.write(output, row, column, 64);
    } else {
      const int slot = piece.slot(first);
#pragma unroll
      for (int u = 0; u < Each; ++u) *reinterpret_cast<float4*>(output.values(slot) + at + u * 64) = total.value[u];
      if (column == 0) output.weights(slot, level + 1)[row] = make_float2(total.high, total.sum);
    }
  }
}

template <class Shape>
ATTNKIT_DEVICE void mla_combine(const DecodeParams& p, const Piece& piece, const RowOutput& output, int* flag) {
  const int fan = mla_fan(piece.count);
  const bool grouped = piece.count > fan;
  int first = grouped ? piece.index / fan * fan : 0, step = 1;
  int count = grouped ? min(fan, piece.count - first) : piece.count;
  int* meeting = p.counters + p.slots + piece.slot0;
  int* counter = grouped ? p.counters + piece.slot(first) : meeting;
#pragma unroll 1
  for (int level = 0; mla_arrives_last(counter, count, flag); ++level) {
    const bool last = !grouped || level == 1;
    mla_add_pieces<Shape>(piece, output, first, step, count, level, last);
    if (last) break;
    first = 0;
    step = fan;
    count = (piece.count + fan - 1) / fan;
    counter = meeting;
  }
}

// ---- pieces whose CTAs have nothing else to do ----

// A piece, and how many of its sequence's, the first ones, are the last of their CTAs. Those wait for the others and
// share the adding up; 0: whoever comes last adds up all.
struct MlaPart : Piece {
  int waiting;

  template <int T>
  ATTNKIT_DEVICE void find_waiting(const Walker<T>& walker) {
    waiting = 0;
    // Where it is 64 KB or less, one CTA adds it up in less time than the others would wait.
    if (count * walker.p.block_rows <= 32 || count == 1 || walker.p.invariant) return;
    const bool goes_on = walker.cut(walker.cta - index + count) != walker.start + walker.tiles;  // the last piece's CTA
    waiting = count - goes_on;
  }
};

// The pieces of one sequence add up each other's rows: who waits has a share of the columns of all rows. Who has waited in
// vain leaves its share to the last to arrive, so that two launches which keep each other from the multiprocessors come to an end
// all the same. The counter has three fields: how many have come, have given up, have left.
//
// Where the output is bf16, pieces come as f16, which has 3 bits more: rows of C values divided by their weights' sum, and of a row
// (log2 of that sum, a power of two by which f16 holds the values). Otherwise as float32, with (reference, sum).
template <class Shape>
struct MlaSharing {
  static constexpr int kCame = 1, kGaveUp = 1 << 10, kLeft = 1 << 20, kMask = 1023;
  static constexpr int Lines = Shape::C / 128;  // of a row: a warp reads 128 columns at a time
  static constexpr bool F16 = Shape::Bf16;
  static constexpr int ValueBytes = F16 ? 2 : 4, Units = F16 ? 2 : 1;  // Units: what add_units takes at once
  const DecodeParams& p;
  const MlaPart& piece;
  const RowOutput& output;
  int* flag;    // in shared memory
  float* sums;  // [4, 128], there too

  ATTNKIT_DEVICE int* counter() const { return p.counters + p.slots + piece.slot0; }
  ATTNKIT_DEVICE int* gave_up(int i) const { return p.counters + piece.slot(i); }

  ATTNKIT_DEVICE static void join(float& high, float& sum, float other, float more) {
    const float most = fmaxf(high, other), base = most == negative_infinity() ? 0.f : most;
    sum = sum * exp2_fast(high - base) + more * exp2_fast(other - base), high = most;
  }

  // A lane's four columns of a piece, as they come.
  struct Columns {
    u32 x[F16 ? 2 : 4];

    ATTNKIT_DEVICE void load(const char* from) {
      if constexpr (F16) {
        const float2 v = load_l2(reinterpret_cast<const float2*>(from));
        x[0] = __float_as_uint(v.x), x[1] = __float_as_uint(v.y);
      } else {
        const float4 v = load_l2(reinterpret_cast<const float4*>(from));
        x[0] = __float_as_uint(v.x), x[1] = __float_as_uint(v.y), x[2] = __float_as_uint(v.z), x[3] = __float_as_uint(v.w);
      }
    }

    ATTNKIT_DEVICE void add_to(float4& total, float f) const {
      float4 v;
      if constexpr (F16) {
        const float2 low = unpack(x[0], false), high = unpack(x[1], false);
        v = make_float4(low.x, low.y, high.x, high.y);
      } else {
        v = make_float4(__uint_as_float(x[0]), __uint_as_float(x[1]), __uint_as_float(x[2]), __uint_as_float(x[3]));
      }
      total.x += v.x * f, total.y += v.y * f, total.z += v.z * f, total.w += v.w * f;
    }
  };

  // This lane's four columns of a line.
  ATTNKIT_DEVICE const char* place(int i, int row, int line) const {
    const char* values = reinterpret_cast<const char*>(output.values(piece.slot(i)));
    return values + ((row * Shape::C + line * 128) + (threadIdx.x & 31) * 4) * ValueBytes;
  }

  ATTNKIT_DEVICE float2 weight(int i, int row) const { return load_l2(output.weights(piece.slot(i), 0) + row); }
  // What the second of a piece's two numbers is to its values, and to the sum of all weights: a factor of one of them.
  ATTNKIT_DEVICE static float factor(float y) { return F16 ? y : 1.f; }
  ATTNKIT_DEVICE static float part_of_sum(float y) { return F16 ? 1.f : y; }

  // Columns 128 line and on of a row, added up over pieces part, part + parts, ...; 16 loads in flight.
  ATTNKIT_DEVICE float4 add_line(int row, int line, int part, int parts) const {
    constexpr int Pieces = 16;
    const int lane = threadIdx.x & 31, count = piece.count;
    float high = negative_infinity(), sum = 0.f;
#pragma unroll 1
    for (int i = lane; i < count; i += 32) {
      const float2 w = weight(i, row);
      join(high, sum, w.x, part_of_sum(w.y));
    }
#pragma unroll 1
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_xor_sync(~0u, high, d), more = __shfl_xor_sync(~0u, sum, d);
      join(high, sum, other, more);
    }
    const float scale = output.finish(row, high, sum, lane == 0 && line == 0 && part == 0);
    high = high == negative_infinity() ? 0.f : high;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int i0 = part; i0 < count; i0 += parts * Pieces) {
      const int mine = i0 + lane % Pieces * parts;
      const float2 w = weight(min(mine, count - 1), row);
      Columns x[Pieces];
#pragma unroll
      for (int k = 0; k < Pieces; ++k) x[k].load(place(min(i0 + k * parts, count - 1), row, line));
      const float by = mine < count ? exp2_fast(w.x - high) * factor(w.y) * scale : 0.f;
#pragma unroll
      for (int k = 0; k < Pieces; ++k) x[k].add_to(total, __shfl_sync(~0u, by, k));
    }
    return total;
  }

  // Up to Pieces pieces: Across lines of a row, for ``unit`` and unit + 4 where there is one, everything in flight together.
  template <int Across, int Pieces>
  ATTNKIT_DEVICE void add_units(int unit, int last) const {
    constexpr int Parts = Lines / Across;
    const int lane = threadIdx.x & 31, mine = lane % Pieces;
    float2 w[Units];
    Columns x[Units][Pieces][Across];
#pragma unroll
    for (int n = 0; n < Units; ++n) {
      const int at = min(unit + 4 * n, last - 1), row = at / Parts, line = at % Parts * Across;
      w[n] = weight(min(mine, piece.count - 1), row);
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        const char* from = place(min(k, piece.count - 1), row, line);
#pragma unroll
        for (int u = 0; u < Across; ++u) x[n][k][u].load(from + u * 128 * ValueBytes);
      }
    }
#pragma unroll
    for (int n = 0; n < Units; ++n) {
      const int at = unit + 4 * n;
      if (at >= last) return;
      const int row = at / Parts, line = at % Parts * Across;
      if (mine >= piece.count) w[n] = make_float2(negative_infinity(), 0.f);
      float high = w[n].x;
#pragma unroll
      for (int d = 1; d < Pieces; d *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
      const float e = exp2_fast(w[n].x - (high == negative_infinity() ? 0.f : high));
      float sum = e * part_of_sum(w[n].y);
#pragma unroll
      for (int d = 1; d < Pieces; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
      const float by = e * factor(w[n].y) * output.finish(row, high, sum, lane == 0 && line == 0);
      float4 total[Across] = {};
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        const float f = __shfl_sync(~0u, by, k);
#pragma unroll
        for (int u = 0; u < Across; ++u) x[n][k][u].add_to(total[u], f);
      }
#pragma unroll
      for (int u = 0; u < Across; ++u) output.write(output.place(row) + ((line + u) * 128 + lane * 4) * 2, total[u], 1.f);
    }
  }

  // The share of the j-th of those who wait, of few pieces.
  template <int Across, int Pieces>
  ATTNKIT_DEVICE void add_few(int j) const {
    const int units = output.rows * (Lines / Across), each = (units + piece.waiting - 1) / piece.waiting, last = min((j + 1) * each, units);
#pragma unroll 1
    for (int unit = j * each + threadIdx.x / 32; unit < last; unit += 4 * Units) add_units<Across, Pieces>(unit, last);
  }

  // The same of many pieces: a warp takes a line at a time, or all warps the pieces of one line, where there are few lines.
  ATTNKIT_DEVICE void add_many(int j) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, units = output.rows * Lines;
    const int each = (units + piece.waiting - 1) / piece.waiting, first = j * each, last = min(first + each, units);
    const bool together = each < 4;
#pragma unroll 1
    for (int unit = first + (together ? 0 : warp); unit < last; unit += together ? 1 : 4) {
      const int row = unit / Lines, line = unit % Lines;
      float4 total = add_line(row, line, together ? warp : 0, together ? 4 : 1);
      if (together) {
        reinterpret_cast<float4*>(sums)[threadIdx.x] = total;
        named_barrier(1, 128);
        if (warp == 0) {
#pragma unroll
          for (int w = 1; w < 4; ++w) {
            const float4 x = reinterpret_cast<const float4*>(sums)[w * 32 + lane];
            total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
          }
        }
        named_barrier(1, 128);
        if (warp > 0) continue;
      }
      output.write(output.place(row) + (line * 128 + lane * 4) * 2, total, 1.f);
    }
  }

  ATTNKIT_DEVICE void add(int j) const {
    if (piece.count <= 4) {
      add_few<Lines, 4>(j);
    } else if (piece.count <= 8) {
      add_few<Lines < 2 ? 1 : 2, 8>(j);
    } else {
      add_many(j);
    }
  }

  enum { kLeaves, kAdds, kLastOfSome };

  // Thread 0: this piece is in the workspace; what is left to do.
  ATTNKIT_DEVICE int arrive() const {
    const int old = add_release(counter(), kCame), mine = piece.index < piece.waiting;
    if ((old & kMask) == piece.count - 1) return old & kMask << 10 ? kLastOfSome : mine ? kAdds : kLeaves;
    if (!mine) return kLeaves;
    for (int i = 0; i < p.late; ++i) {  // how patient, here
      if ((read_acquire(counter()) & kMask) == piece.count) return kAdds;
    }
    *gave_up(piece.index) = 1;
    if ((add_release(counter(), kGaveUp) & kMask) != piece.count) return kLeaves;
    *gave_up(piece.index) = 0;  // the last came just now, and did not see it
    return kAdds;
  }

  ATTNKIT_DEVICE int tell(int value) const {  // thread 0's value to all
    if (threadIdx.x == 0) *flag = value;
    named_barrier(1, 128);
    const int told = *reinterpret_cast<volatile int*>(flag);
    named_barrier(1, 128);
    return told;
  }

  ATTNKIT_DEVICE void run() const {
    named_barrier(1, 128);
    const int todo = tell(threadIdx.x == 0 ? arrive() : 0);
    if (todo != kLeaves && piece.index < piece.waiting) add(piece.index);
#pragma unroll 1
    for (int i = 0; todo == kLastOfSome && i < piece.waiting; ++i) {
      if (tell(threadIdx.x == 0 ? *reinterpret_cast<volatile int*>(gave_up(i)) : 0) == 0) continue;
      add(i);
      if (threadIdx.x == 0) *gave_up(i) = 0;
    }
    named_barrier(1, 128);
    if (threadIdx.x == 0 && add_relaxed(counter(), kLeft) >> 20 == piece.count - 1) *counter() = 0;
  }
};

}  // namespace attnkit
