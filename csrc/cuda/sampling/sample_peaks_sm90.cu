// One build of the first of two launches; attnkit/backends/cuda/sampling.py names it by macros.
#include "sample_peaks_sm90.cuh"

constexpr int kThreads = ATTNKIT_PENALISED != 0 ? attnkit::sampling::kRewriteThreads : attnkit::sampling::kSampleThreads;

extern "C" __global__ void __launch_bounds__(kThreads, ATTNKIT_CTAS)
    attnkit_sample_peaks(const __grid_constant__ attnkit::sampling::SampleParams params) {
  attnkit::sampling::sample_peaks<ATTNKIT_TYPE, ATTNKIT_PENALISED != 0>(params);
}
