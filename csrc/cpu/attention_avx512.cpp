// CPU attention built for AVX-512 with BF16.
#define ATTNKIT_ISA attention_avx512_isa
#define ATTNKIT_ISA_NAME "avx512"
#define ATTNKIT_ISA_RECORD attention_avx512
#include "attention_kernel.h"
