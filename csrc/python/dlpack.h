// The part of DLPack 1.x that describes a tensor, and its C exchange table, which torch
// (since 2.10) and other libraries offer as `type.__dlpack_c_exchange_api__`. A binary interface
// that a major version keeps; see https://dmlc.github.io/dlpack/latest/c_api.html.

#pragma once

#include <cstdint>

namespace gradclip::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kRocm = 10, kRocmHost = 11 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

/// A view of a tensor. `shape` and `strides` belong to the tensor.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  const ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  /// Describes a Python tensor of the table's type. Returns 0, or -1 with a Python exception set.
  /// May be null.
  int (*view)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace gradclip::dlpack
