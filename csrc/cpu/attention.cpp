// CPU attention: checks what lies in lens and the page table, cuts a call into tasks, and runs them on the best build that
// this machine can run.
#include "attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace attnkit {
namespace {

const Isa* kIsas[] = {
#if defined(__x86_64__)
    &attention_avx512, &attention_avx2,
#endif
    &attention_base};

bool runs_here(const Isa* isa) {
#if defined(__x86_64__)
  if (isa == &attention_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == &attention_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa* isa : kIsas)
    if (runs_here(isa)) names.emplace_back(isa->name);
  return names;
}

const Isa& pick(const std::string& name) {
  static const Isa* best = *std::find_if(std::begin(kIsas), std::end(kIsas), runs_here);
  if (name.empty()) return *best;
  for (const Isa* isa : kIsas)
    if (name == isa->name && runs_here(isa)) return *isa;
  throw std::invalid_argument("isa is '" + name + "', which this machine does not have");
}

// ---------------------------------------------------------------- memory that threads keep between calls

class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) & ~size_t(4095);
      data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }
  void drop_above(size_t bytes) {
    if (size_ <= bytes) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Buffer scratch_buffer, partial_buffer;
constexpr size_t kKeepPartials = size_t(64) << 20;  // bytes of partial results a thread keeps for its next call

// ---------------------------------------------------------------- checks of values

struct Sequence {
  int64_t n, L, token0, key0;
};

std::string place(const char* what, int64_t b, int64_t value, int64_t low, int64_t high) {
  return std::string(what) + "[" + std::to_string(b) + "] = " + std::to_string(value) + " is outside [" +
         std::to_string(low) + ", " + std::to_string(high) + "]";
}

// Cumulative offsets [B + 1]: from 0 or above, never falling, up to `total`.
void check_offsets(const std::string& op, const char* name, const int32_t* cu, int64_t B, int64_t total) {
  int64_t before = 0;
  for (int64_t b = 0; b <= B; b++) {
    if (cu[b] < before || cu[b] > total) throw std::invalid_argument(op + ": " + place(name, b, cu[b], before, total));
    before = cu[b];
  }
}

// First key that any query of the sequence sees: what a window hides is never read, so its pages are free to hold anything.
int64_t first_key(const Problem& p, int64_t L, int64_t n) {
  return p.window ? std::max<int64_t>(0, L - n - p.window + 1) : 0;
}

Sequence sequence(const std::string& op, const Problem& p, int64_t b) {
  Sequence s = {p.Q, 0, 0, 0};
  if (p.cu_q) s.n = p.cu_q[b + 1] - p.cu_q[b], s.token0 = p.cu_q[b];
  if (p.S == 0) {
    s.L = p.cu_k[b + 1] - p.cu_k[b], s.key0 = p.cu_k[b];
    return s;
  }
  s.L = p.lens[b];
  if (s.L < 0 || s.L > p.W * p.S) throw std::invalid_argument(op + ": " + place("lens", b, s.L, 0, p.W * p.S));
  if (s.n == 0) return s;
  const int32_t* table = p.pages + b * p.pages_stride;
  for (int64_t w = first_key(p, s.L, s.n) / p.S; w < (s.L + p.S - 1) / p.S; w++)
    if (table[w] < 0 || table[w] >= p.P)
      throw std::invalid_argument(op + ": pages[" + std::to_string(b) + ", " + std::to_string(w) + "] = " +
                                  std::to_string(table[w]) + " is outside [0, " + std::to_string(p.P) + ")");
  return s;
}

// ---------------------------------------------------------------- tasks

struct Work {
  std::vector<Task> tasks;
  struct Join {
    Task task;  // the rows; its keys are those of all parts
    size_t partials;
    int count;
  };
  std::vector<Join> joins;
  std::vector<size_t> partial_at;  // per task, in floats; kWhole where the task is whole
  size_t floats = 0;
  int64_t cost = 0;
};
constexpr size_t kWhole = ~size_t(0);

// Keys a task takes: a function of the sequence alone, so its bits never depend on its neighbours. Few rows (decode) leave
// few tasks, so their keys are split; the more rows, the longer the pieces, which bounds partials to an eighth of a bf16 cache.
int64_t chunk_keys(int64_t rows) { return rows > 1024 ? INT32_MAX : 512 * ((rows + 63) / 64); }

void add_rows(const Problem& p, const Sequence& s, int32_t b, int32_t head, int64_t row0, int64_t rows, Work& work) {
  const int64_t at = s.L - s.n, first = row0 / p.G, last = (row0 + rows - 1) / p.G;  // tokens at at + first to at + last
  int64_t lo = p.window ? std::max<int64_t>(0, at + first - p.window + 1) : 0, hi = s.L;
  if (p.causal && !p.tree) hi = at + last + 1;
  if (!p.causal && p.window) hi = std::min(s.L, at + last + p.window);
  if (at + last < 0) hi = 0;
  hi = std::max<int64_t>(hi, 0);
  lo = std::min(lo, hi);
  Task t = {b,          head,        int32_t(s.n), int32_t(s.L), s.token0, s.key0, int32_t(row0), int32_t(rows),
            int32_t(lo), int32_t(hi), nullptr};
  const int64_t chunk = chunk_keys(s.n * p.G), begin = lo / chunk, end = std::max(begin + 1, (hi + chunk - 1) / chunk);
  work.cost += rows * (hi - lo + 16) * (p.D + p.Dv);
  if (end - begin == 1) {
    work.tasks.push_back(t);
    work.partial_at.push_back(kWhole);
    return;
  }
  work.joins.push_back({t, work.floats, int(end - begin)});
  for (int64_t c = begin; c < end; c++) {
    t.key_lo = int32_t(std::max(lo, c * chunk));
    t.key_hi = int32_t(std::min(hi, (c + 1) * chunk));
    work.tasks.push_back(t);
    work.partial_at.push_back(work.floats);
    work.floats += partial_floats(rows, p.Dv);
  }
}

Work divide(const std::string& op, const Problem& p, int64_t N) {
  if (p.cu_q) check_offsets(op, "cu_q", p.cu_q, p.B, p.T);
  if (p.cu_k) check_offsets(op, "cu_k", p.cu_k, p.B, N);
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.B; b++) sequences.push_back(sequence(op, p, b));
  Work work;
  for (int64_t b = 0; b < p.B; b++) {
    const Sequence& s = sequences[size_t(b)];
    const int64_t rows = s.n * p.G, blocks = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t block = blocks ? std::min<int64_t>(kMaxRows, ((rows + blocks - 1) / blocks + 47) / 48 * 48) : 0;
    for (int64_t h = 0; h < p.Hkv; h++)
      for (int64_t r = 0; r < rows; r += block) add_rows(p, s, int32_t(b), int32_t(h), r, std::min(block, rows - r), work);
  }
  return work;
}

// Longest first, so that no thread starts a long task last.
std::vector<uint32_t> order(const Work& work) {
  std::vector<uint32_t> order(work.tasks.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = uint32_t(i);
  auto cost = [&](uint32_t i) { return int64_t(work.tasks[i].rows + 4) * (work.tasks[i].key_hi - work.tasks[i].key_lo); };
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return cost(a) > cost(b); });
  return order;
}

void run(const Isa& isa, const Problem& p, Work& work, int threads) {
  float* partials = reinterpret_cast<float*>(partial_buffer.at_least(work.floats * sizeof(float)));
  if (work.floats && partials == nullptr) throw std::bad_alloc();
  for (size_t i = 0; i < work.tasks.size(); i++)
    work.tasks[i].partial = work.partial_at[i] == kWhole ? nullptr : partials + work.partial_at[i];
  const std::vector<uint32_t> turn = order(work);
  const size_t bytes = isa.scratch_bytes(p);
  // A thread is worth waking for about 100 us of work.
  threads = int(std::max<int64_t>(1, std::min<int64_t>({threads, int64_t(work.tasks.size()), 1 + work.cost / 2000000})));
  std::atomic<size_t> next{0}, next_join{0};
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* scratch = scratch_buffer.at_least(bytes);
    if (scratch == nullptr) out_of_memory = true;
    auto take = [&]() -> const Task* {
      const size_t i = next++;
      return i < turn.size() ? &work.tasks[turn[i]] : nullptr;
    };
    for (const Task* task = scratch ? take() : nullptr; task != nullptr;) {
      const Task* after = take();
      isa.attend(p, *task, after, scratch);
      task = after;
    }
#pragma omp barrier
    for (size_t i; !out_of_memory && (i = next_join++) < work.joins.size();) {
      const Work::Join& join = work.joins[i];
      isa.combine(p, join.task, partials + join.partials, join.count);
    }
  }
  partial_buffer.drop_above(kKeepPartials);
  if (out_of_memory) throw std::bad_alloc();
}

// Query rows that belong to no sequence (padding around the ragged ones): output 0, lse -inf.
void clear_padding(const Problem& p) {
  if (!p.cu_q) return;
  const size_t size = p.q_type == DType::f32 ? 4 : 2;
  auto clear = [&](int64_t t) {
    for (int64_t h = 0; h < p.Hq; h++) {
      std::fill_n(p.out + (t * p.out_stride[1] + h * p.out_stride[2]) * int64_t(size), size_t(p.Dv) * size, char(0));
      if (p.lse) p.lse[t * p.Hq + h] = -__builtin_inff();
    }
  };
  for (int64_t t = 0; t < p.cu_q[0]; t++) clear(t);
  for (int64_t t = p.cu_q[p.B]; t < p.T; t++) clear(t);
}

// ---------------------------------------------------------------- Python

// One signature of a call: sizes, strides and options. Calling it takes addresses only.
class Attention {
 public:
  Attention(std::string op, int q_type, int kv_type, std::array<int64_t, 10> sizes,
            std::array<std::array<int64_t, 3>, 4> strides, int64_t pages_stride, double scale, double out_scale, bool causal,
            int64_t window, double softcap, bool values_in_keys)
      : op_(std::move(op)) {
    Problem& p = p_;
    p = Problem{};
    p.q_type = DType(q_type), p.kv_type = DType(kv_type);
    p.B = sizes[0], p.T = sizes[1], p.Q = sizes[2], p.Hq = sizes[3], p.Hkv = sizes[4];
    p.D = sizes[5], p.Dv = sizes[6], p.P = sizes[7], p.S = sizes[8], p.W = sizes[9];
    p.G = p.Hq / p.Hkv;
    std::copy(strides[0].begin(), strides[0].end(), p.q_stride);
    std::copy(strides[1].begin(), strides[1].end(), p.k_stride);
    std::copy(strides[2].begin(), strides[2].end(), p.v_stride);
    std::copy(strides[3].begin(), strides[3].end(), p.out_stride);
    p.pages_stride = pages_stride;
    p.scale = float(scale), p.out_scale = float(out_scale), p.softcap = float(softcap);
    p.causal = causal, p.window = std::min<int64_t>(window, INT32_MAX), p.values_in_keys = values_in_keys;
  }

  void operator()(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t pages, uintptr_t lens, uintptr_t cu_q, uintptr_t cu_k,
                  int64_t N, uintptr_t sinks, uintptr_t k_scale, int64_t k_scale_stride, uintptr_t v_scale,
                  int64_t v_scale_stride, uintptr_t tree, std::array<int64_t, 3> tree_stride, uintptr_t out, uintptr_t lse,
                  int threads, const std::string& isa) const {
    Problem p = p_;
    p.q = reinterpret_cast<const char*>(q), p.k = reinterpret_cast<const char*>(k), p.v = reinterpret_cast<const char*>(v);
    p.pages = reinterpret_cast<const int32_t*>(pages), p.lens = reinterpret_cast<const int32_t*>(lens);
    p.cu_q = reinterpret_cast<const int32_t*>(cu_q), p.cu_k = reinterpret_cast<const int32_t*>(cu_k);
    p.sinks = reinterpret_cast<const float*>(sinks);
    p.k_scale = reinterpret_cast<const float*>(k_scale), p.k_scale_stride = k_scale_stride;
    p.v_scale = reinterpret_cast<const float*>(v_scale), p.v_scale_stride = v_scale_stride;
    p.tree = reinterpret_cast<const bool*>(tree);
    std::copy(tree_stride.begin(), tree_stride.end(), p.tree_stride);
    p.out = reinterpret_cast<char*>(out), p.lse = reinterpret_cast<float*>(lse);
    Work work = divide(op_, p, N);
    clear_padding(p);
    run(pick(isa), p, work, threads);
  }

 private:
  std::string op_;
  Problem p_;
};

}  // namespace

void register_cpu_attention(py::module_& m) {
  py::class_<Attention>(m, "CpuAttention",
                        "One signature of a CPU attention call. sizes: B T Q Hq Hkv D Dv P S W (Q 0: ragged queries; S 0: "
                        "ragged keys); strides in elements: q, k, v, out, of (sequence, token, head) or (page, slot, head); "
                        "dtypes: 0 float32, 1 bfloat16, 2 float16, 3 int8, 4 e4m3")
      .def(py::init<std::string, int, int, std::array<int64_t, 10>, std::array<std::array<int64_t, 3>, 4>, int64_t, double,
                    double, bool, int64_t, double, bool>(),
           py::arg("op"), py::arg("q_type"), py::arg("kv_type"), py::arg("sizes"), py::arg("strides"),
           py::arg("pages_stride"), py::arg("scale"), py::arg("out_scale"), py::arg("causal"), py::arg("window"),
           py::arg("softcap"), py::arg("values_in_keys"))
      .def("__call__", &Attention::operator(), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_attention_isas", &isas, "Builds of the attention kernel that this machine can run, best first.");
}

}  // namespace attnkit
