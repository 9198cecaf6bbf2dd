// Absorbed latent decode (MLA) for few query rows: up to 32 rows (heads x query tokens) of a sequence read one latent
// row a token. Memory bound: 1152 bytes a token against 70 thousand flops.
//
// Two producer warps fill a ring of 64-token tiles by TMA, one with the latent planes, one with the rope planes.
// One warpgroup computes with the tokens on the M side of wgmma and the rows on its N side: S^T = K q^T straight from
// the ring, then O^T = V^T P^T, where V^T is the same tile read with the columns as rows, so the latent lands once and
// is never copied. Tiles are divided over a fixed grid from lens (decode_schedule.cuh).
#pragma once
#include "mla_narrow_common.cuh"

namespace attnkit {

// NR: 8-row groups (1, 2 or 4). Ropes: buffers for the rope part; one is enough where three stages else do not fit,
// since it is free again as soon as the tile's scores are there.
template <int C_, int R_, bool Bf16_, int NR_, int Stages_, int Ropes_>
struct MlaShape {
  static constexpr int C = C_, R = R_, NR = NR_, Stages = Stages_, Ropes = Ropes_;
  static constexpr bool Bf16 = Bf16_, PairedColumns = false;
  static constexpr int Rows = 8 * NR, T = 64, CtasPerSm = 1;
  static constexpr int Planes = C / 64, RopePlanes = R / 64, Parts = 2, PartPlanes = Planes / Parts;
  static constexpr int PlaneBytes = T * 128, StageBytes = Planes * PlaneBytes, RopeBytes = RopePlanes * PlaneBytes;
  static constexpr int QPlaneBytes = Rows * 128, PBytes = Rows * 128, QBytes = (Planes + RopePlanes) * QPlaneBytes;
  static constexpr int StageGroups = NR < 2 ? NR : 2, StagePitch = C + 4, HalfPitch = 2 * C + 16;
  static constexpr int ConsumerWarps = 4, Consumers = 128, Threads = Consumers + 64;

  static_assert(C % 128 == 0 && R % 64 == 0 && R > 0 && (NR == 1 || NR == 2 || NR == 4), "latent and rope sizes");
};

struct MlaShared {
  u32 ring, ropes, q, p;           // [Stages, Planes, T, 128], [Ropes, ...], [Planes + RopePlanes, Rows, 128], [2, Rows, 128]
  u32 full, empty;                 // [Stages, Parts]
  u32 rope_full, rope_empty;       // [Ropes]
  u32 q_full, q_empty;
  float* exchange;                 // [4, Rows]
  float2* totals;                  // [Rows]
  float* stage;                    // [8 StageGroups, StagePitch], or f16 [Rows] in HalfPitch bytes and [2, Rows]: the output on its way
  int* scratch;                    // the walker's
  int* flag;
  MlaPart* piece;                  // what q belongs to; tiles = 0: the end
};

// One warp for the latent part of the tiles, one for the rope part and q. Two, because with one rope buffer the latent
// part runs ahead of it.
template <class Shape>
struct MlaProducer : MlaBoxes<Shape::T> {
  static constexpr int T = Shape::T;
  using Boxes = MlaBoxes<T>;
  using Boxes::p, Boxes::lane, Boxes::box_shift, Boxes::boxes;

  const MlaShared& shared;
  u64 policy;

  ATTNKIT_DEVICE MlaProducer(const DecodeParams& params, const MlaShared& s) : Boxes(params), shared(s) { policy = evict_first_policy(); }

  // The boxes of ``Planes`` planes, from ``plane`` on, that hold visible keys.
  template <int Planes>
  ATTNKIT_DEVICE void load_planes(const Piece& piece, const int* pages, int token0, int page, int plane, u32 to, u32 full) {
    const int first = max(piece.low - token0, 0) >> box_shift;
    const int last = min((piece.length - token0 + (1 << box_shift) - 1) >> box_shift, boxes);
    const int slot = token0 & ((1 << p.page_shift) - 1);
    if (elect_one()) mbarrier_arrive_expect(full, max(last - first, 0) * (Planes * 128 << box_shift));
    for (int box = first; box < last; ++box) {
      const int from = boxes <= 32 ? __shfl_sync(~0u, page, box) : pages[(token0 >> p.page_shift) + box];
      if (elect_one()) {
#pragma unroll
        for (int i = 0; i < Planes; ++i) {
          tma_load_4d(to + i * Shape::PlaneBytes + (128 * box << box_shift), &p.k_map, full, (plane + i) * 64, slot, 0, from, policy);
        }
      }
    }
  }

  ATTNKIT_DEVICE void load_q(const MlaPart& piece) {
    if (lane == 0) *shared.piece = piece;
    __syncwarp();
    if (elect_one()) {
      mbarrier_arrive_expect(shared.q_full, (Shape::Planes + Shape::RopePlanes) * p.block_rows * 128);
      for (int plane = 0; plane < Shape::Planes + Shape::RopePlanes; ++plane) {
        tma_load_4d(shared.q + plane * Shape::QPlaneBytes, &p.q_map, shared.q_full, plane * 64, 0, 0, piece.b);
      }
    }
  }

  ATTNKIT_DEVICE void run_latents(Walker<T>& walker) {
    Boxes::template each_tile<Shape::Stages, Piece>(
        walker, [](Piece&) {},
        [&](const Piece& piece, const int* pages, int tile, int page, int stage, int phase) {
          const u32 to = shared.ring + stage * Shape::StageBytes;
#pragma unroll 1
          for (int part = 0; part < Shape::Parts; ++part) {
            const int barrier = 8 * (stage * Shape::Parts + part), plane = part * Shape::PartPlanes;
            mbarrier_wait(shared.empty + barrier, phase);
            load_planes<Shape::PartPlanes>(piece, pages, tile * T, page, plane, to + plane * Shape::PlaneBytes, shared.full + barrier);
          }
        });
  }

  ATTNKIT_DEVICE void run_ropes(Walker<T>& walker) {
    int pieces = 0;
    Boxes::template each_tile<Shape::Ropes, MlaPart>(
        walker, [&](MlaPart& piece) { piece.find_waiting(walker); },
        [&](const MlaPart& piece, const int* pages, int tile, int page, int stage, int phase) {
          if (tile == piece.tile) {
            mbarrier_wait(shared.q_empty, (pieces++ & 1) ^ 1);
            load_q(piece);
          }
          mbarrier_wait(shared.rope_empty + 8 * stage, phase);
          load_planes<Shape::RopePlanes>(piece, pages, tile * T, page, Shape::Planes, shared.ropes + stage * Shape::RopeBytes,
                                         shared.rope_full + 8 * stage);
        });
    mbarrier_wait(shared.q_empty, (pieces & 1) ^ 1);
    if (lane == 0) {
      shared.piece->tiles = 0;
      mbarrier_arrive(shared.q_full);
    }
  }
};

// ---- the computing warpgroup ----

template <class Shape>
struct MlaConsumer {
  static constexpr int NR = Shape::NR, T = Shape::T;
  static constexpr bool Bf16 = Shape::Bf16;

  const MlaShared& shared;
  MlaScores<Shape, 1> rows;
  MlaValues<Shape> output;
  u32 p_rows;  // this tile's P^T; two take turns, for a warp may be a product ahead of another

  ATTNKIT_DEVICE MlaConsumer(const DecodeParams& params, const MlaShared& s) : shared(s), rows(params, s.exchange), output(params), p_rows(s.p) {}

  ATTNKIT_DEVICE void multiply_planes(float (&s)[4 * NR], u32 keys, u32 q, int planes, bool fresh) {
#pragma unroll
    for (int i = 0; i < planes * 4; ++i) {
      const u64 a = wgmma_descriptor(keys + i / 4 * Shape::PlaneBytes + i % 4 * 32, 0, 1024);
      const u64 b = wgmma_descriptor(q + i / 4 * Shape::QPlaneBytes + i % 4 * 32, 0, 1024);
      wgmma_ss_narrow<Bf16, 0>(s, a, b, !fresh || i > 0);
    }
  }

  // S^T of the tile, each part of it as it lands.
  ATTNKIT_DEVICE void scores(float (&s)[4 * NR], u32 tile, u32 full, u32 phase, u32 rope, u32 rope_full, u32 rope_phase) {
    mbarrier_wait(full, phase);
    wgmma_hold(s);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < Shape::Parts; ++part) {
      if (part > 0) mbarrier_wait(full + 8 * part, phase);
      const int plane = part * Shape::PartPlanes;
      multiply_planes(s, tile + plane * Shape::PlaneBytes, shared.q + plane * Shape::QPlaneBytes, Shape::PartPlanes, part == 0);
    }
    mbarrier_wait(rope_full, rope_phase);
    multiply_planes(s, rope, shared.q + Shape::Planes * Shape::QPlaneBytes, Shape::RopePlanes, false);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(s);
  }

  ATTNKIT_DEVICE void store_weights(const float (&s)[4 * NR], float (&added)[NR][2]) {
    u32 w[2 * NR];
#pragma unroll
    for (int n = 0; n < NR; ++n) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = rows.weight(s, n, e);
      added[n][0] = x[0] + x[2];
      added[n][1] = x[1] + x[3];
      w[2 * n] = pack<Bf16>(x[0], x[1]);
      w[2 * n + 1] = pack<Bf16>(x[2], x[3]);
    }
    rows.store_rows(p_rows, w);
    fence_async_shared();
  }

  // Weight 0 times a value nobody wrote may be NaN: latents outside the sequence become zeros.
  ATTNKIT_DEVICE void clear_values(const Piece& piece, int key0, u32 tile) const {
    for (int i = threadIdx.x; i < T * 8; i += Shape::Consumers) {
      const int key = key0 + i / 8;
      if (key >= piece.low && key < piece.length) continue;
      for (int plane = 0; plane < Shape::Planes; ++plane) store_shared_zeros(tile + plane * Shape::PlaneBytes + i * 16);
    }
  }

  // Scores to weights in shared memory.
  ATTNKIT_DEVICE void weights(float (&s)[4 * NR], const Piece& piece, int key0, u32 tile) {
    rows.logits(s, piece, key0);
    if (rows.edge(piece, key0)) clear_values(piece, key0, tile);
    float added[NR][2];
    store_weights(s, added);
    if (any_of_warpgroup<1>(rows.above(s))) {
      float rescale[NR][2];
      rows.raise(s, rescale);
      output.rescale(rescale);
      store_weights(s, added);
      named_barrier(1, Shape::Consumers);
    }
    rows.add(added);
  }

  // O^T += V^T P^T; the ring gets the parts back as they are done with.
  ATTNKIT_DEVICE void add_values(u32 tile, u32 empty) {
#pragma unroll
    for (int m = 0; m < Shape::Planes; ++m) wgmma_hold(output.values[m]);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < Shape::Parts; ++part) {
#pragma unroll
      for (int k = 0; k < T / 16; ++k) {
        const u64 b = wgmma_descriptor(p_rows + k * 32, 0, 1024);
#pragma unroll
        for (int i = 0; i < Shape::PartPlanes; ++i) {
          const int m = part * Shape::PartPlanes + i;
          wgmma_ss_narrow<Bf16, 1>(output.values[m], wgmma_descriptor(tile + m * Shape::PlaneBytes + k * 2048, 1024, 1024), b, 1);
        }
      }
      wgmma_commit();
    }
    wgmma_wait<1>();
    if (rows.lane == 0) mbarrier_arrive(empty);
    wgmma_wait<0>();
    if (rows.lane == 0) mbarrier_arrive(empty + 8);
#pragma unroll
    for (int m = 0; m < Shape::Planes; ++m) wgmma_hold(output.values[m]);
  }

  ATTNKIT_DEVICE void run() {
    int stage = 0, phase = 0, rope = 0, rope_phase = 0;
    for (int pieces = 0;; ++pieces) {
      mbarrier_wait(shared.q_full, pieces & 1);
      const MlaPart piece = *shared.piece;
      if (piece.tiles == 0) break;
      rows.begin();
      output.begin(piece);
#pragma unroll 1
      for (int t = 0; t < piece.tiles; ++t) {
        const u32 tile = shared.ring + stage * Shape::StageBytes;
        const int barrier = 8 * stage * Shape::Parts, key0 = (piece.tile + t) * T;
        float s[4 * NR];
        scores(s, tile, shared.full + barrier, phase, shared.ropes + rope * Shape::RopeBytes, shared.rope_full + 8 * rope, rope_phase);
        if (rows.lane == 0) {
          mbarrier_arrive(shared.rope_empty + 8 * rope);
          if (t == piece.tiles - 1) mbarrier_arrive(shared.q_empty);
        }
        weights(s, piece, key0, tile);
        add_values(tile, shared.empty + barrier);
        p_rows ^= shared.p ^ (shared.p + Shape::PBytes);
        if (++stage == Shape::Stages) {
          stage = 0;
          phase ^= 1;
        }
        if (++rope == Shape::Ropes) {
          rope = 0;
          rope_phase ^= 1;
        }
      }
      rows.publish(shared.totals);
      named_barrier(1, Shape::Consumers);
      output.finish(piece, shared.totals, 1.f, shared.stage, shared.flag);
      named_barrier(1, Shape::Consumers);  // totals and flag are free for the next piece
    }
  }
};

template <class Shape>
ATTNKIT_DEVICE void mla_narrow(const DecodeParams& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  MlaShared shared;
  shared.ring = smem_address(memory);
  shared.ropes = shared.ring + Shape::Stages * Shape::StageBytes;
  shared.q = shared.ropes + Shape::Ropes * Shape::RopeBytes;
  shared.p = shared.q + Shape::QBytes;
  unsigned char* after = memory + (shared.p - shared.ring) + 2 * Shape::PBytes;
  shared.full = smem_address(after);
  shared.empty = shared.full + 8 * Shape::Stages * Shape::Parts;
  shared.rope_full = shared.empty + 8 * Shape::Stages * Shape::Parts;
  shared.rope_empty = shared.rope_full + 8 * Shape::Ropes;
  shared.q_full = shared.rope_empty + 8 * Shape::Ropes;
  shared.q_empty = shared.q_full + 8;
  static_assert(16 * Shape::Stages * Shape::Parts + 16 * Shape::Ropes + 16 <= 256, "room for the barriers");
  static_assert(sizeof(MlaPart) <= 64, "room for the small things");
  shared.scratch = reinterpret_cast<int*>(after + 256);
  shared.piece = reinterpret_cast<MlaPart*>(after + 288);
  shared.flag = reinterpret_cast<int*>(after + 352);
  shared.exchange = reinterpret_cast<float*>(after + 512);
  shared.totals = reinterpret_cast<float2*>(after + 1024);
  shared.stage = reinterpret_cast<float*>(after + 1280);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::Stages * Shape::Parts; ++i) {
      mbarrier_init(shared.full + 8 * i, 1);
      mbarrier_init(shared.empty + 8 * i, Shape::ConsumerWarps);
    }
    for (int i = 0; i < Shape::Ropes; ++i) {
      mbarrier_init(shared.rope_full + 8 * i, 1);
      mbarrier_init(shared.rope_empty + 8 * i, Shape::ConsumerWarps);
    }
    mbarrier_init(shared.q_full, 1);
    mbarrier_init(shared.q_empty, Shape::ConsumerWarps);
    mbarrier_init_fence();
  } else if (threadIdx.x == 64) {
    tma_prefetch_map(&p.k_map);
    tma_prefetch_map(&p.q_map);
  }
  if (p.block_rows < Shape::Rows) {  // rows that no query fills stay zero
    for (int i = threadIdx.x; i < Shape::QBytes / 16; i += Shape::Threads) store_shared_zeros(shared.q + i * 16);
    fence_async_shared();
  }
  __syncthreads();
  launch_dependents();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Walker<Shape::T> walker(p);
  if (warp < Shape::ConsumerWarps) mla_prefetch(p, 2 * (Shape::C + Shape::R));
  if (p.B > 32) {
    wait_for_previous_grid();
    walker.place_many(shared.scratch, Shape::Threads);
  }
  if (warp < Shape::ConsumerWarps) {
    wait_for_previous_grid();
    MlaConsumer<Shape> consumer(p, shared);
    consumer.run();
    return;
  }
  MlaProducer<Shape> producer(p, shared);
  if (warp == Shape::ConsumerWarps) {
    if (p.B <= 32) mla_place_ahead<Shape::T, Shape::Planes + Shape::RopePlanes>(p, walker);
    producer.run_latents(walker);
  } else {
    if (p.B <= 32) mla_place_ahead<Shape::T, 0>(p, walker);
    producer.run_ropes(walker);
  }
}

}  // namespace attnkit
