// The first of two launches, where rows are too few for a multiprocessor each, or penalties come with what no other kernel reads. One
// read of all logits keeps the largest of each group of 16 tokens, its peak, and that of each of its chunks, and what pieces weigh; with
// penalties, bias or a mask the logits after them too, as float32, which the second launch draws from.
#pragma once
#include "sample_stream_sm90.cuh"

namespace attnkit::sampling {

// What is left in memory, of all rows' blocks one after the other: peaks of groups as rows keep them (a lane's four of a block together),
// of chunks, masses of pieces over their largest logits, and logits. Mirrors LEFT_BYTES in attnkit/backends/cuda/builds/sampling.py.
template <int Held>
struct Left {
  Raw<Held>* peaks;
  uint2* chunks;
  float2* masses;
  float4* logits;

  ATTNKIT_DEVICE explicit Left(const SampleParams& p) : peaks(reinterpret_cast<Raw<Held>*>(p.peaks)) {
    const i64 blocks = static_cast<i64>(p.B) * p.blocks;
    chunks = reinterpret_cast<uint2*>(peaks + blocks * 32);
    masses = reinterpret_cast<float2*>(chunks + blocks * (kBlock / 16));
    logits = reinterpret_cast<float4*>(masses + blocks * 4);
  }
};

// Whether rows may be of a longer top-k or min-p, and whether top-p comes with min-p alone: all else wants less.
ATTNKIT_DEVICE bool leaves_chunks(const SampleParams& p) { return (p.left & 1) != 0; }
ATTNKIT_DEVICE bool leaves_masses(const SampleParams& p) { return (p.left & 2) != 0; }

// What a warp's piece weighs, after temperature.
template <int Held>
ATTNKIT_DEVICE void leave_mass(float2* to, const Raw<Held> (&raw)[4], float t) {
  const float peak = order_value(__reduce_max_sync(0xffffffffu, order_key(peak_of<Held>(raw))));
  const float scale = __fdividef(kLog2e, t == 0.0f ? 1.0f : fmaxf(t, 1e-30f));
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float x[4];
    widen_four<Held>(raw[c], x);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += peak > negative_infinity() ? exp2_fast((x[i] - peak) * scale) : 0.0f;
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) *to = make_float2(peak, sum);
}

// Without penalties: blocks of all rows are dealt out evenly; whole ones, each asked for once the one before is done with.
template <int Type>
ATTNKIT_DEVICE void keep_peaks(const SampleParams& p) {
  const i64 all = static_cast<i64>(p.B) * p.blocks;
  const int end = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x), lane = static_cast<int>(lane_id());
  const Left<Type> left(p);
  int n = static_cast<int>(all * blockIdx.x / gridDim.x) + static_cast<int>(threadIdx.x / 32), b = n / p.blocks;
  Raw<Type> raw[4][4];
  const auto load = [&] {
    while (n >= (b + 1) * p.blocks) ++b;
    const int v = (n - b * p.blocks) * kBlock;
    load_pieces<Type>(raw, p, b, v, logits_at<Type>(p, b, v));
  };
  if (n < end) load();
#pragma unroll 1
  while (n < end) {
    const i64 block = n;
    const Raw<Type> peaks = peaks_of<Type>(raw);
    uint2 chunks[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) chunks[u] = chunk_peaks<Type>(raw[u]);
    if (leaves_masses(p)) {
      const float t = option(p.temperature, p.temperature_value, b);
#pragma unroll
      for (int u = 0; u < 4; ++u) leave_mass<Type>(left.masses + block * 4 + u, raw[u], t);
    }
    n += kSampleWarps;
    if (n < end) load();
    left.peaks[block * 32 + lane] = peaks;
#pragma unroll
    for (int u = 0; u < 4 && leaves_chunks(p); ++u) left.chunks[(block * 4 + u) * 32 + lane] = chunks[u];
  }
}

constexpr int kRewriteThreads = 64;

// With penalties: a piece a warp, so that few rows are many warps'.
template <int Type>
ATTNKIT_DEVICE void rewrite(const SampleParams& p) {
  const int piece = static_cast<int>(blockIdx.x * (kRewriteThreads / 32) + threadIdx.x / 32), lane = static_cast<int>(lane_id());
  const int b = piece / (4 * p.blocks), v = (piece - b * 4 * p.blocks) * kPiece + lane * 4;
  const RawOptions options(p, b);
  RowPointers r = row_pointers<Type>(p, b);
  Fetched<Type, true> fetched;
  fetched.ask(r, v, p.V);
  // A bias after the mask leaves the same.
  const char* const bias = r.bias;
  r.bias = nullptr;
  Raw<kF32> more[4];
#pragma unroll
  for (int c = 0; c < 4 && bias != nullptr; ++c) {
    const int at = v + c * kChunk;
    const bool wide = (reinterpret_cast<u64>(bias) & 15) == 0 && at + 4 <= p.V;
    more[c] = wide ? load_stream<kF32>(bias + static_cast<i64>(at) * 4) : load_four_guarded<kF32>(bias, at, p.V);
  }
  Raw<kF32> held[4];
  fetched.use(held, r, options.use(), v, p.V);
#pragma unroll
  for (int i = 0; i < 16 && bias != nullptr; ++i) {
    u32& x = held[i / 4].w[i % 4];
    x = __float_as_uint(biased(__uint_as_float(x), __uint_as_float(more[i / 4].w[i % 4])));
  }
  const Left<kF32> left(p);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const u32(&w)[4] = held[c].w;
    left.logits[(static_cast<i64>(piece) * 4 + c) * 32 + lane] =
        make_float4(__uint_as_float(w[0]), __uint_as_float(w[1]), __uint_as_float(w[2]), __uint_as_float(w[3]));
  }
  reinterpret_cast<float*>(left.peaks + static_cast<i64>(piece / 4) * 32 + lane)[piece % 4] = peak_of<kF32>(held);
  if (leaves_chunks(p)) left.chunks[static_cast<i64>(piece) * 32 + lane] = chunk_peaks<kF32>(held);
  if (leaves_masses(p)) leave_mass<kF32>(left.masses + piece, held, options.t);
}

template <int Type, bool Penalised>
ATTNKIT_DEVICE void sample_peaks(const SampleParams& p) {
  wait_for_previous_grid();
  launch_dependents();
  if constexpr (Penalised) {
    rewrite<Type>(p);
  } else {
    keep_peaks<Type>(p);
  }
}

}  // namespace attnkit::sampling
