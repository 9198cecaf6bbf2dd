// Tensors as the kernels need them, read in nanoseconds through DLPack's exchange table and without a torch header.
#pragma once
#include <Python.h>

#include <cstdint>

namespace attnkit {

// dlpack.h, version 1: what a tensor is. Strides count elements.
struct DlTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dimensions;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;

  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(data) + byte_offset; }
};

// False, with no Python error set, where `object` is no tensor that the table knows or has no memory of its own.
bool read_tensor(PyObject* object, DlTensor* to);

}  // namespace attnkit
