// A row of a longer top-k or of min-p, by its peaks: counts in cells of equal width say from which logit on there are
// k tokens and few more; the chunks of four neighbours that reach it are read again and their tokens listed. Counts and masses of the
// listed in cells of their own then decide nearly every draw: who lies below the cell of the k-th or of top-p's end is not drawn, who
// is drawn above both is kept. The few that lie in these cells are settled by keys and whole masses.
#pragma once
#include "sample_any_sm90.cuh"
#include "sample_counted_sm90.cuh"
#include "sample_hot_sm90.cuh"
#include "sample_rank_sm90.cuh"
#include "sample_topk_sm90.cuh"

namespace attnkit::sampling {

constexpr int kLongCells = 4 * kTopkThreads;

// Cells of equal width from a logit down.
struct Cells {
  float high, per_logit;
  bool good;  // there are some

  ATTNKIT_DEVICE Cells(float high, float spread)
      : high(high), per_logit(__fdividef(kLongCells - 1, spread)), good(spread > 1e-30f && spread < 1e30f) {}
  // Of no logit above ``high``, at most ``last``.
  ATTNKIT_DEVICE u32 of(float x, u32 last) const {
    return min(__float_as_uint(__fmaf_rn(high - x, per_logit, 8388608.0f)), 0x4b000000u + last) - 0x4b000000u;
  }
  ATTNKIT_DEVICE u32 within(float x) const { return of(x, kLongCells - 1u); }
};

// The same of any logit: the first cell has all above it, too.
struct OpenCells : Cells {
  using Cells::Cells;
  ATTNKIT_DEVICE u32 within(float x) const { return of(fminf(x, high), kLongCells - 1u); }
};

ATTNKIT_DEVICE void count_one(const u32* counters, u32 cell) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(smem_address(counters) + 4 * cell) : "memory");
}

// All bits of each half of a pair that is at least ``b``'s.
template <int Type>
ATTNKIT_DEVICE u32 at_least(u32 a, u32 b) {
  u32 r;
  if constexpr (Type == kF16) {
    asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
}

// A lane's sum and those of the lanes before it.
ATTNKIT_DEVICE u32 sum_upto(u32 x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    asm volatile("{\n.reg .pred is;\n.reg .b32 other;\nshfl.sync.up.b32 other|is, %0, %1, 0, 0xffffffff;\n@is add.u32 %0, %0, other;\n}"
                 : "+r"(x)
                 : "r"(step));
  }
  return x;
}

// ``Width`` neighbouring logits as they are in memory; anything where they are not asked for.
template <int Type, int Width>
struct Item {
  u32 w[Width == 1 ? 1 : Type == kF32 ? 4 : 2];

  ATTNKIT_DEVICE void ask(const char* from, bool is) {
    const u32 given = is;
    if constexpr (Width == 1 && Type == kF32) {
      asm volatile("{\n.reg .pred is;\nsetp.ne.u32 is, %2, 0;\n@is ld.global.b32 %0, [%1];\n}" : "=r"(w[0]) : "l"(from), "r"(given));
    } else if constexpr (Width == 1) {
      asm volatile("{\n.reg .pred is;\nsetp.ne.u32 is, %2, 0;\n@is ld.global.u16 %0, [%1];\n}" : "=r"(w[0]) : "l"(from), "r"(given));
    } else if constexpr (Type == kF32) {
      asm volatile(
          "{\n.reg .pred is;\nsetp.ne.u32 is, %5, 0;\n"
          "@is ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
          : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
          : "l"(from), "r"(given));
    } else {
      asm volatile("{\n.reg .pred is;\nsetp.ne.u32 is, %3, 0;\n@is ld.global.v2.b32 {%0, %1}, [%2];\n}"
                   : "=r"(w[0]), "=r"(w[1])
                   : "l"(from), "r"(given));
    }
  }
  ATTNKIT_DEVICE float logit(int j) const {
    if constexpr (Type == kF32) return __uint_as_float(w[j]);
    const float2 two = unpack(w[j / 2], Type == kBf16);
    return j % 2 == 0 ? two.x : two.y;
  }
};

template <bool Penalised>
struct ListedChunk {
  using Is = u16;
};
template <>
struct ListedChunk<true> {
  using Is = u32;
};

template <int Type, bool Penalised = false>
struct LongRow {
  static constexpr int kMost = 8192, kBytes = Type == kF32 ? 4 : 2;
  using Listed = typename ListedChunk<Penalised>::Is;
  static constexpr u32 kSeen = 1u << 16;
  // Shared memory; peaks of chunks follow, with penalties the groups' words, and in their place, once chunks are listed, the words of
  // tokens. Mirrors LONG_BYTES in attnkit/backends/cuda/builds/sampling.py.
  struct alignas(16) Shared {
    AnyShared any;
    union {
      u64 keys[kMost];
      Raw<Type> peaks[kMost * 8 / sizeof(Raw<Type>)];  // until chunks are listed; without penalties
    };
    union {
      Listed listed[kMost];  // chunks: a quarter of their first token, and with penalties whether there is more to read than logits
      Candidate candidates[kCandidates];
    };
    u32 tokens_in[kLongCells], masses[kLongCells + 4];  // of the listed; counts of peaks where masses will be
    uint2 range[kTopkWarps];                            // of peaks, as keys
    u64 bests[kTopkWarps], of_bests[kTopkWarps];        // scores, and the keys of whose they are
    u32 sums[2][kTopkWarps], mass_sums[kTopkWarps];
    u32 cell, upto, inside;  // where the k-th is, how many lie in cells up to that, and in it
    int n, n_listed, n_inside;
    Philox noise;
  };
  static_assert(sizeof(Shared) == (Penalised ? 117664 : 101280), "LONG_BYTES");
  const SampleParams& p;
  Shared& s;
  u32* const behind;  // peaks of a group's chunks (two words), or a group's word, or a token's
  AnyRow<Type, Penalised, true> any;
  const LaneMass mass;  // of top-p without top-k
  const int list = 0;   // where the listed are among the keys

  // By all, before the row is read, or with penalties after it: what is counted is zero.
  ATTNKIT_DEVICE static void open(Shared& s, u64 seed, u64 offset) {
    const int t = static_cast<int>(threadIdx.x);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint4*>(s.tokens_in)[t] = zero, reinterpret_cast<uint4*>(s.masses)[t] = zero;
    if (t == 0) {
      s.n = s.n_listed = s.n_inside = 0, s.cell = kLongCells;
      s.noise = Philox(seed, offset, kOfTokens);
    }
  }

  // ---- over all threads ----

  // The least and the largest of all threads' largest logits before temperature; no -inf if there is a number, NaN if there is one.
  ATTNKIT_DEVICE static float2 range_of(Shared& s, float mine) {
    const u32 lane = lane_id(), key = order_key(mine), high = __reduce_max_sync(0xffffffffu, key);
    const u32 low = __reduce_min_sync(0xffffffffu, mine > negative_infinity() ? key : ~0u);
    if (lane == 0) s.range[threadIdx.x / 32] = make_uint2(low, high);
    __syncthreads();
    const uint2 range = s.range[lane % kTopkWarps];
    return make_float2(order_value(__reduce_min_sync(0xffffffffu, range.x)), order_value(__reduce_max_sync(0xffffffffu, range.y)));
  }

  // Where a lane's n go among all: after those of the lanes before it, and of warps that came before.
  ATTNKIT_DEVICE int place_of(u32 n, int* all) const {
    const u32 upto = sum_upto(n);
    int at = 0;
    if (any.lane == 31) at = atomicAdd(all, static_cast<int>(upto));
    return __shfl_sync(0xffffffffu, at, 31) + static_cast<int>(upto - n);
  }

  // What the warps before this one have.
  ATTNKIT_DEVICE u32 sum_before_warp(const u32* sums) const {
    return __reduce_add_sync(0xffffffffu, any.lane < any.warp ? sums[any.lane % kTopkWarps] : 0);
  }

  // Which cell the k-th of what is counted is in. ``before``: what precedes the thread's four.
  ATTNKIT_DEVICE void find_cell(u32 k, uint4 counts, u32 before) const {
    const u32 four[4] = {counts.x, counts.y, counts.z, counts.w};
    const u32 two = before + counts.x + counts.y, upto[4] = {before + counts.x, two, two + counts.z, two + counts.z + counts.w};
    if (before >= k || upto[3] < k) return;
    const int j = (upto[0] < k) + (upto[1] < k) + (upto[2] < k);
    s.cell = 4 * threadIdx.x + j, s.upto = one_of(upto, j), s.inside = one_of(four, j);
  }

  // ---- the list ----

  // f(four peaks, which of this thread's fours) for those that it kept.
  template <class F>
  ATTNKIT_DEVICE void for_fours(F&& f) const {
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x), n = 0; i < p.blocks * 32; i += kTopkThreads, ++n) {
      float x[4];
      if constexpr (Penalised) {
        const uint4 four = reinterpret_cast<const uint4*>(behind)[i];
        x[0] = TwoPeaks::of(four.x), x[1] = TwoPeaks::of(four.y), x[2] = TwoPeaks::of(four.z), x[3] = TwoPeaks::of(four.w);
      } else {
        widen_four<Type>(s.peaks[i], x);
      }
      f(x, n);
    }
  }
  // f(key) for all peaks.
  template <class F>
  ATTNKIT_DEVICE void for_all(F&& f) const {
    for_fours([&](const float(&x)[4], int n) {
#pragma unroll
      for (int u = 0; u < 4; ++u) f(pack_best(x[u], 4 * n + u));
    });
  }

  // From which logit on there are k tokens, before temperature: as many as groups whose peak reaches it.
  ATTNKIT_DEVICE float bound(u32 k, float2 range) const {
    if (Penalised) range = make_float2(TwoPeaks::held(range.x), TwoPeaks::held(range.y));
    // Some peaks in three reach what the least of all threads' largest is.
    const float spread = range.y - range.x;
    const Cells cells(range.y, k * 6 <= static_cast<u32>(p.blocks) * (kBlock / 16) ? spread : 2.0f * spread);
    if (cells.good) {
      // Those below all cells are counted in one more: no branch.
      for_fours([&](const float(&x)[4], int) {
#pragma unroll
        for (int u = 0; u < 4; ++u) count_one(s.masses, cells.of(x[u], kLongCells));
      });
      __syncthreads();
      const uint4 counts = reinterpret_cast<const uint4*>(s.masses)[threadIdx.x];
      reinterpret_cast<uint4*>(s.masses)[threadIdx.x] = make_uint4(0, 0, 0, 0);
      const u32 four = counts.x + counts.y + counts.z + counts.w, upto = sum_upto(four);
      if (any.lane == 31) s.sums[0][any.warp] = upto;
      __syncthreads();
      find_cell(k, counts, sum_before_warp(s.sums[0]) + upto - four);
      __syncthreads();
      // Half a cell to where it ends, and what rounding does.
      if (s.cell < kLongCells && s.upto <= 2 * k) {
        return reached(range.y - (static_cast<float>(s.cell) + 0.51f) * __fdividef(1.0f, cells.per_logit));
      }
    }
    const u64 last = any.find_last(k, 40, *this);
    return reached(order_value(high_word(last)));
  }
  // What a token may be that is held as this.
  ATTNKIT_DEVICE static float reached(float x) {
    const float from = TopkRow<Type, Penalised>::below(x);
    if (!Penalised) return from;
    return from < -0.9f * TwoPeaks::kMostHeld ? -kF32Max : from - fabsf(from) * TwoPeaks::kRounded - 1e-36f;
  }

  // Lists the tokens from ``from`` on, before temperature, and their ids; their chunks are read again. False if there is no room.
  ATTNKIT_DEVICE bool collect(float from) const {
    const u32 least = Type == kF16 ? pack_f16(from, from) : pack_bf16(from, from);
#pragma unroll 1
    for (int block = any.warp; block < p.blocks; block += 4 * kTopkWarps) {
      if constexpr (Penalised) {
        list_chunks_of_words(block, from);
      } else {
        list_chunks(block, least);
      }
    }
    __syncthreads();
    if (s.n_listed > kMost) return false;
    if constexpr (Penalised) {
      if (s.n_listed <= 3 * kTopkThreads) {
        list_penalised<3>(from);
      } else {
        list_penalised<4>(from);
      }
    } else if (!whole_chunks()) {
      list_tokens<1, 8>(from);
    } else if (s.n_listed <= 3 * kTopkThreads) {
      list_tokens<4, 3>(from);
    } else {
      list_tokens<4, 4>(from);
    }
    __syncthreads();
    return s.n <= kMost;
  }

  ATTNKIT_DEVICE bool whole_chunks() const { return Penalised || (any.r.logits_wide && p.V % 4 == 0); }
  // Each listed token's word.
  ATTNKIT_DEVICE u32* words() const { return behind; }

  // Four of a warp's blocks: a bit for each chunk, then one by one.
  ATTNKIT_DEVICE void list_chunks(int block, u32 least) const {
    u32 found = 0, others = 0;  // chunks 0 and 1; 2 and 3
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int one = block + i / 4 * kTopkWarps;
      if (one < p.blocks) {
        const uint2 four = reinterpret_cast<const uint2*>(behind)[(one * 4 + i % 4) * 32 + any.lane];
        found |= at_least<Type>(four.x, least) & 0x10001u << i;
        others |= at_least<Type>(four.y, least) & 0x10001u << i;
      }
    }
    const u32 n = __popc(found) + __popc(others);
    int at = place_of(n, &s.n_listed);
    if (at + static_cast<int>(n) > kMost) return;
    u32 first = block * (kBlock / 4) + any.lane;
#pragma unroll 1
    for (int end = at + static_cast<int>(n); at < end; ++at) {
      if (found == 0) found = others, first += 2 * kChunk / 4;
      const u32 bit = __ffs(found) - 1;
      found &= found - 1;
      const u32 chunk = first + (bit / 4 & 3u) * (kTopkWarps * kBlock / 4) + (bit & 3u) * (kPiece / 4) + (bit / 16) * (kChunk / 4);
      s.listed[at] = static_cast<u16>(chunk);
    }
  }

  // The same of groups' words: the chunk of the largest, and the other three where one of them may reach the bound, too.
  ATTNKIT_DEVICE void list_chunks_of_words(int block, float from) const {
    const float held = TwoPeaks::held(from);
    u32 firsts = 0, others = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int one = block + q * kTopkWarps;
      if (one >= p.blocks) continue;
      const uint4 four = reinterpret_cast<const uint4*>(behind)[one * 32 + any.lane];
      const u32 w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        firsts |= TwoPeaks::of(w[j]) >= held ? 1u << (4 * q + j) : 0;
        others |= !(TwoPeaks::second_of(w[j]) < from) ? 1u << (4 * q + j) : 0;
      }
    }
    others &= firsts;
    const u32 n = __popc(firsts) + 3 * __popc(others);
    int at = place_of(n, &s.n_listed);
    if (at + static_cast<int>(n) > kMost) return;
#pragma unroll 1
    for (; firsts != 0; firsts &= firsts - 1) {
      const u32 bit = __ffs(firsts) - 1, one = block + bit / 4 * kTopkWarps;
      const u32 word = behind[(one * 32 + any.lane) * 4 + bit % 4];
      const u32 chunk = one * (kBlock / 4) + bit % 4 * (kPiece / 4) + any.lane;
      const u32 end = (others >> bit & 1) != 0 ? 4 : 1;
#pragma unroll 1
      for (u32 u = 0; u < end; ++u) {
        const u32 c = (word + u) & 3u;
        s.listed[at++] = static_cast<Listed>((chunk + c * (kChunk / 4)) | (TwoPeaks::seen_in(word, c) ? kSeen : 0));
      }
    }
  }

  // ``Ahead`` chunks at a time, with what comes with them; their words are worked out meanwhile.
  template <int Ahead>
  ATTNKIT_DEVICE void list_penalised(float from) const {
    const int chunks = s.n_listed;
    const Philox noise = s.noise;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i - any.lane < chunks; i += Ahead * kTopkThreads) {
      ChunkAsked<Type, true> asked[Ahead];
      int v[Ahead];
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        // What lies past the end of the list is somewhere in shared memory.
        const u32 listed = s.listed[i + u * kTopkThreads];
        v[u] = i + u * kTopkThreads < chunks ? static_cast<int>(4 * (listed & 0xffffu)) : p.V;
        asked[u].ask(any.r, v[u], p.V, (listed & kSeen) != 0);
      }
      u32 w[Ahead][4];
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        if (i - any.lane + u * kTopkThreads < chunks) noise.words(static_cast<u32>(v[u]) / 4, w[u]);
      }
      float x[Ahead][4];
      u32 n = 0;
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        asked[u].use(x[u], any.r, any.o, v[u], p.V);
#pragma unroll
        for (int j = 0; j < 4; ++j) n += x[u][j] >= from ? 1 : 0;
      }
      __syncwarp();
      int at = place_of(n, &s.n);
      if (at + static_cast<int>(n) > kMost) continue;
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!(x[u][j] >= from)) continue;
          s.keys[at] = static_cast<u64>(__float_as_uint(x[u][j])) << 32 | static_cast<u32>(v[u] + j);
          words()[at++] = w[u][j];
        }
      }
    }
  }

  // ``Width`` neighbours of a chunk at a time, ``Ahead`` of them on their way; a whole chunk's words are worked out meanwhile.
  template <int Width, int Ahead>
  ATTNKIT_DEVICE void list_tokens(float from) const {
    constexpr u32 kOf = 4 / Width;
    const u32 inside = threadIdx.x % kOf * Width, items = s.n_listed * kOf;
    const char* const row = any.r.logits + inside * kBytes;
    const Philox noise = s.noise;
#pragma unroll 1
    for (u32 i = threadIdx.x; i - any.lane < items; i += Ahead * kTopkThreads) {
      const u16* const listed = s.listed + i / kOf;
      Item<Type, Width> x[Ahead];
      u32 v[Ahead];
      float bar[Ahead];
#pragma unroll
      for (u32 u = 0; u < Ahead; ++u) {
        bool is = i + u * kTopkThreads < items;
        // What lies past the end of the list is somewhere in shared memory.
        v[u] = 4u * listed[u * (kTopkThreads / kOf)];
        is = is && (Width == 4 || v[u] + inside < static_cast<u32>(p.V));
        x[u].ask(row + v[u] * static_cast<u32>(kBytes), is);
        bar[u] = is ? from : __uint_as_float(0x7fffffffu);
      }
      u32 w[Ahead][4];
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        if (Width == 4 && i - any.lane + u * kTopkThreads < items) noise.words(v[u] / 4, w[u]);
      }
      u32 n = 0;
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
#pragma unroll
        for (int j = 0; j < Width; ++j) {
          asm("{\n.reg .pred is;\nsetp.ge.f32 is, %1, %2;\n@is add.u32 %0, %0, 1;\n}" : "+r"(n) : "f"(x[u].logit(j)), "f"(bar[u]));
        }
      }
      const int at = place_of(n, &s.n);
      if (at + static_cast<int>(n) > kMost) continue;
      u32 to = smem_address(s.keys + at), word_to = smem_address(words() + at);
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
#pragma unroll
        for (int j = 0; j < Width; ++j) {
          asm volatile(
              "{\n.reg .pred is;\nsetp.ge.f32 is, %2, %3;\n@is st.shared.v2.b32 [%0], {%4, %2};\n@is add.u32 %0, %0, 8;\n"
              "@is st.shared.b32 [%1], %5;\n@is add.u32 %1, %1, 4;\n}"
              : "+r"(to), "+r"(word_to)
              : "f"(x[u].logit(j)), "f"(bar[u]), "r"(v[u] + inside + j), "r"(w[u][j])
              : "memory");
        }
      }
    }
  }

  // So many make a mass of one: all of the listed weigh less than 2^32.
  ATTNKIT_DEVICE float units() const { return __uint_as_float(127 + __clz(s.n) << 23); }
  ATTNKIT_DEVICE static u32 mass_of(float logit, float top, float unit) {
    return __float2uint_rz(exp2_fast((logit - top) * kLog2e) * unit);
  }
  // What whose mass is.
  struct Scale {
    float top, unit;
  };

  // Listed tokens get their keys; they are counted and weighed if ``cells`` are.
  ATTNKIT_DEVICE void make_keys(const Cells& cells, bool weigh, float top) const {
    const int n = s.n;
    const float unit = units();
    const bool whole = whole_chunks();
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kTopkThreads) {
      const u64 one = s.keys[i];
      const float logit = warm(__uint_as_float(high_word(one)), any.o);
      s.keys[i] = pack_best(logit, static_cast<int>(one));
      if (!cells.good) continue;
      const u32 cell = cells.within(logit);
      count_one(s.tokens_in, cell);
      if (weigh) atomicAdd(s.masses + cell, mass_of(logit, top, unit));
      if (!whole) words()[i] = s.noise.word(static_cast<int>(one));
    }
    __syncthreads();
  }

  // Where the k-th of the listed is; masses become what lies before each cell.
  ATTNKIT_DEVICE void add_up(u32 k) const {
    const int t = static_cast<int>(threadIdx.x);
    const uint4 counts = reinterpret_cast<const uint4*>(s.tokens_in)[t], masses = reinterpret_cast<const uint4*>(s.masses)[t];
    const u32 n = counts.x + counts.y + counts.z + counts.w, mass = masses.x + masses.y + masses.z + masses.w;
    const u32 upto = sum_upto(n), mass_upto = sum_upto(mass);
    if (any.lane == 31) s.sums[1][any.warp] = upto, s.mass_sums[any.warp] = mass_upto;
    __syncthreads();
    const u32 before = sum_before_warp(s.sums[1]) + upto - n, mass_before = sum_before_warp(s.mass_sums) + mass_upto - mass;
    find_cell(k, counts, before);
    reinterpret_cast<uint4*>(s.masses)[t] =
        make_uint4(mass_before, mass_before + masses.x, mass_before + masses.x + masses.y, mass_before + mass - masses.w);
    if (t == kTopkThreads - 1) s.masses[kLongCells] = mass_before + mass;
    __syncthreads();
  }

  // ---- the draw ----

  // The key of the best draw of tokens after key ``limit`` in cells up to that of the k-th, those that top-p leaves out left out: ``end``
  // says from which mass before it on. 0 if there is none. By all.
  ATTNKIT_DEVICE u64 draw_by_cells(const Cells& cells, float end, float least, u64 limit) const {
    const u32 last = s.cell;
    const int n = s.n;
    u64 best = 0, own = 0;
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kTopkThreads) {
      const u64 key = s.keys[i];
      const float logit = any.logit_of(key);
      const u32 cell = cells.within(logit);
      const u64 score = pack_best(noisy(logit, words()[i]), best_id(key));
      const bool is = cell <= last && static_cast<float>(s.masses[cell]) < end && logit >= least && key > limit;
      if (is && score > best) best = score, own = key;
    }
    const u64 most = warp_max(best);
    if (best == most) s.bests[any.warp] = best, s.of_bests[any.warp] = own;
    __syncthreads();
    best = s.bests[any.lane % kTopkWarps];
    return s.of_bests[__ffs(__ballot_sync(0xffffffffu, best == warp_max(best))) - 1];
  }

  // What lies before a key in its cell, in units. By all.
  template <class Cells>
  ATTNKIT_DEVICE u32 mass_in_cell(const Cells& cells, const Scale& scale, u64 own, u32 its) const {
    u32 mass = 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < s.n; i += kTopkThreads) {
      const u64 key = s.keys[list + i];
      if (key > own && cells.within(any.logit_of(key)) == its) mass += mass_of(any.logit_of(key), scale.top, scale.unit);
    }
    mass = __reduce_add_sync(0xffffffffu, mass);
    if (any.lane == 0) s.sums[0][any.warp] = mass;
    __syncthreads();
    return __reduce_add_sync(0xffffffffu, any.lane < kTopkWarps ? s.sums[0][any.lane % kTopkWarps] : 0);
  }

  // The k-th key; its cell is known.
  template <class Cells>
  ATTNKIT_DEVICE u64 last_of_cell(const Cells& cells, u32 k) const {
    const u32 inside = s.inside, need = k - (s.upto - inside);
    if (inside > kCandidates) return any.find_last(k, 0, any);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < s.n; i += kTopkThreads) {
      const u64 key = s.keys[list + i];
      if (cells.within(any.logit_of(key)) == s.cell) s.candidates[atomicAdd(&s.n_inside, 1)] = Candidate{key, 0};
    }
    __syncthreads();
    const Ranked r = rank_candidates<kTopkThreads>(s.candidates, static_cast<int>(inside));
    if (r.is && r.before == need - 1) s.any.own = r.own.key;
    __syncthreads();
    return s.any.own;
  }

  // What weighs so much before it is surely left out by top-p (y), and kept if it is less than x: in units. What the k first weigh is
  // known but for those in the cell of the k-th, whose masses differ little. Tokens are cut to whole units, and sums are rounded here.
  ATTNKIT_DEVICE float2 top_p_end(const Cells& cells, const Scale& scale, float share, u32 k) const {
    const float per_cell = kLog2e * __fdividef(1.0f, cells.per_logit), cell = static_cast<float>(s.cell), unit = scale.unit;
    const float need = static_cast<float>(k - (s.upto - s.inside)), before = static_cast<float>(s.masses[s.cell]);
    const float over = (cells.high - scale.top) * kLog2e, n = static_cast<float>(s.n);
    const float light = exp2_fast(over - (cell + 0.51f) * per_cell) * unit * 0.9999f;
    const float heavy = exp2_fast(over - fmaxf(cell - 0.51f, 0.0f) * per_cell) * unit * 1.0001f;  // none lies above all cells
    return make_float2(share * (before + need * light) * 0.999999f - 2.0f - n, share * (before + need * heavy + n) * 1.000001f + 2.0f);
  }

  // A row of top-k whose tokens are listed.
  ATTNKIT_DEVICE int draw_listed(u32 k, const TopkOptions& options, float top, float from) const {
    const Cells cells(top, top - warm(from, any.o));
    const bool weigh = options.share < 1.0f;
    const float least = options.ratio > 0.0f ? __fadd_rn(top, logf(options.ratio)) : -kF32Max;
    make_keys(cells, weigh, top);
    if (!cells.good) return any.finish(k, any.find_last(k, 0, any), options.share, options.ratio, top, 0, Between{0, 0});
    add_up(k);
    return draw_of_cells(cells, Scale{top, units()}, k, options, top, [&](float end, u64 limit) { return draw_by_cells(cells, end, least, limit); });
  }

  // The same once they are counted and weighed by cell. draw_before(end, limit): as draw_by_cells.
  template <class Cells, class Draw>
  ATTNKIT_DEVICE int draw_of_cells(const Cells& cells, const Scale& scale, u32 k, const TopkOptions& options, float top, Draw&& draw_before) const {
    const bool weigh = options.share < 1.0f;
    const float2 end = weigh ? top_p_end(cells, scale, options.share, k) : make_float2(kF32Max, kF32Max);
    u64 drawn = 0;
#pragma unroll 1
    while (true) {
      drawn = draw_before(end.y, drawn);
      if (drawn == 0) return -1;
      const u32 cell = cells.within(any.logit_of(drawn));
      if (cell == s.cell && s.upto != k) break;
      if (!weigh || static_cast<float>(s.masses[cell + 1]) < end.x) return best_id(drawn);
      const u32 before = s.masses[cell] + mass_in_cell(cells, scale, drawn, cell);
      if (before == 0 || static_cast<float>(before) < end.x) return best_id(drawn);
      if (static_cast<float>(before) < end.y) break;
    }
    return any.finish(k, last_of_cell(cells, k), options.share, options.ratio, top, drawn, Between{0, 0});
  }

  // ``range``: before temperature.
  ATTNKIT_DEVICE int draw(u32 k, const TopkOptions& options, float top, float2 range, int b) {
    float from = negative_infinity();
    if (k != 0) {
      if (k <= kMost / 2 && k <= static_cast<u32>(p.blocks) * (kBlock / 16)) from = bound(k, range);
    } else {
      from = TopkRow<Type, Penalised>::below(__fadd_rn(top, logf(options.ratio)) * any.o.t);
    }
    // With penalties and a mask fewer than k may be left: all of them are listed then.
    const bool some = Penalised ? from >= -kF32Max : from > -kF32Max;
    Between enough{0, 0};
    if (mass.wanted) enough = enough_by_lanes(options.share, top);
    if (!some || !collect(from)) {
      if (k == 0) return draw_hot<Type, Penalised>(p, reinterpret_cast<char*>(&s), b, range.y, enough);
      return draw_unlisted<Type, Penalised>(p, s.any, b, k, top, enough);
    }
    any.list = s.keys, any.listed = s.n;
    if (k != 0) return draw_listed(Penalised ? min(k, static_cast<u32>(s.n)) : k, options, top, from);
    make_keys(Cells(top, 0.0f), false, top);
    return any.finish(0, 1, options.share, options.ratio, top, 0, enough);
  }

  // What top-p wants of the row, by the sums of floats that the lanes took of it: to a margin for rounding. None if they are no numbers.
  ATTNKIT_DEVICE Between enough_by_lanes(float share, float top) const {
    const float over = mass.over(top), margin = 3e-5f + 1e-6f * fabsf(top);
    const bool bad = __syncthreads_or(!(over < 1e6f)) != 0 || !(margin < 0.01f);
    const double all = static_cast<double>(share) * static_cast<double>(any.sum_of(bad ? 0 : static_cast<u64>(over * kMassOne)));
    if (bad) return Between{0, 0};
    return Between{static_cast<u64>(all * (1.0 - margin)), static_cast<u64>(all * (1.0 + margin)) + 2};
  }

  // ``mine``: a thread's largest peak.
  ATTNKIT_DEVICE void choose(u32 k, const TopkOptions& options, float mine, int b) {
    const float2 range = range_of(s, mine);
    const float top = warm(range.y, any.o);
    int id = -1;
    if (top > negative_infinity()) id = draw(k, options, top, range, b);
    if (threadIdx.x == 0) p.tokens[b] = max(id, 0), p.valid[b] = id >= 0;
  }
};

}  // namespace attnkit::sampling
