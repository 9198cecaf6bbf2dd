// Who reads which keys: work is divided on the device, from lens, by every CTA for itself.
//
// The unit of account is a tile of T keys of one (sequence, head). All tiles stand in one line, ordered by
// sequence, head, key. Default: each CTA takes an equal share of the line, so whatever the lengths are no
// CTA has more than one tile more than another, and a CTA cuts at most the first and the last head it meets
// (stream-K). Batch-invariant: the cuts lie at multiples of a chunk that follows from a sequence's own length.
// Where heads are few, each may have a cluster of CTAs instead.
#pragma once
#include "../common/ptx_sm90.cuh"

namespace attnkit {

struct alignas(64) TensorMap {
  u64 words[16];
};

// Mirrored by attnkit/backends/cuda/decode.py (PARAMS). Strides in bytes; a null pointer is an option left out.
struct DecodeParams {
  TensorMap k_map, v_map;    // (plane, all KV heads, S, P, planes): boxes of up to T slots of HEADS heads of a page; all swizzled
                             // planes of them, or (wide builds) one
  TensorMap q_map;           // wide builds: (D, Hq, Q, B), boxes of one plane of the block_rows rows of one head
  const char* q;             // [B, Q, Hq, D]
  const char* k;             // [P, S, Hkv, D]; read through the maps
  const char* v;             // [P, S, Hkv, DV]
  const int* pages;          // [B, W]
  const int* lens;           // [B]
  const void* sinks;         // [Hq]
  const char* k_scale;       // float [Hkv]
  const char* v_scale;       // float [Hkv]
  const u8* tree;            // bool [B, Q, Q]
  char* out;                 // [B, Q, Hq, DV]
  float* lse;                // [B, Q, Hq]
  float* partial;            // [slots, ROWS, DV] weighted sums, then float2 [2, slots, ROWS]: (max, sum)
  int* counters;             // [2 * slots, words], zero between launches
  i64 q_b, q_i, q_h;
  i64 out_b, out_i, out_h;
  i64 pages_b;
  i64 k_scale_h, v_scale_h;
  i64 tree_b, tree_i, tree_j;
  int B, Q, Hkv, G;          // a build that takes KV heads by twos sees half of them, with groups twice as large
  int heads;                 // KV heads that it takes together
  int page_shift;            // log2 S
  int table_width;           // W
  int capacity;              // W * S
  int window;                // 0: none
  int block_rows;            // rows that one CTA takes together, at most ROWS
  int row_blocks;            // ceil(G * Q / block_rows)
  u32 g_magic;               // ceil(2^20 / G)
  int slots;
  int stages;
  int ahead;                 // tiles a CTA asks of L2 while the grid before it still runs
  int late;                  // tiles a CTA has left to ask for when the next grid may start; -1: it may at once
  int least_tiles;           // a CTA takes no fewer tiles than this, if there are enough for that
  int invariant;             // 1: cuts follow from L alone
  int chunk_least;           // invariant: tiles in a chunk, at least
  int chunk_most;            // invariant: chunks of a (sequence, head), at most
  int io_bf16;               // q and out are bf16 (f16 otherwise)
  int sink_type;             // Type of sinks
  float scale, out_scale, softcap, softcap_inverse;  // softcap 0: none
};

// One stretch of keys of one (sequence, head), handled by one CTA. The producer warp finds it; tiles = 0 is the end.
struct Piece {
  int b, h, block;   // sequence, KV head, which block of the G * Q rows that share the head
  int length;        // L
  int low;           // first visible key
  int tile, tiles;   // first tile, in tiles of T keys from key 0; how many
  int index, count;  // which piece of its (sequence, head), and of how many
  int slot0, step;   // workspace slots: piece 0's; piece i's is slot0 + 1 + step * (i - 1)

  ATTNKIT_DEVICE int slot(int i) const { return i == 0 ? slot0 : slot0 + 1 + step * (i - 1); }
};

// Cluster: CTAs that have a head together; with 1 all CTAs divide the line. Charge: the line holds more than tiles.
template <int T, int Cluster = 1, bool Charge = false>
struct Walker {
  static constexpr int Unit = Charge ? 2 : 1;

  const DecodeParams& p;
  int position, end;  // in the line of tiles
  int b, start;       // the sequence that holds position, and where it starts
  int length, low, tiles;
  int share, extra, cta, ctas;
  float per_tile;     // ctas / total
  int seen;           // what this lane (or thread) last read of lens

  ATTNKIT_DEVICE explicit Walker(const DecodeParams& params) : p(params) {}

  // A sequence of length 0 has one tile, all masked: someone must write its output.
  ATTNKIT_DEVICE static void measure(const DecodeParams& p, int b, int& length, int& low, int& tiles) {
    measure_length(p, p.lens[b], length, low, tiles);
  }

  ATTNKIT_DEVICE static void measure_length(const DecodeParams& p, int given, int& length, int& low, int& tiles) {
    length = min(max(given, 0), p.capacity);
    low = p.window > 0 ? max(0, length - p.Q - p.window + 1) : 0;
    tiles = max(1, (length + T - 1) / T - low / T);
  }

  ATTNKIT_DEVICE int heads() const { return p.Hkv * p.row_blocks; }

  // A head's part of the line, and the tile that a place of it is in. Where pieces are charged for, the line is counted in half tiles,
  // and a short head takes one more: beginning and ending it costs about that.
  ATTNKIT_DEVICE static int units(int tiles) { return Unit * tiles + (Charge && tiles < 16); }
  ATTNKIT_DEVICE int tile_at(int unit) const { return Charge ? min((unit + 1) / 2, tiles) : unit; }

  // Where CTA c begins: floor(c total / ctas), so that equal heads are cut alike.
  ATTNKIT_DEVICE int cut(int c) const { return c * share + static_cast<int>(static_cast<u32>(c) * static_cast<u32>(extra) / static_cast<u32>(ctas)); }

  ATTNKIT_DEVICE int owner(int at) const {
    int c = min(static_cast<int>(static_cast<float>(at) * per_tile), ctas - 1);
    while (cut(c) > at) --c;
    while (c + 1 < ctas && cut(c + 1) <= at) ++c;
    return c;
  }

  ATTNKIT_DEVICE void take_share(int total) {
    ctas = max(1, min(static_cast<int>(gridDim.x), total / (Unit * p.least_tiles)));
    cta = blockIdx.x;
    share = total / ctas;
    extra = total - share * ctas;
    per_tile = static_cast<float>(ctas) / static_cast<float>(max(total, 1));
    position = cta >= ctas ? total : cut(cta);
    end = cta >= ctas ? total : cut(cta + 1);
  }

  ATTNKIT_DEVICE static int sum_up_to_lane(int value) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, value, d);
      if (lane >= d) value += other;
    }
    return value;
  }

  // A cluster has one head, each of its CTAs a stretch of it, some of them none where tiles are fewer.
  ATTNKIT_DEVICE void place_in_cluster() {
    const int unit = blockIdx.x / Cluster;
    b = unit / heads();
    start = unit - b * heads();
    seen = load_l2(p.lens + b);
    measure_length(p, seen, length, low, tiles);
    ctas = min(tiles, Cluster);
    cta = blockIdx.x % Cluster;
    position = min(tiles * cta / ctas, tiles);
    end = min(tiles * (cta + 1) / ctas, tiles);
  }

  ATTNKIT_DEVICE bool next_in_cluster(Piece& piece) {
    piece.b = b;
    piece.h = start / p.row_blocks;
    piece.block = start - piece.h * p.row_blocks;
    piece.length = length;
    piece.low = low;
    piece.tile = low / T + position;
    piece.tiles = end - position;
    piece.index = cta;
    piece.count = ctas;
    piece.slot0 = piece.step = 0;
    position = end;
    return piece.tiles > 0;
  }

  // Finds this CTA's part of the line: each warp for itself, where a lane a sequence is enough.
  ATTNKIT_DEVICE void place_few() {
    if constexpr (Cluster > 1) return place_in_cluster();
    const int lane = threadIdx.x & 31;
    int mine = 0;
    if (lane < p.B) {
      seen = load_l2(p.lens + lane);
      measure_length(p, seen, length, low, tiles);
      mine = units(tiles) * heads();
    }
    const int sum = sum_up_to_lane(mine);
    take_share(__shfl_sync(~0u, sum, 31));
    b = __popc(__ballot_sync(~0u, sum <= position)) & 31;  // past the end of the line: any
    start = __shfl_sync(~0u, sum - mine, b);
    length = __shfl_sync(~0u, length, b);
    low = __shfl_sync(~0u, low, b);
    tiles = __shfl_sync(~0u, tiles, b);
  }

  // The same for any number of sequences, all threads together. ``scratch``: an int for each warp, and two.
  ATTNKIT_DEVICE void place_many(int* scratch, int threads) {
    const int thread = threadIdx.x, warp = thread >> 5, warps = threads >> 5;
    const int each = (p.B + threads - 1) / threads;
    const int first = min(thread * each, p.B), last = min(first + each, p.B);
    int mine = 0;
    for (int i = first; i < last; ++i) {
      seen = load_l2(p.lens + i);
      measure_length(p, seen, length, low, tiles);
      mine += units(tiles);
    }
    mine *= heads();
    const int sum = sum_up_to_lane(mine);
    if ((thread & 31) == 31) scratch[warp] = sum;
    __syncthreads();
    int total = 0, before = 0;
    for (int w = 0; w < warps; ++w) {
      before += w < warp ? scratch[w] : 0;
      total += scratch[w];
    }
    take_share(total);
    int at = before + sum - mine;
    if (position >= at && position < at + mine) {
      for (int i = first; i < last; ++i) {
        measure(p, i, length, low, tiles);
        if (position < at + units(tiles) * heads()) {
          scratch[warps] = i;
          scratch[warps + 1] = at;
          break;
        }
        at += units(tiles) * heads();
      }
    }
    __syncthreads();
    if (position < end) {
      b = scratch[warps];
      start = scratch[warps + 1];
      measure(p, b, length, low, tiles);
    }
  }

  // Whether ``lens`` no longer holds what this lane (or thread) placed by: it was read while its writer may have run.
  ATTNKIT_DEVICE bool stale(int i) const { return i < p.B && load_l2(p.lens + i) != seen; }

  ATTNKIT_DEVICE bool next(Piece& piece) {
    if constexpr (Cluster > 1) return next_in_cluster(piece);
    while (position < end) {
      while (position >= start + units(tiles) * heads()) {
        start += units(tiles) * heads();
        ++b;
        measure(p, b, length, low, tiles);
      }
      const int head = (position - start) / (Charge ? units(tiles) : tiles);
      const int from = start + head * (Charge ? units(tiles) : tiles);
      const int offset = Charge ? tile_at(position - from) : position - from;
      piece.b = b;
      piece.h = p.row_blocks == 1 ? head : head / p.row_blocks;
      piece.block = head - piece.h * p.row_blocks;
      piece.length = length;
      piece.low = low;
      piece.tile = low / T + offset;
      if constexpr (Charge) {
        position = min(end, from + units(tiles));
        piece.tiles = tile_at(position - from) - offset;
        if (piece.tiles == 0) continue;  // only what is charged for was left
      }
      if (!Charge && p.invariant) {
        const int chunk = max(p.chunk_least, (tiles + p.chunk_most - 1) / p.chunk_most);
        const int index = offset / chunk;
        if (offset != index * chunk) {  // the CTA before this one began that chunk
          position = from + min((index + 1) * chunk, tiles);
          continue;
        }
        piece.tiles = min(chunk, tiles - offset);
        piece.index = index;
        piece.count = (tiles + chunk - 1) / chunk;
        piece.slot0 = (b * heads() + head) * p.chunk_most;
        piece.step = 1;
      } else {
        if constexpr (!Charge) piece.tiles = min(tiles - offset, end - position);
        const bool whole = piece.tiles == tiles;
        const int first = whole ? cta : owner(from);
        piece.index = cta - first;
        piece.count = whole ? 1 : owner(from + Unit * tiles - Unit) - first + 1;
        piece.slot0 = 2 * first + 1;  // a CTA ends in at most one head it began, and begins in at most one
        piece.step = 2;
      }
      if constexpr (!Charge) position += piece.tiles;
      return true;
    }
    return false;
  }
};

}  // namespace attnkit
