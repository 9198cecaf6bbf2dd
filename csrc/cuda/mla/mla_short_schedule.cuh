// Who reads which keys in the short latent decode: divided on the device, from lens.
#pragma once
#include "mla_wide_schedule.cuh"

namespace attnkit {

// One group's part: one tile or two of one sequence.
struct MlaShortPiece {
  int b, length, low;  // low: first visible key
  int tile, tiles;
  int index, count, first;  // which piece of its sequence, of how many; the group of piece 0
  int seen;                 // the length by which it was found, of sequence ``lane``

  // Groups take pieces in order; pieces have one tile where there are groups enough. False: nothing is left for this group.
  ATTNKIT_DEVICE bool find(const MlaWideParams& p, int group) {
    const int lane = threadIdx.x & 31;
    if (p.B == 1) {  // the same, sooner
      int all;
      MlaWalker::measure(p, 0, length, low, all);
      const int shift = all > p.groups;
      b = 0, first = 0, index = group, count = (all + shift) >> shift;
      tile = low / 64 + (index << shift), tiles = min(1 << shift, all - (index << shift));
      return tiles > 0;
    }
    int len = 0, from = 0, mine = 0, total = 0;  // of sequence b0 + lane
#pragma unroll 1
    for (int b0 = 0; b0 < p.B; b0 += 32) {
      mine = 0;
      if (b0 + lane < p.B) MlaWalker::measure(p, b0 + lane, len, from, mine);
      total += mine;
    }
    seen = len;
    const int shift = __reduce_add_sync(~0u, total) > p.groups;  // log2 of a piece's tiles
    int before = 0;
#pragma unroll 1
    for (int b0 = 0; b0 < p.B; b0 += 32) {
      if (p.B > 32) {
        mine = 0;
        if (b0 + lane < p.B) MlaWalker::measure(p, b0 + lane, len, from, mine);
      }
      const int pieces = (mine + shift) >> shift;
      int sum = pieces;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
      }
      const u32 past = __ballot_sync(~0u, before + sum > group);
      if (past) {
        const int at = __ffs(past) - 1;
        b = b0 + at;
        count = __shfl_sync(~0u, pieces, at);
        first = before + __shfl_sync(~0u, sum, at) - count;
        length = __shfl_sync(~0u, len, at), low = __shfl_sync(~0u, from, at);
        index = group - first;
        tiles = min(1 << shift, __shfl_sync(~0u, mine, at) - (index << shift));
        tile = low / 64 + (index << shift);
        return true;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
    return false;
  }

  // Whether lens, of 2 to 32 sequences, are no longer those by which it was found.
  ATTNKIT_DEVICE bool stale(const MlaWideParams& p) const {
    const int lane = threadIdx.x & 31;
    int length = seen, from, tiles;
    if (lane < p.B) MlaWalker::measure(p, lane, length, from, tiles);
    return __any_sync(~0u, length != seen);
  }
};

}  // namespace attnkit
