// What the builds of the latent decode kernel for few rows share: the rows' softmax, the output, and how pieces meet.
#pragma once
#include "../common/convert.cuh"
#include "../decode/decode_combine.cuh"
#include "../decode/decode_schedule.cuh"
#include "../common/wgmma_sm90.cuh"

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

ATTNKIT_DEVICE int mla_add_release(int* counter, int n) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}

// For counting only: publishes nothing.
ATTNKIT_DEVICE int mla_add_relaxed(int* counter, int n) {
  int old;
  asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
  return old;
}

ATTNKIT_DEVICE int mla_read_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// ---- pieces of one sequence meet ----

// True in the CTA that is the last of ``count`` to arrive; the counter is zero again after that.
ATTNKIT_DEVICE bool mla_arrives_last(int* counter, int count, int* flag) {
  named_barrier(1, 128);  // the partial is written, and the flag's last reader is done
  if (threadIdx.x == 0) {
    const bool last = mla_add_release(counter, 1) == count - 1;
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
template <class Shape>
struct MlaSharing {
  static constexpr int kCame = 1, kGaveUp = 1 << 10, kLeft = 1 << 20, kMask = 1023;
  static constexpr int Lines = Shape::C / 128;  // of a row: a warp reads 128 columns at a time
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

  // Columns 128 line and on of a row, Across lines of them, added up over pieces part, part + parts, ...; 16 loads in flight.
  template <int Across>
  ATTNKIT_DEVICE void add_lines(int row, int line, int part, int parts, float4 (&total)[Across]) const {
    constexpr int Pieces = 16 / Across;
    const int lane = threadIdx.x & 31, count = piece.count;
    float high = negative_infinity(), sum = 0.f;
#pragma unroll 1
    for (int i = lane; i < count; i += 32) {
      const float2 w = load_l2(output.weights(piece.slot(i), 0) + row);
      join(high, sum, w.x, w.y);
    }
#pragma unroll 1
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_xor_sync(~0u, high, d), more = __shfl_xor_sync(~0u, sum, d);
      join(high, sum, other, more);
    }
    const float scale = output.finish(row, high, sum, lane == 0 && line == 0 && part == 0);
    high = high == negative_infinity() ? 0.f : high;
#pragma unroll
    for (int u = 0; u < Across; ++u) total[u] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int i0 = part; i0 < count; i0 += parts * Pieces) {
      const int mine = i0 + lane % Pieces * parts;
      const float2 w = load_l2(output.weights(piece.slot(min(mine, count - 1)), 0) + row);
      float4 x[Across][Pieces];
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        const int i = i0 + k * parts;
        const float4* from = reinterpret_cast<const float4*>(output.values(piece.slot(i)) + row * Shape::C + line * 128) + lane;
#pragma unroll
        for (int u = 0; u < Across; ++u) {
          x[u][k] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (i < count) x[u][k] = load_l2(from + u * 32);
        }
      }
      const float by = exp2_fast(mine < count ? w.x - high : negative_infinity()) * scale;
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        const float f = __shfl_sync(~0u, by, k);
#pragma unroll
        for (int u = 0; u < Across; ++u) {
          total[u].x += x[u][k].x * f, total[u].y += x[u][k].y * f, total[u].z += x[u][k].z * f, total[u].w += x[u][k].w * f;
        }
      }
    }
  }

  // The share of the j-th of those who wait: a warp takes a row's lines, some of them or one at a time.
  template <int Across>
  ATTNKIT_DEVICE void add_share(int j) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, units = output.rows * (Lines / Across);
    const int each = (units + piece.waiting - 1) / piece.waiting, first = j * each, last = min(first + each, units);
    const int parts = Across == 1 && each < 4 ? 4 : 1;  // few: all warps share the pieces
    float4 total[Across];
#pragma unroll 1
    for (int unit = first + (parts == 1 ? warp : 0); unit < last; unit += parts == 1 ? 4 : 1) {
      const int row = unit / (Lines / Across), line = unit % (Lines / Across) * Across;
      add_lines<Across>(row, line, parts == 1 ? 0 : warp, parts, total);
      if (parts > 1) {
        reinterpret_cast<float4*>(sums)[threadIdx.x] = total[0];
        named_barrier(1, 128);
        if (warp == 0) {
#pragma unroll
          for (int w = 1; w < 4; ++w) {
            const float4 x = reinterpret_cast<const float4*>(sums)[w * 32 + lane];
            total[0].x += x.x, total[0].y += x.y, total[0].z += x.z, total[0].w += x.w;
          }
        }
        named_barrier(1, 128);
        if (warp > 0) continue;
      }
#pragma unroll
      for (int u = 0; u < Across; ++u) output.write(output.place(row) + ((line + u) * 128 + lane * 4) * 2, total[u], 1.f);
    }
  }

  ATTNKIT_DEVICE void add(int j) const {
    if (Lines >= 4 && piece.count <= 4) {
      add_share<Lines >= 4 ? 4 : 1>(j);
    } else if (Lines >= 2 && piece.count <= 8) {
      add_share<Lines >= 2 ? 2 : 1>(j);
    } else {
      add_share<1>(j);
    }
  }

  enum { kLeaves, kAdds, kLastOfSome };

  // Thread 0: this piece is in the workspace; what is left to do.
  ATTNKIT_DEVICE int arrive() const {
    const int old = mla_add_release(counter(), kCame), mine = piece.index < piece.waiting;
    if ((old & kMask) == piece.count - 1) return old & kMask << 10 ? kLastOfSome : mine ? kAdds : kLeaves;
    if (!mine) return kLeaves;
    for (int i = 0; i < p.late; ++i) {  // how patient, here
      if ((mla_read_acquire(counter()) & kMask) == piece.count) return kAdds;
    }
    *gave_up(piece.index) = 1;
    if ((mla_add_release(counter(), kGaveUp) & kMask) != piece.count) return kLeaves;
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
    if (threadIdx.x == 0 && mla_add_relaxed(counter(), kLeft) >> 20 == piece.count - 1) *counter() = 0;
  }
};

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

  // The output, or this piece's partial sums, and then perhaps the sum of all pieces; by way of shared memory, so that
  // whole rows are written. ``by``: a factor for the values.
  ATTNKIT_DEVICE void finish(const MlaPart& piece, const float2* totals, float by, float* stage, int* flag) {
    const RowOutput output(p, piece, Shape::Rows, Shape::C);
    const int slot = piece.slot(piece.index);
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
    if (piece.waiting > 0) {
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
