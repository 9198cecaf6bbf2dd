// attnkit._C: registration only. Every room registers its own functions; none includes a torch header.
#include <pybind11/pybind11.h>

namespace attnkit {
void register_cpu_attention(pybind11::module_& m);  // cpu/attention.cpp: paged_prefill, paged_decode, mla
void register_cpu_gemm(pybind11::module_& m);       // cpu/gemm.cpp: w8a8_gemm, quantize_per_token
void register_cpu_sampling(pybind11::module_& m);   // cpu/sampling.cpp: sample
void register_cpu_cache(pybind11::module_& m);      // cpu/cache.cpp: write_kv, merge_states
void register_launch(pybind11::module_& m);         // launch/driver.cpp: cubins through libcuda
void register_tensors(pybind11::module_& m);        // launch/tensors.cpp: a call's key
}  // namespace attnkit

PYBIND11_MODULE(_C, m) {
  m.doc() = "attnkit's compiled part: CPU kernels, and the launcher for CUDA images";
  attnkit::register_cpu_attention(m);
  attnkit::register_cpu_gemm(m);
  attnkit::register_cpu_sampling(m);
  attnkit::register_cpu_cache(m);
  attnkit::register_launch(m);
  attnkit::register_tensors(m);
}
