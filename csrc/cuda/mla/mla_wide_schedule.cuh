// Who reads which keys in the wide latent decode: divided on the device, from lens.
//
// All tiles of 64 keys stand in one line, ordered by sequence, then key; each group of CTAs takes an equal share of the
// line. A group has a cluster for each block of query rows, so that all rows of a sequence read its keys at about the
// same time. A group goes through its share from the end to the start: what it does first is the first part of a
// sequence that the next group finishes, so whoever has to wait for a piece waits for one that is done early, and by
// a CTA with a lower index.
#pragma once
#include "../common/ptx_sm90.cuh"

namespace attnkit {

struct alignas(64) MlaMap {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/mla_wide.py (PARAMS). Strides of out in bytes, of pages in entries.
struct MlaWideParams {
  MlaMap q_map;        // (C+R, heads, tokens, B): boxes of 64 columns and 64 rows
  MlaMap kv_map;       // (C+R, S, P): boxes of 64 columns and box_rows slots of one page
  const char* q;       // [B, Q, H, C+R]; read through the map
  const char* kv;      // [P, S, C+R]; read through the map
  const int* pages;    // [B, W]
  const int* lens;     // [B]
  const void* sinks;   // [H]
  char* out;           // [B, Q, H, C]
  float* lse;          // [B, Q, H]
  float* partial;      // [2 * cells, 32, 128] float4, then [2 * cells, 64] float2: MlaPartials
  int* counters;       // [3, cells]: arrived, left, gave up; zero between launches
  i64 pages_b, out_b, out_i, out_h;
  int B, Q, H;
  int rows;            // Q * H; row n is query token n / H of head n % H
  int q_heads;         // heads of the map: H, or Q * H where a token's rows follow the one before
  int page_shift;      // log2 S
  int box_shift;       // log2 of a box's slots
  int capacity;        // W * S
  int window;          // 0: none
  int row_blocks;      // clusters in a group
  int groups;
  int least_tiles;     // a group takes no fewer tiles than this, if there are enough for that
  int patience;        // how often a CTA asks whether the other pieces have come before it leaves the rest to the last
  int sink_type;       // Type of sinks
  float scale, softcap;  // softcap 0: none
};

// One stretch of keys of one sequence, handled by one group. The producer finds it; tiles = 0 is the end.
struct MlaPiece {
  int b;
  int length;        // L
  int low;           // first visible key
  int tile, tiles;   // first tile, in tiles of 64 keys from key 0; how many
  int index, count;  // which piece of its sequence, and of how many
  int first;         // the group of piece 0; piece i is group first + i's
  int early;         // 1: piece 0's group did it first of all and does not wait for the others

  // Two pieces, the first long done when the second is: the second's CTA gets the first's sums like another tile.
  ATTNKIT_DEVICE bool handed_on() const { return count == 2 && early; }
  ATTNKIT_DEVICE bool takes_over() const { return handed_on() && index == 1; }
};

// n / d, rounded down, for n >= 0 and d > 0. Shorter than /, and a kernel's first instructions come from L2 one by one. The
// first estimate is off by a relative 2^-22, the second by one at most.
ATTNKIT_DEVICE int mla_divide(int n, int d) {
  const float by = reciprocal(static_cast<float>(d));
  u32 q = static_cast<u32>(static_cast<int>(static_cast<float>(n) * by));
  q += static_cast<int>(static_cast<float>(static_cast<int>(n - q * d)) * by);
  const int rest = static_cast<int>(n - q * d);
  return static_cast<int>(q) + (rest >= d) - (rest < 0);
}

// Used by one whole warp: every lane has the same state.
struct MlaWalker {
  static constexpr int T = 64;
  const MlaWideParams& p;
  struct State {
    int group, share, extra;
    int position, begin;               // what is left of the share, in the line of tiles: [begin, position)
    int b, start, length, low, tiles;  // the sequence that holds position - 1, and where it starts
  } state;

  ATTNKIT_DEVICE MlaWalker(const MlaWideParams& params, int group) : p(params) { state.group = group; }
  ATTNKIT_DEVICE MlaWalker(const MlaWideParams& params, const State& saved) : p(params), state(saved) {}

  // A sequence of length 0 has one tile, all masked: someone must write its output. Past L1, as lens are also read
  // while the previous grid may still change them.
  ATTNKIT_DEVICE static void measure(const MlaWideParams& p, int b, int& length, int& low, int& tiles) {
    length = min(max(load_l2(p.lens + b), 0), p.capacity);
    low = p.window > 0 ? max(0, length - p.Q - p.window + 1) : 0;
    tiles = max(1, static_cast<int>(static_cast<u32>(length + T - 1) / T - static_cast<u32>(low) / T));
  }

  ATTNKIT_DEVICE int begin_of(int g) const { return g * state.share + min(g, state.extra); }

  ATTNKIT_DEVICE int owner(int at) const {
    const int big = state.extra * (state.share + 1), past = at < big ? 0 : big;
    return (past ? state.extra : 0) + mla_divide(at - past, at < big ? state.share + 1 : state.share);
  }

  // Shares of ``total`` tiles, ``most`` of them in the longest sequence.
  ATTNKIT_DEVICE void share_out(int total, int most) {
    int used = max(1, min(p.groups, p.least_tiles > 1 ? mla_divide(total, p.least_tiles) : total));
    const int largest = mla_divide(total + used - 1, used);
    used = mla_divide(total + largest - 1, largest);  // fewer groups, if none has more to do for it
    // Equal sequences are cut into equal pieces where that leaves few groups idle: fewer pieces have to meet.
    if (p.B > 1 && used > p.B && total == most * p.B) {
      const int even = mla_divide(used, p.B) * p.B;
      if ((used - even) * 16 <= used) used = even;
    }
    state.share = mla_divide(total, used);
    state.extra = total - state.share * used;
    state.begin = state.group < used ? begin_of(state.group) : total;
    state.position = state.group < used ? begin_of(state.group + 1) : total;
  }

  ATTNKIT_DEVICE void place() {
    const int lane = threadIdx.x & 31;
    int total = 0, most = 0;
    int length = 0, low = 0, mine = 0;  // of sequence b0 + lane
#pragma unroll 1
    for (int b0 = 0; b0 < p.B; b0 += 32) {
      mine = 0;
      if (b0 + lane < p.B) measure(p, b0 + lane, length, low, mine);
      total += mine;
      most = max(most, mine);
    }
    share_out(__reduce_add_sync(~0u, total), __reduce_max_sync(~0u, most));
    state.b = 0, state.start = 0;
    int before = 0;
#pragma unroll 1
    for (int b0 = 0; p.B > 1 && b0 < p.B; b0 += 32) {
      if (p.B > 32) {
        mine = 0;
        if (b0 + lane < p.B) measure(p, b0 + lane, length, low, mine);
      }
      int sum = mine;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
      }
      const u32 past = __ballot_sync(~0u, before + sum >= state.position);
      if (past) {
        const int at = __ffs(past) - 1;
        state.b = b0 + at;
        state.start = __shfl_sync(~0u, before + sum - mine, at);
        break;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
    const int at = state.b & 31;
    state.length = __shfl_sync(~0u, length, at), state.low = __shfl_sync(~0u, low, at), state.tiles = __shfl_sync(~0u, mine, at);
  }

  // The next piece, but for what relate() says of it.
  ATTNKIT_DEVICE bool step(MlaPiece& piece) {
    if (state.position <= state.begin) return false;
    if (state.position == state.start) {  // every sequence has a tile at least
      --state.b;
      measure(p, state.b, state.length, state.low, state.tiles);
      state.start -= state.tiles;
    }
    const int from = max(state.start, state.begin);
    piece.b = state.b;
    piece.length = state.length;
    piece.low = state.low;
    piece.tile = state.low / T + from - state.start;
    piece.tiles = state.position - from;
    state.position = from;
    return true;
  }

  // Which piece of its sequence it is.
  ATTNKIT_DEVICE void relate(MlaPiece& piece) const {
    piece.index = 0, piece.count = 1, piece.first = state.group, piece.early = 0;
    if (piece.tiles == state.tiles) return;
    piece.first = owner(state.start);
    piece.index = state.group - piece.first;
    piece.count = owner(state.start + state.tiles - 1) - piece.first + 1;
    piece.early = begin_of(piece.first) != state.start;
  }

  ATTNKIT_DEVICE bool next(MlaPiece& piece) {
    if (!step(piece)) return false;
    relate(piece);
    return true;
  }
};

}  // namespace attnkit
