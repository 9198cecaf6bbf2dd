// Rows of bf16 logits without top-k, in one launch, a multiprocessor a row: top-p alone by arrival, with min-p by a list of what is kept.
#pragma once
#include "sample_tally_arrive_sm90.cuh"
#include "sample_tally_list_sm90.cuh"

namespace attnkit::sampling {

static_assert(kTopkWarps == kArriveWarps);

// Apart from the rest, for its registers.
__device__ __noinline__ bool look_closer(const SampleParams& p, char* memory, int chosen) {
  return TallyArrive(p, memory).look_closer(chosen);
}

// Rows of which nothing is known, by a CTA's first threads alone: without min-p by arrival,
__device__ __noinline__ void draw_unknown(const SampleParams& p, char* memory, int b) {
  const int n = p.blocks * (kBlock / 16);
  const TallyOptions options(p, b);
  draw_by_arrival<kBf16, false>(p, ArriveMemory(memory, n), options.raw(), options.top_p, b, 1, 0, n);
}
// with it by reading the row again and again.
__device__ __noinline__ void draw_unknown_list(const SampleParams& p, char* memory, int b) {
  const TallyOptions options(p, b);
  const RawOptions raw = options.raw();
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<kBf16>(p, b);
  const AnyRow<kBf16, false, false> row{p, *reinterpret_cast<AnyShared*>(memory), r, o, static_cast<u64>(raw.seed), static_cast<u64>(raw.offset)};
  float most = negative_infinity();
#pragma unroll 1
  for (int v = 4 * static_cast<int>(threadIdx.x); v < p.V; v += 4 * kTopkThreads) {
    float x[4];
    load_chunk<kBf16, false>(x, r, o, v, p.V);
    most = max_nan(most, max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])));
  }
  const float top = row.top_of(most);
  int id = -1;
  if (top > negative_infinity()) id = row.draw(o.cold ? 1 : 0, options.top_p, options.min_p, top, Between{});
  if (threadIdx.x == 0) p.tokens[b] = max(id, 0), p.valid[b] = id >= 0;
}

// Rows of which more is listed than is read soon, by all of a CTA: what else there was in shared memory is not needed any more. ``top``:
// the largest logit.
__device__ __noinline__ void draw_hot_list(const SampleParams& p, char* memory, int b, float top) {
  using Row = HotRow<kBf16, false, kTallyWarps>;
  static_assert(sizeof(HotShared) <= sizeof(TallyRowShared::counters) && Row::kRing <= 8 * kSlotBytes);  // LEAST_SLOTS
  TallyListShared& s = *reinterpret_cast<TallyListShared*>(memory);
  __syncthreads();  // nobody reads the list
  const TallyOptions options = s.guess;
  const RowOptions o = s.o;
  const RowPointers r = row_pointers<kBf16>(p, b);
  char* const ring = memory + kTallyBytes + p.blocks * (kBlock / 16) * 2;
  const Philox noise(static_cast<u64>(options.seed), static_cast<u64>(options.offset), kOfTokens);
  Row row{p, *reinterpret_cast<HotShared*>(s.counters), ring, r, o, noise, b, p.V, options.top_p, options.min_p, s.log_min_p};
  const int id = row.draw(top, Between{0, 0});
  if (threadIdx.x == 0) p.tokens[b] = max(id, 0), p.valid[b] = id >= 0;
}

// ``Lists``: there may be rows with min-p.
template <bool Lists>
ATTNKIT_DEVICE void sample_tally(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  TallyArrive row(p, memory);
  Raw<kBf16> sample;
  if (row.warp == kAsker) row.ask_first();
  if (row.warp < kSamplers) sample = row.ask_sample();
  row.open();
  if (row.warp != kAsker) {
    row.read_options();
    if (row.warp < kSamplers) row.find_bound(sample);
    if (Lists && row.s.guess.listed()) {
      TallyList(p, memory).open();
    } else {
      row.load_words();
    }
    wait_for_previous_grid();
  }
  __syncthreads();
  if (Lists && row.s.guess.listed()) {
    TallyList list(p, memory);
    bool hot = false;
    if (list.draw(hot)) return;
    if (hot) {
      draw_hot_list(p, memory, row.b, list.top);
      return;
    }
  } else {
    const int chosen = row.draw();
    if (chosen == kDrawn || (chosen >= 0 && look_closer(p, memory, chosen))) return;
    row.drain();
  }
  __syncthreads();
  if (row.warp >= kArriveWarps) return;
  if (Lists && TallyOptions(p, row.b).listed()) {
    draw_unknown_list(p, memory, row.b);
  } else {
    draw_unknown(p, memory, row.b);
  }
}

}  // namespace attnkit::sampling
