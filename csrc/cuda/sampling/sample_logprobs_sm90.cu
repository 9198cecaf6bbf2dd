// One build of the kernel for log-probabilities; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_logprobs_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kSampleThreads, ATTNKIT_CTAS)
    attnkit_sample_logprobs(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_logprobs<ATTNKIT_TYPE>(params);
}
