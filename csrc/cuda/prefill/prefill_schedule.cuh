// Which work is whose: all tiles of a ragged batch in one line, found from cu_q and lens on the device.
//
// Sequences go by the length of their longest tile, and inside a sequence the last and so longest causal tiles first,
// so that what is short fills the gaps at the end. The KV heads of a sequence go in groups whose keys and values fit
// the last shared cache together. Where tiles are few, each is cut into pieces over its keys, and each piece is an
// item of the line; cut sequences are the first in it.
#pragma once
#include "../common/ptx_sm90.cuh"

namespace attnkit {

constexpr int kMostSequences = 1024;
constexpr int kMostSorted = 256;  // ranks are found by comparing all pairs
constexpr int kMostPieces = 16;
constexpr int kCacheBytes = 16 << 20;  // of keys and values that run side by side

struct alignas(64) PrefillMap {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/prefill.py (PARAMS). Strides in bytes unless said otherwise.
struct PrefillParams {
  PrefillMap q_map, k_map, v_map;
  const char* q;        // [T, Hq, D], read through its map; likewise k and v
  const char* k;
  const char* v;
  const int* pages;     // [B, W], or null: keys stand one after another, sequence b's from cu_k[b]
  const int* lens;      // [B], unless cu_k
  const int* cu_q;      // [B + 1]
  const int* cu_k;      // [B + 1] or null
  const void* sinks;    // [Hq] or null
  char* out;            // [T, Hq, Dv]
  float* lse;           // [T, Hq] or null
  float* partial;       // slots pieces: outputs, then maxima and sums
  int* counters;        // zero between launches: items taken, CTAs that have left, then arrivals [slots, Consumers]
  const char* k_scale;  // of an 8-bit cache, by KV head: float32 or null
  const char* v_scale;
  i64 pages_b;          // in entries
  i64 out_t, out_h;
  i64 k_scale_h, v_scale_h;
  int B, T, Hkv, G, Dv;
  int tile_tokens;      // tokens of a tile: its rows / G
  int g_magic;          // ceil(2^20 / G)
  int page_shift;       // log2 S; 30 without pages
  int capacity;         // W * S, or the rows of k
  int window;           // 0: none
  int causal;
  int sink_type;        // 0 bf16, 1 f16, 4 f32
  int key_bytes;        // of one key and value of one head
  int slots;            // pieces the workspace has room for; 0: tiles are never cut
  float scale, out_scale, softcap;
};

// Which keys some rows of a tile see, [low, high), and which all do, [full_low, full_high).
struct Reach {
  int low, high, full_low, full_high;
};

// One piece of a tile of query tokens of one (sequence, KV head), as it is handed from warp to warp.
struct Tile {
  int h, q0, tokens;        // KV head; the sequence's first row of q, and its query tokens
  int token0;               // first token of the tile
  int length;               // L
  int block_begin, block_end;
  int full_low, full_high;  // keys in [full_low, full_high) are seen by every row
  int width;                // keys of the last block that are needed: 64, or a whole block
  int piece, pieces;        // which of how many pieces of the tile
  int slot0;                // the workspace's slot of its first piece
  int row0;                 // the first key's row (without pages), or the sequence
  int more;                 // 0 in what follows the last item
  int spare;

  ATTNKIT_DEVICE int blocks() const { return block_end - block_begin; }
  // Values of the last block that are needed: where it is the only one, its product is taken whole.
  ATTNKIT_DEVICE int value_width(int block) const { return blocks() == 1 ? block : width; }
};

ATTNKIT_DEVICE int length_of(const PrefillParams& p, int b) {
  const int n = p.cu_k != nullptr ? p.cu_k[b + 1] - p.cu_k[b] : p.lens[b];
  return max(0, min(n, p.capacity));
}

ATTNKIT_DEVICE Reach reach_of(const PrefillParams& p, int length, int tokens, int token0) {
  const int last = min(token0 + p.tile_tokens, tokens) - 1;
  const int first_at = length - tokens + token0, last_at = length - tokens + last;
  Reach r{0, p.causal ? last_at + 1 : length, 0, p.causal ? first_at + 1 : length};
  if (p.window) {
    r.low = max(0, first_at - p.window + 1);
    r.full_low = last_at - p.window + 1;
    if (!p.causal) {
      r.high = min(r.high, last_at + p.window);
      r.full_high = min(r.full_high, first_at + p.window);
    }
  }
  r.high = max(r.high, 0);
  return r;
}

ATTNKIT_DEVICE float load_sink(const PrefillParams& p, int head) {
  if (p.sink_type == 4) return static_cast<const float*>(p.sinks)[head];
  const u16 bits = static_cast<const u16*>(p.sinks)[head];
  if (p.sink_type == 0) return __uint_as_float(static_cast<u32>(bits) << 16);
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

// The line stands in shared memory: by place (sequences sorted), the items before it and whose it is.
template <int BN>
struct WorkLine {
  const PrefillParams& p;
  int* first;  // [B + 1]: items before place i
  u16* whose;  // [B]: sequence, and pieces of its tiles less one in the upper 6 bits

  ATTNKIT_DEVICE WorkLine(const PrefillParams& params, int* items, u16* sequences) : p(params), first(items), whose(sequences) {}

  ATTNKIT_DEVICE int tiles(int b) const { return (p.cu_q[b + 1] - p.cu_q[b] + p.tile_tokens - 1) / p.tile_tokens; }

  ATTNKIT_DEVICE int blocks(int b, int tile) const {
    const int tokens = p.cu_q[b + 1] - p.cu_q[b];
    if (tokens <= 0) return 0;
    const Reach r = reach_of(p, length_of(p, b), tokens, tile * p.tile_tokens);
    return max(0, (r.high + BN - 1) / BN - r.low / BN);
  }

  ATTNKIT_DEVICE int longest(int b) const { return blocks(b, tiles(b) - 1); }

  // All threads of the CTA; ends with a barrier.
  ATTNKIT_DEVICE void arrange() const {
    for (int b = threadIdx.x; b < p.B; b += blockDim.x) first[b] = longest(b);
    __syncthreads();
    const bool sorted = p.B <= kMostSorted;
    for (int b = threadIdx.x; b < p.B; b += blockDim.x) {
      int place = sorted ? 0 : b;
      if (sorted) {
        const int mine = first[b];
        for (int i = 0; i < p.B; ++i) place += first[i] > mine || (first[i] == mine && i < b);
      }
      whose[place] = static_cast<u16>(b);
    }
    __syncthreads();
    if (threadIdx.x < 32) number(sorted && p.slots > 0 ? chunk() : 0);
    __syncthreads();
  }

  ATTNKIT_DEVICE int pieces_of(int b, int chunk) const {
    return chunk ? max(1, (longest(b) + chunk - 1) / chunk) : 1;
  }

  // One warp: how many items stand before each place.
  ATTNKIT_DEVICE void number(int chunk) const {
    const int lane = threadIdx.x;
    int before = 0;
    for (int from = 0; from < p.B; from += 32) {
      const int place = from + lane;
      int items = 0;
      if (place < p.B) {
        const int b = whose[place], pieces = pieces_of(b, chunk);
        items = tiles(b) * p.Hkv * pieces;
        whose[place] = static_cast<u16>(b | (pieces - 1) << 10);
      }
      int sum = items;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (place < p.B) first[place] = before + sum - items;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) first[p.B] = before;
  }

  // One warp: blocks a piece has at most, 0 where tiles stay whole. Weighs, for each number of pieces, the time of the
  // fullest CTA in blocks: two of them go for starting an item, and some for adding pieces up.
  ATTNKIT_DEVICE int chunk() const {
    const int lane = threadIdx.x, grid = gridDim.x;
    float work = 0.f;
    int most = 0;
    for (int b = lane; b < p.B; b += 32) {
      const int n = tiles(b);
      if (n == 0) continue;
      const int last = longest(b);
      work += 0.5f * n * p.Hkv * (last + blocks(b, 0));
      most = max(most, last);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) work += __shfl_xor_sync(~0u, work, step);
    most = __reduce_max_sync(~0u, most);
    if (most < 16) return 0;
    const float even = work / grid;
    const int pieces = lane + 1, size = (most + pieces - 1) / pieces;
    const int rounds = static_cast<int>(ceilf(work / most * pieces / grid - 0.01f));
    const float joining = pieces > 1 ? 4.f + 0.75f * pieces : 0.f;
    const float time = fminf(rounds * (size + 2.f), 1.15f * even + 0.5f * size + size) + joining;
    u32 rank = pieces > kMostPieces || (pieces > 1 && size < 8) ? ~0u : static_cast<u32>(fminf(time, 1e6f) * 64.f) << 5 | lane;
    int best = (__reduce_min_sync(~0u, rank) & 31) + 1;
    for (; best > 1; --best) {  // until the workspace has room
      const int size_now = (most + best - 1) / best;
      int items = 0;
      for (int b = lane; b < p.B; b += 32) {
        const int n = pieces_of(b, size_now);
        if (n > 1) items += tiles(b) * p.Hkv * n;
      }
      if (static_cast<int>(__reduce_add_sync(~0u, items)) <= p.slots) return size_now;
    }
    return 0;
  }

  // Used by a whole warp: every lane calls with the same index and gets the same answer.
  ATTNKIT_DEVICE bool find(int index, Tile& t) const {
    if (index >= first[p.B]) return false;
    int place = 0;
    for (int from = 0; from < p.B; from += 32) {
      const int i = from + threadIdx.x % 32;
      const u32 passed = __ballot_sync(~0u, i < p.B && first[i + 1] <= index);
      place += __popc(passed);
      if (passed != ~0u) break;
    }
    const int b = whose[place] & 1023;
    t.pieces = (whose[place] >> 10) + 1;
    int i = index - first[place];
    t.piece = t.pieces == 1 ? 0 : i % t.pieces;
    t.slot0 = index - t.piece;
    i /= t.pieces;
    t.q0 = p.cu_q[b];
    t.tokens = p.cu_q[b + 1] - t.q0;
    t.length = length_of(p, b);
    t.row0 = p.cu_k != nullptr ? p.cu_k[b] : b;
    const int n = (t.tokens + p.tile_tokens - 1) / p.tile_tokens;
    const int together = max(1, min(p.Hkv, kCacheBytes / p.key_bytes / max(t.length, 1)));
    const int group = i / (together * n), inside = i - group * together * n;
    const int heads = min(together, p.Hkv - group * together), rank = inside / heads;
    t.h = group * together + inside - rank * heads;
    t.token0 = (n - 1 - rank) * p.tile_tokens;
    const Reach r = reach_of(p, t.length, t.tokens, t.token0);
    const int begin = r.low / BN, end = max(begin, (r.high + BN - 1) / BN);
    t.block_begin = begin + (end - begin) * t.piece / t.pieces;
    t.block_end = begin + (end - begin) * (t.piece + 1) / t.pieces;
    t.full_low = r.full_low;
    t.full_high = r.full_high;
    t.width = t.block_end == end && r.high - (end - 1) * BN <= 64 ? 64 : BN;
    t.more = 1;
    return true;
  }

  // The next item for this CTA's producer warp: asked for by one lane, answered when all need it.
  ATTNKIT_DEVICE int ask() const { return threadIdx.x % 32 == 0 ? atomicAdd(p.counters, 1) : 0; }
  ATTNKIT_DEVICE int answer(int asked) const { return __shfl_sync(~0u, asked, 0) + gridDim.x; }

  // The last CTA to leave makes the counters zero for the next launch.
  ATTNKIT_DEVICE void leave() const {
    if (threadIdx.x % 32 != 0) return;
    if (add_release(p.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
      p.counters[0] = 0;
      p.counters[1] = 0;
      __threadfence();
    }
  }
};

}  // namespace attnkit
