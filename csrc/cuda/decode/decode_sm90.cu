// One narrow build of the decode kernel; attnkit/backends/cuda/decode.py names the shape by macros.
#include "decode_sm90.cuh"

using Shape = attnkit::DecodeShape<ATTNKIT_D, ATTNKIT_DV, ATTNKIT_KV, ATTNKIT_NR, ATTNKIT_WR, ATTNKIT_WT, ATTNKIT_MT, ATTNKIT_CTAS, ATTNKIT_HEADS, ATTNKIT_CLUSTER, ATTNKIT_CHARGE != 0, ATTNKIT_SHARE != 0>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, Shape::CtasPerSm)
    attnkit_paged_decode(const __grid_constant__ attnkit::DecodeParams params) {
  attnkit::decode<Shape, attnkit::DecodeConsumer>(params);
}
