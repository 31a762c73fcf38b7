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
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/operations.h"
#include "cuda/launch.h"
#include "python/reader.h"

namespace gradclip::python {
namespace {

static_assert(cuda::kChunkBytes == cpu::kChunkBytes,
              "reader.cpp cuts lists for every device alike");

struct CudaError : std::runtime_error {
  explicit CudaError(cudaError_t error)
      : std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error)), code(error) {}

  cudaError_t code;
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not find it
  throw CudaError(error);
}

/// The driver's functions that a DeviceGuard needs; null without a driver.
struct Driver {
  int (*get_context)(void** context) = nullptr;
  int (*set_context)(void* context) = nullptr;
  int (*get_device)(int* device) = nullptr;  // of the current context

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);  // the name that the CUDA runtime asks for
    if (library == nullptr) return;
    get_context = reinterpret_cast<decltype(get_context)>(dlsym(library, "cuCtxGetCurrent"));
    set_context = reinterpret_cast<decltype(set_context)>(dlsym(library, "cuCtxSetCurrent"));
    get_device = reinterpret_cast<decltype(get_device)>(dlsym(library, "cuCtxGetDevice"));
  }

  bool is_complete() const {
    return get_context != nullptr && set_context != nullptr && get_device != nullptr;
  }

  static const Driver& instance() {
    static const Driver found;
    return found;
  }
};

/// Makes a device current for one scope. This library has a CUDA runtime of its own, linked
/// statically, beside torch's, and each remembers a current device. What both obey, and what has to
/// be restored, is the driver's current context, even if there was none: torch's runtime would take
/// the one that it finds for its own choice.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const Driver& driver = Driver::instance();
    knows_before_ = driver.is_complete() && driver.get_context(&before_) == 0;
    int device_before = -1;
    if (knows_before_ && before_ != nullptr) driver.get_device(&device_before);
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) {
      restore();  // a constructor that throws has no destructor
      check(error);
    }
    void* primary = nullptr;
    is_primary_ =
        device_before != device || driver.get_context(&primary) != 0 || primary == before_;
    if (!is_primary_) restore();
  }
  ~DeviceGuard() { restore(); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  /// False in a green context of the device, which stays current: the default stream is another one
  /// there, with the same handle.
  bool is_primary() const { return is_primary_; }

 private:
  void restore() const {
    if (knows_before_) Driver::instance().set_context(before_);
  }

  void* before_ = nullptr;
  bool knows_before_ = false;
  bool is_primary_ = true;
};

/// Lets this thread make calls that would break another thread's stream capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one to go back to
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
/// again until the answer is permanent. The first call on a device loads the kernels, which has
/// nothing to do with a stream that another thread may be capturing.
std::optional<Reason> why_unavailable(int device) {
  const py::gil_scoped_release release;
  static std::mutex mutex;
  static std::map<int, std::optional<Reason>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cudaError_t error = cudaSuccess;
  try {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    error = cuda::probe();
  } catch (const CudaError& failure) {
    error = failure.code;
  }
  std::optional<Reason> reason;
  if (error != cudaSuccess) reason.emplace(cudaGetErrorString(error), is_permanent(error));
  if (!reason || reason->second) known[device] = reason;
  return reason;
}

template <typename Pointer>
Pointer at(uint64_t address) {
  return reinterpret_cast<Pointer>(address);
}

/// Limits as Python passes them: a number, or an address, whether doubles are there, and the
/// stride; and whether a non-finite norm zeroes.
using PythonLimits = std::tuple<double, uint64_t, bool, int32_t, bool>;

cuda::Limits limits_from(const PythonLimits& from) {
  cuda::Limits limits{};
  limits.max_norm = std::get<0>(from);
  limits.values = at<const void*>(std::get<1>(from));
  limits.are_float64 = std::get<2>(from);
  limits.stride = std::get<3>(from);
  limits.zero_if_nonfinite = std::get<4>(from);
  return limits;
}

/// Enqueues the norm and the coefficient. `scratch` has norm_scratch_bytes(list) bytes of the
/// device, 16-byte aligned. `is_pool_stream`: the stream lives as long as the process.
void norm(const HeldList& list, double p, const PythonLimits& limits, bool is_float64,
          uint64_t total_norm, uint64_t clip_coef, uint64_t scratch, uint64_t stream,
          bool is_pool_stream) {
  cuda::NormBuffers buffers{};
  buffers.scratch = at<void*>(scratch);
  buffers.total_norm = at<void*>(total_norm);
  buffers.clip_coef = at<void*>(clip_coef);
  buffers.is_float64 = is_float64;
  const py::gil_scoped_release release;  // a launch waits where a thousand others are queued
  const DeviceGuard guard(list.device_index);
  check(cuda::launch_norm(list.spans, p, limits_from(limits), buffers, at<cudaStream_t>(stream),
                          is_pool_stream && guard.is_primary()));
}

/// Enqueues the multiplication by one coefficient on the device or, with `stride` 1, by one for
/// each tensor that has elements: floats or, with `are_float64`, doubles. `is_pool_stream` as for
/// the norm.
void scale(const HeldList& list, uint64_t coefs, bool are_float64, int32_t stride, uint64_t stream,
           bool is_pool_stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(list.device_index);
  check(cuda::launch_scale(list.spans, {at<const void*>(coefs), stride, are_float64},
                           at<cudaStream_t>(stream), is_pool_stream && guard.is_primary()));
}

/// Enqueues the norms of the tensors that have elements and, unless their addresses are null, the
/// coefficients and the statistics. `scratch` has tensors_scratch_bytes(list), 16-byte aligned.
void tensors(const HeldList& list, double p, const PythonLimits& limits, bool is_float64,
             uint64_t norms, uint64_t clip_coefs, uint64_t statistics, uint64_t scratch,
             uint64_t stream, bool is_pool_stream) {
  cuda::TensorBuffers buffers{};
  buffers.scratch = at<void*>(scratch);
  buffers.norms = at<void*>(norms);
  buffers.clip_coefs = at<void*>(clip_coefs);
  buffers.statistics = at<double*>(statistics);
  buffers.is_float64 = is_float64;
  const py::gil_scoped_release release;
  const DeviceGuard guard(list.device_index);
  check(cuda::launch_tensors(list.spans, p, limits_from(limits), buffers, at<cudaStream_t>(stream),
                             is_pool_stream && guard.is_primary()));
}

/// Enqueues adaptive clipping. `units`: of each tensor that has elements. `scratch` has
/// adaptive_scratch_bytes(grads, weights, units), 16-byte aligned.
void clip_adaptive(const HeldList& grads, const HeldList& weights,
                   const std::vector<int64_t>& units, double p, double clip_factor, double eps,
                   uint64_t scratch, uint64_t stream, bool is_pool_stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(grads.device_index);
  check(cuda::launch_clip_adaptive({grads.spans, weights.spans, units.data()},
                                   {p, clip_factor, eps}, at<void*>(scratch),
                                   at<cudaStream_t>(stream), is_pool_stream && guard.is_primary()));
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
  m.def("cuda_tensors_scratch_bytes",
        [](const HeldList& list) { return cuda::tensors_scratch_bytes(list.spans); });
  m.def("cuda_tensors", &tensors);
  m.def("cuda_adaptive_scratch_bytes",
        [](const HeldList& grads, const HeldList& weights, const std::vector<int64_t>& units) {
          return cuda::adaptive_scratch_bytes({grads.spans, weights.spans, units.data()});
        });
  m.def("cuda_clip_adaptive_", &clip_adaptive);
  m.def("cuda_clamp_", &clamp);
}

}  // namespace gradclip::python
