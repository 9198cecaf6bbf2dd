// Loads cubins and launches their kernels through libcuda; knows neither torch nor the CUDA runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "launch/cuda_api.h"
#include "launch/tensors.h"

namespace py = pybind11;

namespace attnkit::cuda {
namespace {

using Dim = std::tuple<unsigned, unsigned, unsigned>;

// One kernel of a cubin, loaded on one device. Modules are never unloaded: graphs may still hold the kernel.
class Kernel {
 public:
  Kernel(const py::bytes& image, const std::string& name, int device, int shared_bytes) : device_(device), shared_bytes_(shared_bytes) {
    ContextGuard guard(device);
    CaptureMode mode = kCaptureRelaxed;  // loading may happen while a stream of this thread is being captured
    check(api().ThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
    Module module = nullptr;
    const Result loaded = api().ModuleLoadData(&module, PyBytes_AS_STRING(image.ptr()));
    api().ThreadExchangeStreamCaptureMode(&mode);
    check(loaded, ("loading the image of " + name).c_str());
    check(api().ModuleGetFunction(&function_, module, name.c_str()), ("finding kernel " + name).c_str());
    if (shared_bytes > 48 * 1024) {
      check(api().FuncSetAttribute(function_, kMaxDynamicShared, shared_bytes),
            (name + ": asking for " + std::to_string(shared_bytes) + " bytes of shared memory").c_str());
    }
  }

  int attribute(FunctionAttribute which) const {
    ContextGuard guard(device_);
    int value = 0;
    check(api().FuncGetAttribute(&value, which, function_), "cuFuncGetAttribute");
    return value;
  }

  int blocks_per_sm(int threads) const {
    ContextGuard guard(device_);
    int blocks = 0;
    check(api().OccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function_, threads, shared_bytes_), "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
  }

  void allow_large_clusters() {
    ContextGuard guard(device_);
    check(api().FuncSetAttribute(function_, kNonPortableCluster, 1), "allowing clusters of more than 8");
  }

  int device() const { return device_; }
  int shared_bytes() const { return shared_bytes_; }
  Function function() const { return function_; }

 private:
  Function function_ = nullptr;
  int device_, shared_bytes_;
};

// How a tensor map is made once its base address is known. Sizes and box: innermost first; strides: bytes,
// from the second dimension on.
struct MapSpec {
  int type = 0, swizzle = 0, promotion = 0, fill = 0;
  std::vector<std::uint64_t> sizes, strides;
  std::vector<std::uint32_t> box;

  MapSpec(int type_, std::vector<std::uint64_t> sizes_, std::vector<std::uint64_t> strides_, std::vector<std::uint32_t> box_,
          int swizzle_, int promotion_, int fill_)
      : type(type_), swizzle(swizzle_), promotion(promotion_), fill(fill_), sizes(std::move(sizes_)), strides(std::move(strides_)),
        box(std::move(box_)) {
    if (sizes.empty() || sizes.size() > 5 || box.size() != sizes.size() || strides.size() + 1 != sizes.size()) {
      throw py::value_error("MapSpec: wanted 1 to 5 sizes, as many box lengths, and one stride fewer");
    }
  }

  void encode(std::uint64_t address, void* to) const {
    TensorMap map;
    const std::uint32_t steps[5] = {1, 1, 1, 1, 1};
    check(api().TensorMapEncodeTiled(&map, type, static_cast<std::uint32_t>(sizes.size()), reinterpret_cast<void*>(address),
                                     sizes.data(), strides.data(), box.data(), steps, 0, swizzle, promotion, fill),
          "cuTensorMapEncodeTiled");
    std::memcpy(to, &map, sizeof map);
  }
};

// A launch with everything fixed but the stream and some 8-byte values of the kernel's one parameter struct.
class Launch {
 public:
  Launch(std::shared_ptr<Kernel> kernel, const Dim& grid, const Dim& block, const Dim& cluster, bool programmatic,
         const py::bytes& parameters, std::vector<std::size_t> offsets, const std::vector<std::tuple<std::size_t, std::size_t, MapSpec>>& maps)
      : kernel_(std::move(kernel)), offsets_(std::move(offsets)) {
    const std::string bytes = parameters;
    storage_.resize((bytes.size() + 63) / 64 + 1);
    std::memcpy(storage_.data(), bytes.data(), bytes.size());
    for (std::size_t offset : offsets_) {
      if (offset % 8 != 0 || offset + 8 > bytes.size()) throw py::value_error("Launch: offset " + std::to_string(offset) + " is outside the parameters");
    }
    for (const auto& [offset, argument, spec] : maps) {
      if (offset % 64 != 0 || offset + sizeof(TensorMap) > bytes.size() || argument >= offsets_.size()) {
        throw py::value_error("Launch: a tensor map at offset " + std::to_string(offset) + " does not fit the parameters");
      }
      maps_.push_back({offset, argument, 0, spec, {}});
    }
    config_ = {};
    std::tie(config_.grid_x, config_.grid_y, config_.grid_z) = grid;
    std::tie(config_.block_x, config_.block_y, config_.block_z) = block;
    config_.shared_bytes = static_cast<unsigned>(kernel_->shared_bytes());
    const auto [x, y, z] = cluster;
    if (x * y * z > 1) {
      LaunchAttribute attribute{};
      attribute.id = kClusterDimension;
      attribute.value.cluster = {x, y, z};
      attributes_.push_back(attribute);
    }
    if (programmatic) {
      LaunchAttribute attribute{};
      attribute.id = kProgrammaticSerialization;
      attribute.value.programmatic = 1;
      attributes_.push_back(attribute);
    }
    config_.attributes = attributes_.data();
    config_.n_attributes = static_cast<unsigned>(attributes_.size());
  }

  // launch(stream, value, ...): one value for each offset, a tensor for its address; None is 0. Holds the GIL, so the buffer has one writer.
  void operator()(PyObject* const* values, std::size_t count) {
    if (count != offsets_.size() + 1) {
      throw py::value_error("Launch: got " + std::to_string(count) + " values, wanted the stream and " + std::to_string(offsets_.size()));
    }
    char* bytes = reinterpret_cast<char*>(storage_.data());
    for (std::size_t i = 0; i < offsets_.size(); ++i) {
      const std::uint64_t value = number(values[i + 1]);
      std::memcpy(bytes + offsets_[i], &value, 8);
    }
    ContextGuard guard(kernel_->device());
    for (Map& map : maps_) {
      std::uint64_t address = 0;
      std::memcpy(&address, bytes + offsets_[map.argument], 8);
      if (address != map.address) {
        std::memcpy(bytes + map.offset, &map.at(address), sizeof(TensorMap));
        map.address = address;
      }
    }
    config_.stream = reinterpret_cast<Stream>(number(values[0]));
    void* parameters[] = {bytes};
    const Result result = api().LaunchKernelEx(&config_, kernel_->function(), parameters, nullptr);
    if (result != kSuccess) check(result, "cuLaunchKernelEx");
  }

 private:
  struct Map {
    std::size_t offset, argument;
    std::uint64_t address;  // of the map that stands in the parameters
    MapSpec spec;
    std::unordered_map<std::uint64_t, TensorMap> made;  // a model calls with the caches of its layers in turn

    const TensorMap& at(std::uint64_t wanted) {
      constexpr std::size_t kMost = 1024;
      const auto found = made.find(wanted);
      if (found != made.end()) return found->second;
      TensorMap map;
      spec.encode(wanted, &map);
      if (made.size() >= kMost) made.clear();
      return made[wanted] = map;
    }
  };
  struct alignas(64) Line {
    char bytes[64];
  };

  static std::uint64_t number(PyObject* object) {
    if (object == Py_None) return 0;
    if (!PyLong_Check(object)) return address(object);
    const std::uint64_t value = PyLong_AsUnsignedLongLongMask(object);  // negative strides wrap to two's complement
    if (value == static_cast<std::uint64_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  static std::uint64_t address(PyObject* tensor) {
    DlTensor read;
    if (read_tensor(tensor, &read)) return read.address();
    return py::handle(tensor).attr("data_ptr")().cast<std::uint64_t>();
  }

  std::shared_ptr<Kernel> kernel_;
  std::vector<std::size_t> offsets_;
  std::vector<Map> maps_;
  std::vector<Line> storage_;
  std::vector<LaunchAttribute> attributes_;
  LaunchConfig config_;
};

// What Python calls: a builtin that owns a Launch. pybind11's way of calling an object would take 0.6 us of some 12.
PyObject* call_launch(PyObject* capsule, PyObject* const* values, Py_ssize_t count) {
  try {
    (*static_cast<Launch*>(PyCapsule_GetPointer(capsule, nullptr)))(values, static_cast<std::size_t>(count));
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef call_launch_definition = {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_launch)), METH_FASTCALL,
                                      "launch(stream, value, ...): one value for each offset, a tensor for its address"};

py::object make_launch(std::shared_ptr<Kernel> kernel, const Dim& grid, const Dim& block, const Dim& cluster, bool programmatic,
                       const py::bytes& parameters, std::vector<std::size_t> offsets,
                       const std::vector<std::tuple<std::size_t, std::size_t, MapSpec>>& maps) {
  auto launch = std::make_unique<Launch>(std::move(kernel), grid, block, cluster, programmatic, parameters, std::move(offsets), maps);
  const py::capsule owner(launch.release(), [](void* p) { delete static_cast<Launch*>(p); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&call_launch_definition, owner.ptr()));
}

// None where CUDA can be used, else why not.
py::object unavailable() {
  try {
    int devices = 0;
    check(api().DeviceGetCount(&devices), "cuDeviceGetCount");
    if (devices == 0) return py::str("the driver lists no CUDA device");
    return py::none();
  } catch (const std::runtime_error& error) {
    return py::str(error.what());
  }
}

// cuda_capture_id(stream): the capture that a stream is part of, or 0. A plain builtin, as it is asked before every launch.
PyObject* capture_id(PyObject*, PyObject* stream) {
  try {
    const std::uint64_t handle = PyLong_AsUnsignedLongLongMask(stream);
    if (handle == static_cast<std::uint64_t>(-1) && PyErr_Occurred()) return nullptr;
    int status = 0;
    std::uint64_t id = 0;
    check(api().StreamGetCaptureInfo(reinterpret_cast<Stream>(handle), &status, &id, nullptr, nullptr, nullptr), "cuStreamGetCaptureInfo");
    return PyLong_FromUnsignedLongLong(status == 1 ? id : 0);  // 1: CU_STREAM_CAPTURE_STATUS_ACTIVE
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef capture_id_definition = {"cuda_capture_id", &capture_id, METH_O, "cuda_capture_id(stream): the capture it is part of, or 0"};

}  // namespace
}  // namespace attnkit::cuda

namespace attnkit {

void register_launch(py::module_& m) {
  using namespace attnkit::cuda;
  m.def("cuda_unavailable", &unavailable, "None where the CUDA driver can be used, else the reason");
  m.attr("cuda_capture_id") = py::reinterpret_steal<py::object>(PyCFunction_New(&capture_id_definition, nullptr));
  m.def("cuda_driver_version", [] {
    int version = 0;
    check(api().DriverGetVersion(&version), "cuDriverGetVersion");
    return version;
  });
  py::class_<Kernel, std::shared_ptr<Kernel>>(m, "CudaKernel")
      .def(py::init<const py::bytes&, const std::string&, int, int>(), py::arg("image"), py::arg("name"), py::arg("device"), py::arg("shared_bytes"))
      .def_property_readonly("registers", [](const Kernel& k) { return k.attribute(kRegisters); })
      .def_property_readonly("local_bytes", [](const Kernel& k) { return k.attribute(kLocalBytes); })
      .def_property_readonly("device", &Kernel::device)
      .def_property_readonly("shared_bytes", &Kernel::shared_bytes)
      .def("blocks_per_sm", &Kernel::blocks_per_sm, py::arg("threads"))
      .def("allow_large_clusters", &Kernel::allow_large_clusters);
  py::class_<MapSpec>(m, "CudaMapSpec")
      .def(py::init<int, std::vector<std::uint64_t>, std::vector<std::uint64_t>, std::vector<std::uint32_t>, int, int, int>(), py::arg("type"),
           py::arg("sizes"), py::arg("strides"), py::arg("box"), py::arg("swizzle") = 0, py::arg("promotion") = 0, py::arg("fill") = 0)
      .def("encode", [](const MapSpec& spec, std::uint64_t address) {
        char map[sizeof(TensorMap)];
        spec.encode(address, map);
        return py::bytes(map, sizeof map);
      });
  m.def("CudaLaunch", &make_launch, py::arg("kernel"), py::arg("grid"), py::arg("block"), py::arg("cluster"), py::arg("programmatic"),
        py::arg("parameters"), py::arg("offsets"), py::arg("maps") = std::vector<std::tuple<std::size_t, std::size_t, MapSpec>>{},
        "A prepared launch, to be called with the stream and a value for each offset");
}

}  // namespace attnkit
