// Where the pieces of one head meet inside a cluster of CTAs: each of them owns some columns, which the others send it, shared memory
// to shared memory, so that no round trip to L2 is waited for.
#pragma once
#include "decode_combine.cuh"
#include "decode_load.cuh"

namespace attnkit {

template <class Shape>
struct ClusterMeeting {
  static constexpr int Own = Shape::DV / Shape::Owners, Units = Own / 4;                   // columns of one owner, in fours
  static constexpr int ValueBytes = Shape::Rows * Own * 4, WeightBytes = Shape::Rows * 16;  // of one piece

  static_assert(Shape::DV % (4 * Shape::Owners) == 0, "an owner has whole fours of columns");

  u32 inbox, barrier;  // shared addresses: [Cluster] pieces' columns, then [Cluster] pieces' (max, sum) a row; and what counts their bytes
  int rank;

  ATTNKIT_DEVICE explicit ClusterMeeting(const DecodeShared& shared)
      : inbox(shared.inbox), barrier(shared.inbox_full), rank(static_cast<int>(cluster_rank())) {}

  ATTNKIT_DEVICE u32 values(int piece) const { return inbox + piece * ValueBytes; }
  ATTNKIT_DEVICE u32 weights(int piece) const { return inbox + Shape::Cluster * ValueBytes + piece * WeightBytes; }

  // One thread says what will come: columns and (max, sum) of each row, from each piece.
  ATTNKIT_DEVICE void expect(int pieces, int rows) const {
    if (rank < Shape::Owners) mbarrier_arrive_expect(barrier, pieces * rows * (Own * 4 + 16));
  }

  ATTNKIT_DEVICE void send_weight(int owner, int row, float most, float sum) const {
    const u32 at = weights(rank) + row * 16;
    store_async_16(cluster_address(at, owner), cluster_address(barrier, owner), __float_as_uint(most), __float_as_uint(sum), 0, 0);
  }

  ATTNKIT_DEVICE void send(int row, int column, const float4& value) const {
    const int owner = column / Own;
    const u32 at = values(rank) + (row * Own + column % Own) * 4;
    store_async_16(cluster_address(at, owner), cluster_address(barrier, owner), __float_as_uint(value.x), __float_as_uint(value.y),
                   __float_as_uint(value.z), __float_as_uint(value.w));
  }

  // Adds up this CTA's columns, in the pieces' order. It may end after that: nothing else will come.
  ATTNKIT_DEVICE void receive(const Piece& piece, const RowOutput& output) const {
    if (rank >= Shape::Owners || threadIdx.x >= output.rows * Units) return;
    mbarrier_wait_cluster(barrier, 0);
    for (int i = threadIdx.x; i < output.rows * Units; i += Shape::Consumers) {
      const int row = i / Units, unit = i % Units;
      float2 weight[Shape::Cluster];
      float4 part[Shape::Cluster], total = make_float4(0.f, 0.f, 0.f, 0.f);
      float most = negative_infinity(), sum = 0.f;
#pragma unroll
      for (int k = 0; k < Shape::Cluster; ++k) {
        const int from = min(k, piece.count - 1);
        weight[k] = load_shared<float2>(weights(from) + row * 16);
        part[k] = load_shared<float4>(values(from) + (row * Own + unit * 4) * 4);
        if (k >= piece.count) weight[k] = make_float2(negative_infinity(), 0.f);
        most = fmaxf(most, weight[k].x);
      }
      const float base = most == negative_infinity() ? 0.f : most;
#pragma unroll
      for (int k = 0; k < Shape::Cluster; ++k) {
        const float by = exp2_fast(weight[k].x - base);
        sum += weight[k].y * by;
        total.x += part[k].x * by;
        total.y += part[k].y * by;
        total.z += part[k].z * by;
        total.w += part[k].w * by;
      }
      const float by = output.finish(row, most, sum, rank == 0 && unit == 0);
      output.write(output.place(row) + (rank * Own + unit * 4) * 2, total, by);
    }
  }
};

}  // namespace attnkit
