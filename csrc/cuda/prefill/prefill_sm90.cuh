// Prefill for sm_90a: ragged query tokens against paged keys and values (or ones that stand in a row), in one launch.
//
// Bound by the tensor cores. Three producer warps bring K and V tiles by TMA, a box a page (the pages of a tile stand under
// one another in shared memory), and a fourth finds the items and brings Q; Consumers warpgroups own 64 rows each
// (prefill_consumer.cuh). The G query heads of a KV head are packed into the rows, token by token.
// A persistent grid takes work from a counter.
#pragma once
#include "prefill_consumer.cuh"
#include "prefill_load.cuh"

namespace attnkit {

// Shape of one build. D and DV are head sizes rounded up to 64s: TMA fills what lies beyond with zeros.
template <int D_, int DV_, bool Bf16_, int Consumers_, int BN_, int Stages_>
struct PrefillShape {
  static constexpr int D = D_, DV = DV_, Consumers = Consumers_, BN = BN_, Stages = Stages_;
  static constexpr bool Bf16 = Bf16_, OutBf16 = Bf16_;  // what is multiplied, and what the output is made of
  static constexpr bool Widened = false;
  static constexpr bool Easy = BN == 128;  // weights without a look at maxima; K is held until they are there
  static constexpr int RawStages = 0, RawBytes = 0, Fillers = 1, Followers = 3;
  static constexpr int Rows = 64 * Consumers;
  static constexpr int Threads = 128 * (Consumers + 1);
  static constexpr int QBytes = Rows * D * 2, KBytes = BN * D * 2, VBytes = BN * DV * 2;
  static constexpr int ConsumerRegisters = Consumers == 2 ? 240 : 160, ProducerRegisters = Consumers == 2 ? 24 : 32;
  static constexpr int OutColumns = D == 192 ? 32 : 64;  // that a warp's rows pass through shared memory at a time
  static constexpr int TileBytes = QBytes + Stages * (KBytes + VBytes);
  static constexpr int QStages = kFixedBytes<Rows, OutColumns> + TileBytes + QBytes <= 227 * 1024 ? 2 : 1;
  static constexpr int SharedBytes = kFixedBytes<Rows, OutColumns> + TileBytes + (QStages - 1) * QBytes;
  static_assert(D % 64 == 0 && DV % 64 == 0 && BN % 64 == 0, "tiles are made of 64-column boxes");
};

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
