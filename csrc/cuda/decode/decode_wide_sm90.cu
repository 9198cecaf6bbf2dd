// One wide build of the decode kernel (more than 16 rows a head).
#include "decode_wide_sm90.cuh"

using Shape = attnkit::DecodeWideShape<ATTNKIT_D, ATTNKIT_DV, ATTNKIT_KV, ATTNKIT_CTAS>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, Shape::CtasPerSm)
    attnkit_paged_decode_wide(const __grid_constant__ attnkit::DecodeParams params) {
  attnkit::decode<Shape, attnkit::DecodeWideConsumer>(params);
}
