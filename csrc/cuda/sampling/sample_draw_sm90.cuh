// Greedy choice and draws from all tokens: one read of the logits. What warps find in a row meets in one 64-bit maximum a
// row, and the last to arrive writes the token.
#pragma once
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

template <int Type, bool Penalised, bool Greedy>
struct DrawWork {
  const SampleParams& p;
  const u64* const reached;
  RawOptions coming;
  RowOptions o;
  u64 seed = 0, offset = 0;
  Floor floor;
  Best best;
  u32 w[4];

  ATTNKIT_DEVICE DrawWork(const SampleParams& q, const u64* shared)
      : p(q), reached(shared), floor(shared, 0) {}

  ATTNKIT_DEVICE bool cold() const { return Greedy || o.cold; }
  ATTNKIT_DEVICE void ask(int b) { coming = RawOptions(p, b); }
  ATTNKIT_DEVICE void begin(int b) {
    o = coming.use();
    best = Best();
    if (cold()) return;
    seed = static_cast<u64>(coming.seed), offset = static_cast<u64>(coming.offset);
    floor = Floor(reached, b);
  }
  ATTNKIT_DEVICE void block(int n) {
    if (!cold()) philox_words(seed, offset, kOfGroups, static_cast<u32>(n) * 32 + lane_id(), w);
  }
  template <int Held>
  ATTNKIT_DEVICE void piece(const Raw<Held> (&raw)[4], int number, int place) {
    const int lane = static_cast<int>(lane_id());
    if (cold()) {
      best.largest<Held>(raw, number * kPiece + lane * 4);
    } else {
      try_group<Held>(best, floor, raw, number * 32 + lane, place & 2 ? (place & 1 ? w[3] : w[2]) : (place & 1 ? w[1] : w[0]), o);
    }
  }

  // 16 bytes a row in ``state``, zero between launches: the best, and how many blocks have arrived.
  ATTNKIT_DEVICE void end(int b, int blocks) {
    u64 top = warp_max(best.packed());
    bool last = true;
    if (blocks < p.blocks) {
      if (lane_id() == 0) {
        u64* const at = reinterpret_cast<u64*>(p.state + 4 * b);
        int* const arrived = p.state + 4 * b + 2;
        if (top != 0) atomicMax(at, top);
        last = add_release(arrived, blocks) + blocks == p.blocks;
        if (last) {
          top = atomicExch(at, 0ull);
          *arrived = 0;
        }
      }
      last = __shfl_sync(0xffffffffu, last, 0);
      if (!last) return;
      top = __shfl_sync(0xffffffffu, top, 0);
    }
    const bool good = top != 0 && top != kNaNSeen;
    int token = good ? best_id(top) : 0;
    if (good && !cold()) {
      float x[4], chosen;
      load_chunk<Type, Penalised>(x, row_pointers<Type>(p, b), o, first_of_group(token) + static_cast<int>(lane_id() & 3) * kChunk, p.V);
      token = choose_inside(x, token, seed, offset, o, chosen);
    }
    if (lane_id() == 0) {
      p.tokens[b] = token;
      p.valid[b] = good;
    }
  }
};

template <int Type, bool Penalised, bool Greedy>
ATTNKIT_DEVICE void sample_draw(const SampleParams& p) {
  __shared__ u64 reached;
  if (threadIdx.x == 0) reached = 0;
  __syncthreads();
  ask_l2_early<Type>(p);
  wait_for_previous_grid();
  launch_dependents();
  DrawWork<Type, Penalised, Greedy> work(p, &reached);
  stream_rows<Type, Penalised>(p, work);
}

}  // namespace attnkit::sampling
