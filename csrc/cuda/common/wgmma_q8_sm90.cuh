// Warpgroup products of 8-bit operands, both in shared memory and K-major: d [64 x N] += a [64 x 32] * b [N x 32]^T,
// int8 into int32 or e4m3 into float32, for every width N that is a multiple of 16 (e4m3's sums are the tensor core's
// own, narrower than float32: promote them). The register lists are long and regular; nothing else lives here.
#pragma once
#include "wgmma_sm90.cuh"

namespace attnkit {

template <int N>
ATTNKIT_DEVICE void wgmma_hold(int (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Registers of a product 16, 32, ... columns wide, as the instruction names them and as its operands.
#define ATTNKIT_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ATTNKIT_NAMES_32 ATTNKIT_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ATTNKIT_NAMES_48 ATTNKIT_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ATTNKIT_NAMES_64 ATTNKIT_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTNKIT_NAMES_80 ATTNKIT_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ATTNKIT_NAMES_96 ATTNKIT_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ATTNKIT_NAMES_112 ATTNKIT_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ATTNKIT_NAMES_128 ATTNKIT_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTNKIT_NAMES_144 ATTNKIT_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ATTNKIT_NAMES_160 ATTNKIT_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define ATTNKIT_NAMES_176 ATTNKIT_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ATTNKIT_NAMES_192 ATTNKIT_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define ATTNKIT_NAMES_208 ATTNKIT_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define ATTNKIT_NAMES_224 ATTNKIT_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define ATTNKIT_NAMES_240 ATTNKIT_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define ATTNKIT_NAMES_256 ATTNKIT_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define ATTNKIT_SUMS_16(C) C(d[0]), C(d[1]), C(d[2]), C(d[3]), C(d[4]), C(d[5]), C(d[6]), C(d[7])
#define ATTNKIT_SUMS_32(C) ATTNKIT_SUMS_16(C), C(d[8]), C(d[9]), C(d[10]), C(d[11]), C(d[12]), C(d[13]), C(d[14]), C(d[15])
#define ATTNKIT_SUMS_48(C) ATTNKIT_SUMS_32(C), C(d[16]), C(d[17]), C(d[18]), C(d[19]), C(d[20]), C(d[21]), C(d[22]), C(d[23])
#define ATTNKIT_SUMS_64(C) ATTNKIT_SUMS_48(C), C(d[24]), C(d[25]), C(d[26]), C(d[27]), C(d[28]), C(d[29]), C(d[30]), C(d[31])
#define ATTNKIT_SUMS_80(C) ATTNKIT_SUMS_64(C), C(d[32]), C(d[33]), C(d[34]), C(d[35]), C(d[36]), C(d[37]), C(d[38]), C(d[39])
#define ATTNKIT_SUMS_96(C) ATTNKIT_SUMS_80(C), C(d[40]), C(d[41]), C(d[42]), C(d[43]), C(d[44]), C(d[45]), C(d[46]), C(d[47])
#define ATTNKIT_SUMS_112(C) ATTNKIT_SUMS_96(C), C(d[48]), C(d[49]), C(d[50]), C(d[51]), C(d[52]), C(d[53]), C(d[54]), C(d[55])
#define ATTNKIT_SUMS_128(C) ATTNKIT_SUMS_112(C), C(d[56]), C(d[57]), C(d[58]), C(d[59]), C(d[60]), C(d[61]), C(d[62]), C(d[63])
#define ATTNKIT_SUMS_144(C) ATTNKIT_SUMS_128(C), C(d[64]), C(d[65]), C(d[66]), C(d[67]), C(d[68]), C(d[69]), C(d[70]), C(d[71])
#define ATTNKIT_SUMS_160(C) ATTNKIT_SUMS_144(C), C(d[72]), C(d[73]), C(d[74]), C(d[75]), C(d[76]), C(d[77]), C(d[78]), C(d[79])
#define ATTNKIT_SUMS_176(C) ATTNKIT_SUMS_160(C), C(d[80]), C(d[81]), C(d[82]), C(d[83]), C(d[84]), C(d[85]), C(d[86]), C(d[87])
#define ATTNKIT_SUMS_192(C) ATTNKIT_SUMS_176(C), C(d[88]), C(d[89]), C(d[90]), C(d[91]), C(d[92]), C(d[93]), C(d[94]), C(d[95])
#define ATTNKIT_SUMS_208(C) ATTNKIT_SUMS_192(C), C(d[96]), C(d[97]), C(d[98]), C(d[99]), C(d[100]), C(d[101]), C(d[102]), C(d[103])
#define ATTNKIT_SUMS_224(C) ATTNKIT_SUMS_208(C), C(d[104]), C(d[105]), C(d[106]), C(d[107]), C(d[108]), C(d[109]), C(d[110]), C(d[111])
#define ATTNKIT_SUMS_240(C) ATTNKIT_SUMS_224(C), C(d[112]), C(d[113]), C(d[114]), C(d[115]), C(d[116]), C(d[117]), C(d[118]), C(d[119])
#define ATTNKIT_SUMS_256(C) ATTNKIT_SUMS_240(C), C(d[120]), C(d[121]), C(d[122]), C(d[123]), C(d[124]), C(d[125]), C(d[126]), C(d[127])

template <int N>
struct Wgmma8;

#define ATTNKIT_WGMMA8(N, A, B, P)                                                                              \
  template <>                                                                                                    \
  struct Wgmma8<N> {                                                                                             \
    static ATTNKIT_DEVICE void multiply(int (&d)[N / 2], u64 a, u64 b, int accumulate) {                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" ATTNKIT_NAMES_##N "}, %" #A ", %" #B \
                   ", p;\n}"                                                                                    \
                   : ATTNKIT_SUMS_##N("+r")                                                                      \
                   : "l"(a), "l"(b), "r"(accumulate));                                                           \
    }                                                                                                            \
    static ATTNKIT_DEVICE void multiply(float (&d)[N / 2], u64 a, u64 b, int accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ATTNKIT_NAMES_##N "}, %" #A      \
                   ", %" #B ", p, 1, 1;\n}"                                                                     \
                   : ATTNKIT_SUMS_##N("+f")                                                                      \
                   : "l"(a), "l"(b), "r"(accumulate));                                                           \
    }                                                                                                            \
  };

ATTNKIT_WGMMA8(16, 8, 9, 10)
ATTNKIT_WGMMA8(32, 16, 17, 18)
ATTNKIT_WGMMA8(48, 24, 25, 26)
ATTNKIT_WGMMA8(64, 32, 33, 34)
ATTNKIT_WGMMA8(80, 40, 41, 42)
ATTNKIT_WGMMA8(96, 48, 49, 50)
ATTNKIT_WGMMA8(112, 56, 57, 58)
ATTNKIT_WGMMA8(128, 64, 65, 66)
ATTNKIT_WGMMA8(144, 72, 73, 74)
ATTNKIT_WGMMA8(160, 80, 81, 82)
ATTNKIT_WGMMA8(176, 88, 89, 90)
ATTNKIT_WGMMA8(192, 96, 97, 98)
ATTNKIT_WGMMA8(208, 104, 105, 106)
ATTNKIT_WGMMA8(224, 112, 113, 114)
ATTNKIT_WGMMA8(240, 120, 121, 122)
ATTNKIT_WGMMA8(256, 128, 129, 130)
#undef ATTNKIT_WGMMA8
#undef ATTNKIT_NAMES_16
#undef ATTNKIT_SUMS_16
#undef ATTNKIT_NAMES_32
#undef ATTNKIT_SUMS_32
#undef ATTNKIT_NAMES_48
#undef ATTNKIT_SUMS_48
#undef ATTNKIT_NAMES_64
#undef ATTNKIT_SUMS_64
#undef ATTNKIT_NAMES_80
#undef ATTNKIT_SUMS_80
#undef ATTNKIT_NAMES_96
#undef ATTNKIT_SUMS_96
#undef ATTNKIT_NAMES_112
#undef ATTNKIT_SUMS_112
#undef ATTNKIT_NAMES_128
#undef ATTNKIT_SUMS_128
#undef ATTNKIT_NAMES_144
#undef ATTNKIT_SUMS_144
#undef ATTNKIT_NAMES_160
#undef ATTNKIT_SUMS_160
#undef ATTNKIT_NAMES_176
#undef ATTNKIT_SUMS_176
#undef ATTNKIT_NAMES_192
#undef ATTNKIT_SUMS_192
#undef ATTNKIT_NAMES_208
#undef ATTNKIT_SUMS_208
#undef ATTNKIT_NAMES_224
#undef ATTNKIT_SUMS_224
#undef ATTNKIT_NAMES_240
#undef ATTNKIT_SUMS_240
#undef ATTNKIT_NAMES_256
#undef ATTNKIT_SUMS_256

}  // namespace attnkit
