// The devices and what a launch there depends on. Part of launch.cu.

#pragma once

#include <map>
#include <mutex>

#include "adaptive.cuh"
#include "clamp.cuh"
#include "norm.cuh"
#include "norm_float64.cuh"
#include "per_tensor_float64.cuh"
#include "scale.cuh"
#include "statistics.cuh"

namespace gradclip::cuda {
namespace {

// With one of these counters, the blocks of a norm determine which of them is the last, and those
// of scale_kernel take runs of chunks. Each is 0 when the kernels are loaded and after every launch
// that uses it. They are static memory, which no allocator reuses: 64 KB, of which a captured call
// keeps two for good, since nothing tells when its graph is gone.
constexpr int kCounters = 16384;
__device__ unsigned counters[kCounters];

/// What a launch depends on: properties of the device, and of the code that this device runs.
struct Device {
  int index = 0;
  unsigned* counters = nullptr;
  int multiprocessors = 0;
  bool dependent_launch = false;
  bool large_parameters = false;
};

/// Loads kernels, so that their first launch can be captured with any driver. Fails if the binary
/// has no code for this device.
template <typename... Kernels>
cudaError_t load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : error), ...);
  return error;
}

/// The kernels of most steps of most trainings, which have tables of all sizes.
template <typename Table>
cudaError_t load_usual_kernels() {
  return load(norm_kernel<L2, Table>, scale_kernel<Table>, clamp_kernel<Table>);
}

template <typename Table>
cudaError_t load_kernels() {
  const cudaError_t error = load_usual_kernels<Table>();
  if (error != cudaSuccess) return error;
  return load(norm_kernel<L1, Table>, norm_kernel<LInf, Table>, norm_float64_kernel<Table>,
              tensors_kernel<L2, NormPartial, Table>, tensors_kernel<L1, StatisticsPartial, Table>,
              tensors_kernel<L2, StatisticsPartial, Table>, tensors_float64_kernel<Table>);
}

cudaError_t describe(int index, Device& device) {
  int driver = 0;
  cudaFuncAttributes scale;
  cudaError_t error = cudaDriverGetVersion(&driver);
  device.index = index;
  if (error == cudaSuccess) error = load(adaptive_kernel);
  if (error == cudaSuccess) error = load_kernels<LaunchTable<kSmallLaunchTensors>>();
#if CUDART_VERSION >= 12010 && !defined(GRADCLIP_EXT_SMALL_LAUNCHES)
  device.large_parameters = driver >= 12010;
  if (error == cudaSuccess && device.large_parameters) {
    error = load_usual_kernels<LaunchTable<kMediumLaunchTensors>>();
    if (error == cudaSuccess) error = load_kernels<LaunchTable<kLargeLaunchTensors>>();
  }
#endif
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&scale, scale_kernel<LaunchTable<kSmallLaunchTensors>>);
  }
  // Queried here, once: the binding makes sure that the query does not invalidate a stream capture.
  void* address = nullptr;
  if (error == cudaSuccess) error = cudaGetSymbolAddress(&address, counters);
  device.counters = static_cast<unsigned*>(address);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  // A dependent launch needs code that waits for the previous kernel. Code compiled for compute_90
  // or later does; other code does not, whatever GPU it runs on. Before CUDA 12.3, capturing a
  // dependent launch is an error.
  device.dependent_launch = error == cudaSuccess && scale.ptxVersion >= 90 && driver >= 12030;
  return error;
}

/// Describes the current device. It is queried once: by probe(), before anything is launched.
cudaError_t current_device(Device& device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) {
    device = found->second;
    return cudaSuccess;
  }
  const cudaError_t failed = describe(index, device);
  if (failed == cudaSuccess) known[index] = device;
  return failed;
}

}  // namespace
}  // namespace gradclip::cuda
