// One read of all logits. The blocks of all rows are dealt out evenly to CTAs and, one by one, to their warps; a lane takes
// the tokens of its own groups. Without penalties the next block is on its way, in registers, while one is worked on.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

template <int Type>
ATTNKIT_DEVICE Raw<Type> load_stream(const char* p) {
  Raw<Type> r;
  if constexpr (Type == kF32) {
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3]) : "l"(p));
  } else {
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
  }
  return r;
}

// Where a lane's first logits from token v of a row on lie.
template <int Type>
ATTNKIT_DEVICE const char* logits_at(const SampleParams& p, int b, int v) {
  return p.logits + b * p.logits_b + (static_cast<i64>(v) + static_cast<int>(lane_id()) * 4) * (Type == kF32 ? 4 : 2);
}

// Where a block lies.
template <int Type>
struct Spot {
  int block, b, v;
  const char* at;  // of this lane
  bool whole;      // every lane may read all of it at full width

  ATTNKIT_DEVICE Spot(const SampleParams& p, int n, int end) : block(n) {
    const int from = min(n, end - 1);
    b = from / p.blocks;
    v = (from - b * p.blocks) * kBlock;
    at = logits_at<Type>(p, b, v);
    whole = n < end && v + kBlock <= p.V && (reinterpret_cast<u64>(at) & (Type == kF32 ? 15 : 7)) == 0;
  }
  ATTNKIT_DEVICE void load(Raw<Type> (&raw)[4], int piece) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) raw[c] = load_stream<Type>(at + (piece * 4 + c) * kChunk * (Type == kF32 ? 4 : 2));
  }
  // L2 asks for some pieces.
  template <int Pieces>
  ATTNKIT_DEVICE void ask_l2(int first) const {
    if (!whole) return;
    constexpr int kItem = Type == kF32 ? 4 : 2, kLines = Pieces * kPiece * kItem / 128;
    const int lane = static_cast<int>(lane_id());
#pragma unroll
    for (int i = 0; i < kLines; i += 32) {
      if (kLines % 32 == 0 || lane + i < kLines) prefetch_l2(at - lane * 4 * kItem + first * kPiece * kItem + (lane + i) * 128);
    }
  }
};

// A piece of a row that is read with care: at its end, at odd addresses, or with penalties. What is asked for first:
template <int Type, bool Penalised>
struct Fetched {
  Raw<Type> raw[4];
  Extras e[Penalised ? 4 : 1];

  ATTNKIT_DEVICE void ask(const RowPointers& r, int v, int V) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = v + c * kChunk;
      if (r.logits_wide && at + 4 <= V) {
        raw[c] = load_stream<Type>(r.logits + static_cast<i64>(at) * (Type == kF32 ? 4 : 2));
      } else {
        raw[c] = load_four_guarded<Type>(r.logits, at, V);
      }
      if constexpr (Penalised) load_counts(e[c].counts, r, at, V);
    }
  }

  ATTNKIT_DEVICE void use(Raw<Penalised ? kF32 : Type> (&held)[4], const RowPointers& r, const RowOptions& o, int v, int V) {
    if constexpr (Penalised) {
#pragma unroll
      for (int c = 0; c < 4; ++c) load_masks(e[c], r, v + c * kChunk, V);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (Penalised) {
        float x[4];
        widen_four<Type>(raw[c], x);
        penalise(x, e[c], r, o, v + c * kChunk, V);
#pragma unroll
        for (int i = 0; i < 4; ++i) held[c].w[i] = __float_as_uint(x[i]);
      } else {
        held[c] = raw[c];
      }
    }
  }
};

template <int Type, bool Penalised>
ATTNKIT_DEVICE void load_piece(Raw<Penalised ? kF32 : Type> (&held)[4], const RowPointers& r, const RowOptions& o, int v, int V) {
  Fetched<Type, Penalised> fetched;
  fetched.ask(r, v, V);
  fetched.use(held, r, o, v, V);
}

// Pieces without penalties, from token v and logits_at on. All of them are on their way at once, but for the end of a row,
// which comes a piece at a time.
template <int Type, int Pieces>
ATTNKIT_DEVICE void load_pieces(Raw<Type> (&raw)[Pieces][4], const SampleParams& p, int b, int v, const char* from) {
  constexpr int kItem = Type == kF32 ? 4 : 2;
  if (v + Pieces * kPiece > p.V) {
#pragma unroll 1
    for (int u = 0; u < Pieces; ++u) {
#pragma unroll
      for (int i = 0; i < 4 * (Pieces - 1); ++i) raw[i / 4][i % 4] = raw[i / 4 + 1][i % 4];
      Fetched<Type, false> fetched;
      fetched.ask(row_pointers<Type>(p, b), v + u * kPiece + static_cast<int>(lane_id()) * 4, p.V);
#pragma unroll
      for (int c = 0; c < 4; ++c) raw[Pieces - 1][c] = fetched.raw[c];
    }
  } else if ((reinterpret_cast<u64>(from) & (Type == kF32 ? 15 : 7)) == 0) {
#pragma unroll
    for (int i = 0; i < 4 * Pieces; ++i) raw[i / 4][i % 4] = load_stream<Type>(from + i * kChunk * kItem);
  } else {
#pragma unroll
    for (int i = 0; i < 4 * Pieces; ++i) raw[i / 4][i % 4] = load_four_guarded<Type>(from + i * kChunk * kItem, 0, 4);
  }
}

// L2 asks for a block's logits.
template <int Type>
ATTNKIT_DEVICE void ask_block_l2(const SampleParams& p, int b, int inside) {
  constexpr int kItem = Type == kF32 ? 4 : 2, kLine = 128 / kItem;
#pragma unroll
  for (int i = 0; i < kBlock / kLine; i += 32) {
    const i64 v = inside * kBlock + (static_cast<int>(lane_id()) + i) * kLine;
    if (v < p.V) prefetch_l2(p.logits + b * p.logits_b + v * kItem);
  }
}

// Before the grid before has ended: L2 asks for every warp's first block, and its row's options. It stays coherent with who
// may still write them. Not where a warp has few blocks: they would come in the way of that grid's.
template <int Type>
ATTNKIT_DEVICE void ask_l2_early(const SampleParams& p) {
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x), first = static_cast<int>(all * blockIdx.x / gridDim.x);
  if (end - first < 3 * kSampleWarps) return;
  const int n = first + static_cast<int>(threadIdx.x / 32), b = n / p.blocks, lane = static_cast<int>(lane_id());
  ask_block_l2<Type>(p, b, n - b * p.blocks);
  if (lane == 0 && p.temperature != nullptr) prefetch_l2(p.temperature + b);
  if (lane == 1) prefetch_l2(p.seeds + b);
}

// What a warp does with a row: ask for its options, begin, block and its pieces (after penalties; their
// number in the row and their place in the block), end with the number of blocks of the row that this warp took.
template <int Type, bool Penalised, class Work>
ATTNKIT_DEVICE void stream_rows(const SampleParams& p, Work& work) {
  constexpr int kHeldType = Penalised ? kF32 : Type;
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  const int start = static_cast<int>(all * blockIdx.x / gridDim.x) + static_cast<int>(threadIdx.x / 32);
  if (start >= end) return;
  Spot<Type> spot(p, start, end);
  Raw<Type> raw[Penalised ? 1 : 4][4];
  work.ask(spot.b);  // before the queue is full of logits
  if (!Penalised && spot.whole) {
#pragma unroll
    for (int u = 0; u < 4; ++u) spot.load(raw[Penalised ? 0 : u], u);
  }
  work.begin(spot.b);
  int taken = 0;
#pragma unroll 1
  while (true) {
    const Spot<Type> next(p, spot.block + kSampleWarps, end);
    const bool last = next.block >= end;
    if (!last && next.b != spot.b) work.ask(next.b);
    const int piece = spot.v / kPiece;
    if (!Penalised && spot.whole) {
      work.block(piece / 4);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if constexpr (!Penalised) {
          work.template piece<kHeldType>(raw[u], piece + u, u);
          if (next.whole) next.load(raw[u], u);
        }
      }
    } else {
      work.block(piece / 4);
      const RowPointers r = row_pointers<Type>(p, spot.b);
      const int v = spot.v + static_cast<int>(lane_id()) * 4;
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        Raw<kHeldType> held[4];
        load_piece<Type, Penalised>(held, r, work.o, v + u * kPiece, p.V);
        work.template piece<kHeldType>(held, piece + u, u);
      }
      if (!Penalised && next.whole) {
#pragma unroll
        for (int u = 0; u < 4; ++u) next.load(raw[Penalised ? 0 : u], u);
      }
    }
    ++taken;
    if (last || next.b != spot.b) {
      work.end(spot.b, taken);
      taken = 0;
      if (last) return;
      work.begin(next.b);
    }
    spot = next;
  }
}

}  // namespace attnkit::sampling
