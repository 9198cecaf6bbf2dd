// One build of the kernel for greedy and plain temperature sampling of many rows with penalties, bias or a mask;
// attnkit/backends/cuda/sampling.py names it by a macro.
#include "sample_changed_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kCountedThreads, 1)
    attnkit_sample_changed(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_changed<ATTNKIT_TYPE>(params);
}
