// Greedy choice and plain temperature sampling: one read of the logits. All tiles of all rows are dealt out evenly to
// CTAs; each warp streams pieces of 512 tokens through a ring of its own, by bulk copies that run ahead over the ends of
// rows. What CTAs find in a row meets in one 64-bit maximum a row, and the last to arrive writes the token.
#pragma once
#include "sample_row_sm90.cuh"

namespace attnkit::sampling {

constexpr int kPiece = 512;  // tokens: four by four of each lane
constexpr int kPiecesOfTile = kSampleTile / kPiece;

// 16 bytes a row in ``state``, zero between launches: the best draw, and how many tiles have arrived.
ATTNKIT_DEVICE void meet_in_row(const SampleParams& p, int b, u64 best, int tiles) {
  u64* const top = reinterpret_cast<u64*>(p.state + 4 * b);
  int* const arrived = p.state + 4 * b + 2;
  if (tiles < p.tiles) {
    if (best != 0) atomicMax(top, best);
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(arrived), "r"(tiles) : "memory");
    if (old + tiles < p.tiles) return;
    best = atomicExch(top, 0ull);
    *arrived = 0;
  }
  const bool good = best != 0 && best != kNaNSeen;
  p.tokens[b] = good ? best_id(best) : 0;
  p.valid[b] = good;
}

// The best of a CTA's threads, in thread 0. ``shared`` is not used again before the next barrier.
ATTNKIT_DEVICE u64 block_best(u64 best, u64* shared) {
  best = warp_max(best);
  if (lane_id() == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 1; i < kSampleWarps; ++i) best = shared[i] > best ? shared[i] : best;
  }
  return best;
}

// A lane's largest logit; the lowest id on ties. The running maximum costs one instruction a token.
struct Largest {
  float best = negative_infinity(), seen = negative_infinity();
  int id = 0;

  ATTNKIT_DEVICE void four(const float (&x)[4], int v) {
    const float top = max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3]));
    seen = max_nan(seen, top);
    if (fminf(top, kF32Max) > best) {
      best = fminf(top, kF32Max);
#pragma unroll
      for (int i = 3; i >= 0; --i) id = fminf(x[i], kF32Max) == best ? v + i : id;
    }
  }
  ATTNKIT_DEVICE u64 packed() const { return seen != seen ? kNaNSeen : best > negative_infinity() ? pack_best(best, id) : 0; }
};

// A warp's ring. Piece number i is ``from`` + i kSampleWarps of all rows' pieces; a row has whole tiles of them.
template <int Type, bool Penalised, int Stages>
struct Ring {
  static constexpr int kItem = Type == kF32 ? 4 : 2;
  static constexpr int kCountsAt = kPiece * kItem;
  static constexpr int kStageBytes = kPiece * (kItem + (Penalised ? 4 : 0));
  static constexpr int kBytes = kSampleWarps * Stages * (kStageBytes + 8);

  const SampleParams& p;
  char* const memory;
  const u32 ready;
  const int from, end, pieces;  // of a row
  u64 policy;
  int next = 0, stage = 0;
  u32 phase = 0;

  ATTNKIT_DEVICE Ring(const SampleParams& q, char* all, int first_tile, int end_tile)
      : p(q),
        memory(all + threadIdx.x / 32 * Stages * kStageBytes),
        ready(smem_address(all + kSampleWarps * Stages * kStageBytes) + threadIdx.x / 32 * Stages * 8),
        from(first_tile * kPiecesOfTile + static_cast<int>(threadIdx.x / 32)),
        end(end_tile * kPiecesOfTile),
        pieces(q.tiles * kPiecesOfTile),
        policy(evict_first_policy()) {
    if (lane_id() == 0) {
      for (int i = 0; i < Stages; ++i) mbarrier_init(ready + 8 * i, 1);
      mbarrier_init_fence();
    }
    __syncwarp();
  }

  // One lane: asks for the piece that a stage, which all lanes have read, is to hold next.
  ATTNKIT_DEVICE void ask(int to) const {
    const int piece = from + (next == 0 ? to : next) * kSampleWarps;
    if (piece >= end) return;
    const int b = piece / pieces, v = (piece - b * pieces) * kPiece;
    const char* const row = p.logits + b * p.logits_b;
    const u32 barrier = ready + 8 * to, at = smem_address(memory) + to * kStageBytes;
    const int bytes = max(0, min(kPiece, copied_tokens<Type>(row, p.V) - v)) * kItem;
    int more = 0;
    const char* counts = nullptr;
    if (Penalised && p.counts != nullptr) {
      counts = p.counts + b * p.counts_b;
      more = max(0, min(kPiece, copied_tokens<kF32>(counts, p.V) - v)) * 4;
    }
    mbarrier_arrive_expect(barrier, bytes + more);
    if (bytes > 0) copy_bulk(at, row + static_cast<i64>(v) * kItem, bytes, barrier, policy);
    if (more > 0) copy_bulk(at + kCountsAt, counts + static_cast<i64>(v) * 4, more, barrier, policy);
  }

  ATTNKIT_DEVICE void start() {
    if (elect_one()) {
#pragma unroll 1
      for (int i = 0; i < Stages; ++i) ask(i);
    }
    next = Stages;
  }

  // What comes with the four tokens from v on, but for counts that the ring brings.
  ATTNKIT_DEVICE void load_others(Extras& e, const RowPointers& r, bool counted, int v, int V) const {
    RowPointers others = r;
    if (counted) others.counts = nullptr;
    load_extras(e, others, v, V);
  }

  // f(x, v) for this lane's tokens of the warp's next piece, the row's from id v on. Rolled: what f does must stay in the
  // innermost instruction cache.
  template <class F>
  ATTNKIT_DEVICE void take(const RowPointers& r, const RowOptions& o, int v, F&& f) {
    v += static_cast<int>(lane_id()) * 4;
    const char* const at = memory + stage * kStageBytes;
    const Raw<Type>* from_ring = reinterpret_cast<const Raw<Type>*>(at) + lane_id();
    const bool counted = Penalised && r.counts != nullptr && copied_tokens<kF32>(r.counts, p.V) != 0;
    Extras e, later;
    if constexpr (Penalised) load_others(e, r, counted, v, p.V);
    mbarrier_wait(ready + 8 * stage, phase);
    const int whole = copied_tokens<Type>(r.logits, p.V);
#pragma unroll 1
    for (int u = 0; u < kPiece / 128; ++u, v += 128, from_ring += 32) {
      if constexpr (Penalised) load_others(later, r, counted, v + 128, u + 1 < kPiece / 128 ? p.V : 0);
      Raw<Type> raw;
      if (v < whole) {
        raw = *from_ring;
      } else {
        raw = load_four_guarded<Type>(r.logits, v, p.V);
      }
      float x[4];
      widen_four<Type>(raw, x);
      if constexpr (Penalised) {
        if (counted) {
          if (v + 4 <= p.V) {
            const int4 n = reinterpret_cast<const int4*>(at + kCountsAt)[u * 32 + lane_id()];
            e.counts[0] = n.x, e.counts[1] = n.y, e.counts[2] = n.z, e.counts[3] = n.w;
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) e.counts[i] = v + i < p.V ? __ldg(reinterpret_cast<const int*>(r.counts) + v + i) : 0;
          }
        }
        penalise(x, e, r, o, v, p.V);
        e = later;
      }
      f(x, v);
    }
    __syncwarp();
    if (elect_one()) ask(stage);
    ++next;
    if (++stage == Stages) stage = 0, phase ^= 1;
  }
};

template <int Type, bool Penalised, bool Greedy, int Stages>
ATTNKIT_DEVICE void sample_draw(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ u64 shared[2][kSampleWarps];
  __shared__ u32 reached[2];
  if (threadIdx.x < 2) reached[threadIdx.x] = 0;
  __syncthreads();
  const i64 all = static_cast<i64>(p.B) * p.tiles;
  int tile = static_cast<int>(all * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  Ring<Type, Penalised, Stages> ring(p, memory, tile, end);
  wait_for_previous_grid();
  launch_dependents();
  RawOptions coming(p, min(tile / p.tiles, p.B - 1));
  ring.start();
  int piece = ring.from;
  for (int turn = 0; tile < end; turn ^= 1) {
    const int b = tile / p.tiles, first = tile - b * p.tiles;
    const int count = min(end - tile, p.tiles - first), last = (tile + count) * kPiecesOfTile;
    const RowPointers r = row_pointers<Type>(p, b);
    const RowOptions o = coming.use();
    const u64 seed = static_cast<u64>(coming.seed), offset = static_cast<u64>(coming.offset);
    coming = RawOptions(p, min(b + 1, p.B - 1));
    u64 best;
    if (Greedy || o.cold) {
      Largest largest;
#pragma unroll 1
      for (; piece < last; piece += kSampleWarps) {
        ring.take(r, o, (piece - b * ring.pieces) * kPiece, [&](const float(&x)[4], int v) { largest.four(x, v); });
      }
      best = largest.packed();
    } else {
      const Philox philox(seed, offset);
      Draw draw(o.rt, &reached[turn]);
#pragma unroll 1
      for (; piece < last; piece += kSampleWarps) {
        ring.take(r, o, (piece - b * ring.pieces) * kPiece, [&](const float(&x)[4], int v) {
          u32 w[4];
          philox.words(static_cast<u32>(v) >> 2, w);
          draw.four(x, w, v, [&](float y) { return warm(y, o); });
        });
      }
      best = draw.packed();
    }
    best = block_best(best, shared[turn]);
    if (threadIdx.x == 0) {
      reached[turn] = 0;
      meet_in_row(p, b, best, count);
    }
    tile += count;
  }
}

}  // namespace attnkit::sampling
