// CPU attention built for the compiler's baseline (SSE2 on x86-64, NEON on Arm).
#define ATTNKIT_ISA attention_base_isa
#define ATTNKIT_ISA_NAME "base"
#define ATTNKIT_ISA_RECORD attention_base
#include "attention_kernel.h"
