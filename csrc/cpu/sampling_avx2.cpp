// The sampler's loops with AVX2.
#define ATTNKIT_ISA avx2
#include "sampling_kernel.h"

namespace attnkit::cpu {
const SampleOps sample_avx2 = avx2::kOps;
}
