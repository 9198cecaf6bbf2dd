// The exchange table of torch's tensors (torch 2.10 and later), and the part of a call's key that tensors make.
#include "launch/tensors.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

namespace py = pybind11;

namespace attnkit {
namespace {

// dlpack.h, version 1: DLPackExchangeAPI. Only the last but one entry is called.
struct ExchangeTable {
  std::uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*read)(void* object, DlTensor* to);
  void* current_stream;
};

const ExchangeTable* table = nullptr;
std::vector<PyTypeObject*> types;  // whose objects the table may be given; never released

void use_table(const py::capsule& capsule, const py::tuple& known) {
  const auto* given = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (given == nullptr) throw py::error_already_set();
  if (given->major != 1 || given->read == nullptr) throw py::value_error("use_tensor_table: wanted DLPack's exchange table, version 1");
  for (const py::handle type : known) types.push_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()));
  table = given;
}

// tensor_key(tensor or None, ...): bytes that are equal where shapes, strides, dtypes, devices and whether an address is a
// multiple of 16 are; None where one of them cannot be read.
PyObject* tensor_key(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  constexpr std::size_t kMost = 256;
  std::int64_t words[kMost];
  std::size_t used = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    DlTensor t;
    const bool given = objects[i] != Py_None;
    if (given && !read_tensor(objects[i], &t)) Py_RETURN_NONE;
    const std::size_t n = given ? static_cast<std::size_t>(t.dimensions) : 0;
    if (used + 2 + 2 * n > kMost) Py_RETURN_NONE;
    const bool aligned = given && t.address() % 16 == 0;
    words[used++] = given ? static_cast<std::int64_t>(n) << 32 | t.code << 24 | t.bits << 16 | t.lanes << 1 | aligned : -1;
    words[used++] = given ? static_cast<std::int64_t>(t.device_type) << 32 | static_cast<std::uint32_t>(t.device_id) : -1;
    std::memcpy(words + used, t.shape, n * sizeof(std::int64_t));
    std::memcpy(words + used + n, t.strides, n * sizeof(std::int64_t));
    used += 2 * n;
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words), static_cast<Py_ssize_t>(used * sizeof words[0]));
}

PyMethodDef tensor_key_definition = {"tensor_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&tensor_key)), METH_FASTCALL,
                                     "tensor_key(tensor or None, ...) -> bytes, or None where one cannot be read"};

}  // namespace

bool read_tensor(PyObject* object, DlTensor* to) {
  for (PyTypeObject* type : types) {
    if (Py_TYPE(object) != type) continue;  // of a subclass only its own code knows what it is
    if (table->read(object, to) == 0 && (to->dimensions == 0 || to->strides != nullptr)) return true;
    PyErr_Clear();
    return false;
  }
  return false;
}

void register_tensors(py::module_& m) {
  m.def("use_tensor_table", &use_table, py::arg("capsule"), py::arg("types"), "Read tensors of these types by DLPack's exchange table");
  m.attr("tensor_key") = py::reinterpret_steal<py::object>(PyCFunction_New(&tensor_key_definition, nullptr));
}

}  // namespace attnkit
