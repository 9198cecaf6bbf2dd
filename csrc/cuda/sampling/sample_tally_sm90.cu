// The build of the kernel that draws rows of bf16 logits without top-k, a multiprocessor a row. ATTNKIT_LISTS: some may have min-p.
#include "sample_tally_sm90.cuh"

extern "C" __global__ void __launch_bounds__(attnkit::sampling::kTallyThreads, 1)
    attnkit_sample_tally(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_tally<ATTNKIT_LISTS>(params);
}
