// Which instruction set the CPU kernels use: chosen at run time, so one module serves every machine.
// Include it from baseline files only (never from *_avx2.cpp or *_avx512.cpp).
#pragma once

namespace attnkit::cpu {

enum Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// AVX-512 here means F, BW, DQ, VL and VNNI (Cascade Lake, Ice Lake, Zen 4 and later).
inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kScalar;
}

// The instruction set asked for (-1: the best), never above what this machine has.
inline Isa pick_isa(int wanted) {
  static const Isa best = best_isa();
  return wanted >= 0 && wanted < best ? static_cast<Isa>(wanted) : best;
}

// bf16 dot products and 128-entry byte look-ups: what the e4m3 product wants beyond kAvx512.
inline bool has_bf16_vbmi() {
#if defined(__x86_64__)
  static const bool yes = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return yes;
#else
  return false;
#endif
}

}  // namespace attnkit::cpu
