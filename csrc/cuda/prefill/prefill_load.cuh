// The warps of prefill that bring tiles by TMA, and the one that finds the items.
#pragma once
#include "prefill_shared.cuh"

namespace attnkit {

// A warp that loads tiles: one for K, one for V, and one that takes every third page of either. Elected lanes issue the boxes:
// ptxas makes a loop over lanes of any other branch.
enum Load { kKeys, kValues, kBoth };

template <class Shape, int What>
struct PrefillProducer {
  const PrefillParams& p;
  const PrefillShared<Shape>& s;
  Ring<Shape::Stages> k_ring, v_ring;

  // Rows of one box, boxes a tile: a page each, or one part of a page that is larger than a tile.
  ATTNKIT_DEVICE int box_rows() const { return min(1 << p.page_shift, Shape::BN); }

  // One page of a tile, ``columns`` wide.
  template <int Columns>
  ATTNKIT_DEVICE void load_page(u32 to, const void* map, u32 full, int head, int slot, int page) const {
    if (!elect_one()) return;
#pragma unroll
    for (int c = 0; c < Columns / 64; ++c) tma_load_4d(to + c * (Shape::BN * 128), map, full, c * 64, head, slot, page);
  }

  // One tile of K or V, whose page ids the lanes hold; ``width``: keys of the item's last block that are needed.
  template <bool Keys>
  ATTNKIT_DEVICE void load(const Tile& t, int block, int page, int width) {
    constexpr int columns = Keys ? Shape::D : Shape::DV, bytes = Keys ? Shape::KBytes : Shape::VBytes;
    auto& ring = Keys ? k_ring : v_ring;
    const u32 full = (Keys ? s.k_full : s.v_full) + 8 * ring.stage, to = (Keys ? s.k : s.v) + ring.stage * bytes;
    const void* map = Keys ? &p.k_map : &p.v_map;
    const int head = t.h, rows = box_rows(), first = block * Shape::BN;
    const int slot = p.pages != nullptr ? first & ((1 << p.page_shift) - 1) : t.row0 + first;
    const int limit = min(t.length, (t.block_end - 1) * Shape::BN + width);
    const int valid = min(Shape::BN / rows, ((limit + (1 << p.page_shift) - 1) >> p.page_shift) - (first >> p.page_shift));
    mbarrier_wait((Keys ? s.k_empty : s.v_empty) + 8 * ring.stage, ring.parity ^ 1);
    if (What != kBoth && elect_one()) mbarrier_arrive_expect(full, valid * rows * columns * 2);
#pragma unroll 1
    for (int i = What == kBoth ? 2 : 0; i < valid; i += 3) {
      load_page<columns>(to + i * rows * 128, map, full, head, slot, __shfl_sync(~0u, page, i));
      if (What != kBoth && i + 1 < valid) {
        load_page<columns>(to + (i + 1) * rows * 128, map, full, head, slot, __shfl_sync(~0u, page, i + 1));
      }
    }
    __syncwarp();
    ring.next();
  }

  // Page ids are read one tile ahead. V of a block comes after K of the next one, as the consumers want them.
  ATTNKIT_DEVICE void run(const Tile& t) {
    const int lane = threadIdx.x % 32, boxes = Shape::BN / box_rows(), end = t.block_end, begin = t.block_begin;
    const int k_width = t.width, v_width = t.value_width(Shape::BN);
    const int* row = p.pages + t.row0 * p.pages_b;
    const int used = p.pages != nullptr ? (min(t.length, end * Shape::BN) + (1 << p.page_shift) - 1) >> p.page_shift : 0;
    auto page_of = [&](int block) {
      const int first = (block * Shape::BN) >> p.page_shift;
      return lane < boxes && first + lane < used && block >= begin ? row[first + lane] : 0;
    };
    int page = page_of(end - 1), before = 0;
    for (int block = end - 1; block >= begin; --block) {
      const int ahead = page_of(block - 1);
      if constexpr (What != kValues) load<true>(t, block, page, k_width);
      if constexpr (What == kValues) load<false>(t, block, page, v_width);
      if (What == kBoth && block < end - 1) load<false>(t, block + 1, before, v_width);
      before = page;
      page = ahead;
    }
    if constexpr (What == kBoth) load<false>(t, begin, before, v_width);
  }

  ATTNKIT_DEVICE void follow() {
    Items<Shape> items{s};
    for (items.wait(); (*items).more; items.release(), items.wait()) {
      if ((*items).blocks() > 0) run(*items);
    }
  }
};

// The warp that finds the items, a little ahead of those that work on them: what is taken early may be missing elsewhere at
// the end. ``begin`` brings what an item starts with.
template <class Shape, class Line, class Begin>
ATTNKIT_DEVICE void find_items(const PrefillShared<Shape>& s, const Line& line, const Begin& begin) {
  Items<Shape> items{s};
  int index = blockIdx.x;
  u32 parity = 0;
  while (items.find(line, index)) {
    if ((*items).blocks() > 0) {
      begin(*items);
      mbarrier_wait(s.nearly_done, parity);
      parity ^= 1;
    }
    index = line.answer(line.ask());
    items.now.next();
  }
  launch_dependents();  // nothing is left to take: the next grid may wait where CTAs have left
  line.leave();
}

template <class Shape>
ATTNKIT_DEVICE void load_queries(const PrefillParams& p, const PrefillShared<Shape>& s, Ring<Shape::QStages>& ring, const Tile& t) {
  const u32 full = s.q_full + 8 * ring.stage, to = s.q + ring.stage * Shape::QBytes;
  mbarrier_wait(s.q_empty + 8 * ring.stage, ring.parity ^ 1);
  if (elect_one()) {
    mbarrier_arrive_expect(full, p.tile_tokens * p.G * Shape::D * 2);
#pragma unroll
    for (int c = 0; c < Shape::D / 64; ++c) {
      tma_load_3d(to + c * (Shape::Rows * 128), &p.q_map, full, c * 64, t.h * p.G, t.q0 + t.token0);
    }
  }
  __syncwarp();
  ring.next();
}

ATTNKIT_DEVICE void prefetch_maps(const PrefillParams& p) {
  if (threadIdx.x == 32) tma_prefetch_map(&p.q_map), tma_prefetch_map(&p.k_map), tma_prefetch_map(&p.v_map);
}

}  // namespace attnkit
