// w8a8_gemm, quantize_per_token and its fused forms on the CPU: baseline build of the kernels, division of work, registration.
#include <pybind11/pybind11.h>

#define ATTNKIT_ISA scalar
#include "gemm_kernel.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;

namespace attnkit::cpu::scalar {

struct Int8 {
  static constexpr int MR = 3, NR = 4;
  static constexpr int64_t kStep = 16, kBlockK = 2048;
  static constexpr int64_t kDirectRows = 0;
  using Elem = int16_t;
  using Right = int16_t;
  using Acc = uint32_t;

  static void convert(const int8_t* x, int64_t n, int16_t* to) {
    for (int64_t k = 0; k < n; ++k) to[k] = x[k];
  }

  static uint32_t pack(const int8_t* a, int64_t K, int16_t* to) {
    convert(a, K, to);
    return 0;
  }

  template <int mr, bool>
  static __attribute__((noinline)) void tile(const int16_t* a, int64_t sa, const char* right, int64_t sw, int64_t k, uint32_t* acc, Ahead) {
    const int16_t* w = reinterpret_cast<const int16_t*>(right);
    sw /= int64_t(sizeof(int16_t));
    for (int i = 0; i < mr; ++i)
      for (int j = 0; j < NR; ++j) {
        int32_t s = 0;  // at most 2048 products: no overflow
        for (int64_t t = 0; t < k; ++t) s += int32_t(a[i * sa + t]) * w[j * sw + t];
        acc[i * NR + j] = static_cast<uint32_t>(s);
      }
  }
};

struct E4m3 {
  static constexpr int MR = 3, NR = 4, kLanes = 8;
  static constexpr int64_t kStep = 16, kBlockK = 1024;
  static constexpr int64_t kDirectRows = 0;
  using Elem = float;
  using Right = float;
  using Acc = float;

  static void convert(const int8_t* x, int64_t n, float* to) {
    int64_t k = 0;
    for (; k < n; ++k) to[k] = e4m3_to_float(static_cast<uint8_t>(x[k]));
    for (; k < (n + kStep - 1) / kStep * kStep; ++k) to[k] = 0.0f;
  }

  template <int mr, bool>
  static __attribute__((noinline)) void tile(const float* a, int64_t sa, const char* right, int64_t sw, int64_t k, float* acc, Ahead) {
    const float* w = reinterpret_cast<const float*>(right);
    sw /= int64_t(sizeof(float));
    for (int i = 0; i < mr; ++i)
      for (int j = 0; j < NR; ++j) {
        float lane[kLanes] = {};
        for (int64_t t = 0; t < k; t += kLanes)
          for (int l = 0; l < kLanes; ++l) lane[l] += a[i * sa + t + l] * w[j * sw + t + l];
        float s = 0.0f;
        for (int l = 0; l < kLanes; ++l) s += lane[l];
        acc[i * NR + j] = s;
      }
  }
};

}  // namespace attnkit::cpu::scalar

namespace attnkit::cpu {

const GemmOps gemm_scalar = scalar::Gemm<scalar::Int8, scalar::E4m3>::ops;

const GemmOps& gemm_ops(int isa) {
#if defined(__x86_64__)
  switch (pick_isa(isa)) {
    case kAvx512: return has_bf16_vbmi() ? gemm_avx512_bf16 : gemm_avx512;
    case kAvx2: return gemm_avx2;
    default: break;
  }
#endif
  return gemm_scalar;
}

namespace {

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

void run_gemm(GemmCall c, int threads, const GemmOps& ops) {
  c.row_bytes = ops.packed_row_bytes(c.kind, c.K);
  Scratch memory;
  const size_t rows = size_t(c.M) * size_t(c.row_bytes);
  c.packed = memory.get(rows + size_t(c.M) * 4);
  c.start = c.kind == kInt8 ? reinterpret_cast<uint32_t*>(c.packed + rows) : nullptr;
  if (c.M * c.K > 1 << 19)  // below, a second parallel region costs more than it saves
    parallel_for(c.M, threads, [&](int64_t m) { ops.pack_row(c, m); });
  else
    for (int64_t m = 0; m < c.M; ++m) ops.pack_row(c, m);
  // Columns in tasks of kBlockN, or fewer where that leaves threads without work; then rows of a.
  const int64_t bm = (c.M + kBlockM - 1) / kBlockM;
  int64_t width = kBlockN;
  while (width > 8 && bm * ((c.N + width - 1) / width) < 4 * threads) width /= 2;
  const int64_t bn = (c.N + width - 1) / width;
  parallel_for(bm * bn, threads, [&](int64_t i) {
    const int64_t m = i / bn, n0 = i % bn * width;
    ops.block(c, c.M * m / bm, c.M * (m + 1) / bm, n0, n0 + width < c.N ? n0 + width : c.N,
              thread_scratch().get(kGemmScratch));
  });
}

// Strides in elements; scales with stride 0 are one value for all.
void w8a8_gemm(int kind, int out_type, int bias_type, int64_t M, int64_t N, int64_t K, uintptr_t a, int64_t lda, uintptr_t w,
               int64_t ldw, uintptr_t a_scale, int64_t a_scale_stride, uintptr_t w_scale, int64_t w_scale_stride,
               uintptr_t bias, uintptr_t out, int64_t ldo, int threads, int isa) {
  GemmCall c{};
  c.kind = kind, c.out_type = out_type, c.bias_type = bias_type;
  c.M = M, c.N = N, c.K = K, c.lda = lda, c.ldw = ldw, c.ldo = ldo;
  c.a = reinterpret_cast<const int8_t*>(a);
  c.w = reinterpret_cast<const int8_t*>(w);
  c.a_scale = reinterpret_cast<const float*>(a_scale), c.a_scale_stride = a_scale_stride;
  c.w_scale = reinterpret_cast<const float*>(w_scale), c.w_scale_stride = w_scale_stride;
  c.bias = reinterpret_cast<const void*>(bias);
  c.out = reinterpret_cast<void*>(out);
  py::gil_scoped_release nogil;
  run_gemm(c, threads, gemm_ops(isa));
}

// row(m, scratch) over all rows, in runs of about 16k elements: a task must outweigh handing it out. scratch: `floats` floats.
template <class Body>
void rows_in_runs(int64_t M, int64_t K, int64_t floats, int threads, const Body& row) {
  const int64_t run = K > 0 ? (1 << 14) / K + 1 : M;
  parallel_for((M + run - 1) / run, threads, [&](int64_t i) {
    float* wide = reinterpret_cast<float*>(thread_scratch().get(size_t(floats) * 4 + 64));
    for (int64_t m = i * run; m < (i + 1) * run && m < M; ++m) row(m, wide);
  });
}

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

void quantize_per_token(int dtype, int out_type, int64_t M, int64_t K, uintptr_t x, int64_t ldx, uintptr_t out, int64_t ldo,
                        uintptr_t scale, int threads, int isa) {
  const char* in = reinterpret_cast<const char*>(x);
  char* to = reinterpret_cast<char*>(out);
  float* scales = reinterpret_cast<float*>(scale);
  const GemmOps& ops = gemm_ops(isa);
  const int64_t row = ldx * bytes_of(dtype);
  py::gil_scoped_release nogil;
  rows_in_runs(M, K, K, threads, [&](int64_t m, float* wide) {
    ops.quantise_row(in + m * row, dtype, K, to + m * ldo, out_type, scales + m, wide);
  });
}

// A residual of 0: none.
void rms_norm_quantize(int dtype, int weight_type, int out_type, int64_t M, int64_t K, uintptr_t x, int64_t ldx, uintptr_t weight,
                       uintptr_t residual, int64_t ldr, uintptr_t out, int64_t ldo, uintptr_t scale, float eps, int threads,
                       int isa) {
  const char* in = reinterpret_cast<const char*>(x);
  char *to = reinterpret_cast<char*>(out), *sums = reinterpret_cast<char*>(residual);
  float* scales = reinterpret_cast<float*>(scale);
  const GemmOps& ops = gemm_ops(isa);
  const int64_t row = ldx * bytes_of(dtype), residual_row = ldr * bytes_of(dtype);
  py::gil_scoped_release nogil;
  Scratch memory;
  float* w = reinterpret_cast<float*>(memory.get(size_t(K) * 4 + 64));
  scalar::widen_any(reinterpret_cast<const void*>(weight), weight_type, K, w);
  rows_in_runs(M, K, K, threads, [&](int64_t m, float* wide) {
    ops.rms_norm_row(in + m * row, sums ? sums + m * residual_row : nullptr, dtype, w, K, eps, wide);
    ops.quantise_row(wide, kFloat32, K, to + m * ldo, out_type, scales + m, nullptr);
  });
}

void silu_mul_quantize(int dtype, int out_type, int64_t M, int64_t K, uintptr_t x, int64_t ldx, uintptr_t out, int64_t ldo,
                       uintptr_t scale, int threads, int isa) {
  const char* in = reinterpret_cast<const char*>(x);
  char* to = reinterpret_cast<char*>(out);
  float* scales = reinterpret_cast<float*>(scale);
  const GemmOps& ops = gemm_ops(isa);
  const int64_t row = ldx * bytes_of(dtype);
  py::gil_scoped_release nogil;
  rows_in_runs(M, K, 2 * K, threads, [&](int64_t m, float* wide) {
    ops.silu_mul_row(in + m * row, dtype, K, wide);
    ops.quantise_row(wide, kFloat32, K, to + m * ldo, out_type, scales + m, nullptr);
  });
}

}  // namespace
}  // namespace attnkit::cpu

namespace attnkit {

void register_cpu_gemm(py::module_& m) {
  m.def("cpu_w8a8_gemm", &cpu::w8a8_gemm);
  m.def("cpu_quantize_per_token", &cpu::quantize_per_token);
  m.def("cpu_rms_norm_quantize", &cpu::rms_norm_quantize);
  m.def("cpu_silu_mul_quantize", &cpu::silu_mul_quantize);
  m.def("cpu_isa", [](int wanted) { return static_cast<int>(cpu::pick_isa(wanted)); }, py::arg("wanted") = -1,
        "The instruction set the CPU kernels use: 0 baseline, 1 AVX2, 2 AVX-512.");
}

}  // namespace attnkit
