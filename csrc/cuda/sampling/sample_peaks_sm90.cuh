// The first of short top-k's two launches: one read of all logits keeps the largest of each group of 16 tokens, its peak. Blocks of
// all rows are dealt out evenly.
#pragma once
#include "sample_counted_sm90.cuh"
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

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
    keep_counted<Type>(p);
  } else {
    keep_peaks<Type>(p);
  }
}

}  // namespace attnkit::sampling
