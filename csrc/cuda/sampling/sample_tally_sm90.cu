// The build of the kernel that draws top-p alone over bf16 logits, a multiprocessor a row.
#include "sample_tally_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kTallyThreads, 1)
    attnkit_sample_tally(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_tally(params);
}
