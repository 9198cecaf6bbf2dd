// w8a8_gemm for sm_90a: out[m, n] = (sum over k of a[m, k] w[n, k]) * a_scale[m] * w_scale[n] + bias[n].
//
// A persistent CTA computes tiles of 64 x Consumers rows and BN columns. One producer warp fills a ring of 128-byte deep
// slices of both operands by TMA; consumer warpgroups multiply and finish them. CTAs of a cluster stand cluster_m x
// cluster_n x splits: those that need the same slice load a part each and multicast it; ``splits`` of them take a stretch
// of K each and meet in shared memory, in a fixed order.
#pragma once
#include "gemm_epilogue.cuh"
#include "../common/wgmma_q8_sm90.cuh"

namespace attnkit {

struct alignas(64) GemmMap {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/gemm.py (PARAMS).
struct GemmParams {
  GemmMap a_map, w_map;
  const void* a;         // [M, K], read through its map; likewise w [N, K]
  const void* w;
  const float* a_scale;  // [M] or [1]
  const float* w_scale;  // [N] or [1]
  const void* bias;      // [N] or null
  char* out;             // [M, N]
  i64 out_m;             // bytes
  int M, N;
  int steps;             // slices of 128 along K
  int tiles_m, tiles_n;  // of clusters, not of CTAs
  int group;             // rows of cluster tiles that are walked together
  int cluster_m, cluster_n, splits;
  int a_box;             // rows of a that one load brings
  int a_rows, w_rows;    // a scale a row, else one for all
  int bias_type, out_type, whole;
  int stream;            // w is read once: it should leave L2 first
};

// Every warpgroup has 64 rows of each tile. Or (Turns) two take whole tiles of 128 rows in turn, so that one finishes a
// tile while the other multiplies.
template <bool Int8_, int Consumers_, int BN_, int Stages_, bool Turns_, int Parts_>
struct GemmShape {
  static constexpr bool Int8 = Int8_, Turns = Turns_;
  static constexpr int Parts = Parts_;                   // e4m3: sets of sums, so that one is multiplied while one is added up
  static constexpr int Consumers = Consumers_, BN = BN_, Stages = Stages_;
  static constexpr int BM = 64 * Consumers, Groups = BN / 8;
  static constexpr int Halves = Turns ? 2 : 1;           // of 64 rows a warpgroup
  static constexpr int Readers = Turns ? 1 : Consumers;  // warpgroups that read a slice
  static constexpr int Threads = 128 * (Consumers + 1);  // of the last 4 warps two load, two give registers
  static constexpr int ABytes = BM * 128, WBytes = BN * 128, StageBytes = ABytes + WBytes;
  static constexpr int StagingBytes = 2048 * 4 * Consumers, ScaleBytes = 2 * 2 * BN * 4;
  static constexpr int SharedBytes = 1024 + Stages * StageBytes + StagingBytes + ScaleBytes + 256;
  static constexpr int ConsumerRegisters = Consumers == 3 ? 160 : 232, ProducerRegisters = Consumers == 3 ? 32 : 40;
  static_assert(!Turns || (Int8 && Consumers == 2 && BN <= 192), "a warpgroup holds 128 x BN sums in registers");
  static_assert(Parts == 1 || (!Int8 && Parts == 2 && BN <= 128), "registers hold no more");
  static_assert(BN % 16 == 0 && BN <= 256 && Stages <= 12, "one wgmma wide, and barriers that fit their 256 bytes");
  static_assert(Stages * StageBytes >= (Groups + 3) * 16 * 128 * Consumers, "a split's pieces meet where the ring was");
};

template <class Shape>
struct GemmShared {
  u32 ring, staging, scales;            // scales: two buffers of BN scales and BN biases
  u32 full, empty, scale_full, scale_empty;
  u32 pieces;                           // counts the bytes of a split's pieces

  ATTNKIT_DEVICE explicit GemmShared(char* raw) {
    ring = (smem_address(raw) + 1023) & ~1023u;
    staging = ring + Shape::Stages * Shape::StageBytes;
    scales = staging + Shape::StagingBytes;
    full = scales + Shape::ScaleBytes;
    empty = full + 8 * Shape::Stages;
    scale_full = empty + 8 * Shape::Stages;
    scale_empty = scale_full + 16;
    pieces = scale_empty + 16;
  }

  // Groups of columns that CTA ``k`` of a split finishes.
  static ATTNKIT_DEVICE int share(int splits, int k) {
    const int share = (Shape::Groups + splits - 1) >> __popc(splits - 1);
    return max(0, min(share, Shape::Groups - k * share));
  }

  ATTNKIT_DEVICE void init_barriers(int sharers, int splits, int k) const {
    constexpr int warps = 4 * Shape::Readers;
    for (int i = 0; i < Shape::Stages; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, warps * sharers);
    for (int i = 0; i < 2; ++i) mbarrier_init(scale_full + 8 * i, 1), mbarrier_init(scale_empty + 8 * i, warps);
    mbarrier_init(pieces, 1);
    mbarrier_init_fence();
    const int bytes = share(splits, k) * splits * (16 * 128 * Shape::Consumers);
    if (splits > 1 && bytes > 0) mbarrier_arrive_expect(pieces, bytes);
  }
};

template <int Stages>
struct GemmRing {
  int stage = 0;
  u32 parity = 0;
  ATTNKIT_DEVICE void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
  ATTNKIT_DEVICE void skip(int n) {
    parity ^= (stage + n) / Stages & 1;
    stage = (stage + n) % Stages;
  }
  // The stage so many before this one.
  ATTNKIT_DEVICE int back(int n) const { return stage >= n ? stage - n : stage + Stages - n; }
};

// This CTA's place in its cluster, and the line of tiles its cluster takes every so many of. cluster_m, cluster_n and
// splits are powers of two. What the parameters and the place give is worked out where it is needed: registers are scarce.
template <class Shape>
struct GemmWalk {
  const GemmParams& p;
  int tile;              // the cluster's next
  int row, column;       // of the current tile: the CTA's first

  ATTNKIT_DEVICE explicit GemmWalk(const GemmParams& p) : p(p), tile(blockIdx.x >> shift()) {}

  static ATTNKIT_DEVICE int log2(int power) { return __popc(power - 1); }
  ATTNKIT_DEVICE int shift() const { return log2(p.cluster_m) + log2(p.cluster_n) + log2(p.splits); }

  // Above and beside one another, and along K.
  ATTNKIT_DEVICE int m() const { return opaque(cluster_rank()) & (p.cluster_m - 1); }
  ATTNKIT_DEVICE int n() const { return opaque(cluster_rank()) >> log2(p.cluster_m) & (p.cluster_n - 1); }
  ATTNKIT_DEVICE int k() const { return opaque(cluster_rank()) >> (log2(p.cluster_m) + log2(p.cluster_n)); }
  ATTNKIT_DEVICE int rank(int m_, int n_, int k_) const { return (k_ * p.cluster_n + n_) * p.cluster_m + m_; }

  // The CTA's stretch of K, in steps.
  ATTNKIT_DEVICE int first() const { return static_cast<u32>(p.steps * k()) >> log2(p.splits); }
  ATTNKIT_DEVICE int last() const { return static_cast<u32>(p.steps * (k() + 1)) >> log2(p.splits); }

  // Finds the current tile; false at the end. Groups of rows, so that what runs at one time shares slices in L2. A tile
  // that would end outside is moved back inside, and what it shares with its neighbour is computed twice, to the same
  // bits: rows from outside, which the copy engine fills with zeros, take it longer than rows from memory.
  ATTNKIT_DEVICE bool find() {
    if (tile >= p.tiles_m * p.tiles_n) return false;
    const u32 per_group = p.group * p.tiles_n, g = tile / per_group, within = tile - g * per_group;
    const u32 height = min(p.tiles_m - g * p.group, p.group), across = within / height;
    const int down = g * p.group + within - across * height;
    row = max(0, min((down * p.cluster_m + m()) * Shape::BM, p.M - Shape::BM));
    column = max(0, min((static_cast<int>(across) * p.cluster_n + n()) * Shape::BN, (p.N - Shape::BN + 7) & ~7));
    return true;
  }

  ATTNKIT_DEVICE void next() { tile += gridDim.x >> shift(); }
};

// Until the previous grid has ended nothing that it may write can be read; but the first weights can come as near as L2.
// More than 48 KB of them hold up the slices that follow.
template <class Shape>
ATTNKIT_DEVICE void gemm_prefetch(const GemmParams& p) {
  GemmWalk<Shape> walk(p);
  if (!walk.find()) return;
  const int first = walk.first(), last = min(walk.last(), first + 384 / Shape::BN);
  for (int i = first; i < last; ++i) tma_prefetch_2d(&p.w_map, i * 128, walk.column);
}

// The elected thread of the first producer warp: slices of both operands, as many CTAs as share one load a part each.
template <class Shape>
ATTNKIT_DEVICE void gemm_load(const GemmParams& p, const GemmShared<Shape>& s) {
  GemmWalk<Shape> walk(p);
  const int m = walk.m(), n = walk.n(), k = walk.k(), first = walk.first(), last = walk.last();
  const int a_rows = p.a_box, w_rows = Shape::BN / p.cluster_m, bytes = (a_rows * p.cluster_n + Shape::BN) * 128;
  u32 a_mask = 0, w_mask = 0;
  for (int i = 0; i < p.cluster_n; ++i) a_mask |= 1u << walk.rank(m, i, k);
  for (int i = 0; i < p.cluster_m; ++i) w_mask |= 1u << walk.rank(i, n, k);
  const u32 a_at = s.ring + n * a_rows * 128, w_at = s.ring + Shape::ABytes + m * w_rows * 128;
  const u64 w_policy = p.stream ? evict_first_policy() : evict_normal_policy();
  GemmRing<Shape::Stages> ring;
  for (; walk.find(); walk.next()) {
    const int a_row = walk.row + n * a_rows, w_row = walk.column + m * w_rows;
    for (int i = first; i < last; ++i) {
      const u32 full = s.full + 8 * ring.stage, offset = ring.stage * Shape::StageBytes;
      mbarrier_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
      mbarrier_arrive_expect(full, bytes);
      if (p.cluster_n > 1) {
        tma_load_2d_multicast(a_at + offset, &p.a_map, full, i * 128, a_row, static_cast<u16>(a_mask));
      } else {
        tma_load_2d(a_at + offset, &p.a_map, full, i * 128, a_row);
      }
      if (p.cluster_m > 1) {
        tma_load_2d_multicast(w_at + offset, &p.w_map, full, i * 128, w_row, static_cast<u16>(w_mask), w_policy);
      } else {
        tma_load_2d(w_at + offset, &p.w_map, full, i * 128, w_row, w_policy);
      }
      ring.next();
    }
  }
}

// The second producer warp: the scales and the bias of a tile's columns, as floats.
template <class Shape>
ATTNKIT_DEVICE void gemm_load_scales(const GemmParams& p, const GemmShared<Shape>& s) {
  GemmRing<2> ring;
  for (GemmWalk<Shape> walk(p); walk.find(); walk.next()) {
    mbarrier_wait(s.scale_empty + 8 * ring.stage, ring.parity ^ 1);
    const u32 to = s.scales + ring.stage * (Shape::BN * 8);
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < Shape::BN; i += 32) {
      const int n = min(walk.column + i, p.N - 1);
      const float scale = p.w_scale[p.w_rows ? n : 0], bias = p.bias == nullptr ? 0.0f : load_as_float(p.bias, n, p.bias_type);
      store_scale(to, i, scale, bias);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(s.scale_full + 8 * ring.stage);
    ring.next();
  }
}

// Of a descriptor the low word alone changes. e4m3 takes it by itself, so that all of the address is computed in uniform
// registers; the widest int8 builds would spill.
template <bool Int8>
struct GemmSum {
  using Type = int;
  using Low = u64;
};
template <>
struct GemmSum<false> {
  using Type = float;
  using Low = u32;
};

template <class Shape>
struct GemmConsumer {
  using Sum = typename GemmSum<Shape::Int8>::Type;
  using Low = typename GemmSum<Shape::Int8>::Low;
  static constexpr int Count = Shape::BN / 2, Halves = Shape::Halves;
  const GemmParams& p;
  const GemmShared<Shape>& s;
  GemmWalk<Shape> walk;
  const int group;                 // warpgroup; of e4m3 the compiler knows that it is every lane's
  u32 release_to;                  // cluster address of ``empty`` in the CTA that this lane tells
  bool releases;
  GemmRing<Shape::Stages> ring;
  GemmRing<2> scale_ring;
  Sum sums[Halves][Count];

  ATTNKIT_DEVICE GemmConsumer(const GemmParams& p, const GemmShared<Shape>& s)
      : p(p), s(s), walk(p), group(Shape::Int8 ? threadIdx.x / 128 : __shfl_sync(~0u, threadIdx.x / 128, 0)) {
    const int lane = threadIdx.x % 32;
    // Slices come from all CTAs in this one's row and column of the cluster: each waits for room here.
    const int i = lane - p.cluster_m, n = i < 0 ? walk.n() : i + (i >= walk.n()), m = i < 0 ? lane : walk.m();
    releases = lane < p.cluster_m + p.cluster_n - 1;
    release_to = cluster_address(s.empty, releases ? walk.rank(m, n, walk.k()) : 0);
    if (Shape::Turns && group == 1) {
      pass();
      give_turn();
    }
  }

  // Turns: named barriers 1 and 2 say whose slices come next. Without them a warpgroup could take the phase of a slice
  // for one that lies a round of the ring before it.
  ATTNKIT_DEVICE void take_turn() const { named_barrier(1 + group, 256); }
  ATTNKIT_DEVICE void give_turn() const { named_barrier_arrive(2 - group, 256); }

  // Turns: the next tile is the other warpgroup's.
  ATTNKIT_DEVICE void pass() {
    walk.next();
    ring.skip(p.steps);
    scale_ring.next();
  }

  ATTNKIT_DEVICE void release(int stage) const {
    if (releases) mbarrier_arrive_cluster(release_to + 8 * stage);
  }

  ATTNKIT_DEVICE void multiply(Sum (&d)[Halves][Count], int accumulate) const {
    const Low base = ring.stage * (Shape::StageBytes / 16);
    const u64 first = wgmma_descriptor(s.ring, 16, 1024), high = sizeof(Low) == 4 ? first >> 32 << 32 : 0;
    const Low a = static_cast<Low>(wgmma_descriptor(s.ring + (Shape::Turns ? 0 : group) * (64 * 128), 16, 1024)) + base;
    const Low w = static_cast<Low>(wgmma_descriptor(s.ring + Shape::ABytes, 16, 1024)) + base;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < Halves; ++h) Wgmma8<Shape::BN>::multiply(d[h], high | (a + 512 * h + 2 * i), high | (w + 2 * i), i > 0 ? 1 : accumulate);
    }
    wgmma_commit();
  }

  ATTNKIT_DEVICE static void hold(Sum (&d)[Halves][Count]) {
#pragma unroll
    for (int h = 0; h < Halves; ++h) wgmma_hold(d[h]);
  }

  // int8: sums are exact where they are, and one product is always in flight behind the next.
  ATTNKIT_DEVICE void add_up_exact() {
    int before = 0;
    const int steps = walk.last() - walk.first();
    if constexpr (Shape::Turns) take_turn();
    for (int i = 0; i < steps; ++i) {
      mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
      multiply(sums, i > 0);
      if (i > 0) {
        wgmma_wait<1>();
        release(before);
      }
      before = ring.stage;
      ring.next();
    }
    if constexpr (Shape::Turns) give_turn();
    wgmma_wait<0>();
    hold(sums);
    release(before);
  }

  ATTNKIT_DEVICE void promote(const Sum (&part)[Halves][Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[0][i] += part[0][i];
  }

  ATTNKIT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[0][i] = 0;
  }

  // e4m3: the tensor core's sums keep some 14 bits, so every 128 of K are added up in float32 registers.
  ATTNKIT_DEVICE void add_up_promoted() {
    clear();
    Sum part[Halves][Count];
    for (int steps = walk.last() - walk.first(); steps > 0; --steps) {
      mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
      multiply(part, 0);
      wgmma_wait<0>();
      hold(part);
      release(ring.stage);
      ring.next();
      promote(part);
    }
  }

  // Two sets of e4m3 sums: the next slice into one, while the other's, which came before, is added up.
  ATTNKIT_DEVICE void begin(Sum (&to)[Halves][Count]) {
    mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
    multiply(to, 0);
    ring.next();
  }

  ATTNKIT_DEVICE void step(Sum (&to)[Halves][Count], Sum (&from)[Halves][Count]) {
    begin(to);
    wgmma_wait<1>();
    hold(from);
    release(ring.back(2));
    promote(from);
  }

  ATTNKIT_DEVICE void end(Sum (&from)[Halves][Count]) {
    wgmma_wait<0>();
    hold(from);
    release(ring.back(1));
    promote(from);
  }

  // A tile's last slice is added up while the first of the next is multiplied, which goes on while the tile is finished. The
  // last tile stands by itself: ptxas would serialise products that are in flight at a branch that may leave the loop.
  ATTNKIT_DEVICE void run_ahead() {
    const int left = walk.last() - walk.first() - 1;
    if (!walk.find()) return;
    Sum one[Halves][Count], two[Halves][Count];
    int row, column;
    float scale[2];
    begin(one);
    while (true) {
      row = first_row(), column = walk.column;
      load_row_scales(row, scale);
      clear();
      walk.next();
      if (!walk.find()) break;
      for (int pairs = (left + 1) / 2; pairs > 0; --pairs) {
        step(two, one);
        step(one, two);
      }
      if (left % 2 == 0) {
        end(one);
        begin(one);
      }
      finish<false>(row, column, scale);
    }
    for (int pairs = left / 2; pairs > 0; --pairs) {
      step(two, one);
      step(one, two);
    }
    if (left % 2) {
      step(two, one);
      end(two);
    } else {
      end(one);
    }
    finish<true>(row, column, scale);
  }

  ATTNKIT_DEVICE int first_row() const {
    return walk.row + (Shape::Turns ? 0 : group) * 64 + opaque(threadIdx.x) / 32 % 4 * 16;
  }

  // Of the thread's two rows; ``first``: the warp's.
  ATTNKIT_DEVICE void load_row_scales(int first, float (&scale)[2]) const {
    const int row = first + opaque(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = p.a_scale[p.a_rows ? min(row + 8 * r, p.M - 1) : 0];
  }

  // Every CTA of a split gets all pieces of its share of the columns and adds them up in the order of K.
  template <int Splits>
  ATTNKIT_DEVICE void meet(GemmRows& rows, int column) const {
    constexpr int Share = (Shape::Groups + Splits - 1) / Splits, Slot = 16 * 128 * Shape::Consumers;
    const u32 at = s.ring + opaque(threadIdx.x) * 16;
    cluster_meet();  // nobody reads the ring any more
#pragma unroll
    for (int to = 0; to < Splits; ++to) {
      const int there = walk.rank(walk.m(), walk.n(), to);
      const u32 slot = cluster_address(at, there) + walk.k() * (Share * Slot), barrier = cluster_address(s.pieces, there);
#pragma unroll
      for (int j = 0; j < Share; ++j) {
        if (to * Share + j >= Shape::Groups) continue;
        const Sum* x = sums[0] + 4 * (to * Share + j);
        store_async_16(slot + j * Slot, barrier, bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
      }
    }
    const int share = s.share(Splits, walk.k());
    if (share == 0) return;
    mbarrier_wait_cluster(s.pieces, 0);
    Sum total[4 * Share];
#pragma unroll
    for (int j = 0; j < Share; ++j) {
#pragma unroll
      for (int from = 0; from < Splits; ++from) add(total + 4 * j, load_shared<uint4>(at + (from * Share + j) * Slot), from > 0);
    }
    const int skip = walk.k() * Share * 8;
    rows.scales += skip * 8;
    rows.template store<Share>(total, column + skip, share);
  }

  static ATTNKIT_DEVICE u32 bits(int x) { return static_cast<u32>(x); }
  static ATTNKIT_DEVICE u32 bits(float x) { return __float_as_uint(x); }
  static ATTNKIT_DEVICE int of_bits(u32 x, int) { return static_cast<int>(x); }
  static ATTNKIT_DEVICE float of_bits(u32 x, float) { return __uint_as_float(x); }
  static ATTNKIT_DEVICE void add(Sum* to, const uint4& v, bool more) {
    const u32 x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = more ? to[e] + of_bits(x[e], Sum()) : of_bits(x[e], Sum());
  }

  // A tile whose sums are complete; ``row``: this warp's first. A split's tile is its CTA's last.
  template <bool Last>
  ATTNKIT_DEVICE void finish(int row, int column, float (&scale)[2]) {
    const GemmOut out{p.out, p.out_m, p.M, p.N, p.out_type, p.whole};
    mbarrier_wait(s.scale_full + 8 * scale_ring.stage, scale_ring.parity);
    const u32 scales = opaque(s.scales + scale_ring.stage * (Shape::BN * 8));
    const u32 staging = s.staging + opaque(threadIdx.x) / 32 * 2048;
#pragma unroll
    for (int h = 0; h < Halves; ++h) {
      if constexpr (Shape::Turns) load_row_scales(row + 64 * h, scale);
      GemmRows rows{out, row + 64 * h, {scale[0], scale[1]}, scales, staging};
      if (Shape::Turns || !Last || p.splits == 1) {
        rows.template store<Shape::Groups>(sums[h], column, Shape::Groups);
      } else if (p.splits == 2) {
        meet<2>(rows, column);
      } else {
        meet<4>(rows, column);
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(s.scale_empty + 8 * scale_ring.stage);
    scale_ring.next();
  }

  ATTNKIT_DEVICE void run() {
    for (; walk.find(); walk.next()) {
      float scale[2];
      if constexpr (!Shape::Turns) load_row_scales(first_row(), scale);
      if constexpr (Shape::Int8) {
        add_up_exact();
      } else {
        add_up_promoted();
      }
      finish<true>(first_row(), walk.column, scale);
      if constexpr (Shape::Turns) pass();
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void gemm(const GemmParams& p) {
  extern __shared__ char raw[];
  const GemmShared<Shape> s(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  launch_dependents();
  if (threadIdx.x == 0) s.init_barriers(p.cluster_m + p.cluster_n - 1, p.splits, GemmWalk<Shape>(p).k());
  if (threadIdx.x == 32) tma_prefetch_map(&p.a_map), tma_prefetch_map(&p.w_map);
  if (p.stream && p.cluster_m == 1 && warp == 4 * Shape::Consumers) {
    if (elect_one()) gemm_prefetch<Shape>(p);
    __syncwarp();
  }
  __syncthreads();
  const bool alone = p.cluster_m * p.cluster_n * p.splits == 1;
  if (!alone) cluster_meet();
  wait_for_previous_grid();
  if (warp >= 4 * Shape::Consumers) {
    registers_lower<Shape::ProducerRegisters>();
    if (warp == 4 * Shape::Consumers) {
      if (elect_one()) gemm_load(p, s);
    } else if (warp == 4 * Shape::Consumers + 1) {
      gemm_load_scales(p, s);
    }
    __syncwarp();
    if (p.splits > 1) cluster_meet();  // beside GemmConsumer::meet
  } else {
    registers_raise<Shape::ConsumerRegisters>();
    GemmConsumer<Shape> consumer(p, s);
    if constexpr (Shape::Parts == 2) {
      consumer.run_ahead();
    } else {
      consumer.run();
    }
  }
  if (!alone) cluster_meet();  // others may still signal this CTA's barriers
}

}  // namespace attnkit
