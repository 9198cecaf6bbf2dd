// The wide latent decode's warps that fetch an fp8 cache and widen it to bf16, in the form that the products read.
#pragma once
#include "mla_wide_fp8_shared.cuh"

namespace attnkit {

ATTNKIT_DEVICE void mla_store_16(u32 to, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

ATTNKIT_DEVICE uint4 mla_load_16(u32 from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
  return x;
}

ATTNKIT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
ATTNKIT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four warps, each of them with its own tokens of every tile; of a cluster's tile each CTA widens its share of the tokens, and
// stores it to all. A step widens 64 columns of eight tokens: four lanes a token and 16 columns a lane; four steps are the
// columns of a unit. What a lane is to widen comes by cp.async, four steps ahead, to shared memory that only it reads.
//
// Tokens outside the sequence may hold NaN and their table entries garbage: zeros come in their place.
//
// The rope plane of a tile is brought one entry after its units, as there are two rope planes only.
//
// Code is short on purpose, and loops are rolled: all of a tile's code, of all warps, has to stay in the instruction cache.
template <class Shape>
struct MlaWideFp8Converter {
  static constexpr int T = Shape::T, Ctas = Shape::Ctas, Each = Shape::Each, Batches = Shape::Batches, Steps = 8 * Batches;
  const MlaWideParams& p;
  const MlaWideShared<Shape>& s;
  const int row0, warp, me;  // me: the lane
  const int other;           // the other CTA of the cluster
  const int first;           // of this warp's tokens in a tile

  // A lane's token of a tile (of each eight of the warp's), or a token for which zeros come.
  struct Token {
    const char* at;
    bool valid;
  };

  int what, b;            // the entry: a tile or one of MlaEntry; of sequence b (kMlaSums: of cell b)
  int length, low, end;   // of the piece; its last tile, and one
  bool late;              // the entry before is a tile, whose rope plane is still to be brought
  Token before[Batches], now[Batches];
  int pages[Batches];     // of this lane's tokens of the next tile
  MlaRing<Shape::Stages> ring;
  MlaUnits<Shape::Units> units;

  ATTNKIT_DEVICE int row(int batch) const { return first + 8 * batch + me / 4; }
  ATTNKIT_DEVICE u32 place(int unit) const { return s.ring + units.of(unit) * Shape::UnitBytes; }
  ATTNKIT_DEVICE u32 full(int unit) const { return s.full + 8 * units.of(unit); }
  ATTNKIT_DEVICE u32 raw() const { return s.raw + warp * (Shape::RawBytes + Shape::ScaleBytes); }
  ATTNKIT_DEVICE u32 scales(int tile, int batch) const {
    return raw() + Shape::RawBytes + ((tile & 1) * Batches + batch) * 128 + me / 4 * 16;
  }
  ATTNKIT_DEVICE u32 late_rope() const { return s.rope + (ring.rope() ^ 1) * Shape::PlaneBytes; }
  ATTNKIT_DEVICE u32 late_full() const { return s.rope_full + 8 * (ring.rope() ^ 1); }

  ATTNKIT_DEVICE bool has(int tile, int key) const { return tile < end && key >= low && key < length; }

  ATTNKIT_DEVICE int page_of(int tile, int batch) const {
    const int key = tile * T + row(batch);
    int page = 0;
    if (has(tile, key)) page = p.pages[b * p.pages_b + (key >> p.page_shift)];
    return page;
  }

  // Places are counted in 16 bytes; box_shift says how far apart pages are.
  ATTNKIT_DEVICE Token token_of(int tile, int batch, int page) const {
    const int key = tile * T + row(batch);
    const u32 place = static_cast<u32>(page) * p.box_shift + (key & ((1 << p.page_shift) - 1)) * (Shape::TokenBytes / 16);
    return {p.kv + static_cast<u64>(place) * 16, has(tile, key)};
  }

  // What is widened in step i: columns 64 (i % 2) of block 2 (i % 4 / 2) + i / 4 / Batches, of batch i / 4 % Batches.
  ATTNKIT_DEVICE static int unit_of(int i) { return i / (4 * Batches); }
  ATTNKIT_DEVICE static int batch_of(int i) { return Batches > 1 ? i / 4 % Batches : 0; }

  ATTNKIT_DEVICE void fetch(const Token& token, int i) const {
    copy_async_16(raw() + i % 4 * 512 + me * 16, token.at + (i % 4 / 2 * 256 + i % 2 * 64 + unit_of(i) * 128 + me % 4 * 16), token.valid);
    copy_async_commit();
  }

  ATTNKIT_DEVICE void fetch_scales(const Token& token, int tile, int batch) const {
    if (me % 4 == 0) copy_async_16(scales(tile, batch), token.at + Shape::ScaleAt, token.valid);
  }

  ATTNKIT_DEVICE static u32 widened(u32 pair, float by) {
    const float2 x = unpack(e4m3x2_to_f16x2(static_cast<u16>(pair)), false);
    return pack_bf16(x.x * by, x.y * by);
  }

  ATTNKIT_DEVICE void store(u32 to, u32 there, const u32 (&x)[4]) const {
    mla_store_16(to, x);
    if constexpr (Ctas > 1) store_async_16(cluster_address(to, other), there, x[0], x[1], x[2], x[3]);
  }

  ATTNKIT_DEVICE void widen(int i, u32 to, u32 there) const {
    copy_async_wait<3>();
    float by;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(by) : "r"(scales(what, batch_of(i)) + (i % 4 / 2 * 2 + unit_of(i)) * 4) : "memory");
    const uint4 in = mla_load_16(raw() + i % 4 * 512 + me * 16);
    const u32 x[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u32 y[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) y[k] = widened(x[2 * h + k / 2] >> 16 * (k % 2), by);
      store(to ^ 16 * h, there, y);
    }
  }

  // One warp counts what comes from other CTAs.
  ATTNKIT_DEVICE void arrive(u32 barrier, int from_others) const {
    if (me == 0) {
      if (Ctas > 1 && warp == 0) {
        mbarrier_arrive_expect(barrier, from_others);
      } else {
        mbarrier_arrive(barrier);
      }
    }
  }

  // A lane's two parts of a rope row lie side by side.
  ATTNKIT_DEVICE u32 rope_place(int batch) const { return late_rope() + row(batch) * 128 + ((me % 4 * 2) ^ row(batch) % 8) * 16; }

  ATTNKIT_DEVICE void fetch_rope() const {
#pragma unroll
    for (int i = 0; i < 2 * Batches; ++i) {
      copy_async_16(rope_place(i / 2) ^ i % 2 * 16, before[i / 2].at + (Shape::RopeAt + me % 4 * 32 + i % 2 * 16), before[i / 2].valid);
    }
  }

  // What has come by fetch_rope() goes to the other CTA as well.
  ATTNKIT_DEVICE void send_rope() const {
    if constexpr (Ctas > 1) {
#pragma unroll
      for (int i = 0; i < 2 * Batches; ++i) {
        const u32 place = rope_place(i / 2) ^ i % 2 * 16;
        const uint4 x = mla_load_16(place);
        store_async_16(cluster_address(place, other), cluster_address(late_full(), other), x.x, x.y, x.z, x.w);
      }
    }
  }

  ATTNKIT_DEVICE void load_q(u32 to, u32 full, int plane) const {
    const int query = row0 / p.q_heads;
    tma_load_4d(to, &p.q_map, full, plane * 64, row0 - query * p.q_heads, query, b);
  }

  // A quarter of a unit that is not a tile's.
  ATTNKIT_DEVICE void bring(int unit) const {
    const u32 to = place(unit) + warp * Shape::PlaneBytes, full = this->full(unit);
    if (elect_one()) {
      if (what == kMlaQ) {
        mbarrier_arrive_expect(full, Shape::PlaneBytes);
        load_q(to, full, Shape::plane(unit, warp));
      } else if (what == kMlaSums) {
        const MlaPartials partials(p, Ctas);
        while (read_acquire(partials.arrived(b)) == 0) {
        }
        fence_async();
        mbarrier_arrive_expect(full, Shape::PlaneBytes);
        bulk_load(to, partials.values(b) + (Shape::UnitPlanes * unit + warp) * (Shape::PlaneBytes / 16), Shape::PlaneBytes, full);
      } else {
        mbarrier_arrive(full);
      }
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void wait_place(int unit) const { mbarrier_wait(s.empty + 8 * units.of(unit), units.parity(unit) ^ 1); }

  ATTNKIT_DEVICE void next() {
    ring.next();
    units.next();
  }

  // An entry takes the places of the units of five before, and its rope plane that of the entry two before.
  ATTNKIT_DEVICE void enter_other() {
    wait_place(0);
    if (late) {
      fetch_rope();
      copy_async_wait_all();
      send_rope();
      fence_async_shared();
      __syncwarp();
      arrive(late_full(), Shape::PlaneBytes / 2);
    }
    bring(0);
    wait_place(1);
    bring(1);
    next();
    late = false;
    if (what == kMlaEnd) return;
    wait_place(0);  // now the rope plane of this entry is free
    if (elect_one()) {
      if (what == kMlaQ && warp == 0) {
        mbarrier_arrive_expect(late_full(), Shape::PlaneBytes);
        load_q(late_rope(), late_full(), Shape::Planes);
      } else {
        mbarrier_arrive(late_full());
      }
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE void enter_tile() {
    Token coming[Batches];
    wait_place(0);
    if (late) fetch_rope();
#pragma unroll
    for (int i = 0; i < Batches; ++i) {
      coming[i] = token_of(what + 1, i, pages[i]);
      pages[i] = page_of(what + 2, i);
      fetch_scales(coming[i], what + 1, i);
      if (coming[i].valid) {
        prefetch_l2(coming[i].at + me % 4 * 164);
        prefetch_l2(coming[i].at + me % 4 * 164 + 128);
      }
    }
    copy_async_wait<3>();  // the first step's, and with it the scales
    __syncwarp();
    const u32 at = row(0) * 128 + ((me % 4 * 2) ^ row(0) % 8) * 16;
    u32 to = place(0) + at, barrier = full(0);
#pragma unroll 1
    for (int i = 0; i < Steps; ++i) {
      if (i == Steps / 2) {
        wait_place(1);
        to = place(1) + at, barrier = full(1);
      }
      widen(i, to + batch_of(i) * 1024 + i % 4 * Shape::PlaneBytes, Ctas > 1 ? cluster_address(barrier, other) : 0);
      const int j = (i + 4) % Steps;
      const bool later = i + 4 >= Steps, second = batch_of(j) > 0;
      const char* at = later ? coming[0].at : second ? now[Batches - 1].at : now[0].at;
      fetch({at, later ? coming[0].valid : second ? now[Batches - 1].valid : now[0].valid}, j);
      if (i % (Steps / 2) == Steps / 2 - 1) {
        const bool with_rope = late && i < Steps / 2;
        if (with_rope) {
          copy_async_wait<3>();  // it has come with the first step's group
          send_rope();
        }
        fence_async_shared();
        __syncwarp();
        arrive(barrier, Shape::UnitBytes / 2);
        if (with_rope) arrive(late_full(), Shape::PlaneBytes / 2);
      }
    }
#pragma unroll
    for (int i = 0; i < Batches; ++i) before[i] = now[i], now[i] = coming[i];
    late = true;
    next();
  }

  // What is found out once a piece waits in shared memory, as registers are few.
  ATTNKIT_DEVICE void save(const MlaWalker::State& state) const {
    const int* from = reinterpret_cast<const int*>(&state);
    if (me == 0) {
#pragma unroll
      for (int i = 0; i < MlaWideShared<Shape>::StateInts; ++i) s.states[warp * MlaWideShared<Shape>::StateInts + i] = from[i];
    }
    __syncwarp();
  }

  ATTNKIT_DEVICE MlaWalker saved() const {
    MlaWalker::State state;
    int* to = reinterpret_cast<int*>(&state);
    const volatile int* from = s.states + warp * MlaWideShared<Shape>::StateInts;
#pragma unroll
    for (int i = 0; i < MlaWideShared<Shape>::StateInts; ++i) to[i] = from[i];
    __syncwarp();
    return MlaWalker(p, state);
  }

  ATTNKIT_DEVICE void run() {
    int sums = 0, n = 0, tile = 0, cell = 0;
    late = false;
#pragma unroll 1
    while (true) {
#pragma unroll 1
      do {
        if (sums > 0) {
          what = kMlaSums, b = cell + 2 - sums--;
        } else {
          MlaPiece piece;
          MlaWalker walker = saved();
          const bool more = walker.next(piece);
          save(walker.state);
          if (!more) piece.tiles = 0;
          if (warp == 0 && me == 0) s.pieces[n] = piece;  // four places: who reads them is less than four pieces behind
          n = (n + 1) & 3;
          __syncwarp();
          what = more ? kMlaQ : kMlaEnd;
          tile = piece.tile, sums = piece.takes_over() ? -2 : 0;
          cell = (piece.first * p.row_blocks * Ctas + row0 / Shape::Rows) * 2;
          if (more) begin(piece);
        }
        enter_other();
      } while (what == kMlaSums);
      if (what == kMlaEnd) break;
#pragma unroll 1
      for (what = tile; what < end; ++what) enter_tile();
      sums = -sums;
    }
  }

  ATTNKIT_DEVICE void begin(const MlaPiece& piece) {
    b = piece.b, length = piece.length, low = piece.low, end = piece.tile + piece.tiles;
    copy_async_wait_all();  // what was fetched beyond the end
#pragma unroll
    for (int i = 0; i < Batches; ++i) {
      now[i] = token_of(piece.tile, i, page_of(piece.tile, i));
      pages[i] = page_of(piece.tile + 1, i);
      fetch_scales(now[i], piece.tile, i);
    }
#pragma unroll 1
    for (int i = 0; i < 4; ++i) fetch(now[0], i);
  }
};

}  // namespace attnkit
