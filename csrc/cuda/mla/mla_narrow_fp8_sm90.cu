// One build of the latent decode kernel for few rows over an fp8 cache.
#include "mla_narrow_fp8_sm90.cuh"

using Shape = attnkit::MlaFp8Shape<ATTNKIT_NR, ATTNKIT_STAGES>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1) attnkit_mla_narrow_fp8(const __grid_constant__ attnkit::DecodeParams params) {
  attnkit::mla_narrow_fp8<Shape>(params);
}
