// write_kv and merge_states on the CPU. Both move memory; the row conversions come from the gemm's instruction-set builds.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "convert.h"
#include "gemm.h"
#include "parallel.h"

namespace py = pybind11;

namespace attnkit::cpu {
namespace {

int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : dtype == kInt8 || dtype == kE4M3 ? 1 : 2; }

// One of the two halves of a write: rows [T, H, D] with strides in elements into a cache [P, S, H, D].
struct Side {
  const char* x;
  char* cache;
  int64_t D, token, head;                      // strides of x
  int64_t page_stride, slot_stride, head_stride;  // of the cache
  const float* scale;                          // [H] or null
  int64_t scale_stride;
};

Side side_of(const py::tuple& t) {
  const auto i64 = [&](int i) { return t[i].cast<int64_t>(); };
  return {reinterpret_cast<const char*>(t[0].cast<uintptr_t>()),
          reinterpret_cast<char*>(t[1].cast<uintptr_t>()),
          i64(2), i64(3), i64(4), i64(5), i64(6), i64(7),
          reinterpret_cast<const float*>(t[8].cast<uintptr_t>()), i64(9)};
}

void write_token(const Side& s, int64_t t, int64_t page, int64_t slot, int64_t heads, int dtype, int kv_dtype, const GemmOps& ops) {
  const char* x = s.x + t * s.token * size_of(dtype);
  char* to = s.cache + (page * s.page_stride + slot * s.slot_stride) * size_of(kv_dtype);
  if (dtype == kv_dtype && s.head == s.D && s.head_stride == s.D) {
    std::memcpy(to, x, static_cast<size_t>(heads * s.D * size_of(dtype)));
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    const char* from = x + h * s.head * size_of(dtype);
    char* row = to + h * s.head_stride * size_of(kv_dtype);
    if (dtype == kv_dtype)
      std::memcpy(row, from, static_cast<size_t>(s.D * size_of(dtype)));
    else
      ops.store_row(from, dtype, s.D, row, kv_dtype, s.scale ? s.scale + h * s.scale_stride : nullptr);
  }
}

// k and v: (x, cache, D, x's token and head stride, the cache's page, slot and head stride, scale or 0, its stride).
void write_kv(int dtype, int kv_dtype, int64_t T, int64_t heads, int64_t pages, int64_t page_size, uintptr_t slots,
              const py::tuple& k, const py::tuple& v, int threads, int isa) {
  const Side sides[2] = {side_of(k), side_of(v)};
  const int64_t* slot = reinterpret_cast<const int64_t*>(slots);
  for (int64_t t = 0; t < T; ++t)
    if (slot[t] < -1 || slot[t] >= pages * page_size)
      throw py::value_error("write_kv: slots[" + std::to_string(t) + "] = " + std::to_string(slot[t]) + " is outside [-1, " +
                            std::to_string(pages * page_size) + ")");
  const GemmOps& ops = gemm_ops(isa);
  py::gil_scoped_release nogil;
  const int64_t run = (1 << 14) / (heads * (sides[0].D + sides[1].D) + 1) + 1;  // tokens that are worth a task
  parallel_for((T + run - 1) / run, threads, [&](int64_t i) {
    for (int64_t t = i * run; t < (i + 1) * run && t < T; ++t)
      if (slot[t] >= 0)
        for (const Side& s : sides) write_token(s, t, slot[t] / page_size, slot[t] % page_size, heads, dtype, kv_dtype, ops);
  });
}

// Rows of Dv values and one lse each, all contiguous.
void merge_states(int dtype, int64_t rows, int64_t Dv, uintptr_t out_a, uintptr_t lse_a, uintptr_t out_b, uintptr_t lse_b,
                  uintptr_t out, uintptr_t lse, int threads, int isa) {
  const GemmOps& ops = gemm_ops(isa);
  const float* la = reinterpret_cast<const float*>(lse_a);
  const float* lb = reinterpret_cast<const float*>(lse_b);
  float* l = reinterpret_cast<float*>(lse);
  const int64_t row = Dv * size_of(dtype);
  py::gil_scoped_release nogil;
  const int64_t run = (1 << 14) / (Dv + 1) + 1;
  parallel_for((rows + run - 1) / run, threads, [&](int64_t i) {
    for (int64_t r = i * run; r < (i + 1) * run && r < rows; ++r) {
      const float top = la[r] > lb[r] || std::isnan(la[r]) ? la[r] : lb[r];
      const float low = la[r] > lb[r] || std::isnan(la[r]) ? lb[r] : la[r];
      const bool none = top == -INFINITY;
      const float joined = none || low == -INFINITY ? top : top + std::log1p(std::exp(low - top));
      // A part that saw nothing weighs exactly 0, and merge_row then selects: what its out holds does not matter.
      const float wa = la[r] == -INFINITY ? 0.0f : std::exp(la[r] - joined);
      const float wb = lb[r] == -INFINITY ? 0.0f : std::exp(lb[r] - joined);
      ops.merge_row(reinterpret_cast<const char*>(out_a) + r * row, reinterpret_cast<const char*>(out_b) + r * row, dtype, Dv, wa,
                    wb, reinterpret_cast<char*>(out) + r * row);
      l[r] = joined;
    }
  });
}

}  // namespace
}  // namespace attnkit::cpu

namespace attnkit {

void register_cpu_cache(py::module_& m) {
  m.def("cpu_write_kv", &cpu::write_kv);
  m.def("cpu_merge_states", &cpu::merge_states);
}

}  // namespace attnkit
