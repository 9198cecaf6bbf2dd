// Absorbed latent decode (MLA) for many query rows over an fp8 cache: 656 bytes a token, which are 512 e4m3 values, four
// float32 scales of 128 values each, and 64 bf16 of rope. The wide latent decode (mla_wide_sm90.cuh) behind warps that widen.
//
// The four warps that bring tiles there fetch tokens by cp.async here, widen them to bf16 (a value times its scale, rounded
// once), and store them as the products read them. The two CTAs of a cluster each widen half of a tile's tokens, and store
// them to both. Pages may be of any size.
//
// Registers: 128 + 2 x 160 + 64 a thread of each warpgroup, of clusters of two. So 16 of the 36 steps of q are in registers and
// 20 in shared memory, and the ring has two and a half tiles, whose halves are freed one by one: see MlaWideFp8Shape.
#pragma once
#include "mla_wide_adder.cuh"
#include "mla_wide_fp8_converter.cuh"
#include "mla_wide_scorer.cuh"

namespace attnkit {

template <class Shape>
struct MlaWideFp8Scorer : MlaWideScorer<Shape> {
  using Base = MlaWideScorer<Shape>;
  using Base::lane, Base::mine, Base::p, Base::q, Base::ring, Base::row0, Base::s, Base::scores, Base::sum, Base::top, Base::warp;
  static constexpr int T = Shape::T, Steps = Base::Steps, UnitSteps = Shape::UnitSteps;
  MlaUnits<Shape::Units> units;

  ATTNKIT_DEVICE u32 place(int unit) const { return s.ring + units.of(unit) * Shape::UnitBytes; }
  ATTNKIT_DEVICE void wait_unit(int unit) const { mbarrier_wait(s.full + 8 * units.of(unit), units.parity(unit)); }
  ATTNKIT_DEVICE bool has_unit(int unit) const { return mbarrier_test(s.full + 8 * units.of(unit), units.parity(unit)); }
  ATTNKIT_DEVICE void wait_rope() const { mbarrier_wait(s.rope_full + 8 * ring.rope(), ring.rope_parity()); }
  ATTNKIT_DEVICE bool has_rope() const { return mbarrier_test(s.rope_full + 8 * ring.rope(), ring.rope_parity()); }

  ATTNKIT_DEVICE void next() {
    ring.next();
    units.next();
  }

  // Each warp copies its own 16 rows of what does not stay in registers; its products with the old ones are done.
  ATTNKIT_DEVICE void load_q() {
#pragma unroll
    for (int step = 0; step < Shape::Held; ++step) {
      if (step == UnitSteps) wait_unit(1);
      const u32 plane = place(step / UnitSteps) + step % UnitSteps / 4 * Shape::PlaneBytes;
      load_matrix_x4(reinterpret_cast<u32(&)[4]>(q[4 * step]), this->matrix_row(plane, step % 4));
    }
    wait_unit(1);
    wait_rope();
#pragma unroll 1
    for (int i = Shape::QFirst; i <= Shape::Planes; ++i) {
      const int unit = i / Shape::UnitPlanes;
      const u32 plane = unit < 2 ? place(unit) + i % Shape::UnitPlanes * Shape::PlaneBytes : s.rope + ring.rope() * Shape::PlaneBytes;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        u32 r[4];
        load_matrix_x4(r, this->matrix_row(plane, step));
        store_matrix_x4(this->matrix_row(s.q + (i - Shape::QFirst) * Shape::PlaneBytes, step), r[0], r[1], r[2], r[3]);
      }
    }
    fence_async_shared();
    named_barrier(1, 128);
  }

  // ``held``: the stage of an entry that the adders may begin with when this has been issued, or before if there is a wait in it.
  ATTNKIT_DEVICE void multiply(int held) {
    const u64 keys[3] = {mla_operand(place(0)), mla_operand(place(1)), mla_operand(s.rope + ring.rope() * Shape::PlaneBytes)};
    const u64 rest = mla_operand(s.q);
    constexpr int Plane = Shape::PlaneBytes / 16;
    wgmma_hold(scores);
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
      const int unit = step / UnitSteps;
      if (step % UnitSteps == 0) {
        if (unit > 0 && held >= 0 && !(unit == 1 ? has_unit(1) : has_rope())) this->let_go(held), held = -1;
        if (unit < 2) {
          wait_unit(unit);
        } else {
          wait_rope();
        }
      }
      if (step == 0) wgmma_fence();
      const u64 b = keys[unit] + step % UnitSteps / 4 * Plane + step % 4 * 2;
      if (step < Shape::Held) {
        wgmma_rs<Shape::Bf16>(scores, q + 4 * step, b, step > 0);
      } else {
        wgmma_ss<Shape::Bf16>(scores, rest + (step / 4 - Shape::QFirst) * Plane + step % 4 * 2, b, 1);
      }
    }
    if (held >= 0) this->let_go(held);
    wgmma_commit();
  }

  // One tile, the ``last`` of its piece or not. ``held``: the stage of a tile that the adders may not yet begin with.
  template <bool Capped, bool Masked>
  ATTNKIT_DEVICE void step(const MlaPiece& piece, int tile, bool last, int& held) {
    const float factor = Capped ? kLog2e : p.scale * kLog2e;
    if (held >= 0 && !has_unit(0)) {
      this->let_go(held);  // nothing to issue yet: no reason to make them wait
      held = -1;
    }
    multiply(held);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(s.read);
    wgmma_hold(scores);
    if constexpr (Capped) this->cap();
    if constexpr (Masked) this->mask(piece, tile);
    this->weigh(factor);
    if (last) this->tell_totals();
    fence_async_shared();
    __syncwarp();
    this->arrive(s.scored);
    held = ring.stage;
    next();
  }

  template <bool Capped>
  ATTNKIT_DEVICE void run() {
    mine = this->matrix_row(s.rope, 0);
#pragma unroll
    for (int i = 0; i < T / 2; ++i) scores[i] = 0.0f;
#pragma unroll 1
    for (int n = 0;; n = (n + 1) & 3) {
      wait_unit(0);
      const MlaPiece& piece = s.pieces[n];
      // For both units, whatever the entry: the second takes the place of the entry two before, and so tells that the adders
      // no longer wait for that one, whose barriers are about to be used again.
      wait_unit(1);
      if (piece.tiles == 0) break;
      load_q();
      this->arrive(s.scored);
      this->arrive(s.go);
      next();
      top[0] = top[1] = negative_infinity();
      sum[0] = sum[1] = 0.0f;
      // The same in all lanes, and known to be.
      int held = -1, tile = __shfl_sync(~0u, piece.tile, 0);
      const int end = tile + __shfl_sync(~0u, piece.tiles, 0), length = __shfl_sync(~0u, piece.length, 0);
      // Tiles that all rows see all of: those in between.
      const int full_end = Capped ? 0 : min(max(length - p.Q + 1, 0) / T, end);
      const int full_begin = p.window > 0 ? (max(length - 1 - p.window, -1) + T) / T : 0;
#pragma unroll 1
      for (; tile < min(full_begin, end); ++tile) step<Capped, true>(piece, tile, tile == end - 1, held);
#pragma unroll 1
      for (; tile < full_end; ++tile) step<Capped, false>(piece, tile, tile == end - 1, held);
#pragma unroll 1
      for (; tile < end; ++tile) step<Capped, true>(piece, tile, tile == end - 1, held);
      this->let_go(held);
      for (int sums = piece.takes_over() ? 2 : 0; sums > 0; --sums) {
        wait_unit(0);
        wait_unit(1);
        this->arrive(s.scored);
        this->arrive(s.go);
        next();
      }
    }
    this->arrive(s.scored);
  }
};

template <class Shape>
struct MlaWideFp8Adder : MlaWideAdder<Shape> {
  using Base = MlaWideAdder<Shape>;
  using Base::at, Base::half, Base::lane, Base::out, Base::p, Base::ring, Base::row, Base::row0, Base::s, Base::thread;
  MlaUnits<Shape::Units> units;

  ATTNKIT_DEVICE u32 place(int unit) const { return s.ring + units.of(unit) * Shape::UnitBytes; }
  ATTNKIT_DEVICE void wait_unit(int unit) const { mbarrier_wait(s.full + 8 * units.of(unit), units.parity(unit)); }

  ATTNKIT_DEVICE void release(int unit) const {
    __syncwarp();
    if (lane() < Shape::Ctas) mbarrier_arrive_cluster(cluster_address(s.empty + 8 * units.of(unit), lane()));
  }

  ATTNKIT_DEVICE void next() {
    ring.next();
    units.next();
  }

  ATTNKIT_DEVICE void pass() {
    release(0);
    release(1);
    next();
  }

  // The first unit's columns, then the second's: their places are free one after the other.
  ATTNKIT_DEVICE void multiply(bool last, float2 (&totals)[2]) {
    const u64 first = mla_operand(place(0) + 2 * half() * Shape::PlaneBytes);
    const u64 second = mla_operand(place(1) + 2 * half() * Shape::PlaneBytes);
    const u64 weights = mla_operand(s.rope + ring.rope() * Shape::PlaneBytes);
    mbarrier_wait(s.go + 8 * ring.stage, ring.parity);
    wgmma_hold(out[0]);
    wgmma_hold(out[1]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::T / 16; ++step) wgmma_ss_transposed<true>(out[0], weights + step * 2, first + step * 128, 1);
    wgmma_commit();
#pragma unroll
    for (int step = 0; step < Shape::T / 16; ++step) wgmma_ss_transposed<true>(out[1], weights + step * 2, second + step * 128, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (last) {  // before the scorer may go on to the next piece's
#pragma unroll
      for (int r = 0; r < 2; ++r) totals[r] = s.totals[row() + 8 * r];
    }
    release(0);
    wgmma_wait<0>();
    wgmma_hold(out[0]);
    wgmma_hold(out[1]);
  }

  // Adds the sums of the piece before, of the same rows and columns, which lie in the ring.
  ATTNKIT_DEVICE void take_over(const MlaPiece& piece, float2 (&totals)[2]) {
    const MlaPartials partials(p, Shape::Ctas);
    const int cell = (piece.first * p.row_blocks * Shape::Ctas + row0 / Shape::Rows) * 2 + half();
    wait_unit(0);
    wait_unit(1);
    read_acquire(partials.arrived(cell));
    float mine[2], others[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 other = load_l2(partials.weights(cell) + row() + 8 * r);
      const float high = fmaxf(totals[r].x, other.x), base = high == negative_infinity() ? 0.f : high;
      mine[r] = exp2_fast(totals[r].x - base), others[r] = exp2_fast(other.x - base);
      totals[r] = make_float2(high, totals[r].y * mine[r] + other.y * others[r]);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const u32 from = place(i / 16) + thread() * 16 + i % 16 * 2048;
      float4 x;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from) : "memory");
      at(4 * i) = at(4 * i) * mine[0] + x.x * others[0];
      at(4 * i + 1) = at(4 * i + 1) * mine[0] + x.y * others[0];
      at(4 * i + 2) = at(4 * i + 2) * mine[1] + x.z * others[1];
      at(4 * i + 3) = at(4 * i + 3) * mine[1] + x.w * others[1];
    }
    named_barrier(2 + half(), 128);
    if (thread() == 0) *partials.arrived(cell) = 0;
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
      pass();
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
        wait_unit(0);
        wait_unit(1);
        if (t > 0) this->rescale();
        multiply(t == tiles - 1, totals);
        release(1);
        next();
      }
#pragma unroll 1
      for (int i = 0; i < sums; ++i) {
        mbarrier_wait(s.scored + 8 * ring.stage, ring.parity);
        if (i == half()) take_over(piece, totals);
        pass();
      }
      this->finish(piece, totals);
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void mla_wide_fp8(const MlaWideParams& p) {
  extern __shared__ __align__(1024) char raw[];
  const MlaWideShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = Shape::Ctas > 1 ? cluster_rank() : 0;
  const int block = blockIdx.y, group = blockIdx.z;
  // For what is read first after the wait below; nothing is read yet.
  const int spare = threadIdx.x - 384, lines = ((p.capacity >> p.page_shift) + 31) >> 5;
  const int line = (spare - 32) * (gridDim.y * gridDim.z) + group * gridDim.y + block;
  if (spare == 1) tma_prefetch_map(&p.q_map);
  if (spare >= 0 && spare < 32 && spare * 32 < p.B) prefetch_l2(p.lens + spare * 32);
  if (spare >= 32 && spare < 64 && rank == 0 && line < p.B * lines) prefetch_l2(p.pages + line / lines * p.pages_b + line % lines * 32);
  if (threadIdx.x == 0) s.init_barriers();
  if (threadIdx.x < 32) reinterpret_cast<u32*>(s.decay)[threadIdx.x] = 0;
  if (Shape::Ctas > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  launch_dependents();
  const int row0 = (block * Shape::Ctas + rank) * Shape::Rows;
  if (warp >= 12) {
    int me;  // the lane; from here, it is kept and not asked for again and again
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(me));
    registers_lower<Shape::ConverterRegisters>();
    MlaWalker walker(p, group);
    // From shuffles, so that the compiler knows them to be the same in all lanes.
    const int other = __shfl_sync(~0u, rank ^ 1, 0), first = __shfl_sync(~0u, rank * (Shape::T / Shape::Ctas) + (warp - 12) * Shape::Each, 0);
    MlaWideFp8Converter<Shape> converter{p, s, row0, warp - 12, me, other, first};
    wait_for_previous_grid();
    walker.place();
    converter.save(walker.state);
    converter.run();
  } else if (warp >= 4) {
    registers_raise<Shape::AdderRegisters>();
    wait_for_previous_grid();
    MlaWideFp8Adder<Shape> adder{{p, s, row0}};
    adder.run();
  } else {
    if constexpr (Shape::ScorerRegisters < 128) {
      registers_lower<Shape::ScorerRegisters>();
    } else {
      registers_raise<Shape::ScorerRegisters>();
    }
    wait_for_previous_grid();
    MlaWideFp8Scorer<Shape> scorer{{p, s, lane, warp}};
    scorer.row0 = row0;
    if (p.softcap > 0.0f) {
      scorer.template run<true>();
    } else {
      scorer.template run<false>();
    }
  }
  if (Shape::Ctas > 1) cluster_sync();  // nobody leaves while another may still arrive at its barriers
}

}  // namespace attnkit
