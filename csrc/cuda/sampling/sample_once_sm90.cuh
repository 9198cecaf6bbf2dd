// A CTA a row: any top-k (with top-p and min-p if they come), and what other rows a batch has. One read of the logits, and of what
// comes with them, keeps the peaks of groups in shared memory, or another launch has left them; the row is drawn by them.
#pragma once
#include "sample_arrive_sm90.cuh"
#include "sample_counted_sm90.cuh"
#include "sample_long_sm90.cuh"
#include "sample_peaks_sm90.cuh"
#include "sample_streamed_sm90.cuh"

namespace attnkit::sampling {

static_assert(kTopkThreads == kArriveThreads && kTopkThreads == kCountedThreads);
static_assert(sizeof(TopkShared) <= sizeof(ArriveShared) + 4 * kBins);  // what arrival takes is the most

// A warp's blocks of a row in turn, in parts: a block or half of one, so that a lane has as many bytes of either on their way. Of 16-bit
// logits of many rows warps begin at other ones of theirs, some in each part of the row, so that all first ones are a sample of it.
template <int Type>
struct OnceStream {
  static constexpr int kPieces = Type == kF32 ? 2 : 4, kParts = 4 / kPieces;
  const SampleParams& p;
  const int b;
  const u32 warp = threadIdx.x / 32;
  const u32 rounds = (static_cast<u32>(p.blocks) - warp + kTopkWarps - 1) / kTopkWarps;  // that the warp has of whole blocks
  const u32 first = enough_to_stream() ? warp * rounds / kTopkWarps : 0;
  Raw<Type> raw[kPieces][4];

  ATTNKIT_DEVICE int block_of(u32 round) const {
    if constexpr (Type == kF32) return static_cast<int>(warp + round / kParts * kTopkWarps);
    const u32 n = round + first;
    return static_cast<int>(warp + (n < rounds ? n : n - rounds) * kTopkWarps);
  }
  ATTNKIT_DEVICE bool has(u32 round) const { return Type == kF32 ? block_of(round) < p.blocks : round < rounds; }
  ATTNKIT_DEVICE void load(int round) {
    const int v = block_of(round) * kBlock + round % kParts * kPieces * kPiece;
    if (has(round)) load_pieces<Type>(raw, p, b, v, logits_at<Type>(p, b, v));
  }
  // Keeps the peaks of a part.
  ATTNKIT_DEVICE void keep(int round, uint2 most, Raw<Type>* to) const {
    reinterpret_cast<uint2*>(to + block_of(round) * 32 + lane_id())[round % kParts] = most;
  }
  // The peaks of what is there in two words, and the largest.
  ATTNKIT_DEVICE uint2 peaks(float& most) const {
    if constexpr (Type == kF32) {
      const float two[2] = {peak_of<Type>(raw[0]), peak_of<Type>(raw[1])};
      most = max_nan(most, max_nan(two[0], two[1]));
      return make_uint2(__float_as_uint(two[0]), __float_as_uint(two[1]));
    } else {
      const Raw<Type> four = peaks_of<Type>(raw);
      const float2 two = unpack(max_pairs<Type>(four.w[0], four.w[1]), Type == kBf16);
      most = max_nan(most, max_nan(two.x, two.y));
      return make_uint2(four.w[0], four.w[1]);
    }
  }
  // Adds what is there, of which none is above ``most``.
  ATTNKIT_DEVICE void weigh(LaneMass& mass, float most) const {
    mass.reach(most);
    const float shift = mass.shift();
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < 4 * kPieces; ++i) {
      float x[4];
      widen_four<Type>(raw[i / 4][i % 4], x);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += exp2_fast(__fmaf_rn(x[j], mass.scale, shift));
    }
    mass.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// What a row keeps its peaks by. First of all:
template <int Type, bool Penalised>
struct OnceRow {
  static constexpr int kHeld = Type, kRing = 0;
  OnceStream<Type> stream;

  ATTNKIT_DEVICE OnceRow(const SampleParams& p, char*, int b) : stream{p, b} {}
  // L2 may be asked before the grid before has ended: it stays coherent with who may still write.
  ATTNKIT_DEVICE void ask_early() const { ask_block_l2<Type>(stream.p, stream.b, stream.block_of(0)); }
  ATTNKIT_DEVICE void begin() { stream.load(0); }
  ATTNKIT_DEVICE void leave() const {}
  // Keeps all peaks, and those of chunks if ``Chunks``, and adds what the lane's tokens weigh if ``Weighed``; a thread's largest.
  template <bool Chunks = false, bool Weighed = false>
  ATTNKIT_DEVICE float keep(Raw<Type>* peaks, uint2* chunks = nullptr, LaneMass* mass = nullptr) {
    constexpr int kPieces = OnceStream<Type>::kPieces, kParts = OnceStream<Type>::kParts;
    float mine = negative_infinity();
#pragma unroll 1
    for (int round = 0; stream.has(round); ++round) {
      uint2 of_chunks[kPieces];
#pragma unroll
      for (int u = 0; u < kPieces && Chunks; ++u) of_chunks[u] = chunk_peaks<Type>(stream.raw[u]);
      const uint2 most = stream.peaks(mine);
      if constexpr (Weighed) stream.weigh(*mass, mine);
      stream.load(round + 1);
      stream.keep(round, most, peaks);
#pragma unroll
      for (int u = 0; u < kPieces && Chunks; ++u) {
        chunks[((stream.block_of(round) * 4 + round % kParts * kPieces) + u) * 32 + lane_id()] = of_chunks[u];
      }
    }
    return mine;
  }
  ATTNKIT_DEVICE float keep_chunks(Raw<Type>* peaks, uint2* chunks, LaneMass& mass) {
    return mass.wanted ? keep<true, true>(peaks, chunks, &mass) : keep<true>(peaks, chunks);
  }
};

// The same with penalties. What is on its way lies where other things will: nothing else is there until all peaks are kept, or all
// have left.
template <int Type>
struct OnceRow<Type, true> {
  static constexpr int kHeld = kF32, kRing = kCountedBytes<Type, false>;
  const SampleParams& p;
  const char* const memory;
  const int first;
  const bool plain;
  CountedBegun begun;

  ATTNKIT_DEVICE OnceRow(const SampleParams& q, char* ring, int b) : p(q), memory(ring), first(b * p.blocks), plain(only_counts(p)) {}
  template <bool Plain>
  ATTNKIT_DEVICE Counted<Type, false, Plain> blocks() const {
    return Counted<Type, false, Plain>(p, memory, first + p.blocks);
  }
  ATTNKIT_DEVICE void ask_early() const {}
  ATTNKIT_DEVICE void begin() {
    const int n = first + static_cast<int>(threadIdx.x / 32);
    begun = plain ? blocks<true>().begin(n) : blocks<false>().begin(n);
  }
  ATTNKIT_DEVICE void leave() const { copy_async_wait_all(); }
  ATTNKIT_DEVICE float keep(Raw<kF32>* peaks) {
    float4* const to = reinterpret_cast<float4*>(peaks);
    const float mine = plain ? blocks<true>().run(begun, to, first) : blocks<false>().run(begun, to, first);
    __syncthreads();
    return mine;
  }
  // The same of words (see TwoPeaks).
  ATTNKIT_DEVICE float keep_words(u32* words, LaneMass& mass) {
    return plain ? keep_words(blocks<true>(), words, mass) : keep_words(blocks<false>(), words, mass);
  }
  template <class Blocks>
  ATTNKIT_DEVICE float keep_words(const Blocks& blocks, u32* words, LaneMass& mass) {
    float mine = negative_infinity();
    blocks.keep(begun, reinterpret_cast<float4*>(words), first, [&](u32 slot, const RowOptions& o) {
      const TwoPeaks peaks = blocks.two_peaks(slot, o, mass);
      mine = max_nan(mine, peaks.first);
      return __uint_as_float(peaks.word());
    });
    __syncthreads();
    return mine;
  }
};

// The same of peaks that are in memory already.
template <int Type>
struct GivenRow {
  static constexpr int kThreads = kTopkThreads;
  const SampleParams& p;
  const int b;

  ATTNKIT_DEVICE GivenRow(const SampleParams& q, char*, int row) : p(q), b(row) {}
  ATTNKIT_DEVICE void ask_early() const {}
  ATTNKIT_DEVICE void begin() const {}
  ATTNKIT_DEVICE void leave() const {}
  template <bool Chunks = false>
  ATTNKIT_DEVICE float keep(Raw<Type>* peaks, uint2* chunks = nullptr) const {
    const Left<Type> left(p);
    const i64 first = static_cast<i64>(b) * p.blocks;
    const int t = static_cast<int>(threadIdx.x);
    if constexpr (Chunks) {
      const char* const from = reinterpret_cast<const char*>(left.chunks + first * (kBlock / 16));
#pragma unroll 4
      for (int i = t; i < p.blocks * 64; i += kThreads) copy_own<16>(smem_address(chunks) + i * 16, from + i * 16);
    }
    float mine = negative_infinity();
#pragma unroll 4
    for (int i = t; i < p.blocks * 32; i += kThreads) {
      const Raw<Type> four = left.peaks[first * 32 + i];
      peaks[i] = four;
      float x[4];
      widen_four<Type>(four, x);
      mine = max_nan(mine, max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])));
    }
    if constexpr (Chunks) copy_async_wait_all();
    return mine;
  }
  // And adds what this thread's pieces weigh.
  ATTNKIT_DEVICE float keep_chunks(Raw<Type>* peaks, uint2* chunks, LaneMass& mass) const {
    const float mine = keep<true>(peaks, chunks);
    const float2* const masses = Left<Type>(p).masses + static_cast<i64>(b) * p.blocks * 4;
    for (int i = static_cast<int>(threadIdx.x); i < p.blocks * 4 && mass.wanted; i += kThreads) mass.take(masses[i].x, masses[i].y);
    return mine;
  }
};

// By whether they are given, which is after penalties.
template <int Type, bool Penalised, bool Given>
struct PeaksBy {
  using Row = OnceRow<Type, Penalised>;
};
template <int Type>
struct PeaksBy<Type, false, true> {
  using Row = GivenRow<Type>;
};

// Where peaks lie: behind what the row's draw takes, and what brings them.
template <int Type, bool Penalised, class Shared>
ATTNKIT_DEVICE auto peaks_behind(char* memory) {
  using Row = OnceRow<Type, Penalised>;
  return reinterpret_cast<Raw<Row::kHeld>*>(memory + max(static_cast<int>(sizeof(Shared)), Row::kRing));
}

// A row without top-k and min-p. A function of its own: what it keeps in registers is not the others'.
template <int Type, bool Penalised>
__device__ __noinline__ void draw_flat(const SampleParams& p, char* memory, int b) {
  const int n = p.blocks * (kBlock / 16);
  draw_by_arrival<Type, Penalised>(p, ArriveMemory(memory, n), b, 1, 0, n);
}

// A row of a longer top-k or of min-p with penalties, of which first pieces are on their way: a function of its own too. ``k``: 0
// without top-k.
template <int Type>
__device__ __noinline__ void draw_counted(const SampleParams& p, char* memory, int b, u32 k, OnceRow<Type, true> row) {
  using Long = LongRow<Type, true>;
  static_assert(sizeof(typename Long::Shared) <= OnceRow<Type, true>::kRing);  // at_once_bytes in builds
  const RawOptions raw(p, b);
  const TopkOptions options(p, b);
  auto& s = *reinterpret_cast<typename Long::Shared*>(memory);
  auto* const words = reinterpret_cast<u32*>(peaks_behind<Type, true, typename Long::Shared>(memory));
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<Type>(p, b);
  const u64 seed = static_cast<u64>(raw.seed), offset = static_cast<u64>(raw.offset);
  LaneMass mass{k == 0 && options.share < 1.0f, o.rt * kLog2e};
  const float mine = row.keep_words(words, mass);
  Long::open(s, seed, offset);
  Long long_row{p, s, words, AnyRow<Type, true, true>{p, s.any, r, o, seed, offset}, mass};
  long_row.choose(k, options, mine, b);
}

// A row of a longer top-k or of min-p of 16-bit logits.
template <int Type>
ATTNKIT_DEVICE void draw_streamed(const SampleParams& p, typename LongRow<Type>::Shared& s, uint2* chunks, OnceRow<Type, false>& row,
                                  const RowOptions& o, const RowPointers& r, const StreamedLater& given, u32 k, int b) {
  StreamedLater later = given;
  bool weighed = false;
  float mine, of = negative_infinity(), sum = 0.0f;
  if (StreamedRow<Type>::fits(p, r, k)) {
    StreamedRow<Type> streamed(p, s, o, k, later.options.share < 1.0f);
    if (threadIdx.x == 0) streamed.later() = later;
    mine = streamed.keep(row.stream, chunks);
    later = streamed.later();
    if (streamed.choose(AnyRow<Type, false, true>{p, s.any, r, o, later.seed, later.offset}, later.options, b)) return;
  } else {
    LaneMass mass{k == 0 && later.options.share < 1.0f, o.rt * kLog2e};
    mine = row.keep_chunks(s.peaks, chunks, mass);
    weighed = mass.wanted, of = mass.of, sum = mass.sum;
  }
  const AnyRow<Type, false, true> any{p, s.any, r, o, later.seed, later.offset};
  LongRow<Type>{p, s, reinterpret_cast<u32*>(chunks), any, LaneMass{weighed, o.rt * kLog2e, of, sum}}.choose(k, later.options, mine, b);
}

template <int Type, bool Penalised, bool Given>
ATTNKIT_DEVICE void sample_once(const SampleParams& p) {
  static_assert(!(Penalised && Given));  // what is given is after penalties
  extern __shared__ __align__(128) char memory[];
  TopkShared& s = *reinterpret_cast<TopkShared*>(memory);
  const int b = static_cast<int>(blockIdx.x);
  typename PeaksBy<Type, Penalised, Given>::Row once(p, memory, b);
  once.ask_early();
  if constexpr (!Penalised) s.open();
  if (!Given) wait_for_previous_grid(), launch_dependents();
  const RawOptions raw(p, b);
  const TopkOptions options(p, b);
  // This grid began when all before the first launch had ended: a row's options were there.
  if (Given) wait_for_previous_grid(), launch_dependents();
  once.begin();
  const u64 seed = static_cast<u64>(raw.seed), offset = static_cast<u64>(raw.offset);
  const u32 longer = options.given > 0 && options.given < p.V ? static_cast<u32>(options.given) : 0;
  if (options.k == 0 && longer == 0 && options.ratio <= 0.0f) {
    once.leave();
    if (Penalised) __syncthreads();  // nobody's pieces are on their way to where other things will lie
    draw_flat<Type, Penalised>(p, memory, b);
    return;
  }
  if constexpr (Penalised) {
    if (options.k == 0) {
      draw_counted<Type>(p, memory, b, longer, once);
      return;
    }
  }
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<Type>(p, b);
  if constexpr (!Penalised) {
    if (options.k == 0) {
      auto& s_long = *reinterpret_cast<typename LongRow<Type>::Shared*>(memory);
      uint2* const chunks = reinterpret_cast<uint2*>(&s_long + 1);
      LongRow<Type>::open(s_long, seed, offset);
      if constexpr (Type != kF32 && !Given) {
        draw_streamed<Type>(p, s_long, chunks, once, o, r, StreamedLater{seed, offset, options}, longer, b);
      } else {
        LaneMass mass{longer == 0 && options.share < 1.0f && (!Given || leaves_masses(p)), o.rt * kLog2e};
        const float mine = once.keep_chunks(s_long.peaks, chunks, mass);
        const AnyRow<Type, false, true> any{p, s_long.any, r, o, seed, offset};
        LongRow<Type>{p, s_long, reinterpret_cast<u32*>(chunks), any, mass}.choose(longer, options, mine, b);
      }
      return;
    }
  }
  auto* const peaks = peaks_behind<Type, Penalised, TopkShared>(memory);
  TopkRow<Type, Penalised> row{p, s, r, o, options.k, seed, offset};
  const float mine = once.keep(peaks);
  if constexpr (Penalised) s.open();
  row.collect(peaks, p.blocks * 32, row.find_bound(mine), mine);
  row.finish(options, b);
}

}  // namespace attnkit::sampling
