// w8a8_gemm for sm_90a and up to 128 tokens: out[m, n] = (sum over k of a[m, k] w[n, k]) * a_scale[m] * w_scale[n] + bias[n].
//
// Memory bound: every weight is read once. Tokens are the rows of wgmma (64, whatever M: those beyond multiply what lies
// there, and are dropped), weights its columns, so that tiles of many widths give every multiprocessor about the same bytes.
// One producer thread fills a ring of slices by TMA; two consumer warpgroups multiply half the columns each, or (Tall) all
// columns for 64 of up to 128 tokens (up to 64 of them are the first one's alone). Where N is too small for that, ``splits``
// CTAs of a cluster take a stretch of K each: every one of them finishes a share of the columns, from the pieces that all of
// them store there, in the order of K (repeats are bitwise equal). Pieces have shared memory of their own: nothing but TMA
// ever writes to the ring.
#pragma once
#include "gemm_epilogue.cuh"
#include "../common/ring.cuh"
#include "../common/wgmma_q8_sm90.cuh"

namespace attnkit {

struct alignas(64) SkinnyMap {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/gemm_skinny.py (PARAMS).
struct SkinnyParams {
  SkinnyMap a_map, w_map;
  const void* a;         // [M, K], read through its map
  const void* w;         // [N, K], likewise
  const float* a_scale;  // [M] or [1]
  const float* w_scale;  // [N] or [1]
  const void* bias;      // [N] or null
  char* out;             // [M, N]
  i64 out_m;             // bytes
  int M, N;
  int steps;             // slices along K
  int tiles;             // along N
  int splits;            // CTAs of a cluster: 1, 2 or 4
  int stages;            // slices of the ring: fewer than fit, or who starts late waits behind everybody's
  int a_rows;            // rows of a's box: M rounded up to 8
  int ahead;             // slices that L2 is asked for before the previous grid is done
  int a_scales, w_scales;  // a scale a row, else one for all
  int bias_type, out_type;
  int whole;             // rows may leave in whole lines, and have 2 KB of shared memory a warp for it
};

template <bool Int8_, int BN_, int Planes_, bool Tall_>
struct SkinnyShape {
  static constexpr bool Int8 = Int8_, Tall = Tall_;
  static constexpr int BN = BN_;
  static constexpr int Rows = Tall ? 128 : 64;                   // most tokens
  static constexpr int Wide = Tall ? BN : BN / 2;                // columns of a warpgroup
  static constexpr int Groups = Wide / 8, Half = Groups / 2;     // units of 8 columns; a split's CTA finishes half of a warp's
  static constexpr int Consumers = 256, Threads = Consumers + 32;
  static constexpr int Planes = Planes_, Slice = 128 * Planes;   // bytes of K in a slice, in swizzled planes
  static constexpr int MostStages = 32;                          // a lane initialises each
  static constexpr int ScaleBytes = 8 * BN;
  // e4m3: sets of sums beside the float32 ones, so that one is multiplied while one is added up, where registers hold both.
  static constexpr int Parts = Int8 ? 0 : Wide <= 96 ? 2 : 1;
  // Two CTAs a multiprocessor, as far as registers go: the next grid's may then wait beside this one's.
  static constexpr int PerSm = Wide <= (Int8 ? 64 : 32) ? 2 : 1;
  // Warps that multiply: where there are no more than 64 tokens, a tall CTA's second warpgroup has none.
  static ATTNKIT_DEVICE int readers(int M) { return Tall && M <= 64 ? 4 : 8; }
  // Warps that have any of the M tokens: of a warpgroup, or of all where each has tokens of its own.
  static ATTNKIT_DEVICE int warps(int M) { return (M + 15) / 16; }
  static_assert(BN % (Tall ? 16 : 32) == 0, "2 shares of whole units, or 4");
  static_assert(Int8 || Planes == 1, "e4m3 is added up a slice at a time");
  static_assert(BN * Planes >= 64 && BN <= Consumers, "64 rows of a end inside a slice, and a thread has a column's scale");
};

template <class Shape>
struct SkinnyShared {
  u32 ring, slice, w_at;       // bytes of a slice, and where its weights begin
  u32 own, warp_bytes;         // each warp's that has tokens: pieces from other CTAs, then rows on their way out
  u32 scales;                  // of BN columns, with their biases
  u32 full, empty, met;        // barriers

  ATTNKIT_DEVICE SkinnyShared(const SkinnyParams& p, char* raw) {
    ring = (smem_address(raw) + 1023) & ~1023u;
    w_at = p.a_rows * Shape::Slice;
    slice = w_at + Shape::BN * Shape::Slice;
    own = ring + p.stages * slice;
    warp_bytes = max(p.whole ? 2048 : 0, (p.splits - 1) * (Shape::Half * 512));
    scales = own + (Shape::Tall ? 1 : 2) * Shape::warps(p.M) * warp_bytes;
    full = scales + Shape::ScaleBytes;
    empty = full + 8 * Shape::MostStages;
    met = empty + 8 * Shape::MostStages;
  }
};

// This CTA's tiles and its stretch of K.
struct SkinnyWork {
  int rank, first, last;  // in the cluster; slices
  int tile, stride;
  ATTNKIT_DEVICE explicit SkinnyWork(const SkinnyParams& p) {
    const int shift = p.splits >> 1;  // log2 of 1, 2 or 4
    rank = blockIdx.x & (p.splits - 1);
    first = static_cast<u32>(p.steps * rank) >> shift;
    last = static_cast<u32>(p.steps * (rank + 1)) >> shift;
    tile = blockIdx.x >> shift;
    stride = gridDim.x >> shift;
  }
};

// One thread, as soon as the CTA is there. Weights that an earlier kernel may still be writing go no further than L2 before
// the wait: a line there cannot become stale, a copy in shared memory would.
template <class Shape>
ATTNKIT_DEVICE void skinny_prefetch(const SkinnyParams& p, const SkinnyWork& work) {
  const int end = work.first + min(p.ahead, work.last - work.first);
  for (int i = work.first; i < end; ++i) {
#pragma unroll
    for (int plane = 0; plane < Shape::Planes; ++plane) {
      tma_prefetch_2d(&p.w_map, i * Shape::Slice + plane * 128, work.tile * Shape::BN);
    }
  }
}

// One thread: slices of both operands. Once all are asked for, the next grid may start: its first weights come while the
// last of these are multiplied.
template <class Shape>
ATTNKIT_DEVICE void skinny_load(const SkinnyParams& p, const SkinnyShared<Shape>& s, SkinnyWork work) {
  tma_prefetch_map(&p.a_map);
  wait_for_previous_grid();
  const u64 once = evict_first_policy();
  StageRing ring(p.stages);
  for (; work.tile < p.tiles; work.tile += work.stride) {
    for (int i = work.first; i < work.last; ++i) {
      const u32 full = s.full + 8 * ring.stage, a_to = s.ring + ring.stage * s.slice, w_to = a_to + s.w_at;
      mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
      mbarrier_arrive_expect(full, s.slice);
#pragma unroll
      for (int plane = 0; plane < Shape::Planes; ++plane) {
        tma_load_2d(a_to + plane * p.a_rows * 128, &p.a_map, full, i * Shape::Slice + plane * 128, 0);
      }
#pragma unroll
      for (int plane = 0; plane < Shape::Planes; ++plane) {
        tma_load_2d(w_to + plane * Shape::BN * 128, &p.w_map, full, i * Shape::Slice + plane * 128, work.tile * Shape::BN, once);
      }
      ring.next();
    }
  }
  launch_dependents();
}

template <bool Int8>
struct SkinnySum {
  using Type = int;
};
template <>
struct SkinnySum<false> {
  using Type = float;
};

template <class Shape>
struct SkinnyConsumer {
  using Sum = typename SkinnySum<Shape::Int8>::Type;
  static constexpr int Count = Shape::Wide / 2, Groups = Shape::Groups, Half = Shape::Half;
  const SkinnyParams& p;
  const SkinnyShared<Shape>& s;
  const SkinnyWork& work;
  const int thread, group;
  StageRing ring;
  Sum sums[Count];

  ATTNKIT_DEVICE SkinnyConsumer(const SkinnyParams& p, const SkinnyShared<Shape>& s, const SkinnyWork& work)
      : p(p), s(s), work(work), thread(threadIdx.x), group(threadIdx.x / 128), ring(p.stages) {}

  ATTNKIT_DEVICE void multiply(Sum (&d)[Count], int plane, int accumulate) const {
    const u32 at = s.ring + ring.stage * s.slice;
    const int row = Shape::Tall ? group * 64 : 0, column = Shape::Tall ? 0 : group * Shape::Wide;
    const u64 a = wgmma_descriptor(at + (plane * p.a_rows + row) * 128, 16, 1024);
    const u64 w = wgmma_descriptor(at + s.w_at + (plane * Shape::BN + column) * 128, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) Wgmma8<Shape::Wide>::multiply(d, a + 2 * i, w + 2 * i, i > 0 ? 1 : accumulate);
  }

  ATTNKIT_DEVICE void release(int stage) const {
    if (thread % 32 == 0) mbarrier_arrive(s.empty + 8 * stage);
  }

  // int8: sums are exact where they are, and one product is always in flight behind the next.
  ATTNKIT_DEVICE void add_up_exact() {
    int before = 0;
    for (int i = work.first; i < work.last; ++i) {
      mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
#pragma unroll
      for (int plane = 0; plane < Shape::Planes; ++plane) multiply(sums, plane, plane > 0 || i > work.first);
      wgmma_commit();
      if (i > work.first) {
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

  // A slice's product by itself, on its way.
  ATTNKIT_DEVICE void begin(Sum (&to)[Count]) const {
    mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
    multiply(to, 0, 0);
    wgmma_commit();
  }

  // Adds the product of ``stage`` up, while as many as ``Pending`` later ones are on their way.
  template <int Pending>
  ATTNKIT_DEVICE void promote(Sum (&part)[Count], int stage) {
    wgmma_wait<Pending>();
    wgmma_hold(part);
    release(stage);
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] += part[i];
  }

  // The next slice into ``to`` while ``from`` is added up.
  ATTNKIT_DEVICE void step(Sum (&to)[Count], Sum (&from)[Count]) {
    const int stage = ring.stage;
    ring.next();
    begin(to);
    promote<1>(from, stage);
  }

  // e4m3: the tensor core's sums keep some 14 bits, so every 128 of K are added up in float32 registers. The last product
  // stands by itself: ptxas would serialise products that are in flight at a branch that may leave the loop.
  ATTNKIT_DEVICE void add_up_promoted() {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] = 0;
    Sum one[Count], two[Count];
    const int slices = work.last - work.first;
    if constexpr (Shape::Parts == 1) {
      for (int i = 0; i < slices; ++i, ring.next()) begin(one), promote<0>(one, ring.stage);
      return;
    }
    begin(one);
    for (int pairs = (slices - 1) / 2; pairs > 0; --pairs) step(two, one), step(one, two);
    if (slices % 2 == 0) {
      step(two, one);
      promote<0>(two, ring.stage);
    } else {
      promote<0>(one, ring.stage);
    }
    ring.next();
  }

  ATTNKIT_DEVICE void add_up() {
    if constexpr (Shape::Int8) {
      add_up_exact();
    } else {
      add_up_promoted();
    }
  }

  static ATTNKIT_DEVICE u32 bits(int x) { return static_cast<u32>(x); }
  static ATTNKIT_DEVICE u32 bits(float x) { return __float_as_uint(x); }
  static ATTNKIT_DEVICE int of_bits(u32 x, int) { return static_cast<int>(x); }
  static ATTNKIT_DEVICE float of_bits(u32 x, float) { return __uint_as_float(x); }

  ATTNKIT_DEVICE int warp() const { return opaque(threadIdx.x) / 32; }
  ATTNKIT_DEVICE int first_row() const { return warp() % (Shape::Rows / 16) * 16; }

  // What is this warp's own, as an address of shared memory.
  ATTNKIT_DEVICE u32 own() const {
    const int before = Shape::Tall ? warp() : group * Shape::warps(p.M) + warp() % 4;
    return s.own + before * s.warp_bytes;
  }

  // Half ``h`` of a warp's units is finished by this CTA of the cluster, and there by the same warp.
  ATTNKIT_DEVICE int finisher(int h) const { return p.splits == 2 ? h : 2 * group + h; }

  // Sums of units that another CTA finishes, as they are and as wgmma left them: so sums of splits stay exact.
  ATTNKIT_DEVICE void hand_over() const {
    const u32 at = own() + opaque(threadIdx.x) % 32 * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int who = finisher(h);
      if (who == work.rank) continue;
      const u32 slot = at + (work.rank - (work.rank > who)) * (Half * 512);
      const u32 there = cluster_address(slot, who), met = cluster_address(s.met, who);
#pragma unroll
      for (int j = 0; j < Half; ++j) {
        const Sum* x = sums + 4 * (h * Half + j);
        store_async_16(there + j * 512, met, bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
      }
    }
  }

  // This CTA's half ``h`` of the units: pieces added up in the order of K.
  ATTNKIT_DEVICE void gather(int h, Sum (&total)[4 * Half]) const {
    const u32 at = own() + opaque(threadIdx.x) % 32 * 16;
#pragma unroll
    for (int i = 0; i < 4 * Half; ++i) total[i] = 0;
#pragma unroll 1
    for (int k = 0; k < p.splits; ++k) {
      if (k == work.rank) {
#pragma unroll
        for (int i = 0; i < 4 * Half; ++i) total[i] += h ? sums[4 * Half + i] : sums[i];
        continue;
      }
#pragma unroll
      for (int j = 0; j < Half; ++j) {
        const uint4 v = load_shared<uint4>(at + (k - (k > work.rank)) * (Half * 512) + j * 512);
        total[4 * j] += of_bits(v.x, Sum()), total[4 * j + 1] += of_bits(v.y, Sum());
        total[4 * j + 2] += of_bits(v.z, Sum()), total[4 * j + 3] += of_bits(v.w, Sum());
      }
    }
    __syncwarp();  // rows go where the pieces lay
  }

  // A tile whose sums are complete, or its pieces on their way.
  ATTNKIT_DEVICE void finish(int tile, const float (&scale)[2]) const {
    if (first_row() >= p.M) return;
    const GemmOut out{p.out, p.out_m, p.M, p.N, p.out_type, p.whole};
    const int column = Shape::Tall ? 0 : group * Shape::Wide;
    GemmRows rows{out, first_row(), {scale[0], scale[1]}, opaque(s.scales + column * 8), own()};
    if (p.splits == 1) {
      rows.template store<Groups>(sums, tile * Shape::BN + column, Groups);
      return;
    }
    const int h = work.rank - finisher(0);
    if (h != 0 && h != 1) return;
    mbarrier_wait_cluster(s.met, 0);
    Sum total[4 * Half];
    gather(h, total);
    rows.scales += h * (Half * 64);
    rows.template store<Half>(total, tile * Shape::BN + column + h * (Half * 8), Half);
  }

  ATTNKIT_DEVICE void sync() const {
    __syncwarp();
    named_barrier(1, Shape::Consumers);
  }

  // Scales of the rows, scales and biases of a tile's columns, into L2 only: behind the weights that everybody then asks
  // for at once, memory would take its time.
  ATTNKIT_DEVICE void prefetch_scales() const {
    const int n = work.tile * Shape::BN + thread;
    if (thread < Shape::BN && n < p.N) {
      if (p.w_scales) prefetch_l2(p.w_scale + n);
      if (p.bias != nullptr) prefetch_l2(static_cast<const char*>(p.bias) + (p.bias_type == kF32 ? 4 : 2) * static_cast<i64>(n));
    }
    if (thread < p.M && p.a_scales) prefetch_l2(p.a_scale + thread);
  }

  ATTNKIT_DEVICE void run() {
    prefetch_scales();
    wait_for_previous_grid();
    float row_scale[2];  // of the thread's rows
#pragma unroll
    for (int r = 0; r < 2; ++r) row_scale[r] = p.a_scale[p.a_scales ? min(first_row() + thread % 32 / 4 + 8 * r, p.M - 1) : 0];
    for (int tile = work.tile; tile < p.tiles; tile += work.stride) {
      float scale = 0.0f, bias = 0.0f;  // of a column, on their way while products are
      if (thread < Shape::BN) {
        const int n = min(tile * Shape::BN + thread, p.N - 1);
        scale = p.w_scale[p.w_scales ? n : 0];
        if (p.bias != nullptr) bias = load_as_float(p.bias, n, p.bias_type);
      }
      if (thread / 32 < Shape::readers(p.M)) add_up();
      if (p.splits > 1 && first_row() < p.M) hand_over();
      if (tile != work.tile) sync();  // everybody has read the last tile's scales
      if (thread < Shape::BN) store_scale(s.scales, thread, scale, bias);
      sync();
      finish(tile, row_scale);
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void skinny_gemm(const SkinnyParams& p) {
  extern __shared__ char raw[];
  const SkinnyWork work(p);
  const SkinnyShared<Shape> s(p, raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const bool loads = warp == Shape::Consumers / 32;
  if (loads) {
    if (elect_one()) skinny_prefetch<Shape>(p, work);
  } else if (threadIdx.x < p.stages) {
    mbarrier_init(s.full + 8 * threadIdx.x, 1);
    mbarrier_init(s.empty + 8 * threadIdx.x, Shape::readers(p.M));
    mbarrier_init_fence();
  } else if (threadIdx.x == 32 && p.splits > 1) {
    mbarrier_init(s.met, 1);
    mbarrier_init_fence();
    // The others' pieces of what this CTA finishes: all warps' halves, or those of one of two warpgroups.
    const int warps = (Shape::Tall || p.splits == 4 ? 1 : 2) * Shape::warps(p.M);
    mbarrier_arrive_expect(s.met, (p.splits - 1) * warps * (Shape::Half * 512));
  }
  __syncwarp();
  __syncthreads();
  if (p.splits > 1) cluster_meet();  // nobody stores to a CTA whose barriers are not there
  if (loads) {
    if (elect_one()) skinny_load<Shape>(p, s, work);
    __syncwarp();
  } else {
    SkinnyConsumer<Shape>(p, s, work).run();
  }
}

}  // namespace attnkit
