// Log-probabilities of the token drawn and of the ``columns`` highest, of the logits as given.
#pragma once
#include "sample_list_sm90.cuh"

namespace attnkit::sampling {

// The ids of the first logits that are -inf, from column ``column`` on; one warp.
template <int Type>
ATTNKIT_DEVICE void list_impossible(const SampleParams& p, const RowPointers& r, i64* ids, float* values, int column) {
  for (int v = 0; v < p.V && column < p.columns; v += 32) {
    const int mine = v + static_cast<int>(lane_id());
    float x[4] = {};
    widen_four<Type>(load_four_guarded<Type>(r.logits, mine & ~3, p.V), x);
    const float l = mine & 2 ? (mine & 1 ? x[3] : x[2]) : (mine & 1 ? x[1] : x[0]);
    const u32 found = __ballot_sync(0xffffffffu, mine < p.V && l == negative_infinity());
    const int at = column + __popc(found & ((1u << lane_id()) - 1));
    if ((found >> lane_id() & 1) != 0 && at < p.columns) {
      ids[at] = mine;
      values[at] = negative_infinity();
    }
    column += __popc(found);
  }
}

template <int Type>
ATTNKIT_DEVICE void sample_logprobs(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  auto row = begin_row<Type>(p, memory);
  FilterShared& s = row.s;
  const int b = row.b;
  const RowPointers pointers = row_pointers<Type>(p, b);
  row.o = RowOptions{1.0f, 1.0f, 1.0f, 1.0f, 0.0f, 0.0f, false, false};
  const u32 k = max(p.columns, 1);
  ListRow<Type> list(row);
  const float peak = list.load(pointers, k);
  bool nan;
  const bool apart = list.share(peak, k, nan);

  const i64 token = p.tokens[b];
  float* const values = p.chosen + static_cast<i64>(b) * (p.columns + 1);
  i64* const ids = p.top_ids + static_cast<i64>(b) * (p.columns + 1);
  if (nan || row.top == negative_infinity()) {
    if (row.rank == 0) {
      for (int i = threadIdx.x; i <= p.columns; i += kSampleThreads) {
        values[i] = __uint_as_float(0x7fffffffu);
        ids[i] = i == 0 ? token : i - 1;
      }
    }
    return;
  }
  if (!apart) list.count_out(k);

  float sum = 0.0f;
  row.template for_slice<4>([&](const float(&x)[4], int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += exp2_fast((fminf(x[i], kF32Max) - row.top) * kLog2e);
  });
  sum = warp_sum(sum);
  if (row.lane == 0) s.sums[row.warp] = __float_as_uint(sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (int i = 0; i < kSampleWarps; ++i) sum += __uint_as_float(static_cast<u32>(s.sums[i]));
    store_remote(remote_address(&s.masses[row.rank], 0), __float_as_uint(sum));
  }
  cluster_sync();
  if (row.rank != 0) return;

  const int n = list.gather(apart);
  float whole = 0.0f;
  for (int i = 0; i < row.size; ++i) whole += s.masses[i];
  const float norm = logf(whole);
  if (threadIdx.x == 0) {
    float x[4];
    widen_four<Type>(load_four_guarded<Type>(pointers.logits, static_cast<int>(token) & ~3, p.V), x);
    const float l = token & 2 ? (token & 1 ? x[3] : x[2]) : (token & 1 ? x[1] : x[0]);
    values[0] = fminf(l, kF32Max) - row.top - norm;
    ids[0] = token;
    s.kept = 0;
  }
  __syncthreads();
  const Ranked r = rank_candidates<kSampleThreads>(reinterpret_cast<const Candidate*>(row.slice), n);
  if (r.is && r.before < static_cast<u32>(p.columns) && r.own.logit() > negative_infinity()) {
    values[1 + r.before] = r.own.logit() - row.top - norm;
    ids[1 + r.before] = r.own.id();
    atomicAdd(&s.kept, 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) list_impossible<Type>(p, pointers, ids + 1, values + 1, s.kept);
}

}  // namespace attnkit::sampling
