// Prefill for sm_90a over an 8-bit cache (e4m3 or int8): the consumers of 16-bit tiles behind warps that widen.
//
// The 8-bit tiles of K and V arrive by TMA in a ring of their own, half the bytes of 16-bit ones. A warpgroup widens them
// to f16, which holds every e4m3 and int8 value exactly, into the stages that the consumers multiply from. Q goes the same
// way: a bf16 row becomes f16 times the softmax scale and k_scale, so that its scores are logits in log2, or times a power of
// two where that would cost its range. What scores are times then is PrefillShared::unit, v_scale goes into the output. Weights
// are f16: they stay below 2^13.
//
// Tiles are loaded in the order in which the consumers multiply: Q, K0, K1, V0, K2, V1, .., the last V. So a tile is never
// held up by the room of another that is needed later.
#pragma once
#include "prefill_consumer.cuh"
#include "prefill_shared.cuh"

namespace attnkit {

template <int D_, int DV_, bool Bf16_, int KvType_, int Stages_, int RawStages_>
struct PrefillQ8Shape {
  static constexpr int D = D_, DV = DV_, Consumers = 2, BN = 128, Stages = Stages_, QStages = 1, KvType = KvType_;
  static constexpr bool Bf16 = false, OutBf16 = Bf16_, Widened = true, Easy = true;
  // Warps: more loaders than are needed take turns from the products.
  static constexpr int RawStages = RawStages_, Loaders = 2, Fillers = 4, Followers = Fillers + Loaders - 1;
  static constexpr int Rows = 64 * Consumers, Threads = 128 * (Consumers + 2);
  static constexpr int QBytes = Rows * D * 2, KBytes = BN * D * 2, VBytes = BN * DV * 2;
  static constexpr int RawBytes = 128 * 128;  // 64 columns of Q, or a tile of K or V
  static constexpr int ConsumerRegisters = 216, ConverterRegisters = 48, ProducerRegisters = 32;
  static constexpr int OutColumns = 32;
  static constexpr int SharedBytes = kFixedBytes<Rows, OutColumns> + 2 * Rows * 4 + QBytes + Stages * (KBytes + VBytes) + RawStages * RawBytes;
  static_assert(D % 64 == 0 && D <= 128 && DV % 64 == 0 && DV <= 128, "a raw row is one swizzled line, or half of one");
  static_assert(RawStages > D / 64, "Q is in the ring at once");
};

ATTNKIT_DEVICE void store_shared_16(u32 to, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// Four bytes to two f16 pairs.
template <int KvType>
ATTNKIT_DEVICE void widen_in_order(u32 x, u32& lo, u32& hi) {
  if constexpr (KvType == kE4m3) {  // without permutations or shifts: ptxas takes either half of a register
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
        : "=r"(lo), "=r"(hi) : "r"(x));
  } else {
    widen<KvType, 0, 1, 2, 3>(x, lo, hi);
  }
}

// The warps that load. Issuing a box takes a warp some 150 cycles, so the boxes of a tile go round them; the first also
// finds the items and says how many bytes will come.
template <class Shape>
struct PrefillQ8Producer {
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  const int warp;
  Ring<Shape::RawStages> ring;

  ATTNKIT_DEVICE void load_q(const Tile& t) {
    for (int c = 0; c < Shape::D / 64; ++c) {
      if (c % Shape::Loaders == warp) {
        const u32 full = s.raw_full + 8 * ring.stage;
        mbarrier_wait(s.raw_empty + 8 * ring.stage, ring.parity ^ 1);
        if (elect_one()) {
          mbarrier_arrive_expect(full, p.tile_tokens * p.G * 128);
          tma_load_3d(s.ring + ring.stage * Shape::RawBytes, &p.q_map, full, c * 64, t.h * p.G, t.q0 + t.token0);
        }
        __syncwarp();
      }
      ring.next();
    }
  }

  // One block of K or V in boxes of ``rows`` keys, a page each or a part of a larger one, whose ids the lanes hold.
  template <bool Keys>
  ATTNKIT_DEVICE void load(int head, int rows, int slot, int page, int boxes) {
    constexpr int columns = Keys ? Shape::D : Shape::DV;
    const u32 full = s.raw_full + 8 * ring.stage, box_bytes = rows * columns;
    mbarrier_wait(s.raw_empty + 8 * ring.stage, ring.parity ^ 1);
    if (warp == 0 && elect_one()) mbarrier_arrive_expect(full, boxes * box_bytes);
    u32 to = s.ring + ring.stage * Shape::RawBytes + warp * box_bytes;
#pragma unroll 1
    for (int i = warp; i < boxes; i += Shape::Loaders) {
      const int from = __shfl_sync(~0u, page, i);
      if (elect_one()) tma_load_4d(to, Keys ? &p.k_map : &p.v_map, full, 0, head, slot, from);
      to += Shape::Loaders * box_bytes;
    }
    __syncwarp();
    ring.next();
  }

  // Page ids are read one block ahead, and the next item is asked for before the last values' room is waited for. What is the
  // same for all blocks is found before them: these instructions, too, take their turns from the tensor cores.
  template <class Line>
  ATTNKIT_DEVICE int run(const Tile& t, const Line& line) {
    const int lane = threadIdx.x % 32, shift = p.page_shift, rows = min(1 << shift, Shape::BN), boxes = Shape::BN / rows;
    const int begin = t.block_begin, last = t.block_end - 1, head = t.h, inside = (1 << shift) - 1;
    const int* row = p.pages + t.row0 * p.pages_b;
    auto used = [&](int width) {  // boxes of the last block that are needed
      return min(boxes, ((min(t.length, last * Shape::BN + width) + inside) >> shift) - (last * Shape::BN >> shift));
    };
    const int k_boxes = used(t.width);
    int v_boxes = used(t.value_width(Shape::BN)), before = 0, asked = 0;
    if (lane < v_boxes) before = row[(last * Shape::BN >> shift) + lane];
    row += lane & (boxes - 1);  // other blocks are seen whole, so that any lane may read
    int page = last > begin ? row[(last - 1) * Shape::BN >> shift] : 0;
    load_q(t);
    load<true>(head, rows, last * Shape::BN & inside, before, k_boxes);
#pragma unroll 1
    for (int block = last - 1; block >= begin; --block) {
      const int ahead = block > begin ? row[(block - 1) * Shape::BN >> shift] : 0;
      load<true>(head, rows, block * Shape::BN & inside, page, boxes);
      load<false>(head, rows, (block + 1) * Shape::BN & inside, before, v_boxes);
      v_boxes = boxes;
      before = page;
      page = ahead;
    }
    if (warp == 0) asked = line.ask();
    load<false>(head, rows, begin * Shape::BN & inside, before, v_boxes);
    return asked;
  }
};

// The warpgroup that widens: a thread a row.
template <class Shape>
struct PrefillConverter {
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  const int row;
  Ring<Shape::RawStages> raw;
  Ring<Shape::Stages> k_ring, v_ring;
  Ring<Shape::QStages> q_ring;
  int unit_set;

  // Where 16 bytes of the row stand in swizzled lines of 128 bytes.
  ATTNKIT_DEVICE u32 wide_at(int unit) const { return (row * 128 + row % 8 * 16) ^ (unit * 16); }
  // The same in raw lines of ``Columns`` bytes; shorter ones are swizzled two to a line.
  template <int Columns>
  ATTNKIT_DEVICE u32 raw_at(int unit) const {
    return Columns == 128 ? wide_at(unit) : (row * 64 + row / 2 % 4 * 16) ^ (unit * 16);
  }

  ATTNKIT_DEVICE void arrive(u32 barrier) const {
    if (row % 32 == 0) mbarrier_arrive(barrier);
  }

  // Writes of the warp are the consumers' to multiply, and what it read may be overwritten.
  ATTNKIT_DEVICE void hand_over(u32 full) {
    fence_async_shared();
    __syncwarp();
    arrive(full);
    arrive(s.raw_empty + 8 * raw.stage);
    raw.next();
  }

  // Slots at and beyond L may hold NaN, and zero times NaN is NaN: their values become zero.
  ATTNKIT_DEVICE void run() {
    Items<Shape> items{s};
    unit_set = 0;
    for (items.wait(); (*items).more; items.release(), items.wait()) {
      const Tile& t = *items;
      const int last = t.block_end - 1;
      int blocks = t.blocks(), value_width = t.value_width(Shape::BN), valid = t.length - last * Shape::BN;
      if (blocks <= 0) continue;
      widen_q(t);
      widen_tile<true>(t.width, Shape::BN);
#pragma unroll 1
      while (--blocks > 0) {
        widen_tile<true>(Shape::BN, Shape::BN);
        widen_tile<false>(value_width, valid);
        value_width = valid = Shape::BN;
      }
      widen_tile<false>(value_width, valid);
    }
  }

  // Rows below ``width``; those from ``valid`` on become zero.
  template <bool Keys>
  ATTNKIT_DEVICE void widen_tile(int width, int valid) {
    constexpr int Columns = Keys ? Shape::D : Shape::DV, Units = Columns / 16, Batch = 4;
    auto& ring = Keys ? k_ring : v_ring;
    const u32 from = s.ring + raw.stage * Shape::RawBytes;
    const u32 to = Keys ? s.k + ring.stage * Shape::KBytes : s.v + ring.stage * Shape::VBytes;
    mbarrier_wait(s.raw_full + 8 * raw.stage, raw.parity);
    mbarrier_wait((Keys ? s.k_empty : s.v_empty) + 8 * ring.stage, ring.parity ^ 1);
    if (row >= width) {
      // nothing of it is multiplied
    } else if (row < valid) {
#pragma unroll
      for (int first = 0; first < Units; first += Batch) {
        uint4 x[Batch];
#pragma unroll
        for (int i = 0; i < Batch; ++i) x[i] = load_shared<uint4>(from + raw_at<Columns>(first + i));
#pragma unroll
        for (int i = 0; i < Batch; ++i) {
          const int unit = 2 * (first + i), column = unit / 8 * (Shape::BN * 128);
          u32 y[8];
          widen_in_order<Shape::KvType>(x[i].x, y[0], y[1]);
          widen_in_order<Shape::KvType>(x[i].y, y[2], y[3]);
          widen_in_order<Shape::KvType>(x[i].z, y[4], y[5]);
          widen_in_order<Shape::KvType>(x[i].w, y[6], y[7]);
          store_shared_16(to + column + wide_at(unit % 8), y[0], y[1], y[2], y[3]);
          store_shared_16(to + column + wide_at(unit % 8 + 1), y[4], y[5], y[6], y[7]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2 * Units; ++i) store_shared_zeros(to + i / 8 * (Shape::BN * 128) + wide_at(i % 8));
    }
    hand_over((Keys ? s.k_full : s.v_full) + 8 * ring.stage);
    ring.next();
  }

  // bf16 times the scale and k_scale is rounded to f16, which has three bits more. Where a row's largest value is too large or
  // small for that, 2^e above it becomes 2^15; below 2^-29 of it, values lose bits. f16 goes through as it is.
  ATTNKIT_DEVICE void widen_q(const Tile& t) {
    const float k_scale = p.k_scale == nullptr ? 1.f : *reinterpret_cast<const float*>(p.k_scale + t.h * p.k_scale_h);
    const u32 flip = k_scale < 0.f ? 0x80008000u : 0u;
    float up = fabsf(k_scale), down = 1.f;
    if constexpr (Shape::OutBf16) {
      u32 most = 0;
      Ring<Shape::RawStages> at = raw;
#pragma unroll 1
      for (int c = 0; c < Shape::D / 64; ++c, at.next()) {
        mbarrier_wait(s.raw_full + 8 * at.stage, at.parity);
#pragma unroll
        for (int unit = 0; unit < 8; ++unit) {
          const uint4 x = load_shared<uint4>(s.ring + at.stage * Shape::RawBytes + wide_at(unit));
          most = larger(larger(most, larger(x.x, x.y)), larger(x.z, x.w));
        }
      }
      const int e = max(static_cast<int>(max(most & 0xffff, most >> 16) >> 7) - 126, -110);
      const float log2 = p.scale * kLog2e, largest = up * log2 * __uint_as_float(static_cast<u32>(127 + e) << 23);
      if (p.softcap == 0.f && largest >= 0x1p-8f && largest <= 0x1p15f) {
        down = up * log2;
        up = 1.f / log2;
      } else {
        down = __uint_as_float(static_cast<u32>(127 + 15 - e) << 23);
        up *= __uint_as_float(static_cast<u32>(127 - 15 + e) << 23);
      }
    }
    mbarrier_wait(s.q_empty + 8 * q_ring.stage, q_ring.parity ^ 1);
    s.unit[unit_set * Shape::Rows + row] = up < 1e-37f ? 1e-37f : up;  // a masked score is -inf, and times 0 it would be NaN
    unit_set ^= 1;
#pragma unroll 1
    for (int c = 0; c < Shape::D / 64; ++c) {
      const u32 from = s.ring + raw.stage * Shape::RawBytes, to = s.q + c * (Shape::Rows * 128);
      mbarrier_wait(s.raw_full + 8 * raw.stage, raw.parity);
#pragma unroll
      for (int unit = 0; unit < 8; ++unit) {
        const uint4 x = load_shared<uint4>(from + wide_at(unit));
        const u32 y[4] = {scaled(x.x, down), scaled(x.y, down), scaled(x.z, down), scaled(x.w, down)};
        store_shared_16(to + wide_at(unit), y[0] ^ flip, y[1] ^ flip, y[2] ^ flip, y[3] ^ flip);
      }
      __syncwarp();
      if (c < Shape::D / 64 - 1) {
        arrive(s.raw_empty + 8 * raw.stage);
        raw.next();
      }
    }
    hand_over(s.q_full + 8 * q_ring.stage);
    q_ring.next();
  }

  // Of two pairs of bf16, the larger magnitudes.
  static ATTNKIT_DEVICE u32 larger(u32 a, u32 b) {
    u32 r;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a & 0x7fff7fffu), "r"(b & 0x7fff7fffu));
    return r;
  }

  static ATTNKIT_DEVICE u32 scaled(u32 x, float by) {
    if constexpr (!Shape::OutBf16) return x;
    const float2 pair = unpack(x, true);
    return pack_f16(pair.x * by, pair.y * by);
  }
};

template <class Shape>
ATTNKIT_DEVICE void prefill_q8(const PrefillParams& p) {
  extern __shared__ char raw[];
  const PrefillShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) s.init_barriers();
  wait_for_previous_grid();  // everything that is read may be its work, and the counters are
  if (p.cu_q[p.B] < p.T) clear_padding(p);
  const WorkLine<Shape::BN> line(p, s.line, s.whose);
  line.arrange();
  if (warp >= 4 * Shape::Consumers + 4) {
    registers_lower<Shape::ProducerRegisters>();
    PrefillQ8Producer<Shape> producer{p, s, warp % 4};
    Items<Shape> items{s};
    if (producer.warp == 0) {
      int index = blockIdx.x;
      while (items.find(line, index)) {
        const Tile& t = *items;
        index = line.answer(t.blocks() > 0 ? producer.run(t, line) : line.ask());
        items.now.next();
      }
      line.leave();
    } else if (producer.warp < Shape::Loaders) {
      for (items.wait(); (*items).more; items.release(), items.wait()) {
        if ((*items).blocks() > 0) producer.run(*items, line);
      }
    }
  } else if (warp >= 4 * Shape::Consumers) {
    registers_lower<Shape::ConverterRegisters>();
    PrefillConverter<Shape> converter{p, s, static_cast<int>(threadIdx.x % 128)};
    converter.run();
  } else {
    registers_raise<Shape::ConsumerRegisters>();
    PrefillConsumer<Shape> consumer{p, s, warp / 4, static_cast<int>(threadIdx.x % 128), {}, {}, {}, {s}};
    if (consumer.group == Shape::Consumers - 1) consumer.give_turn();
    if (p.softcap > 0.0f) {
      consumer.template run<true>();
    } else {
      consumer.template run<false>();
    }
  }
}

}  // namespace attnkit
