// The kernel for greedy and plain temperature sampling of many rows of float32.
#include "sample_ring_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kRingThreads, 1)
    attnkit_sample_ring(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_ring(params);
}
