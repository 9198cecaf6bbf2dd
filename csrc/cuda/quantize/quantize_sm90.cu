// The quantise kernels of one form and one type; attnkit/backends/cuda/builds/quantize.py names both by macros, and says
// which kernels there are. A launch picks by what is written, by how many chunks of eight values a thread keeps, and by the
// way there (enum Way).
#include "quantize_sm90.cuh"

#define ATTNKIT_QUANTIZE(name, int8, chunks, way, threads, ctas)                                                        \
  extern "C" __global__ void __launch_bounds__(threads, ctas) name(const __grid_constant__ attnkit::QuantizeParams p) { \
    attnkit::quantize<ATTNKIT_FORM, ATTNKIT_X, int8, chunks, attnkit::way>(p);                                          \
  }
#define ATTNKIT_QUANTIZE_PAIRS(name, int8, pairs, threads, ctas)                                                        \
  extern "C" __global__ void __launch_bounds__(threads, ctas) name(const __grid_constant__ attnkit::QuantizeParams p) { \
    attnkit::quantize_pairs<ATTNKIT_X, int8, pairs>(p);                                                                 \
  }
#define ATTNKIT_QUANTIZE_BOTH(suffix, chunks, way, threads, ctas)                    \
  ATTNKIT_QUANTIZE(attnkit_quantize_int8_##suffix, true, chunks, way, threads, ctas) \
  ATTNKIT_QUANTIZE(attnkit_quantize_e4m3_##suffix, false, chunks, way, threads, ctas)

#if ATTNKIT_X == 4  // float32: twice the registers
ATTNKIT_QUANTIZE_BOTH(1, 1, kHeld, 1024, 1)
ATTNKIT_QUANTIZE_BOTH(2, 2, kHeld, 512, 1)
ATTNKIT_QUANTIZE_BOTH(2_long, 2, kLong, 512, 1)
#elif ATTNKIT_FORM == 0
ATTNKIT_QUANTIZE_BOTH(1, 1, kHeld, 1024, 2)
ATTNKIT_QUANTIZE_PAIRS(attnkit_quantize_int8_2, true, 1, 1024, 2)
ATTNKIT_QUANTIZE_PAIRS(attnkit_quantize_e4m3_2, false, 1, 1024, 2)
ATTNKIT_QUANTIZE_PAIRS(attnkit_quantize_int8_4, true, 2, 768, 2)  // 40 registers: three rows of 14336 a multiprocessor
ATTNKIT_QUANTIZE_PAIRS(attnkit_quantize_e4m3_4, false, 2, 768, 2)
ATTNKIT_QUANTIZE_BOTH(8, 8, kHeld, 512, 2)
ATTNKIT_QUANTIZE_BOTH(4_long, 4, kLong, 768, 1)
#elif ATTNKIT_FORM == 1
ATTNKIT_QUANTIZE_BOTH(1, 1, kHeld, 1024, 1)
ATTNKIT_QUANTIZE_BOTH(2, 2, kHeld, 512, 1)
ATTNKIT_QUANTIZE_BOTH(4, 4, kHeld, 512, 1)
ATTNKIT_QUANTIZE_BOTH(4_long, 4, kLong, 512, 1)
ATTNKIT_QUANTIZE_BOTH(4_streamed, 4, kStreamed, 512, 1)
#else
ATTNKIT_QUANTIZE_BOTH(1, 1, kHeld, 1024, 1)
ATTNKIT_QUANTIZE_BOTH(2, 2, kHeld, 512, 2)
ATTNKIT_QUANTIZE_BOTH(4, 4, kHeld, 512, 1)
ATTNKIT_QUANTIZE_BOTH(4_long, 4, kLong, 512, 1)
ATTNKIT_QUANTIZE_BOTH(2_streamed, 2, kStreamed, 1024, 1)
ATTNKIT_QUANTIZE_BOTH(4_streamed, 4, kStreamed, 640, 1)
#endif
