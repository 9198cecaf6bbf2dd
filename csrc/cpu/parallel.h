// OpenMP where the compiler has it, one thread where not. Include it from baseline files only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace attnkit::cpu {

// body(i) for i in [0, n), handed out one by one to at most `threads` threads. What a body throws is thrown here.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads > n) threads = static_cast<int>(n);
#if defined(_OPENMP)
  if (threads > 1) {
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
      try {
        body(i);
      } catch (...) {
#pragma omp critical(attnkit_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(i);
}

// Memory that grows to the largest size asked for and is kept: one object a thread (thread_local) or a call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes`, 64-byte aligned; what it held before may be gone.
  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace attnkit::cpu
