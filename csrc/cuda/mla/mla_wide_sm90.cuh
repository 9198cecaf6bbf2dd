// Absorbed latent decode (MLA) for many query rows: more than 32 (heads x query tokens) of a sequence read one latent
// row a token. Bound by the tensor cores: 8.9 MFLOP for 64 rows and 64 keys, 2176 cycles of one multiprocessor.
//
// A CTA has 64 query rows and walks over tiles of 64 keys in a ring of three. Four warpgroups:
//  - the scorer holds most of q in registers, so that its products read little but the keys from shared memory; with q
//    read from there too, 64 x 64 products would take all of its bandwidth. It leaves its weights, rounded, in the
//    tile's rope plane, which nobody reads any more.
//  - two adders have the 64 x 512 output, 256 columns each, and multiply the weights with the same tile read
//    transposed.
//  - a producer brings the tiles by TMA. The two CTAs of a cluster have different rows of the same sequence; each loads
//    half a tile, and both get both halves.
// The products take turns: the adders' for tile j start when the scorer's for tile j + 1 have been issued, and then run
// while the scorer takes the exponentials of tile j + 1. So the tensor cores always have a product to go on with.
//
// Registers and shared memory are both full: 168 + 2 x 160 + 24 registers a thread of each warpgroup, all 227 KB.
#pragma once
#include "mla_wide_adder.cuh"
#include "mla_wide_scorer.cuh"

namespace attnkit {

// Four warps, two latent planes each, and each finds out for itself what is next. The rope plane of an entry is loaded
// one entry after its latent planes, as there are two rope planes only; it is brought to L2 before. What is waited for
// most is the first tile, and its instructions come from L2 one by one: start() asks for it as soon as its page is known,
// and has all registers. Tiles that follow one another have a loop of their own, and all other entries go through one piece
// of code.
template <class Shape>
struct MlaWideProducer {
  static constexpr int T = Shape::T, Ctas = Shape::Ctas, Each = 2;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int row0, warp;
  MlaWalker& walker;

  // What an entry of the ring is: a tile or one of MlaEntry; of sequence b, or kMlaSums: of cell b. pages: of this lane's box.
  struct Entry {
    int what, b, length, pages;
  };
  MlaRing<Shape::Stages> ring;
  Entry late;  // the one before
  Entry entry;
  MlaPiece piece;
  int page = 0, sums = 0, told = 0;  // told: pieces

  ATTNKIT_DEVICE static int lane() { return threadIdx.x & 31; }
  ATTNKIT_DEVICE static int rank() { return Ctas > 1 ? cluster_rank() : 0; }
  ATTNKIT_DEVICE int boxes() const { return (T >> p.box_shift) / Ctas; }  // of a tile that this CTA loads
  ATTNKIT_DEVICE u32 place(int stage) const { return s.ring + stage * Shape::StageBytes + warp * (Each * Shape::PlaneBytes); }
  ATTNKIT_DEVICE u32 full(int stage) const { return s.full + 8 * (Shape::Parts * stage + warp / 2); }
  ATTNKIT_DEVICE bool says() const { return warp % 2 == 0; }

  // Planes [first, first + planes) of a tile, this CTA's share of them; the barrier waits for ``awaited`` planes.
  ATTNKIT_DEVICE void bring_tile(const Entry& e, u32 to, u32 full, int first, int planes, int awaited, bool says) const {
    const int shift = p.box_shift, mine = boxes(), box0 = rank() * mine;
    const int valid = max(0, min((e.length - e.what * T + (1 << shift) - 1) >> shift, T >> shift)), end = min(mine, valid - box0);
    if (says && elect_one()) mbarrier_arrive_expect(full, valid * (awaited * 128) << shift);
#pragma unroll 1
    for (int box = 0; box < end; ++box) {
      const int page = __shfl_sync(~0u, e.pages, box), slot = (e.what * T + ((box0 + box) << shift)) & ((1 << p.page_shift) - 1);
      if (elect_one()) {
        const u64 policy = evict_first_policy();
#pragma unroll 1
        for (int i = 0; i < planes; ++i) {
          const u32 place = to + i * Shape::PlaneBytes + (128 * (box0 + box) << shift);
          if constexpr (Ctas > 1) {
            tma_load_3d_multicast(place, &p.kv_map, full, (first + i) * 64, slot, page, (1 << Ctas) - 1, policy);
          } else {
            tma_load_3d(place, &p.kv_map, full, (first + i) * 64, slot, page, policy);
          }
        }
      }
    }
  }

  ATTNKIT_DEVICE void bring_q(int b, u32 to, u32 full, int first, int planes) const {
    const int token = p.q_heads < p.rows ? row0 / p.q_heads : 0, head = row0 - token * p.q_heads;
#pragma unroll 1
    for (int i = 0; i < planes; ++i) tma_load_4d(to + i * Shape::PlaneBytes, &p.q_map, full, (first + i) * 64, head, token, b);
  }

  ATTNKIT_DEVICE void bring(const Entry& e, u32 to, u32 full, int first, int planes, int awaited, bool says) const {
    if (e.what >= 0) {
      bring_tile(e, to, full, first, planes, awaited, says);
    } else if (elect_one()) {
      if (e.what == kMlaQ) {
        if (says) mbarrier_arrive_expect(full, awaited * Shape::PlaneBytes);
        bring_q(e.b, to, full, first, planes);
      } else if (e.what == kMlaSums && planes > 1) {
        const MlaPartials partials(p, Ctas);
        while (read_acquire(partials.arrived(e.b)) == 0) {
        }
        fence_async();
        if (says) mbarrier_arrive_expect(full, awaited * Shape::PlaneBytes);
        bulk_load(to, partials.values(e.b) + first * (Shape::PlaneBytes / 16), planes * Shape::PlaneBytes, full);
      } else if (says) {
        mbarrier_arrive(full);
      }
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void fetch_rope(const Entry& e) const {
    const int mine = boxes(), slot0 = e.what * T + (rank() * mine << p.box_shift);
    if (lane() < mine && slot0 + (lane() << p.box_shift) < e.length) {
      tma_prefetch_3d(&p.kv_map, Shape::C, (slot0 + (lane() << p.box_shift)) & ((1 << p.page_shift) - 1), e.pages);
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE int page_of(int b, int tile, int length) const {
    const int mine = boxes(), token = tile * T + ((rank() * mine + lane()) << p.box_shift);
    return lane() < mine && token < length ? p.pages[b * p.pages_b + (token >> p.page_shift)] : 0;
  }

  // The rope plane of the entry before goes to the plane that this entry's does not use.
  ATTNKIT_DEVICE void bring_late() const {
    const int other = ring.rope() ^ 1;
    bring(late, s.rope + other * Shape::PlaneBytes, s.rope_full + 8 * other, Shape::Planes, 1, 1, true);
  }

  // Entry k's latent planes and entry k - 1's rope plane take the places of entry k - 3.
  ATTNKIT_DEVICE void enter() {
    mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
    if (warp == 0 && ring.entry > 0) bring_late();
    bring(entry, place(ring.stage), full(ring.stage), Each * warp, Each, Shape::PartPlanes, says());
    if (warp == 0 && entry.what >= 0) fetch_rope(entry);
    late = entry;
    ring.next();
  }

  // To the others: before its q's barrier completes. Four places: who reads them is less than four pieces behind.
  ATTNKIT_DEVICE void tell_piece() {
    if (warp == 0 && lane() == 0) s.pieces[told & 3] = piece;
    ++told;
    __syncwarp();
  }

  ATTNKIT_DEVICE static void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  }

  // The first piece's q and first tile: nothing has to be waited for, and what takes its time comes after the loads.
  ATTNKIT_DEVICE void start() {
    entry.what = kMlaEnd;
    if (!walker.step(piece)) return;
    entry = {piece.tile, piece.b, piece.length, page_of(piece.b, piece.tile, piece.length)};
    if (elect_one()) {
      if (says()) expect(full(0), Shape::PartPlanes * Shape::PlaneBytes);
      bring_q(piece.b, place(0), full(0), Each * warp, Each);
      if (warp == 0) {
        expect(s.rope_full, Shape::PlaneBytes);
        bring_q(piece.b, s.rope, s.rope_full, Shape::Planes, 1);
      }
    }
    __syncwarp();
    ring.next();
    bring_tile(entry, place(1), full(1), Each * warp, Each, Shape::PartPlanes, says());
    walker.relate(piece);
    sums = piece.takes_over() ? 2 : 0;
    tell_piece();
    if (says() && elect_one()) {
      mbarrier_arrive(full(0));
      if (warp == 0) mbarrier_arrive(s.rope_full);
    }
    __syncwarp();
    if (warp == 0) fetch_rope(entry);
    page = page_of(piece.b, piece.tile + 1, piece.length);
    late = entry;
    ring.next();
  }

  // Tiles of a piece that follow one another: all there is to do, most of the time, in few instructions.
  ATTNKIT_DEVICE void run_tiles() {
    const int end = piece.tile + piece.tiles;
#pragma unroll 1
    while (entry.what >= 0 && entry.what + 1 < end) {
      ++entry.what;
      entry.pages = page;
      page = page_of(piece.b, entry.what + 1, piece.length);  // of the next, if there is one
      mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
      if (warp == 0) bring_late();
      bring_tile(entry, place(ring.stage), full(ring.stage), Each * warp, Each, Shape::PartPlanes, says());
      __syncwarp();
      if (warp == 0) fetch_rope(entry);
      late = entry;
      ring.next();
    }
  }

  ATTNKIT_DEVICE void run() {
#pragma unroll 1
    while (true) {
      run_tiles();
      if (entry.what == kMlaQ) {
        entry.what = piece.tile;
      } else if (sums > 0) {
        const int cell = (piece.first * p.row_blocks * Ctas + row0 / Shape::Rows) * 2;
        entry.what = kMlaSums, entry.b = cell + 2 - sums--;
      } else {
        const bool more = walker.next(piece);
        if (!more) piece.tiles = 0;
        tell_piece();
        entry.what = more ? kMlaQ : kMlaEnd, entry.b = piece.b, entry.length = piece.length;
        if (more) page = page_of(piece.b, piece.tile, piece.length), sums = piece.takes_over() ? 2 : 0;
      }
      entry.pages = page;
      if (entry.what >= 0) page = page_of(piece.b, entry.what + 1, piece.length);
      enter();
      if (entry.what == kMlaEnd) break;
    }
    // The other CTA arrives at these barriers, so this one may not be gone before; the end itself is not given back.
    if (Ctas > 1) {
      mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
      ring.next();
      mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void mla_wide(const MlaWideParams& p) {
  extern __shared__ __align__(1024) char raw[];
  const MlaWideShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = Shape::Ctas > 1 ? cluster_rank() : 0;
  const int block = blockIdx.y, group = blockIdx.z;
  if (threadIdx.x == 0) s.init_barriers();
  if (threadIdx.x == 384) tma_prefetch_map(&p.kv_map);
  if (threadIdx.x == 416) tma_prefetch_map(&p.q_map);
  if (Shape::Ctas > 1) {
    cluster_meet();
  } else {
    __syncthreads();
  }
  launch_dependents();
  const int row0 = (block * Shape::Ctas + rank) * Shape::Rows;
  if (warp >= 12) {
    MlaWalker walker(p, group);
    MlaWideProducer<Shape> producer{p, s, row0, warp - 12, walker};
    wait_for_previous_grid();
    walker.place();
    producer.start();
    registers_lower<Shape::ProducerRegisters>();
    producer.run();
  } else if (warp >= 4) {
    // For what is read first after the wait; nothing is read yet.
    const int spare = threadIdx.x - 128, lines = ((p.capacity >> p.page_shift) + 31) >> 5;
    const int line = (spare - 32) * (gridDim.y * gridDim.z) + group * gridDim.y + block;
    if (spare < 32 && spare * 32 < p.B) prefetch_l2(p.lens + spare * 32);
    if (spare >= 32 && spare < 64 && rank == 0 && line < p.B * lines) {
      prefetch_l2(p.pages + line / lines * p.pages_b + line % lines * 32);
    }
    wait_for_previous_grid();
    mbarrier_wait(s.full, 0);  // registers come when the producers have begun: no need to ask for them again and again
    registers_raise<Shape::AdderRegisters>();
    code_gap<Shape::Gap>(p.B < 0);
    MlaWideAdder<Shape> adder{p, s, row0};
    adder.run();
  } else {
    wait_for_previous_grid();
    mbarrier_wait(s.full, 0);
    registers_raise<Shape::ScorerRegisters>();
    MlaWideScorer<Shape> scorer{p, s, lane, warp};
    scorer.row0 = row0;
    if (p.softcap > 0.0f) {
      scorer.template run<true>();
    } else {
      scorer.template run<false>();
    }
  }
}

}  // namespace attnkit
