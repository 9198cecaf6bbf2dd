// w8a8_gemm for sm_90a and up to 128 tokens: out[m, n] = (sum over k of a[m, k] w[n, k]) * a_scale[m] * w_scale[n] + bias[n].
//
// Memory bound: every weight is read once. Tokens are the rows of wgmma (64, whatever M: those beyond multiply what lies
// there, and are dropped), weights its columns, so that tiles of many widths give every multiprocessor about the same bytes.
// One producer thread fills a ring of slices by TMA; two consumer warpgroups multiply half the columns each, or (Tall) all
// columns for 64 of up to 128 tokens. Where N is too small for that, ``splits`` CTAs of a cluster take a stretch of K each:
// every one of them finishes a share of the columns, from the pieces that all of them store there, in the order of K (repeats
// are bitwise equal). Sums have shared memory of their own: nothing but TMA ever writes to the ring.
#pragma once
#include "gemm_epilogue.cuh"
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
  int bias_type, out_type, whole;
};

template <bool Int8_, int BN_, int Planes_, bool Tall_>
struct SkinnyShape {
  static constexpr bool Int8 = Int8_, Tall = Tall_;
  static constexpr int BN = BN_, Units = BN / 8;                 // a unit: 8 columns
  static constexpr int Rows = Tall ? 128 : 64;                   // most tokens
  static constexpr int Wide = Tall ? BN : BN / 2;                // columns of a warpgroup
  static constexpr int Consumers = 256, Threads = Consumers + 32;
  static constexpr int Planes = Planes_, Slice = 128 * Planes;   // bytes of K in a slice, in swizzled planes
  static constexpr int MostStages = 32;                          // a lane initialises each
  static constexpr int ScaleBytes = 2 * BN * 4 + Rows * 4, BarrierBytes = 16 * MostStages + 16;
  // Two CTAs a multiprocessor, as far as registers go: the next grid's may then wait beside this one's.
  static constexpr int PerSm = Wide <= (Int8 ? 80 : 64) ? 2 : 1;
  // Warps that multiply: where there are no more than 64 tokens, a tall CTA's second warpgroup has none.
  static ATTNKIT_DEVICE int readers(int M) { return Tall && M <= 64 ? 4 : 8; }
  static_assert(BN % (Tall ? 16 : 32) == 0, "2 shares of whole units, or 4");
  static_assert(BN * Planes >= 64 && BN <= Consumers, "64 rows of a end inside a slice, and a thread has a column's scale");
};

template <class Shape>
struct SkinnyShared {
  u32 ring, slice, w_at;       // bytes of a slice, and where its weights begin
  u32 pieces, pitch;           // [splits][M][share of columns] sums; bytes a row
  u32 scales;                  // BN scales, BN biases, a scale a row
  u32 full, empty, met;        // barriers

  ATTNKIT_DEVICE SkinnyShared(const SkinnyParams& p, char* raw, int share) {
    ring = (smem_address(raw) + 1023) & ~1023u;
    w_at = p.a_rows * Shape::Slice;
    slice = w_at + Shape::BN * Shape::Slice;
    pieces = ring + p.stages * slice;
    pitch = 32 * (share | 1);  // an odd multiple of 32: rows start in other banks
    scales = pieces + p.splits * p.M * pitch;
    full = scales + Shape::ScaleBytes;
    empty = full + 8 * Shape::MostStages;
    met = empty + 8 * Shape::MostStages;
  }
};

struct SkinnyRing {
  int stages, stage = 0;
  u32 parity = 0;
  ATTNKIT_DEVICE explicit SkinnyRing(int stages) : stages(stages) {}
  ATTNKIT_DEVICE void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
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

ATTNKIT_DEVICE void prefetch_l2_2d(const void* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}

ATTNKIT_DEVICE void store_shared_16(u32 to, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

ATTNKIT_DEVICE void store_shared_4(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }

// Not volatile, so that many are in flight: ``from`` must come from opaque() behind the barrier that guards it.
ATTNKIT_DEVICE uint4 load_piece(u32 from) {
  uint4 v;
  asm("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

ATTNKIT_DEVICE float load_row_scale(u32 from) {
  float x;
  asm("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
  return x;
}

// One thread, as soon as the CTA is there. Weights that an earlier kernel may still be writing go no further than L2 before
// the wait: a line there cannot become stale, a copy in shared memory would.
template <class Shape>
ATTNKIT_DEVICE void skinny_prefetch(const SkinnyParams& p, const SkinnyWork& work) {
  const int end = work.first + min(p.ahead, work.last - work.first);
  for (int i = work.first; i < end; ++i) {
#pragma unroll
    for (int plane = 0; plane < Shape::Planes; ++plane) {
      prefetch_l2_2d(&p.w_map, i * Shape::Slice + plane * 128, work.tile * Shape::BN);
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
  SkinnyRing ring(p.stages);
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
  static constexpr int Count = Shape::Wide / 2, Groups = Shape::Wide / 8;
  const SkinnyParams& p;
  const SkinnyShared<Shape>& s;
  const SkinnyWork& work;
  const int share;   // units of columns that a CTA of the cluster finishes
  const int thread, group;
  SkinnyRing ring;
  Sum sums[Count];

  ATTNKIT_DEVICE SkinnyConsumer(const SkinnyParams& p, const SkinnyShared<Shape>& s, const SkinnyWork& work, int share)
      : p(p), s(s), work(work), share(share), thread(threadIdx.x), group(threadIdx.x / 128), ring(p.stages) {}

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

  // e4m3: the tensor core's sums keep some 14 bits, so every 128 of K are added up in float32 registers.
  ATTNKIT_DEVICE void add_up_promoted() {
    Sum part[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] = 0;
    for (int step = work.first; step < work.last; ++step) {
      mbarrier_wait(s.full + 8 * ring.stage, ring.parity);
#pragma unroll
      for (int plane = 0; plane < Shape::Planes; ++plane) {
        multiply(part, plane, 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(part);
        if (plane == Shape::Planes - 1) release(ring.stage);
#pragma unroll
        for (int i = 0; i < Count; ++i) sums[i] += part[i];
      }
      ring.next();
    }
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

  // A warp's 16 rows go to who finishes their columns, as they are: so sums of splits stay exact. wgmma leaves a thread
  // two columns of every unit in rows lane / 4 and 8 more; neighbours swap, and each stores 4 columns of one row.
  ATTNKIT_DEVICE void hand_over() const {
    const int lane = opaque(threadIdx.x) % 32, warp = opaque(threadIdx.x) / 32, odd = lane & 1;
    const int first = warp % (Shape::Rows / 16) * 16, row = first + lane / 4 + 8 * odd;
    if (first >= p.M) return;
    const u32 to = s.pieces + (work.rank * p.M + row) * s.pitch + lane % 4 / 2 * 16;
    if constexpr (Shape::Tall) {
      if (p.splits == 1) {
        store<0, Groups>(to, work.rank, row, odd);
      } else {
        store<0, Groups / 2>(to, 0, row, odd);
        store<Groups / 2, Groups / 2>(to, 1, row, odd);
      }
    } else if (p.splits == 1) {
      store<0, Groups>(to + warp / 4 * (Groups * 32), work.rank, row, odd);
    } else if (p.splits == 2) {
      store<0, Groups>(to, warp / 4, row, odd);
    } else {
      store<0, Groups / 2>(to, warp / 4 * 2, row, odd);
      store<Groups / 2, Groups / 2>(to, warp / 4 * 2 + 1, row, odd);
    }
  }

  // Some of the thread's units, to CTA ``who`` of the cluster.
  template <int First, int Units>
  ATTNKIT_DEVICE void store(u32 to, int who, int row, int odd) const {
    const bool here = who == work.rank, valid = row < p.M;
    const u32 there = here ? to : cluster_address(to, who), met = here ? 0 : cluster_address(s.met, who);
#pragma unroll
    for (int j = 0; j < Units; ++j) {
      const Sum* x = sums + 4 * (First + j);
      const u32 a = bits(x[0]), b = bits(x[1]), c = bits(x[2]), d = bits(x[3]);
      const u32 e = __shfl_xor_sync(~0u, odd ? a : c, 1), f = __shfl_xor_sync(~0u, odd ? b : d, 1);
      const u32 y[4] = {odd ? e : a, odd ? f : b, odd ? c : e, odd ? d : f};
      if (!valid) continue;
      if (here) {
        store_shared_16(there + j * 32, y[0], y[1], y[2], y[3]);
      } else {
        store_async_16(there + j * 32, met, y[0], y[1], y[2], y[3]);
      }
    }
  }

  // This CTA's columns, 4 a thread and as many rows at a time as there are threads for: pieces added up in the order of K,
  // scaled, rounded once.
  ATTNKIT_DEVICE void finish(int tile) const {
    const int parts = 2 * share, width = 32 - __clz(parts - 1);  // log2 of threads a row
    const int part = opaque(threadIdx.x) & ((1 << width) - 1), rows = Shape::Consumers >> width, first = work.rank * parts + part;
    const int column = tile * Shape::BN + first * 4, least = opaque(threadIdx.x) >> width;
    if (part >= parts || column >= p.N) return;
    const u32 scales = opaque(s.scales + first * 16), stride = p.M * s.pitch;
    const float4 w = load_scales(scales), bias = load_scales(scales + Shape::BN * 4);
    const bool inside = p.whole && column + 4 <= p.N;
    u32 from = opaque(s.pieces + least * s.pitch + part * 16), row_scale = opaque(s.scales + 2 * Shape::BN * 4 + least * 4);
    char* to = p.out + least * p.out_m + static_cast<i64>(column) * (p.out_type == kF32 ? 4 : 2);
#pragma unroll 4
    for (int row = least; row < p.M; row += rows) {
      const float scale = load_row_scale(row_scale);
      uint4 x = load_piece(from);
      Sum total[4] = {of_bits(x.x, Sum()), of_bits(x.y, Sum()), of_bits(x.z, Sum()), of_bits(x.w, Sum())};
#pragma unroll 1
      for (int k = 1; k < p.splits; ++k) {
        x = load_piece(from + k * stride);
        total[0] += of_bits(x.x, Sum()), total[1] += of_bits(x.y, Sum());
        total[2] += of_bits(x.z, Sum()), total[3] += of_bits(x.w, Sum());
      }
      write(to, p.N - column, inside,
            make_float4(fmaf(as_float(total[0]) * scale, w.x, bias.x), fmaf(as_float(total[1]) * scale, w.y, bias.y),
                        fmaf(as_float(total[2]) * scale, w.z, bias.z), fmaf(as_float(total[3]) * scale, w.w, bias.w)));
      from += rows * s.pitch, row_scale += rows * 4, to += rows * p.out_m;
    }
  }

  // The first ``count`` of 4 columns; ``inside``: all of them, in one aligned store.
  ATTNKIT_DEVICE void write(char* to, int count, bool inside, float4 y) const {
    if (p.out_type == kF32) {
      float* at = reinterpret_cast<float*>(to);
      if (inside) {
        *reinterpret_cast<float4*>(at) = y;
      } else {
        at[0] = y.x;
        if (count > 1) at[1] = y.y;
        if (count > 2) at[2] = y.z;
        if (count > 3) at[3] = y.w;
      }
      return;
    }
    const bool bf16 = p.out_type == kBf16;
    const u32 low = bf16 ? pack_bf16(y.x, y.y) : pack_f16(y.x, y.y), high = bf16 ? pack_bf16(y.z, y.w) : pack_f16(y.z, y.w);
    u16* at = reinterpret_cast<u16*>(to);
    if (inside) {
      *reinterpret_cast<uint2*>(at) = make_uint2(low, high);
    } else {
      at[0] = static_cast<u16>(low);
      if (count > 1) at[1] = static_cast<u16>(low >> 16);
      if (count > 2) at[2] = static_cast<u16>(high);
      if (count > 3) at[3] = static_cast<u16>(high >> 16);
    }
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
    const float row_scale = thread < p.M ? p.a_scale[p.a_scales ? thread : 0] : 0.0f;
    for (int tile = work.tile; tile < p.tiles; tile += work.stride) {
      float scale = 0.0f, bias = 0.0f;  // of a column, on their way while products are
      if (thread < Shape::BN) {
        const int n = min(tile * Shape::BN + thread, p.N - 1);
        scale = p.w_scale[p.w_scales ? n : 0];
        if (p.bias != nullptr) bias = load_as_float(p.bias, n, p.bias_type);
      }
      if (thread / 32 < Shape::readers(p.M)) add_up();
      if (tile != work.tile) sync();  // everybody has read the last tile's sums and scales
      hand_over();
      if (thread < Shape::BN) store_shared_4(s.scales + thread * 4, scale), store_shared_4(s.scales + (Shape::BN + thread) * 4, bias);
      if (thread < Shape::Rows) store_shared_4(s.scales + (2 * Shape::BN + thread) * 4, row_scale);
      sync();
      if (p.splits > 1) mbarrier_wait_cluster(s.met, 0);
      finish(tile);
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void skinny_gemm(const SkinnyParams& p) {
  extern __shared__ char raw[];
  const SkinnyWork work(p);
  const int share = Shape::Units >> (p.splits >> 1);
  const SkinnyShared<Shape> s(p, raw, share);
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
    mbarrier_arrive_expect(s.met, (p.splits - 1) * p.M * share * 32);  // the others' pieces of this CTA's columns
  }
  __syncwarp();
  __syncthreads();
  if (p.splits > 1) cluster_meet();  // nobody stores to a CTA whose barriers are not there
  if (loads) {
    if (elect_one()) skinny_load<Shape>(p, s, work);
    __syncwarp();
  } else {
    SkinnyConsumer<Shape>(p, s, work, share).run();
  }
}

}  // namespace attnkit
