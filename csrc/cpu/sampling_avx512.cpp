// The sampler's loops with AVX-512.
#define ATTNKIT_ISA avx512
#include "sampling_kernel.h"

namespace attnkit::cpu {
const SampleOps sample_avx512 = avx512::kOps;
}
