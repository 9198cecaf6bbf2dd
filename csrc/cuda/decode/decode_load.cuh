// What every decode build shares: its shared memory, and the producer warp that fills the ring.
#pragma once
#include "decode_schedule.cuh"

namespace attnkit {

// A piece of a head that several CTAs add up: how many those are, what the head's counter holds once all pieces have come, which
// share is this CTA's (-1: none), and whether it takes over what others have left.
struct ShareTask : Piece {
  int waiting, wanted, share, takes_over;
};

struct DecodeShared {
  u32 ring, q;                    // shared-space addresses: [stages, StageBytes], [QSlots, QBytes]
  u32 full, empty, q_full, q_empty;  // barriers: [stages], [stages], [2], [2]
  unsigned char *tiles, *meet;    // the ring as ordinary memory, and where a narrow build's warps compare their rows' (max, sum)
  u32 inbox, inbox_full;          // clusters: where others' sums come in, and their barrier
  int* scratch;                   // the walker's, then a flag
  volatile int* ended;            // whether the previous grid has
  Piece* pieces;                  // [2]: what the q of the same slot belongs to
  ShareTask* tasks;               // [2], with shared adding-up: this CTA's first piece, where it goes on after that, and its last
  int* is_last;                   // [2]: whether the piece of the same slot is
  u32 cleared, told;              // barriers: places in the workspace are cleared, tasks are settled
};

template <class Shape>
struct ShareGate;

// Boxes of the cache: into shared memory, or into L2 and no further.
ATTNKIT_DEVICE void load_box(u32 to, const TensorMap& map, u32 barrier, int head, int slot, int page, int plane, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(0), "r"(head), "r"(slot), "r"(page), "r"(plane), "l"(policy)
      : "memory");
}

ATTNKIT_DEVICE void prefetch_box(const TensorMap& map, int head, int slot, int page, int plane) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(&map), "r"(0), "r"(head), "r"(slot),
               "r"(page), "r"(plane)
               : "memory");
}

// Two warps: one brings the keys, the other q and the values; or four, two for the keys' boxes and two for the values'.
// Issuing boxes of 16 slots takes a warp longer than their bytes take to arrive. All run the same code, rolled up: what runs
// once a launch waits for its instructions.
template <class Shape>
struct DecodeProducer {
  static constexpr int T = Shape::T;
  static constexpr bool Same = Shape::RowK == Shape::RowV;

  const DecodeParams& p;
  const DecodeShared& shared;
  bool keys, q;                // what this warp brings
  int part, parts;             // which boxes: every parts-th
  int lane, box_shift, boxes;  // slots in a box: 2^box_shift; boxes of one plane of a tile
  u64 policy;
  Piece piece;
  bool is_last;                // of the CTA's pieces

  ATTNKIT_DEVICE DecodeProducer(const DecodeParams& params, const DecodeShared& s, int warp)
      : p(params), shared(s), keys(warp % 2 == 0), q(warp == 1), part(warp / 2) {
    parts = (Shape::Producers + keys) / 2;
    lane = threadIdx.x & 31;
    box_shift = min(p.page_shift, 31 - __clz(T));
    boxes = T >> box_shift;
    policy = evict_first_policy();
  }

  // Rows i * G + g of one head. Wide builds read them by wgmma, so they come by TMA, in swizzled planes.
  ATTNKIT_DEVICE void load_q_planes(int slot) {
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

  ATTNKIT_DEVICE void load_q_rows(int slot) {
    constexpr int Units = Shape::D * 2 / 16;
    const char* base = p.q + piece.b * p.q_b + piece.h * p.G * p.q_h;
    const u32 to = shared.q + slot * Shape::QBytes;
#pragma unroll 4
    for (int unit = lane; unit < Shape::Rows * Units; unit += 32) {
      const int row = unit / Units, column = (unit - row * Units) * 16;
      const int n = piece.block * p.block_rows + Shape::row_of(p, row);
      const int i = n * p.g_magic >> 20;
      const bool valid = i < p.Q;
      copy_async_16(to + row * Shape::PitchQ + column, valid ? base + i * p.q_i + (n - i * p.G) * p.q_h + column : p.q, valid);
    }
    copy_async_arrive(shared.q_full + 8 * slot);
    if (lane == 0) {
      shared.pieces[slot] = piece;
      if constexpr (Shape::Share) shared.is_last[slot] = is_last;
      mbarrier_arrive(shared.q_full + 8 * slot);  // publishes the piece, which the arrival above does not
    }
  }

  ATTNKIT_DEVICE void prefetch_q() const {
    constexpr int Lines = (Shape::D * 2 + 127) / 128;
#pragma unroll 1
    for (int i = lane; i < Shape::Rows * Lines; i += 32) {
      const int n = piece.block * p.block_rows + Shape::row_of(p, i / Lines), token = n * p.g_magic >> 20;
      if (token >= p.Q) continue;
      prefetch_l2(p.q + piece.b * p.q_b + token * p.q_i + (piece.h * p.G + n - token * p.G) * p.q_h + i % Lines * 128);
    }
  }

  // The page of this lane's box of a tile; 0 where the box holds no visible key: its table entry may be garbage.
  // L1 may not see a table that is still being written, so what is read ahead of the wait goes past it.
  ATTNKIT_DEVICE int page_of(const int* pages, int tile, bool ahead) const {
    const int token = tile * T + ((lane & (boxes - 1)) << box_shift);
    if (token >= piece.length || token + (1 << box_shift) <= piece.low) return 0;
    const int* page = pages + (token >> p.page_shift);
    return ahead ? load_l2(page) : *page;
  }

  // The boxes of a tile that hold visible keys: into the ring, or (ahead) into L2 only.
  ATTNKIT_DEVICE void load_tile(const int* pages, int tile, int page, int stage, bool ahead) {
    const int row = Same || keys ? Shape::RowK : Shape::RowV, swizzle = Same || keys ? Shape::SwizzleK : Shape::SwizzleV;
    const TensorMap& map = keys ? p.k_map : p.v_map;
    const u32 full = shared.full + 8 * stage, to = shared.ring + stage * Shape::StageBytes + (keys ? 0 : T * Shape::Heads * Shape::RowK);
    const int token0 = tile * T, slot = token0 & ((1 << p.page_shift) - 1), head = piece.h * Shape::Heads;
    const int first = max(piece.low - token0, 0) >> box_shift;
    const int last = min((piece.length - token0 + (1 << box_shift) - 1) >> box_shift, boxes);
    const int own = max((last - first - part + parts - 1) / parts, 0);
    if (!ahead && elect_one()) mbarrier_arrive_expect(full, own * (row * Shape::Heads << box_shift));
#pragma unroll 1
    for (int box = first + part; box < last; box += parts) {
      const int* entry = pages + (token0 >> p.page_shift) + box;
      const int from = boxes <= 32 ? __shfl_sync(~0u, page, box) : ahead ? load_l2(entry) : *entry;
      // A warp issues one box in 200 cycles, so a narrow build's holds all planes; wgmma wants them a tile apart.
      const u32 at = to + (box << box_shift) * (Shape::Wide ? swizzle : Shape::Heads * row);
      if (elect_one()) {
#pragma unroll
        for (int plane = 0; plane < (Shape::Wide ? row / swizzle : 1); ++plane) {
          if (ahead) {
            prefetch_box(map, head, slot, from, plane);
          } else {
            load_box(at + plane * T * swizzle, map, full, head, slot, from, plane, policy);
          }
        }
      }
    }
  }

  ATTNKIT_DEVICE void load_q(int pieces) {
    const int slot = pieces % Shape::QSlots;
    mbarrier_wait(shared.q_empty + 8 * slot, (pieces / Shape::QSlots & 1) ^ 1);
    if constexpr (Shape::Wide) {
      load_q_planes(slot);
    } else {
      load_q_rows(slot);
    }
  }

  // Pieces wait after which their CTAs have no other, all but perhaps the head's last: the last ones of them to come, as many as
  // have enough to add up.
  ATTNKIT_DEVICE void set_task(int i, const Walker<T, Shape::Cluster, Shape::Charge>& walker) const {
    ShareTask& task = shared.tasks[i];
    static_cast<Piece&>(task) = piece;
    const int end = walker.start + (piece.h * p.row_blocks + piece.block + 1) * walker.tiles;
    const bool goes_on = walker.cut(walker.cta - piece.index + piece.count) != end;
    const int units = min(p.block_rows, p.Q * p.G - piece.block * p.block_rows) * (Shape::DV / 4);
    task.waiting = min(piece.count - goes_on, (units + p.chunk_least - 1) / p.chunk_least);
    task.wanted = piece.count - goes_on + (goes_on << 10);
    task.share = -1;
    task.takes_over = 0;
  }

  // Who that is, is settled by one thread of a CTA, once it has asked for all tiles.
  ATTNKIT_DEVICE bool settles() const { return keys && part == 0 && lane == 0; }

  ATTNKIT_DEVICE void settle(int pieces) const {
    const ShareGate<Shape> gate{p};
    mbarrier_wait(shared.cleared, 0);
    if (pieces > 1 && shared.tasks[0].count > 1) gate.pass(shared.tasks[0]);
    const bool leaves = shared.tasks[1].count > 1 && gate.come(shared.tasks[1]);
    mbarrier_arrive(shared.told);
    if (leaves) gate.leave(shared.tasks[1]);
  }

  // Before the previous grid has ended nothing it may write can be trusted, but what seems to be this CTA's first
  // tiles can be asked for: they come closer, and are read, like lens and table, after the wait.
  ATTNKIT_DEVICE void run(Walker<T, Shape::Cluster, Shape::Charge>& walker) {
    int stage = 0, phase = 1, pieces = 0;
#pragma unroll 1
    for (bool placed = Shape::Cluster == 1 && p.B > 32, waited = placed;;) {
      if (!placed) walker.place_few();
      placed = true;
      const bool more = walker.next(piece);
      const int* pages = p.pages + piece.b * p.pages_b;
      if (!waited) {
        const int last = more ? piece.tile + min(p.ahead, piece.tiles) : piece.tile;
#pragma unroll 1
        for (int tile = piece.tile; tile < last && !*shared.ended; ++tile) load_tile(pages, tile, page_of(pages, tile, true), 0, true);
        if constexpr (!Shape::Wide) {
          if (q && more && !*shared.ended) prefetch_q();
        }
        wait_for_previous_grid();
        waited = true;
        if (__any_sync(~0u, walker.stale(Shape::Cluster > 1 ? walker.b : lane))) {
          placed = false;
          continue;
        }
      }
      if (Shape::Cluster > 1 && !more) launch_dependents();  // this CTA has nothing to ask for
      if (!more) break;
      int page = page_of(pages, piece.tile, false);
      if constexpr (Shape::Share) {
        is_last = walker.position == walker.end;
        if (settles() && (pieces == 0 || is_last)) set_task(is_last, walker);
      }
      if (!Shape::Wide && q) load_q(pieces);  // while the page is on its way
#pragma unroll 1
      for (int tile = piece.tile; tile < piece.tile + piece.tiles; ++tile) {
        const int next_page = page_of(pages, tile + 1, false);
        mbarrier_wait(shared.empty + 8 * stage, phase);
        load_tile(pages, tile, page, stage, false);
        if (Shape::Wide && q && tile == piece.tile) load_q(pieces);  // its place is free only when the piece before has ended
        if (piece.tile + piece.tiles - 1 - tile + walker.end - walker.position <= p.late) launch_dependents();
        page = next_page;
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      ++pieces;
    }
    if constexpr (Shape::Share) {
      if (settles() && pieces > 0) settle(pieces);
    }
    if (q) {
      const int slot = pieces % Shape::QSlots;
      mbarrier_wait(shared.q_empty + 8 * slot, (pieces / Shape::QSlots & 1) ^ 1);
      if (lane == 0) {
        if (Shape::Cluster > 1) shared.pieces[slot] = piece;  // without tiles, but with columns to add up
        shared.pieces[slot].tiles = 0;
      }
      __syncwarp();
      if (!Shape::Wide) mbarrier_arrive(shared.q_full + 8 * slot);
      if (lane == 0) mbarrier_arrive(shared.q_full + 8 * slot);
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
  // TMA's swizzle follows address bits: the ring lies on a multiple of 1024, as dynamic shared memory does.
  shared.ring = smem_address(memory);
  shared.tiles = memory;
  shared.q = shared.ring + p.stages * Shape::StageBytes;
  unsigned char* after = memory + p.stages * Shape::StageBytes + Shape::QSlots * Shape::QBytes;
  shared.full = smem_address(after);
  shared.empty = shared.full + 8 * 16;
  shared.q_full = shared.empty + 8 * 16;
  shared.q_empty = shared.q_full + 8 * 2;
  shared.scratch = reinterpret_cast<int*>(after + 320);
  shared.pieces = reinterpret_cast<Piece*>(after + 384);
  shared.ended = shared.scratch + 15;
  shared.meet = after + 512;
  if constexpr (Shape::Share) {
    shared.tasks = reinterpret_cast<ShareTask*>(after + 512 + Shape::WT * Shape::Rows * 8);
    shared.is_last = reinterpret_cast<int*>(after + 472);
    shared.cleared = shared.q_empty + 8 * 2;
    shared.told = shared.cleared + 8;
  }
  if constexpr (Shape::Cluster > 1) {
    shared.inbox = smem_address(after) + 512 + Shape::WT * Shape::Rows * 8;
    shared.inbox_full = shared.q_empty + 8 * 2;
  }

  if (threadIdx.x < p.stages) {
    mbarrier_init(shared.full + 8 * threadIdx.x, Shape::Producers);
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
    *shared.ended = 0;
    if constexpr (Shape::Share) {
      shared.tasks[0].share = -1;
      shared.tasks[0].takes_over = 0;
      mbarrier_init(shared.cleared, Shape::ConsumerWarps);
      mbarrier_init(shared.told, 1);
      mbarrier_init_fence();
    }
    if constexpr (Shape::Cluster > 1) {
      mbarrier_init(shared.inbox_full, 1);
      mbarrier_init_fence();
    }
  }
  if constexpr (Shape::Cluster > 1) {
    cluster_sync();  // everybody's are ready
  } else {
    __syncthreads();  // the barriers are ready
  }
  if (p.late < 0) launch_dependents();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Walker<Shape::T, Shape::Cluster, Shape::Charge> walker(p);
  if (Shape::Cluster == 1 && p.B > 32) {  // more sequences than a warp has lanes
    prefetch_table(p);
    bool waited = p.B > Shape::Threads;
    if (waited) wait_for_previous_grid();
#pragma unroll 1
    for (;;) {
      walker.place_many(shared.scratch, Shape::Threads);
      if (waited) break;
      wait_for_previous_grid();
      waited = true;
      if (!__syncthreads_or(walker.stale(threadIdx.x))) break;
    }
  }
  if (warp < Shape::ConsumerWarps) {
    if (Shape::Cluster > 1 || p.B <= 32) {
      prefetch_table(p);
      wait_for_previous_grid();
      *shared.ended = 1;
    }
    Consumer<Shape> consumer(p, shared);
    consumer.run();
  } else {
    DecodeProducer<Shape> producer(p, shared, warp - Shape::ConsumerWarps);
    producer.run(walker);
  }
}

}  // namespace attnkit
