// libcuda, opened when first needed: importing attnkit on a machine without it must work.
#include "launch/cuda_api.h"

#include <dlfcn.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

namespace attnkit::cuda {
namespace {

template <class Entry>
void resolve(void* library, Entry& entry, const char* name) {
  entry = reinterpret_cast<Entry>(dlsym(library, name));
  if (entry == nullptr) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name + ": the driver is too old");
}

Api open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  Api api{};
  resolve(library, api.Init, "cuInit");
  resolve(library, api.DriverGetVersion, "cuDriverGetVersion");
  resolve(library, api.GetErrorName, "cuGetErrorName");
  resolve(library, api.GetErrorString, "cuGetErrorString");
  resolve(library, api.DeviceGetCount, "cuDeviceGetCount");
  resolve(library, api.DeviceGet, "cuDeviceGet");
  resolve(library, api.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  resolve(library, api.CtxGetCurrent, "cuCtxGetCurrent");
  resolve(library, api.CtxPushCurrent, "cuCtxPushCurrent_v2");
  resolve(library, api.CtxPopCurrent, "cuCtxPopCurrent_v2");
  resolve(library, api.ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
  resolve(library, api.StreamGetCaptureInfo, "cuStreamGetCaptureInfo_v2");
  resolve(library, api.ModuleLoadData, "cuModuleLoadData");
  resolve(library, api.ModuleGetFunction, "cuModuleGetFunction");
  resolve(library, api.FuncGetAttribute, "cuFuncGetAttribute");
  resolve(library, api.FuncSetAttribute, "cuFuncSetAttribute");
  resolve(library, api.OccupancyMaxActiveBlocksPerMultiprocessor, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  resolve(library, api.LaunchKernelEx, "cuLaunchKernelEx");
  resolve(library, api.TensorMapEncodeTiled, "cuTensorMapEncodeTiled");
  const Result result = api.Init(0);
  if (result != kSuccess) throw std::runtime_error("cuInit failed with error " + std::to_string(result) + ": no usable CUDA device");
  return api;
}

constexpr int kMaxDevices = 64;

Context primary(int device) {
  static std::array<Context, kMaxDevices> contexts{};
  static std::mutex mutex;
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("CUDA device " + std::to_string(device) + " is out of range");
  if (contexts[device] == nullptr) {
    std::lock_guard<std::mutex> lock(mutex);
    Device handle = 0;
    check(api().DeviceGet(&handle, device), "cuDeviceGet");
    Context context = nullptr;
    check(api().DevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain");
    contexts[device] = context;
  }
  return contexts[device];
}

}  // namespace

const Api& api() {
  static const Api opened = open();  // a throw leaves it unset: the next call tries again
  return opened;
}

void check(Result result, const char* what) {
  if (result == kSuccess) return;
  const char *name = nullptr, *text = nullptr;
  api().GetErrorName(result, &name);
  api().GetErrorString(result, &text);
  throw std::runtime_error(std::string(what) + ": " + (name ? name : std::to_string(result)) + (text ? std::string(" (") + text + ")" : ""));
}

ContextGuard::ContextGuard(int device) {
  Context current = nullptr, wanted = primary(device);
  check(api().CtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current != wanted) {
    check(api().CtxPushCurrent(wanted), "cuCtxPushCurrent");
    pushed_ = true;
  }
}

ContextGuard::~ContextGuard() {
  Context popped = nullptr;
  if (pushed_) api().CtxPopCurrent(&popped);
}

}  // namespace attnkit::cuda
