// Prefill for sm_90a: ragged query tokens against paged keys and values (or ones that stand in a row), in one launch.
//
// Bound by the tensor cores. Two or four producer warps bring Q, K and V tiles by TMA, a box a page (the pages of a
// tile stand under one another in shared memory); Consumers warpgroups own 64 rows each. The G query heads of a KV head
// are packed into the rows, token by token. Inside a warpgroup the product Q K^T of the next block runs beside the
// softmax of this one, and the warpgroups take turns at the tensor cores (FlashAttention-3, Shah et al. 2024).
// A persistent grid takes work from a counter; the blocks of one item follow those of the one before without a
// gap: the next item's first product is issued before this item's output is written.
#pragma once
#include "prefill_products.cuh"
#include "prefill_softmax.cuh"

namespace attnkit {

// Shape of one build. D and DV are head sizes rounded up to 64s: TMA fills what lies beyond with zeros.
template <int D_, int DV_, bool Bf16_, int Consumers_, int BN_, int Stages_, int Loaders_>
struct PrefillShape {
  static constexpr int D = D_, DV = DV_, Consumers = Consumers_, BN = BN_, Stages = Stages_;
  static constexpr bool Bf16 = Bf16_, OutBf16 = Bf16_;  // what is multiplied, and what the output is made of
  static constexpr bool Widened = false;
  static constexpr int RawStages = 0, RawBytes = 0, Fillers = 1, Loaders = Loaders_, Followers = Loaders - 1;
  static_assert(Loaders == 2 || Loaders == 4, "one or two warps each for K and V");
  static constexpr int Rows = 64 * Consumers;
  static constexpr int Threads = 128 * (Consumers + 1);
  static constexpr int QBytes = Rows * D * 2, KBytes = BN * D * 2, VBytes = BN * DV * 2;
  static constexpr int ConsumerRegisters = Consumers == 2 ? 240 : 160, ProducerRegisters = Consumers == 2 ? 24 : 32;
  static constexpr int LineBytes = kMostSequences * 6 + 16, FixedBytes = 1024 + 640 + LineBytes;
  static constexpr int TileBytes = QBytes + Stages * (KBytes + VBytes);
  static constexpr int QStages = FixedBytes + TileBytes + QBytes <= 227 * 1024 ? 2 : 1;
  static constexpr int SharedBytes = FixedBytes + TileBytes + (QStages - 1) * QBytes;
  static_assert(D % 64 == 0 && DV % 64 == 0 && BN % 64 == 0, "tiles are made of 64-column boxes");
};

// A build for 8-bit caches (prefill_q8_sm90.cuh) says Widened: what the consumers multiply was widened from raw tiles by
// other warps, Fillers of which make a stage full; Followers are the warps that follow the items beside the consumers.
template <class Shape>
struct PrefillShared {
  u32 q, k, v;  // shared-space addresses, 1024-byte aligned
  u32 ring;     // [RawStages, RawBytes], likewise
  u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, raw_full, raw_empty, work_full, work_empty;
  Tile* work;   // [kItems]
  int* last;    // [Consumers]: did this warpgroup arrive last
  float* unit;  // [2, Rows] where Widened: what a row's scores are times
  int* line;    // WorkLine's
  u16* whose;

  ATTNKIT_DEVICE explicit PrefillShared(char* raw) {
    const u32 base = (smem_address(raw) + 1023) & ~1023u;
    char* generic = raw + (base - smem_address(raw));
    q = base;
    k = q + Shape::QStages * Shape::QBytes;
    v = k + Shape::Stages * Shape::KBytes;
    ring = v + Shape::Stages * Shape::VBytes;
    const u32 rest = ring + Shape::RawStages * Shape::RawBytes;
    q_full = rest, q_empty = rest + 16, work_full = rest + 32, work_empty = rest + 64;
    k_full = rest + 96, k_empty = k_full + 8 * Shape::Stages;
    v_full = k_empty + 8 * Shape::Stages, v_empty = v_full + 8 * Shape::Stages;
    raw_full = v_empty + 8 * Shape::Stages, raw_empty = raw_full + 8 * Shape::RawStages;
    static_assert(96 + 32 * Shape::Stages + 16 * Shape::RawStages <= 384, "barriers");
    generic += rest - base;
    work = reinterpret_cast<Tile*>(generic + 384);
    last = reinterpret_cast<int*>(generic + 384 + kItems * sizeof(Tile));
    static_assert(kItems * sizeof(Tile) + 16 <= 256, "work");
    line = reinterpret_cast<int*>(generic + 640);
    whose = reinterpret_cast<u16*>(generic + 640 + kMostSequences * 4 + 16);
    unit = reinterpret_cast<float*>(generic + 640 + Shape::LineBytes);
  }

  ATTNKIT_DEVICE void init_barriers() const {
    constexpr int warps = 4 * Shape::Consumers;
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(q_full + 8 * i, Shape::Fillers), mbarrier_init(q_empty + 8 * i, warps);
    }
    for (int i = 0; i < kItems; ++i) {
      mbarrier_init(work_full + 8 * i, 1), mbarrier_init(work_empty + 8 * i, warps + Shape::Followers);
    }
    for (int i = 0; i < Shape::Stages; ++i) {
      mbarrier_init(k_full + 8 * i, Shape::Fillers), mbarrier_init(k_empty + 8 * i, warps);
      mbarrier_init(v_full + 8 * i, Shape::Fillers), mbarrier_init(v_empty + 8 * i, warps);
    }
    for (int i = 0; i < Shape::RawStages; ++i) {
      mbarrier_init(raw_full + 8 * i, 1), mbarrier_init(raw_empty + 8 * i, Shape::Fillers);
    }
    mbarrier_init_fence();
  }
};

template <class Shape>
struct PrefillProducer {
  static constexpr int Parts = Shape::Loaders / 2;
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  const int part;  // of the Parts warps that share the boxes of K, or of V: issuing one takes a warp some 150 cycles
  Ring<Shape::Stages> ring;
  Ring<Shape::QStages> q_ring;

  // Rows of one box, boxes a tile: a page each, or one part of a page that is larger than a tile.
  ATTNKIT_DEVICE int box_rows() const { return min(1 << p.page_shift, Shape::BN); }

  // One tile of K or V. TMA takes its coordinates from uniform registers, so one lane issues all boxes of a warp: an elected
  // one, as ptxas makes a loop over lanes of any other branch.
  ATTNKIT_DEVICE void load_tile(const void* map, u32 full, u32 to, int columns, int head, int page, int valid, int slot) {
    const int rows = box_rows();
    if (part == 0 && elect_one()) mbarrier_arrive_expect(full, valid * rows * columns * 2);
#pragma unroll 1
    for (int i = 0; i < valid; ++i) {
      const int from = __shfl_sync(~0u, page, i);
      for (int c = 0; c < columns / 64; ++c) {
        if ((i * (columns / 64) + c) % Parts != part || !elect_one()) continue;
        tma_load_4d(to + c * (Shape::BN * 128) + i * rows * 128, map, full, c * 64, head, slot, from);
      }
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void load_q(const Tile& t) {
    mbarrier_wait(s.q_empty + 8 * q_ring.stage, q_ring.parity ^ 1);
    if (threadIdx.x % 32 == 0) {
      const u32 full = s.q_full + 8 * q_ring.stage, to = s.q + q_ring.stage * Shape::QBytes;
      mbarrier_arrive_expect(full, p.tile_tokens * p.G * Shape::D * 2);
      for (int c = 0; c < Shape::D / 64; ++c) {
        tma_load_3d(to + c * (Shape::Rows * 128), &p.q_map, full, c * 64, t.h * p.G, t.q0 + t.token0);
      }
    }
    __syncwarp();
    q_ring.next();
  }

  // K and V have warps of their own, so that neither waits for the other's room. Page ids are read one tile ahead, and the
  // next item is asked for before the last block's room is waited for.
  template <bool Keys, class Line>
  ATTNKIT_DEVICE int run(const Tile& t, const Line& line) {
    if (Keys && part == 0) load_q(t);
    constexpr int columns = Keys ? Shape::D : Shape::DV, bytes = Keys ? Shape::KBytes : Shape::VBytes;
    const u32 to = Keys ? s.k : s.v, full = Keys ? s.k_full : s.v_full, empty = Keys ? s.k_empty : s.v_empty;
    const void* map = Keys ? &p.k_map : &p.v_map;
    const int lane = threadIdx.x % 32, boxes = Shape::BN / box_rows();
    const bool paged = p.pages != nullptr;
    const int* row = p.pages + t.row0 * p.pages_b;
    const int limit = min(t.length, (t.block_end - 1) * Shape::BN + (Keys ? t.width : t.value_width(Shape::BN)));
    const int used = (limit + (1 << p.page_shift) - 1) >> p.page_shift;
    auto page_of = [&](int block) {
      const int first = (block * Shape::BN) >> p.page_shift;
      return paged && lane < boxes && first + lane < used && block >= t.block_begin ? row[first + lane] : 0;
    };
    int asked = 0, page = page_of(t.block_end - 1);
    for (int block = t.block_end - 1; block >= t.block_begin; --block) {
      const int ahead = page_of(block - 1);
      const int valid = min(boxes, used - ((block * Shape::BN) >> p.page_shift));
      const int slot = paged ? (block * Shape::BN) & ((1 << p.page_shift) - 1) : t.row0 + block * Shape::BN;
      if (Keys && part == 0 && block == t.block_begin) asked = line.ask();
      mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
      load_tile(map, full + 8 * ring.stage, to + ring.stage * bytes, columns, t.h, page, valid, slot);
      ring.next();
      page = ahead;
    }
    return asked;
  }
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
  float unit[2];  // what the rows' scores are times, besides the scale
  int unit_set;

  template <int N>
  ATTNKIT_DEVICE void round_probabilities() {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) probabilities[i] = pack<Shape::Bf16>(scores[2 * i], scores[2 * i + 1]);
  }

  // What a loop over blocks asks again and again, out of shared memory.
  struct Span {
    int begin, full_low, full_high;
  };

  // One block's scores to weights; true where outputs have to shrink by decay.
  template <bool Capped, bool First, int N>
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
    if (cut_high) rows.template mask_high<N>(scores, block * BN, negative_infinity());
    if (cut_low) rows.template mask_low<N>(scores, block * BN, negative_infinity());
    if constexpr (Capped) {
      if (cap.flat) {
        rows.template weigh_flat<N, First>(scores, [](float x) { return x; });
        return false;
      }
    }
    const bool shrinks = rows.template lift<N, First>(scores, factor, decay);
    rows.template weigh<N, First>(scores, factor, decay);
    return shrinks;
  }

  // From the raw scores of the item's last block (K released) to its last weights; that block's P V is left to do.
  template <bool Capped>
  ATTNKIT_DEVICE void attend(const Tile& t, const Cap& cap) {
    const float factor[2] = {Capped ? 1.f : log2_unit(unit[0]), Capped ? 1.f : log2_unit(unit[1])};
    const Span span{t.block_begin, t.full_low, t.full_high};
    float decay[2];
    int block = t.block_end - 1;
    const bool narrow = Halves && t.width == 64;
    if (block == span.begin) release_q();
    if (narrow) {
      weigh<Capped, true, Scores / 2>(span, cap, factor, block, decay);
      round_probabilities<Scores / 2>();
#pragma unroll
      for (int i = BN / 8; i < BN / 4; ++i) probabilities[i] = 0;
    } else {
      weigh<Capped, true, Scores>(span, cap, factor, block, decay);
      round_probabilities<Scores>();
    }
    if constexpr (!Shape::Widened) {
      wait_v();
      clear_values_beyond(t);
    }
    if (--block < span.begin) return;
    if (narrow) {
      step<Capped, 64>(span, cap, factor, block, 0);
    } else {
      step<Capped, BN>(span, cap, factor, block, 0);
    }
    for (--block; block >= span.begin; --block) step<Capped, BN>(span, cap, factor, block, 1);
  }

  // Q K^T of ``block`` beside P V of the one after it.
  template <bool Capped, int Keys>
  ATTNKIT_DEVICE void step(const Span& span, const Cap& cap, const float (&factor)[2], int block, int accumulate) {
    float decay[2];
    wait_k();
    take_turn();
    multiply_qk();
    wait_v();
    this->template multiply_pv<Keys>(accumulate);
    give_turn();
    wgmma_wait<1>();
    wgmma_hold(scores);
    release_k();
    if (block == span.begin) release_q();
    const bool shrinks = weigh<Capped, false, Scores>(span, cap, factor, block, decay);
    wgmma_wait<0>();
    wgmma_hold(out);
    release_v();
    round_probabilities<Scores>();
    if (shrinks) rescale(decay);
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
      if ((*items).pieces == 1) {
        finish(*items, at, false);
      } else if (this->meet(*items, [&](int r) { return log2_unit(unit[r]); })) {
        finish(*items, at, true);
      }
      items.release();
      items.wait();
    }
  }

  // What a row's maximum is times to be a logit in log2. A capped score is one already.
  ATTNKIT_DEVICE float log2_unit(float of_row) const { return p.softcap > 0.f ? 1.f : p.scale * kLog2e * of_row; }

  // met: the maxima are logits in log2.
  ATTNKIT_DEVICE void finish(const Tile& t, const Place& at, bool met) {
    float out_scale = p.out_scale;
    if (Shape::Widened && p.v_scale != nullptr) out_scale *= *reinterpret_cast<const float*>(p.v_scale + t.h * p.v_scale_h);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = rows.sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      float logit = rows.top[r] * (met || p.softcap > 0.0f ? kLn2 : p.scale * unit[r]);
      float weight = total > 0.0f ? 1.0f / total : total == 0.0f ? 0.0f : total;
      if (p.sinks != nullptr && at.token[r] >= 0) {
        const float sink = load_sink(p, at.head[r]);
        const float most = fmaxf(logit, sink), base = most == negative_infinity() ? 0.0f : most;
        const float shrink = logit == negative_infinity() ? 0.0f : exp2_fast((logit - base) * kLog2e);
        total = total * shrink + exp2_fast((sink - base) * kLog2e);
        weight = (total > 0.0f ? 1.0f / total : total == 0.0f ? 0.0f : total) * shrink;
        logit = most;
      }
      if (p.lse != nullptr && lane % 4 == 0 && at.token[r] >= 0) {
        p.lse[static_cast<i64>(t.q0 + at.token[r]) * (p.Hkv * p.G) + at.head[r]] =
            total > 0.0f ? logit + log2_fast(total) * kLn2 : total == 0.0f ? negative_infinity() : total;
      }
      store_row(t, r, at.token[r], at.head[r], weight * out_scale);
    }
  }

  // Four threads hold a row's columns two by two; they trade so that each stores 16 bytes in one piece.
  ATTNKIT_DEVICE void store_row(const Tile& t, int r, int token, int head, float weight) const {
    const int me = lane % 4;
    char* row = p.out + static_cast<i64>(t.q0 + token) * p.out_t + head * p.out_h;
#pragma unroll
    for (int i = 0; i < Shape::DV / 32; ++i) {
      u32 own[4], got[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        own[j] = pack<Shape::OutBf16>(out[16 * i + 4 * j + 2 * r] * weight, out[16 * i + 4 * j + 2 * r + 1] * weight);
      }
      auto pick = [&](int j) { return j & 2 ? (j & 1 ? own[3] : own[2]) : (j & 1 ? own[1] : own[0]); };
      u32 received[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) received[k] = __shfl_xor_sync(~0u, pick(me ^ k), k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // word j comes from thread j, which is k = j ^ me away
        const int k = j ^ me;
        got[j] = k & 2 ? (k & 1 ? received[3] : received[2]) : (k & 1 ? received[1] : received[0]);
      }
      const int column = 32 * i + 8 * me;
      if (token >= 0 && column < p.Dv) *reinterpret_cast<uint4*>(row + column * 2) = make_uint4(got[0], got[1], got[2], got[3]);
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
  wait_for_previous_grid();  // everything that is read may be its work, and the counters are
  if (p.cu_q[p.B] < p.T) clear_padding(p);
  const WorkLine<Shape::BN> line(p, s.line, s.whose);
  line.arrange();
  if (warp >= 4 * Shape::Consumers) {
    registers_lower<Shape::ProducerRegisters>();
    const int loader = warp - 4 * Shape::Consumers;
    PrefillProducer<Shape> producer{p, s, loader / 2};
    Items<Shape> items{s};
    if (loader == 0) {
      int index = blockIdx.x;
      while (items.find(line, index)) {
        const Tile& t = *items;
        index = line.answer(t.blocks() > 0 ? producer.template run<true>(t, line) : line.ask());
        items.now.next();
      }
      line.leave();
    } else if (loader < Shape::Loaders) {
      for (items.wait(); (*items).more; items.release(), items.wait()) {
        if ((*items).blocks() <= 0) continue;
        if (loader % 2 == 0) {
          producer.template run<true>(*items, line);
        } else {
          producer.template run<false>(*items, line);
        }
      }
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
