// A row of a longer top-k of 16-bit logits, whose tokens are listed while it streams by. The first blocks of all warps are a sample of
// the row: a bound that somewhat more than their share of k tokens reach is nearly always reached by k tokens of the row. What reaches
// it is listed with its score, counted and weighed by cells while the next block is on its way, so that little is left to do when the
// row has been read. Where the sample says too much or too little, by what was listed, the row is drawn by its peaks (LongRow), which
// are kept besides.
#pragma once
#include "sample_long_sm90.cuh"

namespace attnkit::sampling {

// Whether rows are so many that the memory brings blocks no faster than tokens are listed.
ATTNKIT_DEVICE bool enough_to_stream() { return gridDim.x >= 56; }

// A warp's chunks of four neighbours that have a token to list, and which of the row they are.
struct StreamedChunks {
  static constexpr int kMost = 96;
  uint2 logits[kMost];
  u16 number[kMost];
};

// What a row's end wants: in shared memory while it streams by, where it takes no registers.
struct StreamedLater {
  u64 seed, offset;
  TopkOptions options;
};

template <int Type>
struct StreamedRow {
  using Long = LongRow<Type>;
  using Shared = typename Long::Shared;
  // Chunks that are expected of a block at the most; how many may wait for more to come, of the first block and later: a lane has one
  // each time, and the third block is asked for before the first one's are listed.
  static constexpr int kExpected = 40, kWaitAtFirst = 28, kWait = 20;
  static constexpr int kRounds = 3;  // blocks that each warp has at the least
  static constexpr int kSample = kTopkWarps * kBlock;
  static constexpr u32 kBoundCells = 256, kLost = 1u << 20;
  static constexpr float kUnit = 1048576.0f;  // so many make a mass of one
  static_assert(sizeof(StreamedChunks) * kTopkWarps <= sizeof(Shared::listed));
  static_assert(2 * kBoundCells == sizeof(AnyShared::counted) / 4);

  const SampleParams& p;
  Shared& s;
  const RowOptions& o;
  const u32 k;
  const bool weigh;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);
  // Tokens to look for in the sample.
  const float wanted;
  // Keys are listed behind the peaks, then scores and cells.
  const int list = p.blocks * 32, room = room_of(p);
  float from = 0.0f;  // a token is listed from here on
  float top = 0.0f;   // of the sample; the mass of that is one
  u32 heavy = 0;      // what the lane has listed weighs, in 4096 units
  int waiting = 0;    // the warp's chunks of which no token is listed yet
  OpenCells cells{0.0f, 0.0f};

  // By all; LongRow::open comes before.
  ATTNKIT_DEVICE StreamedRow(const SampleParams& p, Shared& s, const RowOptions& o, u32 k, bool weigh)
      : p(p), s(s), o(o), k(k), weigh(weigh), wanted(wanted_of(k, share_of_sample(p))) {
    if (threadIdx.x <= kBoundCells / 4) reinterpret_cast<uint4*>(s.any.counted)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  }
  ATTNKIT_DEVICE StreamedLater& later() const { return *reinterpret_cast<StreamedLater*>(&s.any.counted[1][128]); }

  ATTNKIT_DEVICE static float share_of_sample(const SampleParams& p) { return __fdividef(kSample, static_cast<float>(p.V)); }
  // So many in a sample are k in the row but for 4.5 times what chance does.
  ATTNKIT_DEVICE static float wanted_of(u32 k, float share) {
    const float rest = 1.0f - share, mean = static_cast<float>(k) * share;
    return mean + 4.5f * mean * rest * rsqrtf(mean * rest) + 10.0f * rest;
  }

  // Whether there is room for what is expected. The same for all.
  ATTNKIT_DEVICE static bool fits(const SampleParams& p, const RowPointers& r, u32 k) {
    const int room = room_of(p), most = min(kExpected * p.blocks, room - room / 8);
    if (k == 0 || static_cast<int>(k) >= most || p.blocks < kRounds * kTopkWarps || !enough_to_stream() || !r.logits_wide) return false;
    return wanted_of(k, share_of_sample(p)) <= static_cast<float>(most) * share_of_sample(p);
  }
  ATTNKIT_DEVICE static int room_of(const SampleParams& p) { return (Long::kMost - p.blocks * 32) / 2; }

  ATTNKIT_DEVICE uint2* scores() const { return reinterpret_cast<uint2*>(s.keys + list + room); }
  ATTNKIT_DEVICE StreamedChunks& chunks() const { return reinterpret_cast<StreamedChunks*>(s.listed)[warp]; }

  // ---- while it streams by ----

  // Keeps peaks as OnceRow::keep does, and lists. A thread's largest.
  template <class Stream>
  ATTNKIT_DEVICE float keep(Stream& stream, uint2* of_chunks) {
    float mine = negative_infinity();
    u32 least = 0;
#pragma unroll 1
    for (int round = 0; stream.has(round); ++round) {
      Raw<Type> raw[4][4];
#pragma unroll
      for (int i = 0; i < 16; ++i) raw[i / 4][i % 4] = stream.raw[i / 4][i % 4];
      stream.load(round + 1);
      const int block = stream.block_of(round);
      uint2 peaks[4];
      u32 most[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        peaks[u] = chunk_peaks<Type>(raw[u]);
        of_chunks[(block * 4 + u) * 32 + lane] = peaks[u];
        most[u] = max_pairs<Type>(peaks[u].x, peaks[u].y);
      }
      Raw<Type> four;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 a = most[2 * i], b = most[2 * i + 1];
        four.w[i] = max_pairs<Type>(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
      }
      s.peaks[block * 32 + lane] = four;
      const float2 two = unpack(max_pairs<Type>(four.w[0], four.w[1]), Type == kBf16);
      mine = max_nan(mine, max_nan(two.x, two.y));
      if (round == 0) {
        bound(four, mine);
        least = Type == kF16 ? pack_f16(from, from) : pack_bf16(from, from);
      }
      if (cells.good) take(raw, peaks, block, least);
      list_chunks(round == 0 ? kWaitAtFirst : stream.has(round + 1) ? kWait : 0);
    }
    const u32 most = __reduce_max_sync(0xffffffffu, order_key(mine)), weighed = __reduce_add_sync(0xffffffffu, heavy);
    if (lane == 0) s.range[warp] = make_uint2(weighed, most);
    __syncthreads();
    return mine;
  }

  // From which logit on tokens are listed, by the first blocks' peaks, and the cells of listed ones.
  ATTNKIT_DEVICE void bound(const Raw<Type>& four, float mine) {
    // So many groups are expected to hold as many tokens.
    constexpr float kGroups = kSample / 16;
    const u32 groups = static_cast<u32>(kGroups * (1.0f - exp2_fast(wanted * (-kLog2e / kGroups)))) + 1;
    const float2 range = Long::range_of(s, mine);
    const float least = range.x, most = range.y;
    const float spread = most - least, per_logit = __fdividef(kBoundCells - 1, spread);
    float x[4];
    widen_four<Type>(four, x);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      // Those below all cells are counted in one more.
      count_one(&s.any.counted[0][0], min(__float_as_uint(__fmaf_rn(most - x[u], per_logit, 8388608.0f)) - 0x4b000000u, kBoundCells));
    }
    __syncthreads();
    const uint4 a = reinterpret_cast<const uint4*>(s.any.counted)[2 * lane], b = reinterpret_cast<const uint4*>(s.any.counted)[2 * lane + 1];
    const u32 counts[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    u32 sum = 0, upto[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) upto[i] = sum += counts[i];
    const u32 all = sum_upto(sum), reached = __ballot_sync(0xffffffffu, all >= groups);
    u32 cell = 8 * lane;
#pragma unroll
    for (int i = 0; i < 7; ++i) cell += all - sum + upto[i] < groups ? 1 : 0;
    cell = __shfl_sync(0xffffffffu, cell, __ffs(reached) - 1 & 31);
    from = Long::reached(most - (static_cast<float>(cell) + 0.51f) * __fdividef(1.0f, per_logit));
    // The row's largest may be above the sample's.
    top = warm(most, o);
    const float wide = top - warm(from, o);
    cells = OpenCells(top + wide, 2.0f * wide);
    cells.good = cells.good && reached != 0 && spread > 1e-30f;
  }

  // A warp's block: its chunks with a token to list lie together from then on. Converged warps only.
  ATTNKIT_DEVICE void take(const Raw<Type> (&raw)[4][4], const uint2 (&peaks)[4], int block, u32 least) {
    u32 found = 0;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      found |= at_least<Type>(peaks[u].x, least) & 0x10001u << u;
      found |= at_least<Type>(peaks[u].y, least) & 0x100010u << u;
    }
    const u32 n = __popc(found), upto = sum_upto(n);
    const int all = static_cast<int>(__shfl_sync(0xffffffffu, upto, 31)), at = waiting + static_cast<int>(upto - n);
    if (waiting + all > StreamedChunks::kMost) {
      if (lane == 0) atomicAdd(&s.n, static_cast<int>(kLost));
      return;
    }
    waiting += all;
    u32 to = smem_address(chunks().logits + at), number_to = smem_address(chunks().number + at);
    const u32 number = static_cast<u32>(block) * (kBlock / 4) + lane;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int u = i / 4, c = i % 4;
      asm volatile(
          "{\n.reg .pred is;\n.reg .b32 bit;\nand.b32 bit, %2, %3;\nsetp.ne.u32 is, bit, 0;\n@is st.shared.v2.b32 [%0], {%4, %5};\n"
          "@is st.shared.u16 [%1], %6;\n@is add.u32 %0, %0, 8;\n@is add.u32 %1, %1, 2;\n}"
          : "+r"(to), "+r"(number_to)
          : "r"(found), "r"(1u << (u + c / 2 * 4 + c % 2 * 16)), "r"(raw[u][c].w[0]), "r"(raw[u][c].w[1]),
            "r"(number + u * (kPiece / 4) + c * (kChunk / 4))
          : "memory");
    }
  }

  // Lists tokens of chunks that wait until few do, each lane those of one. Converged warps only.
  ATTNKIT_DEVICE void list_chunks(int few) {
    if (waiting <= few) return;
    __syncwarp();
    const Philox noise = s.noise;
#pragma unroll 1
    do {
      const int first = max(waiting - 32, 0);
      list_chunk(noise, first + lane, first + lane < waiting);
      waiting = first;
    } while (waiting > few);
    __syncwarp();
  }

  // A lane's chunk: its tokens to list with their noise, and counted.
  ATTNKIT_DEVICE void list_chunk(const Philox& noise, int at, bool is) {
    const uint2 chunk = chunks().logits[at];
    u32 number = chunks().number[at];
    float x[4];
    widen_four<Type>(Raw<Type>{{chunk.x, chunk.y}}, x);
    u32 w[4], found = 0, to = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) found |= x[j] >= from ? 1u << j : 0;
    if (!is) found = 0;
    const u32 n = __reduce_add_sync(0xffffffffu, __popc(found));
    // Words are worked out while the place comes. Lanes' addresses differ, or the assembler makes an aggregated addition of it.
    asm volatile("{\n.reg .pred is;\nsetp.eq.s32 is, %2, 0;\n@is atom.shared.add.u32 %0, [%3], %4;\n}"
                 : "+r"(to), "+r"(number)
                 : "r"(lane), "r"(smem_address(&s.n) + 4 * lane), "r"(n)
                 : "memory");
    noise.words(number, w);
    to = __shfl_sync(0xffffffffu, to, 0);
    if (to + n > static_cast<u32>(room)) return;
    const u32 before = (1u << lane) - 1;
#pragma unroll 1
    for (u32 some = __ballot_sync(0xffffffffu, found != 0); some != 0; some = __ballot_sync(0xffffffffu, found != 0)) {
      if (found != 0) {
        const u32 j = __ffs(found) - 1, place = to + __popc(some & before);
        const float logit = warm(one_of(x, j), o);
        s.keys[list + place] = pack_best(logit, static_cast<int>(4 * number + j));
        const u32 cell = cells.within(logit);
        scores()[place] = make_uint2(order_key(noisy(logit, one_of(w, j))), cell);
        count_one(s.tokens_in, cell);
        if (weigh) {
          const u32 mass = Long::mass_of(logit, top, kUnit);
          atomicAdd(s.masses + cell, mass);
          heavy += mass / 4096;
        }
        found &= found - 1;
      }
      to += __popc(some);
      __syncwarp();
    }
  }

  // ---- afterwards ----

  // f(key, score and cell, is it one) of the listed, some of which are on their way.
  template <class F>
  ATTNKIT_DEVICE void for_listed(F&& f) const {
    constexpr int kAhead = 3;
    const int n = s.n;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kAhead * kTopkThreads) {
      u64 key[kAhead];
      uint2 score[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        // What lies past the end of the list is somewhere in shared memory.
        key[u] = s.keys[list + i + u * kTopkThreads], score[u] = scores()[i + u * kTopkThreads];
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) f(key[u], score[u], i + u * kTopkThreads < n);
    }
  }

  // As LongRow::draw_by_cells.
  ATTNKIT_DEVICE u64 draw_by_scores(float end, float least, u64 limit) const {
    const u32 last = s.cell, least_key = order_key(least), most_mass = __float2uint_ru(end);
    u64 best = 0, own = 0;
    for_listed([&](u64 key, uint2 score, bool is) {
      is = is && score.y <= last;
      const u32 before = s.masses[is ? score.y : 0];
      const u64 scored = static_cast<u64>(score.x) << 32 | static_cast<u32>(key);
      if (is & (before < most_mass) & (high_word(key) >= least_key) & (key > limit) & (scored > best)) best = scored, own = key;
    });
    const u64 most = warp_max(best);
    if (best == most) s.bests[warp] = best, s.of_bests[warp] = own;
    __syncthreads();
    best = s.bests[lane % kTopkWarps];
    return s.of_bests[__ffs(__ballot_sync(0xffffffffu, best == warp_max(best))) - 1];
  }

  // Draws the row, if its list has what it takes; else all is as before it was read. By all.
  ATTNKIT_DEVICE bool choose(const AnyRow<Type, false, true>& any, const TopkOptions& options, int b) const {
    Long row{p, s, nullptr, any, LaneMass{false}, list};
    row.add_up(k);
    const int n = s.n;
    const uint2 range = s.range[lane % kTopkWarps];
    const float most = warm(order_value(__reduce_max_sync(0xffffffffu, range.y)), o);
    // Each warp's sum is less by one for each token at the most.
    const u32 weighed = __reduce_add_sync(0xffffffffu, lane < kTopkWarps ? min(range.x, kLost) : 0) + n;
    if (!cells.good || n < static_cast<int>(k) || n > room || !(fabsf(most) <= kF32Max)) {
      give_up();
      return false;
    }
    row.any.list = s.keys + list, row.any.listed = n;
    typename Long::Scale scale{top, kUnit};
    if (weighed >= kLost) scale = weigh_again(row, most);
    int id;
    if (s.cell == 0) {
      id = row.any.finish(k, row.any.find_last(k, 0, row.any), options.share, options.ratio, most, 0, Between{0, 0});
    } else {
      const float least = options.ratio > 0.0f ? __fadd_rn(most, logf(options.ratio)) : -kF32Max;
      id = row.draw_of_cells(cells, scale, k, options, most, [&](float end, u64 limit) { return draw_by_scores(end, least, limit); });
    }
    if (threadIdx.x == 0) p.tokens[b] = max(id, 0), p.valid[b] = id >= 0;
    return true;
  }

  // Where the row's largest is so far above the sample's that masses do not fit.
  ATTNKIT_DEVICE typename Long::Scale weigh_again(const Long& row, float most) const {
    const typename Long::Scale scale{most, row.units()};
    __syncthreads();
    reinterpret_cast<uint4*>(s.masses)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for_listed([&](u64 key, uint2 score, bool is) {
      if (is) atomicAdd(s.masses + score.y, Long::mass_of(AnyRow<Type, false, true>::logit_of(key), scale.top, scale.unit));
    });
    __syncthreads();
    row.add_up(k);
    return scale;
  }

  ATTNKIT_DEVICE void give_up() const {
    __syncthreads();
    reinterpret_cast<uint4*>(s.tokens_in)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint4*>(s.masses)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) s.n = 0, s.cell = kLongCells;
    __syncthreads();
  }
};

}  // namespace attnkit::sampling
