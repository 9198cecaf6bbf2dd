// One build of the latent decode kernel for few rows.
#include "mla_narrow_sm90.cuh"

using Shape = attnkit::MlaShape<ATTNKIT_C, ATTNKIT_R, ATTNKIT_BF16 != 0, ATTNKIT_NR, ATTNKIT_STAGES, ATTNKIT_ROPES>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1) attnkit_mla_narrow(const __grid_constant__ attnkit::DecodeParams params) {
  attnkit::mla_narrow<Shape>(params);
}
