// One build of sample_from_hidden; attnkit/backends/cuda/builds/hidden.py names it by macros.
#include "hidden_sm90.cuh"

using Shape = attnkit::hidden::HiddenShape<ATTNKIT_BF16 != 0, ATTNKIT_ROWS>;

extern "C" __global__ void __launch_bounds__(Shape::Threads, 1)
    attnkit_sample_from_hidden(const __grid_constant__ attnkit::hidden::HiddenParams params) {
  attnkit::hidden::sample_from_hidden<Shape>(params);
}
