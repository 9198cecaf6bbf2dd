// What a warpgroup that attends does with its items, over 16-bit tiles and over widened ones.
//
// The softmax of a block runs beside P V of the one after it, and the warpgroups take turns at the tensor cores
// (FlashAttention-3, Shah et al. 2024). Most blocks do without a maximum of their own. The blocks of one item follow those
// of the one before without a gap: the next item's first product is issued before this item's output is written.
#pragma once
#include "prefill_products.cuh"
#include "prefill_shared.cuh"
#include "prefill_softmax.cuh"

namespace attnkit {

template <class Shape>
struct PrefillConsumer : PrefillProducts<Shape, Rows<Shape::Widened, Shape::D == 64>> {
  using Base = PrefillProducts<Shape, Rows<Shape::Widened, Shape::D == 64>>;
  using typename Base::Place;
  using Base::p, Base::s, Base::group, Base::lane, Base::k_ring, Base::q_ring, Base::items, Base::rows, Base::scores, Base::out,
      Base::probabilities, Base::BN, Base::take_turn, Base::give_turn, Base::multiply_qk, Base::rescale, Base::release_k,
      Base::release_v, Base::release_q, Base::wait_k, Base::wait_v, Base::wait_q, Base::clear_values_beyond, Base::place_rows;
  static constexpr int Scores = BN / 2;
  // Queries are let go behind the loop over blocks, which asks one thing less then, unless their room is waited for.
  static constexpr bool kQueriesLate = Shape::QStages == 2 || Shape::Widened;
  static constexpr bool Halves = BN == 128;  // a tile's last block may be 64 keys wide
  float unit[2];  // what the rows' scores are times, besides the scale: 1 unless Widened
  int unit_set;
  // Blocks from Span's first_whole on that go without a look at maxima: all rows of the warp see them whole and have a maximum;
  // where scores are capped, none of the item was large so far.
  u32 easy;
  bool level;  // all rows of the warp are Rows::level

  ATTNKIT_DEVICE void round_probabilities() {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) probabilities[i] = pack<Shape::Bf16>(scores[2 * i], scores[2 * i + 1]);
  }

  // The next item may be taken: its queries and first keys are here by the time this one ends.
  static constexpr int kAhead = 2;
  ATTNKIT_DEVICE void announce() const {
    if (!Shape::Widened && group == 0 && lane == 0) mbarrier_arrive(s.nearly_done);
  }

  // What a loop over blocks asks again and again, out of shared memory.
  struct Span {
    int begin, full_low, full_high, first_whole;
    u32 whole;  // blocks from first_whole on that every row sees whole

    ATTNKIT_DEVICE explicit Span(const Tile& t) : begin(t.block_begin), full_low(t.full_low), full_high(t.full_high) {
      first_whole = (max(full_low, 0) + BN - 1) / BN;
      whole = max(max(full_high, 0) / BN - first_whole, 0);
    }
    ATTNKIT_DEVICE u32 easy(bool now) const { return now ? whole : 0; }
  };

  // The first N scores of a block to weights, whatever the rows see of it; true where outputs have to shrink by decay.
  template <bool Capped, int N>
  ATTNKIT_DEVICE bool weigh(const Span& span, const Cap& cap, const float (&factor)[2], int block, float (&decay)[2]) {
    if constexpr (Capped && Shape::Widened) {
#pragma unroll
      for (int i = 0; i < N; ++i) scores[i] *= unit[i / 2 % 2];
    }
    const bool cut_high = block * BN + 2 * N > span.full_high, cut_low = block * BN < span.full_low;
    if constexpr (Capped) {  // the cap's form goes by what it sees, and that must not be what happens to stand behind the keys
      if (cut_high) rows.template mask_high<N>(scores, block * BN, 0.f);
      if (cut_low) rows.template mask_low<N>(scores, block * BN, 0.f);
      cap.template apply<N>(scores, cap.template small<N>(scores, rows.high));
    }
    if (cut_high) {  // most often the last keys alone
      if (N == 64 && !Capped && block * BN + 64 <= span.full_high) {
        rows.template mask_high<N, N / 2>(scores, block * BN, negative_infinity());
      } else {
        rows.template mask_high<N>(scores, block * BN, negative_infinity());
      }
    }
    if (cut_low) rows.template mask_low<N>(scores, block * BN, negative_infinity());
    if (Capped && cap.flat) {
      rows.template weigh_flat<N>(scores);
      return false;
    }
    const bool shrinks = rows.template lift<N>(scores, factor, decay);
    rows.template weigh<N>(scores, factor, decay);
    return shrinks;
  }

  // A block's raw scores to weights; true where outputs have to shrink by decay. While that is easy, a block that all rows see
  // whole is weighed without a look at its largest scores; where the weights tell that it was not, the scores are made again.
  template <bool Capped>
  ATTNKIT_DEVICE bool soften(const Span& span, const Cap& cap, const float (&factor)[2], int block, float (&decay)[2]) {
    constexpr bool Flat = !Capped || Shape::Bf16;  // other types' capped weights are not
    if (Shape::Easy && Flat && static_cast<u32>(block - span.first_whole) < easy) {
      if constexpr (Capped) {
        if (rows.template weigh_near<Scores>(scores, cap)) return false;
        easy = 0;
      } else if (Shape::Widened && level) {
        if (rows.template weigh_level<Scores>(scores)) return false;
      } else {
        if (rows.template weigh_low<Scores>(scores, factor)) return false;
      }
      this->multiply_qk_again();
    }
    const bool shrinks = weigh<Capped, Scores>(span, cap, factor, block, decay);
    if (!Capped) easy = span.easy(rows.known());
    if (!Capped && Shape::Widened) level = rows.level(factor);
    return shrinks;
  }

  // From the raw scores of the item's last block (K released) to the weights of its first, whose P V is left to do.
  template <bool Capped>
  ATTNKIT_DEVICE void attend(const Tile& t, const Cap& cap) {
    const float factor[2] = {Capped ? 1.f : log2_unit(0), Capped ? 1.f : log2_unit(1)};
    const Span span(t);
    const bool narrow = Halves && t.width == 64;
    int block = t.block_end - 1;
    float decay[2];
    rows.clear();
    if (block == span.begin) release_q();
    if (block <= span.begin + kAhead) announce();
    if (narrow) {
      weigh<Capped, Scores / 2>(span, cap, factor, block, decay);
#pragma unroll
      for (int i = Scores / 2; i < Scores; ++i) scores[i] = 0.f;
    } else {
      weigh<Capped, Scores>(span, cap, factor, block, decay);
    }
    easy = span.easy(Capped ? cap.flat : rows.known());
    level = !Capped && Shape::Widened && rows.level(factor);
    round_probabilities();
    if constexpr (!Shape::Widened) {
      wait_v();
      clear_values_beyond(t);
    }
    if (block-- == span.begin) return;
    if (narrow) {
      advance<64>(0);
    } else {
      advance<BN>(0);
    }
    while (true) {
      if (block == span.begin + kAhead) announce();
      const bool shrinks = soften<Capped>(span, cap, factor, block, decay);
      if (!kQueriesLate && block == span.begin) release_q();
      if (Shape::Easy) release_k();
      wgmma_wait<0>();
      wgmma_hold(out);
      release_v();
      round_probabilities();
      if (shrinks) rescale(decay);
      if (block == span.begin) break;
      --block;
      advance<BN>(1);
    }
    if (kQueriesLate) release_q();
  }

  // Q K^T of a block, whose K is not released, and P V of the one after it, which stays in flight.
  template <int Keys>
  ATTNKIT_DEVICE void advance(int accumulate) {
    wait_k();
    take_turn();
    multiply_qk();
    wait_v();
    this->template multiply_pv<Keys>(accumulate);
    give_turn();
    wgmma_wait<1>();
    wgmma_hold(scores);
    if (!Shape::Easy) release_k();
  }

  // P V of the item's last block beside the next item's first product; the output is written under the latter.
  ATTNKIT_DEVICE void join(Place& at) {
    wait_v();
    take_turn();
    this->template multiply_pv<BN>((*items).blocks() > 1);
    wait_q();
    wait_k();
    multiply_qk();
    give_turn();
    wgmma_wait<1>();
    wgmma_hold(out);
    release_v();
    finish(*items, at, false);
    items.release();
    at = place_rows(*items);
    read_units();
    wgmma_wait<0>();
    wgmma_hold(scores);
    release_k();
  }

  // After wait_q() of the item.
  ATTNKIT_DEVICE void read_units() {
    if constexpr (Shape::Widened) {
      const float* from = s.unit + unit_set * Shape::Rows + group * 64 + lane / 32 * 16 + lane % 32 / 4;
      unit[0] = from[0];
      unit[1] = from[8];
      unit_set ^= 1;
    }
  }

  template <bool Capped>
  ATTNKIT_DEVICE void run() {
    const Cap cap(p.scale, p.softcap, Shape::Bf16);
    unit[0] = unit[1] = 1.f;
    unit_set = 0;
    items.wait();
    while ((*items).more) {
      Place at = place_rows(*items);
      if ((*items).blocks() > 0) {
        wait_q();
        read_units();
        wait_k();
        multiply_qk();
        wgmma_wait<0>();
        wgmma_hold(scores);
        release_k();
        while (true) {
          attend<Capped>(*items, cap);
          const Tile& next = items.following();
          if ((*items).pieces > 1 || next.blocks() <= 0) break;
          join(at);
        }
        wait_v();
        this->template multiply_pv<BN>((*items).blocks() > 1);
        wgmma_wait<0>();
        wgmma_hold(out);
        release_v();
      } else {
        rows.clear();
        unit[0] = unit[1] = 1.f;
#pragma unroll
        for (int i = 0; i < Shape::DV / 2; ++i) out[i] = 0.f;
      }
      const bool met = (*items).pieces > 1;
      if (!met || this->meet(*items, [&](int r) { return log2_unit(r); })) finish(*items, at, met);
      items.release();
      items.wait();
    }
  }

  // What a row's maximum is times to be a logit in log2. A capped score is one already, and so are those of queries that took
  // the scale with them, but for float32's rounding of unit.
  ATTNKIT_DEVICE float log2_unit(int r) const {
    const float factor = p.scale * kLog2e * unit[r];
    return p.softcap > 0.f || (Shape::Widened && fabsf(factor - 1.f) < 1e-6f) ? 1.f : factor;
  }

  // met: the maxima are logits in log2.
  ATTNKIT_DEVICE void finish(const Tile& t, const Place& at, bool met) {
    float total[2], weights[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = rows.sum[r] + __shfl_xor_sync(~0u, rows.sum[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      weights[r] = total[r] == 0.f ? 0.f : reciprocal(total[r]);
    }
    if (p.sinks != nullptr || p.lse != nullptr) add_sinks(t, at, met, total, weights);
    float out_scale = p.out_scale;
    if (Shape::Widened && p.v_scale != nullptr) out_scale *= *reinterpret_cast<const float*>(p.v_scale + t.h * p.v_scale_h);
#pragma unroll
    for (int r = 0; r < 2; ++r) weights[r] *= out_scale;
    store_rows(t, at, weights);
  }

  // What sinks change about the rows' sums and weights; writes the rows' lse.
  ATTNKIT_DEVICE void add_sinks(const Tile& t, const Place& at, bool met, float (&total)[2], float (&weights)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float logit = rows.top[r] * (met || p.softcap > 0.0f ? kLn2 : p.scale * unit[r]);
      if (p.sinks != nullptr && at.token[r] >= 0) {
        const float sink = load_sink(p, at.head[r]);
        const float most = fmaxf(logit, sink), base = most == negative_infinity() ? 0.0f : most;
        const float shrink = logit == negative_infinity() ? 0.0f : exp2_fast((logit - base) * kLog2e);
        total[r] = total[r] * shrink + exp2_fast((sink - base) * kLog2e);
        weights[r] = total[r] == 0.f ? 0.f : reciprocal(total[r]) * shrink;
        logit = most;
      }
      if (p.lse != nullptr && lane % 4 == 0 && at.token[r] >= 0) {
        p.lse[static_cast<i64>(t.q0 + at.token[r]) * (p.Hkv * p.G) + at.head[r]] =
            total[r] > 0.0f ? logit + log2_fast(total[r]) * kLn2 : total[r] == 0.0f ? negative_infinity() : total[r];
      }
    }
  }

  // By way of shared memory, OutColumns columns of the warp's 16 rows at a time: four threads hold a row's columns two by two,
  // and each is to store 16 bytes in one piece.
  ATTNKIT_DEVICE void store_rows(const Tile& t, const Place& at, const float (&weights)[2]) const {
    constexpr int Columns = Shape::OutColumns, Bytes = Columns * 2;
    const int me = lane % 32, column = me % 4 * 8;
    auto place = [&](int row, int unit) {
      return s.staged + (group * 4 + lane / 32) * (16 * Bytes) + row * Bytes + (unit ^ (Columns == 64 ? row % 8 : row / 2 % 4)) * 16;
    };
    const u32 to = place(me % 16, me / 16), from[2] = {place(me / 4, me % 4), place(me / 4 + 8, me % 4)};
    char* rows_out[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) rows_out[r] = p.out + static_cast<i64>(t.q0 + at.token[r]) * p.out_t + at.head[r] * p.out_h + column * 2;
#pragma unroll
    for (int first = 0; first < Shape::DV; first += Columns) {
#pragma unroll
      for (int i = 0; i < Columns / 16; ++i) {
        const float* x = out + first / 2 + 8 * i;
        u32 y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = pack<Shape::OutBf16>(x[2 * j] * weights[j % 2], x[2 * j + 1] * weights[j % 2]);
        store_matrix_x4(to ^ (i * 32), y[0], y[1], y[2], y[3]);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Columns / 32; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint4 x = load_shared<uint4>(from[r] ^ (i * 64));
          if (at.token[r] >= 0 && first + i * 32 + column < p.Dv) *reinterpret_cast<uint4*>(rows_out[r] + (first + i * 32) * 2) = x;
        }
      }
      __syncwarp();
    }
  }
};

// Rows at and beyond cu_q[B] belong to nobody; they are padding of a captured batch and become zero.
ATTNKIT_DEVICE void clear_padding(const PrefillParams& p) {
  const i64 heads = p.Hkv * p.G, units = p.Dv / 8;
  const i64 first = p.cu_q[p.B], count = (p.T - first) * heads;
  const int step = gridDim.x * blockDim.x;
  for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < count * units; i += step) {
    const i64 row = i / units, token = first + row / heads;
    *reinterpret_cast<uint4*>(p.out + token * p.out_t + row % heads * p.out_h + i % units * 16) = make_uint4(0, 0, 0, 0);
    if (p.lse != nullptr && i % units == 0) p.lse[first * heads + row] = negative_infinity();
  }
}

}  // namespace attnkit
