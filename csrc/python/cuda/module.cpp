// The CUDA operations as Python calls them: addresses of memory that torch allocated, the handle of
// torch's current stream, and no waiting for the device.

#include "python/cuda/module.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/operations.h"
#include "cuda/launch.h"
#include "python/reader.h"

namespace gradclip::python {
namespace {

static_assert(cuda::kChunkBytes == cpu::kChunkBytes, "reader.cpp cuts lists for every device alike");

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not find it
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

/// Makes a device current for one scope. This library has a CUDA runtime of its own, linked
/// statically, beside torch's, and each remembers a current device: what both see, and what has to
/// be restored, is the driver's current context.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (driver().get != nullptr) driver().get(&before_);
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (before_ != nullptr) driver().set(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  struct Driver {
    int (*get)(void** context) = nullptr;
    int (*set)(void* context) = nullptr;

    Driver() {
      void* library = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
      if (library == nullptr) return;
      get = reinterpret_cast<decltype(get)>(dlsym(library, "cuCtxGetCurrent"));
      set = reinterpret_cast<decltype(set)>(dlsym(library, "cuCtxSetCurrent"));
      if (set == nullptr) get = nullptr;
    }
  };
  static const Driver& driver() {
    static const Driver found;
    return found;
  }

  void* before_ = nullptr;
};

/// Errors that stay as long as the process lives, unlike too little memory to load the kernels.
bool is_permanent(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorInsufficientDriver:
      return true;
    default:
      return false;
  }
}

using Reason = std::pair<std::string, bool>;

/// Returns why the kernels cannot run on a device and whether that is permanent, or nothing. Asks
/// again until the answer is permanent.
std::optional<Reason> why_unavailable(int device) {
  static std::mutex mutex;
  static std::map<int, std::optional<Reason>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cudaError_t error = cudaSuccess;
  try {
    const DeviceGuard guard(device);
    // Loading kernels has nothing to do with a stream that another thread is capturing, and need
    // not break its capture.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    error = cuda::probe();
    check(cudaThreadExchangeStreamCaptureMode(&mode));
  } catch (const std::runtime_error& failure) {
    return Reason(failure.what(), false);
  }
  if (error == cudaSuccess) return known[device] = std::nullopt;
  const Reason reason(cudaGetErrorString(error), is_permanent(error));
  return reason.second ? known[device] = reason : reason;
}

template <typename Pointer>
Pointer at(uint64_t address) {
  return reinterpret_cast<Pointer>(address);
}

/// Enqueues the norm and the coefficient. `scratch` has norm_scratch_bytes(list) bytes of the device,
/// 16-byte aligned. `is_pool_stream`: the stream lives as long as the process.
void norm(const HeldList& list, double p, double max_norm, bool float64, uint64_t total_norm,
          uint64_t clip_coef, uint64_t scratch, uint64_t stream, bool is_pool_stream) {
  cuda::NormBuffers buffers{};
  buffers.scratch = at<void*>(scratch);
  buffers.total_norm = at<void*>(total_norm);
  buffers.clip_coef = at<void*>(clip_coef);
  buffers.float64 = float64;
  const py::gil_scoped_release release;  // a launch waits where a thousand others are queued
  const DeviceGuard guard(list.device_index);
  check(cuda::launch_norm(list.spans, p, Rule{max_norm}, buffers, at<cudaStream_t>(stream),
                          is_pool_stream));
}

/// Enqueues the multiplication by a coefficient on the device, a float or, with `float64`, a double.
void scale(const HeldList& list, uint64_t clip_coef, bool float64, uint64_t stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(list.device_index);
  check(cuda::launch_scale(list.spans, at<const void*>(clip_coef), float64,
                           at<cudaStream_t>(stream)));
}

/// Enqueues the clamp to [min, max].
void clamp(const HeldList& list, double min, double max, uint64_t stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(list.device_index);
  check(cuda::launch_clamp(list.spans, min, max, at<cudaStream_t>(stream)));
}

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_why_unavailable", &why_unavailable);
  m.def("cuda_norm_scratch_bytes",
        [](const HeldList& list) { return cuda::norm_scratch_bytes(list.spans); });
  m.def("cuda_norm", &norm);
  m.def("cuda_scale_", &scale);
  m.def("cuda_clamp_", &clamp);
}

}  // namespace gradclip::python
