// One build of the kernel for greedy and plain temperature sampling of many rows of 16-bit logits; attnkit/backends/cuda/sampling.py
// names it by a macro.
#include "sample_flow_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kFlowThreads, 1)
    attnkit_sample_flow(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_flow<ATTNKIT_TYPE>(params);
}
