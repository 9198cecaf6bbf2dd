// Prefill for sm_90a with 16-bit heads of 128: as prefill_sm90.cuh, with the softmax of a block beside P V of the one after it.
//
// Bound by the tensor cores. Three producer warps bring K and V tiles by TMA, a box a page (the pages of a tile stand under
// one another in shared memory), and a fourth finds the items and brings Q; Consumers warpgroups own 64 rows each. The G
// query heads of a KV head are packed into the rows, token by token. Inside a warpgroup the softmax of a block runs beside
// P V of the one after it, and the warpgroups take turns at the tensor cores (FlashAttention-3, Shah et al. 2024).
// A persistent grid takes work from a counter; the blocks of one item follow those of the one before without a
// gap: the next item's first product is issued before this item's output is written.
#pragma once
#include "prefill_overlap_load.cuh"
#include "prefill_products.cuh"
#include "prefill_softmax.cuh"

namespace attnkit {

// Shape of one build. D and DV are head sizes rounded up to 64s: TMA fills what lies beyond with zeros.
template <int D_, int DV_, bool Bf16_, int Consumers_, int BN_, int Stages_>
struct PrefillShape {
  static constexpr int D = D_, DV = DV_, Consumers = Consumers_, BN = BN_, Stages = Stages_;
  static constexpr bool Bf16 = Bf16_;
  static constexpr int Rows = 64 * Consumers;
  static constexpr int Threads = 128 * (Consumers + 1);
  static constexpr int QBytes = Rows * D * 2, KBytes = BN * D * 2, VBytes = BN * DV * 2;
  static constexpr int ConsumerRegisters = Consumers == 2 ? 240 : 160, ProducerRegisters = Consumers == 2 ? 24 : 32;
  static constexpr int OutColumns = 64;  // that a warp's rows pass through shared memory at a time
  static constexpr int LineBytes = kMostSequences * 6 + 16, OutBytes = Rows * OutColumns * 2 + 112;
  static constexpr int FixedBytes = 1024 + 640 + LineBytes + OutBytes;
  static constexpr int TileBytes = QBytes + Stages * (KBytes + VBytes);
  static constexpr int QStages = FixedBytes + TileBytes + QBytes <= 227 * 1024 ? 2 : 1;
  static constexpr int SharedBytes = FixedBytes + TileBytes + (QStages - 1) * QBytes;
  static_assert(D % 64 == 0 && DV % 64 == 0 && BN % 64 == 0, "tiles are made of 64-column boxes");
};

template <class Shape>
struct PrefillConsumer : PrefillProducts<Shape, Rows> {
  using Base = PrefillProducts<Shape, Rows>;
  using typename Base::Place;
  using Base::p, Base::s, Base::group, Base::lane, Base::k_ring, Base::q_ring, Base::items, Base::rows, Base::scores, Base::out,
      Base::probabilities, Base::BN, Base::take_turn, Base::give_turn, Base::multiply_qk, Base::rescale, Base::release_k,
      Base::release_v, Base::release_q, Base::wait_k, Base::wait_v, Base::wait_q, Base::clear_values_beyond, Base::place_rows;
  static constexpr int Scores = BN / 2;
  static constexpr bool Halves = BN == 128;  // a tile's last block may be 64 keys wide

  ATTNKIT_DEVICE void round_probabilities() {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) probabilities[i] = pack<Shape::Bf16>(scores[2 * i], scores[2 * i + 1]);
  }

  // The next item may be taken: its queries and first keys are here by the time this one ends.
  static constexpr int kAhead = 2;
  ATTNKIT_DEVICE void announce() const {
    if (group == 0 && lane == 0) mbarrier_arrive(s.nearly_done);
  }

  // What a loop over blocks asks again and again, out of shared memory.
  struct Span {
    int begin, full_low, full_high;

    ATTNKIT_DEVICE bool seen_whole(int block) const { return block * BN >= full_low && block * BN + BN <= full_high; }
  };

  // One block's scores to weights; true where outputs have to shrink by decay. Cut: the block may hold keys that a row
  // does not see.
  template <bool Capped, bool Cut>
  ATTNKIT_DEVICE bool weigh(const Span& span, const Cap& cap, const float (&factor)[2], int block, float (&decay)[2]) {
    const bool cut_high = Cut && block * BN + BN > span.full_high, cut_low = Cut && block * BN < span.full_low;
    if constexpr (Capped) {  // the cap's form goes by what it sees, and that must not be what happens to stand behind the keys
      if (cut_high) rows.template mask_high<Scores>(scores, block * BN, 0.f);
      if (cut_low) rows.template mask_low<Scores>(scores, block * BN, 0.f);
      const bool small = cap.template small<Scores>(scores, rows.high);
      if (!Cut && small && cap.flat) {  // in one piece, so that polynomials run beside exponentials
        rows.template weigh_flat<Scores, false>(scores, [&](float s) { return cap.of_small(s); });
        return false;
      }
      cap.template apply<Scores>(scores, small);
    }
    if (cut_high) rows.template mask_high<Scores>(scores, block * BN, negative_infinity());
    if (cut_low) rows.template mask_low<Scores>(scores, block * BN, negative_infinity());
    if constexpr (Capped) {
      if (cap.flat) {
        rows.template weigh_flat<Scores, false>(scores, [](float s) { return s; });
        return false;
      }
    }
    const bool shrinks = rows.template lift<Scores, false>(scores, factor, decay);
    rows.template weigh<Scores, false>(scores, factor, decay);
    return shrinks;
  }

  // From the raw scores of the item's last block (K released) to the weights of its first, whose P V is left to do. The
  // softmax of a block runs beside P V of the one after it; that it stands in two branches keeps ptxas from moving the
  // exponentials behind the wait for that product.
  template <bool Capped>
  ATTNKIT_DEVICE void attend(const Tile& t, const Cap& cap) {
    const float unit = Capped ? 1.f : log2_unit(), factor[2] = {unit, unit};
    const Span span{t.block_begin, t.full_low, t.full_high};
    const bool narrow = Halves && t.width == 64;
    int block = t.block_end - 1;
    float decay[2];
    rows.clear();
    if (block == span.begin) release_q();
    if (block <= span.begin + kAhead) announce();
    weigh<Capped, true>(span, cap, factor, block, decay);
    round_probabilities();
    wait_v();
    clear_values_beyond(t);
    if (block-- == span.begin) return;
    if (narrow) {
      advance<64>(0);
    } else {
      advance<BN>(0);
    }
    while (true) {
      if (block == span.begin) release_q();
      if (block == span.begin + kAhead) announce();
      const bool shrinks = span.seen_whole(block) ? weigh<Capped, false>(span, cap, factor, block, decay)
                                                  : weigh<Capped, true>(span, cap, factor, block, decay);
      wgmma_wait<0>();
      wgmma_hold(out);
      release_v();
      round_probabilities();
      if (shrinks) rescale(decay);
      if (block-- == span.begin) return;
      advance<BN>(1);
    }
  }

  // Q K^T of a block and P V of the one after it, which stays in flight.
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
    release_k();
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
    wgmma_wait<0>();
    wgmma_hold(scores);
    release_k();
  }

  template <bool Capped>
  ATTNKIT_DEVICE void run() {
    const Cap cap(p.scale, p.softcap, Shape::Bf16);
    items.wait();
    while ((*items).more) {
      Place at = place_rows(*items);
      if ((*items).blocks() > 0) {
        wait_q();
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
#pragma unroll
        for (int i = 0; i < Shape::DV / 2; ++i) out[i] = 0.f;
      }
      if ((*items).pieces == 1) {
        finish(*items, at, false);
      } else if (this->meet(*items, [&](int) { return log2_unit(); })) {
        finish(*items, at, true);
      }
      items.release();
      items.wait();
    }
  }

  // What a row's maximum is times to be a logit in log2. A capped score is one already.
  ATTNKIT_DEVICE float log2_unit() const { return p.softcap > 0.f ? 1.f : p.scale * kLog2e; }

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
#pragma unroll
    for (int r = 0; r < 2; ++r) weights[r] *= p.out_scale;
    store_rows(t, at, weights);
  }

  // What sinks change about the rows' sums and weights; writes the rows' lse.
  ATTNKIT_DEVICE void add_sinks(const Tile& t, const Place& at, bool met, float (&total)[2], float (&weights)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float logit = rows.top[r] * (met || p.softcap > 0.0f ? kLn2 : p.scale);
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
        for (int j = 0; j < 4; ++j) y[j] = pack<Shape::Bf16>(x[2 * j] * weights[j % 2], x[2 * j + 1] * weights[j % 2]);
        store_matrix_x4(to ^ (i * 32), y[0], y[1], y[2], y[3]);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Columns / 32; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint4 x = load_shared_16(from[r] ^ (i * 64));
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

template <class Shape>
ATTNKIT_DEVICE void prefill(const PrefillParams& p) {
  extern __shared__ char raw[];
  const PrefillShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) s.init_barriers();
  prefetch_maps(p);
  wait_for_previous_grid();  // everything that is read may be its work, and the counters are
  if (p.cu_q[p.B] < p.T) clear_padding(p);
  const WorkLine<Shape::BN> line(p, s.line, s.whose);
  line.arrange();
  if (warp >= 4 * Shape::Consumers) {
    registers_lower<Shape::ProducerRegisters>();
    switch (warp - 4 * Shape::Consumers) {
      case 0: {
        Ring<Shape::QStages> ring;
        find_items(s, line, [&](const Tile& t) { load_queries<Shape>(p, s, ring, t); });
        break;
      }
      case 1: PrefillProducer<Shape, kKeys>{p, s}.follow(); break;
      case 2: PrefillProducer<Shape, kValues>{p, s}.follow(); break;
      default: PrefillProducer<Shape, kBoth>{p, s}.follow();
    }
  } else {
    registers_raise<Shape::ConsumerRegisters>();
    PrefillConsumer<Shape> consumer{p, s, warp / 4, static_cast<int>(threadIdx.x % 128), {}, {}, {}, {s}};
    if (Shape::Consumers > 1 && consumer.group == Shape::Consumers - 1) consumer.give_turn();
    if (p.softcap > 0.0f) {
      consumer.template run<true>();
    } else {
      consumer.template run<false>();
    }
  }
}

}  // namespace attnkit
