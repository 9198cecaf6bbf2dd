// sample_from_hidden for sm_90a and up to 64 rows: hidden @ weight^T and a draw from each row of it, whose logits stay in
// shared memory.
//
// Memory bound: every weight is read once. Weights are the rows of wgmma, 64 of a tile of 128 for each of two consumer
// warpgroups, and rows of hidden its columns. One producer thread fills a ring of slices of both by TMA. All slices of all
// tiles are dealt out evenly, so a CTA may begin and end inside a tile: such a tile is finished by whoever of its two CTAs
// comes last, from what the other has left in the workspace (nobody waits), always adding the same two sums.
// Between tiles the consumers draw (hidden_draw_sm90.cuh), while the ring fills.
#pragma once
#include "hidden_draw_sm90.cuh"
#include "../common/ring.cuh"
#include "../common/wgmma_sm90.cuh"

namespace attnkit::hidden {

struct alignas(64) Map {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/hidden.py (PARAMS).
struct HiddenParams {
  Map hidden_map, w_map;
  const void* hidden;   // [B, H], read through its map
  const void* weight;   // [V, H], likewise
  float4* partials;     // two of a tile's sums for each CTA
  float* out;           // [B, out_b]: the logits, instead of a draw
  i64 out_b;
  i64 tiles;
  i64 steps;            // slices along H
  i64 stages;           // slices of the ring
  i64 ahead;            // slices that L2 is asked for before the previous grid is done
  i64 extras;           // whether penalties, a bias or a mask come
  SampleParams sample;  // its state: 4 words a row, then one for each CTA; zero between launches
};

template <bool Bf16_, int N_>
struct HiddenShape {
  static constexpr bool Bf16 = Bf16_;
  static constexpr int N = N_;            // rows of hidden, at most
  static constexpr int Planes = 2;        // of 128 bytes of H in a slice
  static constexpr int Consumers = 256, Threads = Consumers + 32;
  static constexpr int Count = N / 2;     // sums of a thread
  static constexpr int Draws = N > 32 ? 2 : 1;  // rows that a thread helps to draw
  static constexpr u32 WeightBytes = kTile * 128 * Planes, Stage = WeightBytes + N * 128 * Planes;
  static constexpr int MostStages = 32;   // a lane initialises each
};

template <class Shape>
struct HiddenShared {
  u32 ring, logits, full, empty, word;

  ATTNKIT_DEVICE HiddenShared(const HiddenParams& p, char* raw) {
    ring = (smem_address(raw) + 1023) & ~1023u;
    logits = ring + static_cast<u32>(p.stages) * Shape::Stage;
    full = logits + Shape::N * kPitch * 4;
    empty = full + 8 * Shape::MostStages;
    word = empty + 8 * Shape::MostStages;
  }
};

// Slices of one tile.
struct Part {
  int tile, first, count;
};

// This CTA's slices, tile after tile. There are no more CTAs than tiles, so no tile has more than two CTAs.
struct Work {
  const int steps, last;
  int at;
  ATTNKIT_DEVICE explicit Work(const HiddenParams& p)
      : steps(static_cast<int>(p.steps)),
        last(static_cast<int>(p.tiles * p.steps * (blockIdx.x + 1) / gridDim.x)),
        at(static_cast<int>(p.tiles * p.steps * blockIdx.x / gridDim.x)) {}
  ATTNKIT_DEVICE bool next(Part& part) {
    if (at >= last) return false;
    const int first = at % steps;
    part = {at / steps, first, min(steps - first, last - at)};
    at += part.count;
    return true;
  }
};

// Where a tile's four stretches lie: one in each chunk of a piece, or, where logits are written, one behind the other, so that
// whole pages of memory are.
struct TilePlace {
  int first, apart;
  ATTNKIT_DEVICE TilePlace(const HiddenParams& p, int tile)
      : first(p.out == nullptr ? first_of_tile(tile) : tile * kTile), apart(p.out == nullptr ? kChunk : kStretch) {}
};

// One thread, as soon as the CTA is there. Weights that an earlier kernel may still be writing go no further than L2 before
// the wait: a line there cannot become stale, a copy in shared memory would.
template <class Shape>
ATTNKIT_DEVICE void prefetch(const HiddenParams& p, Work work) {
  Part part;
  work.next(part);
  const TilePlace at(p, part.tile);
  const int end = part.first + min(static_cast<int>(p.ahead), part.count);
  for (int i = part.first; i < end; ++i) {
#pragma unroll
    for (int plane = 0; plane < Shape::Planes; ++plane) {
#pragma unroll
      for (int c = 0; c < 4; ++c) tma_prefetch_2d(&p.w_map, (i * Shape::Planes + plane) * 64, at.first + c * at.apart);
    }
  }
}

// One thread: slices of both operands. Once all are asked for, the next grid may start.
template <class Shape>
ATTNKIT_DEVICE void load(const HiddenParams& p, const HiddenShared<Shape>& s, Work work) {
  tma_prefetch_map(&p.hidden_map);
  wait_for_previous_grid();
  const u64 once = evict_first_policy();
  StageRing ring(static_cast<int>(p.stages));
  for (Part part; work.next(part);) {
    const TilePlace at(p, part.tile);
    for (int i = part.first; i < part.first + part.count; ++i) {
      const u32 full = s.full + 8 * ring.stage, to = s.ring + ring.stage * Shape::Stage;
      mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
      mbarrier_arrive_expect(full, Shape::Stage);
#pragma unroll
      for (int plane = 0; plane < Shape::Planes; ++plane) {
        const int x = (i * Shape::Planes + plane) * 64;
        tma_load_2d(to + Shape::WeightBytes + plane * Shape::N * 128, &p.hidden_map, full, x, 0);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          tma_load_2d(to + (plane * kTile + c * kStretch) * 128, &p.w_map, full, x, at.first + c * at.apart, once);
        }
      }
      ring.next();
    }
  }
  launch_dependents();
}

template <class Shape>
struct Consumer {
  static constexpr int Count = Shape::Count;
  const HiddenParams& p;
  const HiddenShared<Shape>& s;
  const int thread, group;
  StageRing ring;
  RowDraw draw[Shape::Draws];
  float sums[Count];

  ATTNKIT_DEVICE Consumer(const HiddenParams& p, const HiddenShared<Shape>& s)
      : p(p), s(s), thread(threadIdx.x), group(threadIdx.x / 128), ring(static_cast<int>(p.stages)) {
#pragma unroll
    for (int i = 0; i < Shape::Draws; ++i) draw[i].begin(p.sample, thread + i * Shape::Consumers);
  }

  ATTNKIT_DEVICE void product(u64 w, u64 h, int accumulate) {
    if constexpr (Shape::N == 64) {
      wgmma_ss<Shape::Bf16>(sums, w, h, accumulate);
    } else {
      wgmma_ss_narrow<Shape::Bf16, 0>(sums, w, h, accumulate);
    }
  }

  ATTNKIT_DEVICE void multiply(int accumulate) {
    const u32 at = s.ring + ring.stage * Shape::Stage;
    wgmma_fence();
#pragma unroll
    for (int plane = 0; plane < Shape::Planes; ++plane) {
      const u64 w = wgmma_descriptor(at + (plane * kTile + group * 64) * 128, 16, 1024);
      const u64 h = wgmma_descriptor(at + Shape::WeightBytes + plane * Shape::N * 128, 16, 1024);
#pragma unroll
      for (int i = 0; i < 4; ++i) product(w + 2 * i, h + 2 * i, plane + i > 0 ? 1 : accumulate);
    }
    wgmma_commit();
  }

  ATTNKIT_DEVICE void release(int stage) const {
    if (thread % 32 == 0) mbarrier_arrive(s.empty + 8 * stage);
  }

  // ``count`` slices of one tile; one product is always in flight behind the next.
  ATTNKIT_DEVICE void add_up(int count) {
    int before = 0;
    for (int i = 0; i < count; ++i) {
      mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
      multiply(i > 0);
      if (i > 0) {
        wgmma_wait<1>();
        release(before);
      }
      before = ring.stage;
      ring.next();
    }
    wgmma_wait<0>();
    wgmma_hold(sums);
    release(before);
  }

  ATTNKIT_DEVICE void sync() const {
    __syncwarp();
    named_barrier(1, Shape::Consumers);
  }

  // What one thread found out, for all.
  template <class F>
  ATTNKIT_DEVICE int told(F&& find) const {
    sync();
    if (thread == 0) asm volatile("st.shared.s32 [%0], %1;" ::"r"(s.word), "r"(find()) : "memory");
    sync();
    int found;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(found) : "r"(s.word) : "memory");
    return found;
  }

  // Sums of a tile that two CTAs share: those of the CTA ``number`` (its first tile) or of the one before it (its last).
  ATTNKIT_DEVICE float4* shared_sums(int number, bool first) const {
    return p.partials + (static_cast<i64>(number) * 2 + first) * (Count / 4 * Shape::Consumers) + thread;
  }
  ATTNKIT_DEVICE int* arrivals(int number) const { return p.sample.state + 4 * p.sample.B + number; }

  ATTNKIT_DEVICE void load_sums(float (&to)[Count], const float4* from) const {
#pragma unroll
    for (int i = 0; i < Count / 4; ++i) {
      const float4 x = load_l2(from + i * Shape::Consumers);
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  }

  ATTNKIT_DEVICE void add(const float (&other)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] += other[i];
  }

  // Leaves this CTA's part of a tile; true if the other's was there before, and is added.
  ATTNKIT_DEVICE bool meet(int number, bool first) {
    float4* const to = shared_sums(number, first);
#pragma unroll
    for (int i = 0; i < Count / 4; ++i) {
      to[i * Shape::Consumers] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
    int* const count = arrivals(number);
    if (told([&] { return add_release(count, 1); }) == 0) return false;
    if (thread == 0) *count = 0;
    float other[Count];
    load_sums(other, shared_sums(number, !first));
    add(other);
    return true;
  }

  // A tile's logits to shared memory, and from there to a draw or to ``out``.
  ATTNKIT_DEVICE void finish(int tile) {
    sync();  // everybody has read the last tile's
    const int lane = thread % 32;
    const u32 to = s.logits + (lane % 4 * 2 * kPitch + thread / 32 * 16 + lane / 4) * 4;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const int row = i / 4 * 8 + i % 2, token = i % 4 / 2 * 8;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + (row * kPitch + token) * 4), "f"(sums[i]) : "memory");
    }
    sync();
    if (thread >= 8 * Shape::N) return;
#pragma unroll
    for (int i = 0; i < Shape::Draws; ++i) {
      if (p.out == nullptr) {
        draw[i].tile(p.sample, tile, s.logits, p.extras != 0);
      } else if (draw[i].there(p.sample)) {
        store(draw[i], tile);
      }
    }
  }

  ATTNKIT_DEVICE void store(const RowDraw& draw, int tile) const {
    const int first = tile * kTile + draw.lane() * 4;
    float* const row = p.out + draw.b * p.out_b;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int v = first + c * kStretch;
      if (v < p.sample.V) {
        *reinterpret_cast<float4*>(row + v) = load_shared<float4>(s.logits + (draw.b * kPitch + c * kStretch + draw.lane() * 4) * 4);
      }
    }
  }

  // The first slices of a tile whose others are where another CTA began, and so there long before, as a rule.
  ATTNKIT_DEVICE bool first_part(int count) {
    const int number = blockIdx.x + 1;
    const bool ready = told([&] { return read_acquire(arrivals(number)); }) != 0;
    float other[Count] = {};
    if (ready) load_sums(other, shared_sums(number, true));
    add_up(count);
    if (!ready) return meet(number, false);
    add(other);
    if (thread == 0) *arrivals(number) = 0;
    return true;
  }

  ATTNKIT_DEVICE void run(Work work) {
    for (Part part; work.next(part);) {
      bool whole = true;
      if (part.first > 0) {
        add_up(part.count);
        whole = meet(blockIdx.x, true);
      } else if (part.count < work.steps) {
        whole = first_part(part.count);
      } else {
        add_up(part.count);
      }
      if (whole) finish(part.tile);
    }
    if (p.out != nullptr) return;
#pragma unroll
    for (int i = 0; i < Shape::Draws; ++i) draw[i].finish(p.sample, gridDim.x);
  }
};

template <class Shape>
ATTNKIT_DEVICE void sample_from_hidden(const HiddenParams& p) {
  extern __shared__ char raw[];
  const Work work(p);
  const HiddenShared<Shape> s(p, raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const bool loads = warp == Shape::Consumers / 32;
  if (loads) {
    if (elect_one()) prefetch<Shape>(p, work);
  } else if (threadIdx.x < p.stages) {
    mbarrier_init(s.full + 8 * threadIdx.x, 1);
    mbarrier_init(s.empty + 8 * threadIdx.x, Shape::Consumers / 32);
    mbarrier_init_fence();
  }
  __syncwarp();
  __syncthreads();
  if (loads) {
    if (elect_one()) load<Shape>(p, s, work);
    __syncwarp();
  } else {
    wait_for_previous_grid();
    Consumer<Shape>(p, s).run(work);
  }
}

}  // namespace attnkit::hidden
