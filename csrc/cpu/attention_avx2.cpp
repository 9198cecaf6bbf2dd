// CPU attention built for AVX2, FMA and F16C.
#define ATTNKIT_ISA attention_avx2_isa
#define ATTNKIT_ISA_NAME "avx2"
#define ATTNKIT_ISA_RECORD attention_avx2
#include "attention_kernel.h"
