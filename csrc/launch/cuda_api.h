// The few types and entry points of libcuda that the launcher uses, declared here so that building needs no
// CUDA headers; the library itself is opened at run time. Values and layouts are those of the driver's ABI.
#pragma once
#include <cstdint>

namespace attnkit::cuda {

using Result = int;
using Device = int;
using Context = struct ContextTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Stream = struct StreamTag*;

constexpr Result kSuccess = 0;

enum FunctionAttribute : int {
  kMaxThreads = 0, kStaticShared = 1, kLocalBytes = 3, kRegisters = 4, kMaxDynamicShared = 8, kNonPortableCluster = 14,
};

enum LaunchAttributeId : int { kClusterDimension = 4, kProgrammaticSerialization = 6 };

struct LaunchAttribute {
  LaunchAttributeId id;
  char pad[4];
  union {
    struct { unsigned x, y, z; } cluster;
    int programmatic;
    char bytes[64];
  } value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned n_attributes;
};

struct alignas(64) TensorMap {
  std::uint64_t words[16];
};

enum CaptureMode : int { kCaptureGlobal = 0, kCaptureThreadLocal = 1, kCaptureRelaxed = 2 };

struct Api {
  Result (*Init)(unsigned);
  Result (*DriverGetVersion)(int*);
  Result (*GetErrorName)(Result, const char**);
  Result (*GetErrorString)(Result, const char**);
  Result (*DeviceGetCount)(int*);
  Result (*DeviceGet)(Device*, int);
  Result (*DevicePrimaryCtxRetain)(Context*, Device);
  Result (*CtxGetCurrent)(Context*);
  Result (*CtxPushCurrent)(Context);
  Result (*CtxPopCurrent)(Context*);
  Result (*ThreadExchangeStreamCaptureMode)(CaptureMode*);
  Result (*StreamGetCaptureInfo)(Stream, int* status, std::uint64_t* id, void* graph, void* dependencies, void* count);
  Result (*ModuleLoadData)(Module*, const void*);
  Result (*ModuleGetFunction)(Function*, Module, const char*);
  Result (*FuncGetAttribute)(int*, FunctionAttribute, Function);
  Result (*FuncSetAttribute)(Function, FunctionAttribute, int);
  Result (*OccupancyMaxActiveBlocksPerMultiprocessor)(int*, Function, int, std::size_t);
  Result (*LaunchKernelEx)(const LaunchConfig*, Function, void**, void**);
  Result (*TensorMapEncodeTiled)(TensorMap*, int type, std::uint32_t rank, void* address, const std::uint64_t* sizes,
                                 const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t* steps,
                                 int interleave, int swizzle, int promotion, int fill);
};

// The entry points; opens libcuda on first use. Throws std::runtime_error with the loader's reason.
const Api& api();

// Throws std::runtime_error naming ``what`` and the driver's error where ``result`` is not success.
void check(Result result, const char* what);

// Makes the primary context of a device current for its lifetime, and then the former one again.
class ContextGuard {
 public:
  explicit ContextGuard(int device);
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace attnkit::cuda
