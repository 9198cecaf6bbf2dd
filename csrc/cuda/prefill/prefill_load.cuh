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

  // One tile of K or V in boxes of ``rows`` keys, a page each or a part of a larger one, whose ids the lanes hold.
  template <bool Keys>
  ATTNKIT_DEVICE void load(int head, int rows, int slot, int page, int boxes) {
    constexpr int columns = Keys ? Shape::D : Shape::DV, bytes = Keys ? Shape::KBytes : Shape::VBytes;
    auto& ring = Keys ? k_ring : v_ring;
    const u32 full = (Keys ? s.k_full : s.v_full) + 8 * ring.stage, to = (Keys ? s.k : s.v) + ring.stage * bytes;
    mbarrier_wait((Keys ? s.k_empty : s.v_empty) + 8 * ring.stage, ring.parity ^ 1);
    if (What != kBoth && elect_one()) mbarrier_arrive_expect(full, boxes * rows * columns * 2);
    auto load_page = [&](int i) {
      const int from = __shfl_sync(~0u, page, i);
      if (!elect_one()) return;
#pragma unroll
      for (int c = 0; c < columns / 64; ++c) {
        tma_load_4d(to + i * rows * 128 + c * (Shape::BN * 128), Keys ? &p.k_map : &p.v_map, full, c * 64, head, slot, from);
      }
    };
#pragma unroll 1
    for (int i = What == kBoth ? 2 : 0; i < boxes; i += 3) {
      load_page(i);
      if (What != kBoth && i + 1 < boxes) load_page(i + 1);
    }
    __syncwarp();
    ring.next();
  }

  // Page ids are read one tile ahead. V of a block comes after K of the next one, as the consumers want them. What is the same
  // for all blocks is found before them: these instructions, too, take their turns from the tensor cores.
  ATTNKIT_DEVICE void run(const Tile& t) {
    const int lane = threadIdx.x % 32, shift = p.page_shift, rows = min(1 << shift, Shape::BN), boxes = Shape::BN / rows;
    const int begin = t.block_begin, last = t.block_end - 1, head = t.h, inside = (1 << shift) - 1;
    const int start = p.pages != nullptr ? 0 : t.row0;  // of the keys, where they have no pages
    const int* row = p.pages + t.row0 * p.pages_b;
    auto used = [&](int width) {  // boxes of the last block that are needed
      return min(boxes, ((min(t.length, last * Shape::BN + width) + inside) >> shift) - (last * Shape::BN >> shift));
    };
    auto page_of = [&](int block) { return p.pages != nullptr ? row[block * Shape::BN >> shift] : 0; };
    auto slot_of = [&](int block) { return start + (block * Shape::BN & inside); };
    int k_boxes = used(t.width), v_boxes = used(t.value_width(Shape::BN)), page = 0, before = 0;
    row += lane;
    if (lane < max(k_boxes, v_boxes)) page = page_of(last);
    row += (lane & (boxes - 1)) - lane;  // other blocks are seen whole, so that any lane may read
#pragma unroll 1
    for (int block = last; block >= begin; --block) {
      const int ahead = block > begin ? page_of(block - 1) : 0;
      if constexpr (What != kValues) load<true>(head, rows, slot_of(block), page, k_boxes);
      if constexpr (What == kValues) {
        load<false>(head, rows, slot_of(block), page, v_boxes);
        v_boxes = boxes;
      }
      if (What == kBoth && block < last) {
        load<false>(head, rows, slot_of(block + 1), before, v_boxes);
        v_boxes = boxes;
      }
      k_boxes = boxes;
      before = page;
      page = ahead;
    }
    if constexpr (What == kBoth) load<false>(head, rows, slot_of(begin), before, v_boxes);
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
