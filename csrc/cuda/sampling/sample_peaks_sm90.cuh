// The first of short top-k's two launches: one read of all logits keeps the largest of each group of 16 tokens, its peak. Blocks of
// all rows are dealt out evenly.
#pragma once
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

template <int Type>
struct PeakWork {
  static constexpr bool kAhead = true;
  const SampleParams& p;
  RawOptions coming;
  RowOptions o;
  float* to = nullptr;  // four of a lane stand together
  i64 top_k = 0;
  int asked = -1, judged = -1;
  bool wanted = true;

  ATTNKIT_DEVICE explicit PeakWork(const SampleParams& q) : p(q) {}
  ATTNKIT_DEVICE void ask(int b) {
    coming = RawOptions(p, b);
    if (p.listed != 0) top_k = option(p.top_k, p.top_k_value, b), asked = b;
  }
  ATTNKIT_DEVICE void begin(int b) {
    o = coming.use();
    to = p.peaks + static_cast<i64>(b) * p.blocks * (kBlock / 16) + lane_id() * 4;
  }
  ATTNKIT_DEVICE bool wants(int b) {
    if (p.listed != 0 && b != judged) {
      wanted = (b == asked ? listed_k(top_k, coming.t, p.V) : listed_k(p, b)) != 0;
      judged = b;
    }
    return wanted;
  }
  ATTNKIT_DEVICE void block(int) {}
  template <int Held>
  ATTNKIT_DEVICE void piece(const Raw<Held> (&raw)[4], int number, int) {
    to[number / 4 * (kBlock / 16) + number % 4] = peak_of<Held>(raw);
  }
  ATTNKIT_DEVICE void end(int, int) {}
};

// Without penalties: whole blocks, each asked for once the one before is done with. Whether a row is wanted comes with its logits.
template <int Type>
ATTNKIT_DEVICE void keep_peaks(const SampleParams& p) {
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  int n = static_cast<int>(all * blockIdx.x / gridDim.x) + static_cast<int>(threadIdx.x / 32), b = n / p.blocks, judged = -1;
  bool wanted = true;
  if (n >= end) return;
  Raw<Type> raw[4][4];
  const auto load = [&] {
    const int v = (n - b * p.blocks) * kBlock;
    load_pieces<Type>(raw, p, b, v, logits_at<Type>(p, b, v));
  };
  load();
#pragma unroll 1
  while (true) {
    if (p.listed != 0 && b != judged) wanted = listed_k(p, b) != 0, judged = b;
    const Raw<Type> peaks = peaks_of<Type>(raw);
    Raw<Type>* const to = reinterpret_cast<Raw<Type>*>(p.peaks) + static_cast<i64>(n) * 32 + lane_id();
    const bool kept = wanted;
    do {
      n += kSampleWarps;
      while (n >= (b + 1) * p.blocks) ++b;
    } while (!wanted && n < end && b == judged);
    if (n < end) load();
    if (kept) *to = peaks;
    if (n >= end) return;
  }
}

template <int Type, bool Penalised>
ATTNKIT_DEVICE void sample_peaks(const SampleParams& p) {
  wait_for_previous_grid();
  launch_dependents();
  if constexpr (Penalised) {
    PeakWork<Type> work(p);
    stream_rows<Type, true>(p, work);
  } else {
    keep_peaks<Type>(p);
  }
}

}  // namespace attnkit::sampling
