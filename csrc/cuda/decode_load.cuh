// What every decode build shares: its shared memory, and the producer warp that fills the ring.
#pragma once
#include "decode_schedule.cuh"

namespace attnkit {

struct DecodeShared {
  u32 ring, q;                    // shared-space addresses: [stages, StageBytes], [QSlots, QBytes]
  u32 full, empty, q_full, q_empty;  // barriers: [stages], [stages], [2], [2]
  unsigned char* meet;            // where warps of a narrow build add up
  int* scratch;                   // the walker's, then a flag
  Piece* pieces;                  // [2]: what the q of the same slot belongs to
};

// Where 16-byte unit ``unit`` of ``row`` lies in planes of Swizzle bytes, less the row's and the planes' offsets.
template <int Swizzle>
ATTNKIT_DEVICE constexpr u32 swizzled(int row, int unit) {
  constexpr int Units = Swizzle / 16, Shift = Swizzle == 128 ? 0 : Swizzle == 64 ? 1 : 2;
  return static_cast<u32>(unit ^ (row >> Shift & (Units - 1))) * 16;
}

// Two warps: one brings the keys, the other q and the values. Issuing boxes of 16 slots takes a warp longer
// than their bytes take to arrive.
template <class Shape>
struct DecodeProducer {
  static constexpr int T = Shape::T;

  const DecodeParams& p;
  const DecodeShared& shared;
  int lane, box_shift, boxes;  // slots in a box: 2^box_shift; boxes of one plane of a tile
  u64 policy;

  ATTNKIT_DEVICE DecodeProducer(const DecodeParams& params, const DecodeShared& s) : p(params), shared(s) {
    lane = threadIdx.x & 31;
    box_shift = min(p.page_shift, 31 - __clz(T));
    boxes = T >> box_shift;
    policy = evict_first_policy();
  }

  // Rows i * G + g of one head. Wide builds read them by wgmma, so they come by TMA, in swizzled planes.
  ATTNKIT_DEVICE void load_q_planes(const Piece& piece, int slot) {
    constexpr int Planes = Shape::D / 64;
    const u32 full = shared.q_full + 8 * slot, to = shared.q + slot * Shape::QBytes;
    const int token0 = piece.block * p.block_rows / p.G;
    if (lane == 0) shared.pieces[slot] = piece;
    __syncwarp();
    if (elect_one()) {
      mbarrier_arrive_expect(full, Planes * p.block_rows * 128);
      for (int plane = 0; plane < Planes; ++plane) {
        tma_load_4d(to + plane * Shape::Rows * 128, &p.q_map, full, plane * 64, piece.h * p.G, token0, piece.b);
      }
    }
  }

  ATTNKIT_DEVICE void load_q_rows(const Piece& piece, int slot) {
    constexpr int Units = Shape::D * 2 / 16;
    const char* base = p.q + piece.b * p.q_b + piece.h * p.G * p.q_h;
    const u32 to = shared.q + slot * Shape::QBytes;
#pragma unroll
    for (int unit = lane; unit < Shape::Rows * Units; unit += 32) {
      const int row = unit / Units, column = (unit - row * Units) * 16;
      const int n = piece.block * p.block_rows + row;
      const int i = n * p.g_magic >> 20;
      const bool valid = i < p.Q;
      copy_async_16(to + row * Shape::PitchQ + column, valid ? base + i * p.q_i + (n - i * p.G) * p.q_h + column : p.q, valid);
    }
    copy_async_arrive(shared.q_full + 8 * slot);
    if (lane == 0) {
      shared.pieces[slot] = piece;
      mbarrier_arrive(shared.q_full + 8 * slot);  // publishes the piece, which the arrival above does not
    }
  }

  // The page of this lane's box of a tile; 0 where the box holds no visible key: its table entry may be garbage.
  ATTNKIT_DEVICE int page_of(const Piece& piece, const int* pages, int tile) const {
    const int token = tile * T + ((lane & (boxes - 1)) << box_shift);
    return token < piece.length && token + (1 << box_shift) > piece.low ? pages[token >> p.page_shift] : 0;
  }

  // The boxes of one operand of a tile that hold visible keys.
  template <int Row, int Swizzle>
  ATTNKIT_DEVICE void load_tile(const TensorMap& map, const Piece& piece, const int* pages, int token0, int page, u32 to, u32 full) {
    const int first = max(piece.low - token0, 0) >> box_shift;
    const int last = min((piece.length - token0 + (1 << box_shift) - 1) >> box_shift, boxes);
    const int slot = token0 & ((1 << p.page_shift) - 1);
    if (elect_one()) mbarrier_arrive_expect(full, max(last - first, 0) * (Row << box_shift));
    for (int box = first; box < last; ++box) {
      const int from = boxes <= 32 ? __shfl_sync(~0u, page, box) : pages[(token0 >> p.page_shift) + box];
      const u32 at = to + (box << box_shift) * Swizzle;
      if (elect_one()) {
#pragma unroll
        for (int plane = 0; plane < Row / Swizzle; ++plane) {
          tma_load_4d(at + plane * T * Swizzle, &map, full, plane * (Swizzle / Shape::ElementBytes), slot, piece.h, from, policy);
        }
      }
    }
  }

  template <bool Keys>
  ATTNKIT_DEVICE void run(Walker<T>& walker) {
    Piece piece;
    int stage = 0, phase = 1, pieces = 0, q_slot = 0;
    while (walker.next(piece)) {
      const int* pages = p.pages + piece.b * p.pages_b;
      int page = page_of(piece, pages, piece.tile);
#pragma unroll 1
      for (int tile = piece.tile; tile < piece.tile + piece.tiles; ++tile) {
        const int next_page = page_of(piece, pages, tile + 1);
        mbarrier_wait(shared.empty + 8 * stage, phase);
        const u32 to = shared.ring + stage * Shape::StageBytes, full = shared.full + 8 * stage;
        if constexpr (Keys) {
          load_tile<Shape::RowK, Shape::SwizzleK>(p.k_map, piece, pages, tile * T, page, to, full);
        } else {
          load_tile<Shape::RowV, Shape::SwizzleV>(p.v_map, piece, pages, tile * T, page, to + T * Shape::RowK, full);
        }
        if (!Keys && tile == piece.tile) {  // q after the first values: it is small, and not needed sooner
          mbarrier_wait(shared.q_empty + 8 * q_slot, (pieces / Shape::QSlots & 1) ^ 1);
          if constexpr (Shape::Wide) {
            load_q_planes(piece, q_slot);
          } else {
            load_q_rows(piece, q_slot);
          }
          q_slot = ++pieces % Shape::QSlots;
        }
        page = next_page;
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    if constexpr (!Keys) {
      mbarrier_wait(shared.q_empty + 8 * q_slot, (pieces / Shape::QSlots & 1) ^ 1);
      if (lane == 0) shared.pieces[q_slot].tiles = 0;
      __syncwarp();
      if (!Shape::Wide) mbarrier_arrive(shared.q_full + 8 * q_slot);
      if (lane == 0) mbarrier_arrive(shared.q_full + 8 * q_slot);
      copy_async_wait_all();
    }
  }
};

// The table is read once lens are known; meanwhile it comes closer. Every CTA asks for its part of the lines.
ATTNKIT_DEVICE void prefetch_table(const DecodeParams& p) {
  const u32 lines = (p.table_width + 31) / 32, i = threadIdx.x * gridDim.x + blockIdx.x;
  const u32 b = i / lines;
  if (b < static_cast<u32>(p.B)) prefetch_l2(p.pages + b * p.pages_b + (i - b * lines) * 32);
}

// The kernel's frame: shared memory, the CTA's part of the work, then each warp its role.
template <class Shape, template <class> class Consumer>
ATTNKIT_DEVICE void decode(const DecodeParams& p) {
  extern __shared__ __align__(16) unsigned char memory[];
  DecodeShared shared;
  // TMA's swizzle follows address bits: the ring lies on a multiple of 1024.
  shared.ring = (smem_address(memory) + Shape::AlignBytes) & ~1023u;
  shared.q = shared.ring + p.stages * Shape::StageBytes;
  unsigned char* after = memory + (shared.q - smem_address(memory)) + Shape::QSlots * Shape::QBytes;
  shared.full = smem_address(after);
  shared.empty = shared.full + 8 * 16;
  shared.q_full = shared.empty + 8 * 16;
  shared.q_empty = shared.q_full + 8 * 2;
  shared.scratch = reinterpret_cast<int*>(after + 320);
  shared.pieces = reinterpret_cast<Piece*>(after + 384);
  shared.meet = after + 512;

  if (threadIdx.x < p.stages) {
    mbarrier_init(shared.full + 8 * threadIdx.x, 2);
    mbarrier_init(shared.empty + 8 * threadIdx.x, Shape::ConsumerWarps);
    mbarrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 34) {
    mbarrier_init(shared.q_full + 8 * (threadIdx.x - 32), Shape::Wide ? 1 : 33);
    mbarrier_init(shared.q_empty + 8 * (threadIdx.x - 32), Shape::ConsumerWarps);
    mbarrier_init_fence();
  } else if (threadIdx.x == 64) {
    tma_prefetch_map(&p.k_map);
    tma_prefetch_map(&p.v_map);
    if (Shape::Wide) tma_prefetch_map(&p.q_map);
  }
  __syncthreads();  // the barriers are ready
  launch_dependents();
  wait_for_previous_grid();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Walker<Shape::T> walker(p);
  if (p.B > 32) walker.place_many(shared.scratch, Shape::Threads);
  if (warp < Shape::ConsumerWarps) {
    prefetch_table(p);
    Consumer<Shape> consumer(p, shared);
    consumer.run();
    return;
  }
  if (p.B <= 32) walker.place_few();
  DecodeProducer<Shape> producer(p, shared);
  if (warp == Shape::ConsumerWarps) {
    producer.template run<true>(walker);
  } else {
    producer.template run<false>(walker);
  }
}

}  // namespace attnkit
