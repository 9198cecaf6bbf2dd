// The wide latent decode's two warpgroups that multiply weights with values, and bring pieces to an end.
#pragma once
#include "mla_wide_shared.cuh"

namespace attnkit {

template <class Shape>
struct MlaWideAdder {
  static constexpr int T = Shape::T, Parts = Shape::Parts, Ctas = Shape::Ctas;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int row0;  // the CTA's first query row
  MlaRing<Shape::Stages> ring;
  float out[2][64];  // 128 columns each: a product of 256 needs more registers than a kernel of 512 threads starts with

  ATTNKIT_DEVICE float& at(int i) { return out[i / 64][i % 64]; }

  // Which 256 columns. From a shuffle, so that the compiler knows it to be the same in all lanes, and with it barriers'
  // addresses, descriptors and loops: they are then in uniform registers, ready when a product may begin.
  const int which = __shfl_sync(~0u, (threadIdx.x >> 7) - 1, 0);
  ATTNKIT_DEVICE int half() const { return which; }

  // Asked for where they are used, not kept: registers hold sums.
  ATTNKIT_DEVICE static int thread() { return threadIdx.x & 127; }
  ATTNKIT_DEVICE static int lane() { return threadIdx.x & 31; }
  ATTNKIT_DEVICE static int row() { return (threadIdx.x >> 5 & 3) * 16 + lane() / 4; }  // and 8 below

  ATTNKIT_DEVICE u32 stage() const { return s.ring + ring.stage * Shape::StageBytes; }

  ATTNKIT_DEVICE void release() {
    __syncwarp();
    if (lane() < Ctas) mbarrier_arrive_cluster(cluster_address(s.empty + 8 * ring.stage, lane()));
    ring.next();
  }

  // Slots outside the sequence may hold NaN, and zero times NaN is NaN: their rows become zero.
  ATTNKIT_DEVICE void clear_outside(int low, int high) const {
    for (int i = thread(); i < T * 8; i += 128) {
      const int key = i / 8;
      if (key >= low && key < high) continue;
#pragma unroll
      for (int plane = 0; plane < 4; ++plane) store_shared_zeros(stage() + (4 * half() + plane) * Shape::PlaneBytes + i * 16);
    }
    fence_async_shared();
    named_barrier(2 + half(), 128);
  }

  ATTNKIT_DEVICE void rescale() {
    const signed char* decay = s.decay + ring.rope() * 64 + row();
    const int down0 = decay[0], down1 = decay[8];
    if (!__any_sync(~0u, down0 | down1)) return;
    const float by0 = exp2_fast(static_cast<float>(down0)), by1 = exp2_fast(static_cast<float>(down1));
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
      at(i) *= by0, at(i + 1) *= by0, at(i + 2) *= by1, at(i + 3) *= by1;
    }
  }

  // Everything but the products is done before the barrier: nothing else may keep them waiting.
  ATTNKIT_DEVICE void multiply() {
    const u64 values = mla_operand(stage() + 4 * half() * Shape::PlaneBytes);
    constexpr int Second = 2 * Shape::PlaneBytes / 16;
    const u64 weights = mla_operand(s.rope + ring.rope() * Shape::PlaneBytes);
    mbarrier_wait(s.go + 8 * ring.stage, ring.parity);
    wgmma_hold(out[0]);
    wgmma_hold(out[1]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < T / 16; ++step) {
      wgmma_ss_transposed<Shape::Bf16>(out[0], weights + step * 2, values + step * 128, 1);
      wgmma_ss_transposed<Shape::Bf16>(out[1], weights + step * 2, values + Second + step * 128, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(out[0]);
    wgmma_hold(out[1]);
  }

  // Four threads hold a row's columns two by two; they trade so that each stores 16 bytes in one piece.
  ATTNKIT_DEVICE void store_row(char* row, int r, float by) {
    const int me = lane() % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      u32 own[4], got[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] = pack<Shape::Bf16>(at(16 * i + 4 * j + 2 * r) * by, at(16 * i + 4 * j + 2 * r + 1) * by);
      // Round k: with the thread k away. What goes there is its column; what comes is ours of its word.
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int to = me ^ k;
        const u32 send = to & 2 ? (to & 1 ? own[3] : own[2]) : (to & 1 ? own[1] : own[0]);
        got[k] = __shfl_xor_sync(~0u, send, k);
      }
      u32 word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = j ^ me;
        word[j] = k & 2 ? (k & 1 ? got[3] : got[2]) : (k & 1 ? got[1] : got[0]);
      }
      if (row) *reinterpret_cast<uint4*>(row + (32 * i + 8 * me) * 2) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  // Adds the sums of the piece before, of the same rows and columns, which lie in the ring.
  ATTNKIT_DEVICE void take_over(const MlaPiece& piece, float2 (&totals)[2]) {
    const MlaPartials partials(p, Ctas);
    const int cell = (piece.first * p.row_blocks * Ctas + row0 / Shape::Rows) * 2 + half();
    mbarrier_wait(s.full + 8 * Parts * ring.stage, ring.parity);
    mbarrier_wait(s.full + 8 * (Parts * ring.stage + 1), ring.parity);
    read_acquire(partials.arrived(cell));
    float mine[2], others[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 other = load_l2(partials.weights(cell) + row() + 8 * r);
      const float high = fmaxf(totals[r].x, other.x), base = high == negative_infinity() ? 0.f : high;
      mine[r] = exp2_fast(totals[r].x - base), others[r] = exp2_fast(other.x - base);
      totals[r] = make_float2(high, totals[r].y * mine[r] + other.y * others[r]);
    }
    const u32 from = stage() + thread() * 16;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float4 x;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from + i * 2048) : "memory");
      at(4 * i) = at(4 * i) * mine[0] + x.x * others[0];
      at(4 * i + 1) = at(4 * i + 1) * mine[0] + x.y * others[0];
      at(4 * i + 2) = at(4 * i + 2) * mine[1] + x.z * others[1];
      at(4 * i + 3) = at(4 * i + 3) * mine[1] + x.w * others[1];
    }
    named_barrier(2 + half(), 128);
    if (thread() == 0) *partials.arrived(cell) = 0;
  }

  using Meeting = MlaMeeting<Ctas, Shape::Bf16>;

  // For the piece that goes on with these sums: as they are. TMA will read them.
  ATTNKIT_DEVICE void hand_on(const Meeting& meeting, const float2 (&totals)[2]) {
    float4* to = meeting.values(meeting.index) + thread();
#pragma unroll
    for (int i = 0; i < MlaPartials::Chunks; ++i) to[i * 128] = make_float4(at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3));
    tell_weights(meeting, totals);
    fence_async();
    named_barrier(2 + half(), 128);
    if (thread() == 0) add_release(meeting.partials.arrived(meeting.cell(0)), 1);
  }

  ATTNKIT_DEVICE void tell_weights(const Meeting& meeting, const float2 (&w)[2]) const {
    if (lane() % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) meeting.weights(meeting.index)[row() + 8 * r] = w[r];
  }

  // Sums divided by their weights' sum, to the workspace.
  ATTNKIT_DEVICE void publish(const Meeting& meeting, const float2 (&totals)[2]) {
    float by[2];
    float2 w[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool none = totals[r].y == 0.f;
      by[r] = none ? 0.f : reciprocal(totals[r].y);
      w[r] = make_float2(none ? negative_infinity() : totals[r].x + log2_fast(totals[r].y), 1.f);
    }
    float4* to = meeting.values(meeting.index) + Meeting::unit(row(), 0, lane());
#pragma unroll 1
    for (bool again = false;; again = true) {
      const bool large = store_rows(to, by);
      if (!Meeting::Narrow || again || !__any_sync(~0u, large)) break;
      scale_down(by, w);
    }
    tell_weights(meeting, w);
  }

  // True where f16 does not hold them.
  ATTNKIT_DEVICE bool store_rows(float4* to, const float (&by)[2]) {
    constexpr int Pairs = Meeting::Values / 2;
    u32 most = 0;
#pragma unroll
    for (int k = 0; k < Meeting::Units; ++k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        u32 x[4];
#pragma unroll
        for (int e = 0; e < Pairs; ++e) {
          const float a = at(4 * (Pairs * k + e) + 2 * r) * by[r], b = at(4 * (Pairs * k + e) + 2 * r + 1) * by[r];
          if constexpr (Meeting::Narrow) {
            x[e] = pack_f16(a, b);
            asm("max.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(most) : "r"(x[e]));
          } else {
            x[2 * e] = __float_as_uint(a), x[2 * e + 1] = __float_as_uint(b);
          }
        }
        const float y[4] = {__uint_as_float(x[0]), __uint_as_float(x[1]), __uint_as_float(x[2]), __uint_as_float(x[3])};
        to[Meeting::unit(8 * r, k, 0)] = make_float4(y[0], y[1], y[2], y[3]);
      }
    }
    return (most & 0x7fff) >= 0x7c00 || (most >> 16 & 0x7fff) >= 0x7c00;
  }

  // A power of two for each row, by which f16 holds it; the weights tell.
  ATTNKIT_DEVICE void scale_down(float (&by)[2], float2 (&w)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = 0.f;
#pragma unroll
      for (int i = 2 * r; i < 128; i += 4) high = fmaxf(high, fmaxf(fabsf(at(i)), fabsf(at(i + 1))));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2)) * by[r];
      const int down = max(0, static_cast<int>(__float_as_uint(high) >> 23) - 127 - 14);
      by[r] *= __uint_as_float((127 - down) << 23), w[r].y = __uint_as_float((127 + down) << 23);
    }
  }

  // One piece of a sequence, or all of it (count 1).
  ATTNKIT_DEVICE void finish(const MlaPiece& piece, const float2 (&totals)[2]) {
    const MlaRows rows{p, piece.b, row0, 256 * half()};
    if (piece.count == 1 || piece.takes_over()) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float by = rows.finish(row() + 8 * r, totals[r].x, totals[r].y, half() == 0 && lane() % 4 == 0);
        store_row(rows.has(row() + 8 * r) ? rows.place(row() + 8 * r) : nullptr, r, by);
      }
      return;
    }
    const MlaPartials partials(p, Ctas);
    const int step = p.row_blocks * Ctas * 2, cell0 = piece.first * step + row0 / Shape::Rows * 2 + half();
    const Meeting meeting{p,          partials, rows,   piece.index, piece.count,      piece.early,
                          cell0,      step,     half(), thread(),    s.flags + half(), 2 + half()};
    if (piece.handed_on()) return hand_on(meeting, totals);
    publish(meeting, totals);
    int todo = meeting.meet();
    if (todo == Meeting::kGivesUp) todo = meeting.give_up();
    // Who waits has nothing else to do: what is left of q is not needed any more.
    meeting.add_and_leave(todo, meeting.mine() < 0 ? nullptr : s.spare + half() * 1056);
  }

  ATTNKIT_DEVICE void run() {
#pragma unroll 1
    for (int n = 0;; n = (n + 1) & 3) {
      float2 totals[2] = {};
#pragma unroll
      for (int i = 0; i < 128; ++i) at(i) = 0.0f;
      mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
      const MlaPiece& piece = s.pieces[n];
      const int tiles = piece.tiles, sums = piece.takes_over() ? 2 : 0;
      if (tiles == 0) break;
      release();
      // Only the first tile and the last can hold slots outside of the sequence.
      const int low = piece.low - piece.tile * T, high = piece.length - piece.tile * T;
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
        mbarrier_wait(s.full + 8 * (Parts * ring.stage + half()), ring.parity);
        if (t > 0) rescale();
        if ((t == 0 && low > 0) || (t == tiles - 1 && high < tiles * T)) clear_outside(low - t * T, high - t * T);
        multiply();
        if (t == tiles - 1) {
#pragma unroll
          for (int r = 0; r < 2; ++r) totals[r] = s.totals[row() + 8 * r];
        }
        release();
      }
#pragma unroll 1
      for (int i = 0; i < sums; ++i) {
        mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
        if (i == half()) take_over(piece, totals);
        release();
      }
      finish(piece, totals);
    }
  }
};

}  // namespace attnkit
