// Which tile is whose: all tiles of a ragged batch in one line, found from cu_q and lens on the device.
//
// The line goes by rank from the end: first the last tile of every sequence, then the last but one, ...; so the
// longest of causal tiles start first and the shortest fill the gaps. KV heads of one tile stand side by side.
#pragma once
#include "ptx_sm90.cuh"

namespace attnkit {

constexpr int kMostSequences = 1024;

struct alignas(64) PrefillMap {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/prefill.py (PARAMS). Strides in bytes unless said otherwise.
struct PrefillParams {
  PrefillMap q_map, k_map, v_map;
  const char* q;        // [T, Hq, D], read through its map; likewise k and v
  const char* k;
  const char* v;
  const int* pages;     // [B, W]
  const int* lens;      // [B]
  const int* cu_q;      // [B + 1]
  const void* sinks;    // [Hq] or null
  char* out;            // [T, Hq, Dv]
  float* lse;           // [T, Hq] or null
  int* counters;        // [2], zero between launches: tiles taken, CTAs that have left
  i64 pages_b;          // in entries
  i64 out_t, out_h;
  int B, T, Hkv, G, Dv;
  int tile_tokens;      // tokens of a tile: its rows / G
  int page_shift;       // log2 S
  int capacity;         // W * S
  int window;           // 0: none
  int causal;
  int sink_type;        // 0 bf16, 1 f16, 4 f32
  float scale, out_scale, softcap;
};

// One tile of query tokens of one (sequence, KV head), and the blocks of keys it needs.
struct Tile {
  int b, h;
  int q0, tokens;        // the sequence's first row of q, and its query tokens
  int token0;            // first token of the tile
  int length;            // L
  int block_begin, block_end;
  int full_low, full_high;  // keys in [full_low, full_high) are seen by every row
};

ATTNKIT_DEVICE int tiles_of(const PrefillParams& p, int b) {
  return (p.cu_q[b + 1] - p.cu_q[b] + p.tile_tokens - 1) / p.tile_tokens;
}

ATTNKIT_DEVICE float load_sink(const PrefillParams& p, int head) {
  if (p.sink_type == 4) return static_cast<const float*>(p.sinks)[head];
  const u16 bits = static_cast<const u16*>(p.sinks)[head];
  if (p.sink_type == 0) return __uint_as_float(static_cast<u32>(bits) << 16);
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

// Used by whole warps: every lane calls with the same arguments and gets the same answer.
struct WorkLine {
  const PrefillParams& p;
  const int* tiles;

  ATTNKIT_DEVICE WorkLine(const PrefillParams& params, const int* counts) : p(params), tiles(counts) {}

  // Tiles among the first ``rank`` from the end of each sequence.
  ATTNKIT_DEVICE int before(int rank) const {
    int n = 0;
    for (int b = threadIdx.x % 32; b < p.B; b += 32) n += min(tiles[b], rank);
    return __reduce_add_sync(~0u, n);
  }

  ATTNKIT_DEVICE bool find(int index, int block_size, Tile& t) const {
    const int i = index / p.Hkv;
    t.h = index - i * p.Hkv;
    int most = 0;
    for (int b = threadIdx.x % 32; b < p.B; b += 32) most = max(most, tiles[b]);
    most = __reduce_max_sync(~0u, most);
    int low = 0, high = most;  // before(low) <= i < before(high)
    if (i >= before(most)) return false;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (before(middle) <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    int left = i - before(low);
    t.b = 0;
    for (int first = 0; first < p.B; first += 32) {
      const int b = first + threadIdx.x % 32;
      const u32 has = __ballot_sync(~0u, b < p.B && tiles[b] > low);
      const int n = __popc(has);
      if (left < n) {
        t.b = first + __fns(has, 0, left + 1);
        break;
      }
      left -= n;
    }
    describe(tiles[t.b] - 1 - low, block_size, t);
    return true;
  }

  ATTNKIT_DEVICE void describe(int tile, int block_size, Tile& t) const {
    t.q0 = p.cu_q[t.b];
    t.tokens = p.cu_q[t.b + 1] - t.q0;
    t.length = max(0, min(p.lens[t.b], p.capacity));
    t.token0 = tile * p.tile_tokens;
    const int last = min(t.token0 + p.tile_tokens, t.tokens) - 1;
    const int first_at = t.length - t.tokens + t.token0, last_at = t.length - t.tokens + last;
    int high = p.causal ? last_at + 1 : t.length, low = 0;
    t.full_high = p.causal ? first_at + 1 : t.length;
    t.full_low = 0;
    if (p.window) {
      low = max(0, first_at - p.window + 1);
      t.full_low = last_at - p.window + 1;
      if (!p.causal) {
        high = min(high, last_at + p.window);
        t.full_high = min(t.full_high, first_at + p.window);
      }
    }
    high = max(high, 0);
    t.block_begin = low / block_size;
    t.block_end = (high + block_size - 1) / block_size;
  }

  // The next tile for this CTA's producer warp.
  ATTNKIT_DEVICE int take() const {
    int next = 0;
    if (threadIdx.x % 32 == 0) next = atomicAdd(p.counters, 1) + gridDim.x;
    return __shfl_sync(~0u, next, 0);
  }

  // The last CTA to leave makes the counters zero for the next launch.
  ATTNKIT_DEVICE void leave() const {
    if (threadIdx.x % 32 != 0) return;
    if (count_arrival(p.counters + 1) == static_cast<int>(gridDim.x) - 1) {
      p.counters[0] = 0;
      p.counters[1] = 0;
      __threadfence();
    }
  }
};

}  // namespace attnkit
