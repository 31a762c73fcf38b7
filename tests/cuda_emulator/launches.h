// Finds the package's kernels by the names that nvcc gives them, and enqueues their emulation.

#pragma once

#include <dlfcn.h>

#include <random>
#include <string>
#include <tuple>

#include "device.h"
// clang-format off
#include "emulator.h"  // after the C++ library, which uses some of its macros' names
// clang-format on

#include "cuda/adaptive.cuh"
#include "cuda/clamp.cuh"
#include "cuda/norm.cuh"
#include "cuda/norm_float64.cuh"
#include "cuda/per_tensor_float64.cuh"
#include "cuda/scale.cuh"

#undef gridDim  // also a field of cudaLaunchConfig_t

namespace emulator {

/// Copies the arguments of a launch, and returns the task that runs it.
using Launch = Task (*)(void** arguments, unsigned blocks, int device);

struct Kernel {
  std::string name;
  Launch launch;  // null for other kernels than the package's
};

inline auto& kernels = *new std::map<const void*, Kernel>;

template <typename T>
void check(const T&, int) {}

template <int kCapacity>
void check(const gradclip::LaunchTable<kCapacity>& table, int device) {
  for (int t = 0; t < table.tensors; ++t) {
    const gradclip::DType dtype = table.dtype(t);
    const int begin = table.chunk_prefix[t], last = table.chunk_prefix[t + 1] - 1;
    const int numel = table.numel(last, t, 0);
    const size_t bytes = (last - begin) * gradclip::cuda::kChunkBytes + numel * item_size(dtype);
    const Memory* memory = memory_at(table.data(t), bytes);
    if (memory == nullptr || memory->device != device) {
      stop("a gradient is not in memory of the kernel's device");
    }
  }
}

inline void check(const gradclip::cuda::UnitTable& table, int device) {
  for (int t = 0; t < table.tensors; ++t) {
    const int64_t numel = table.units[t] * table.unit_numel[t];
    const Memory* grad = memory_at(table.grads[t], numel * item_size(table.grad_dtypes[t]));
    const Memory* weight = memory_at(table.weights[t], numel * item_size(table.weight_dtypes[t]));
    if (grad == nullptr || weight == nullptr || grad->device != device ||
        weight->device != device) {
      stop("a gradient or weight is not in memory of the kernel's device");
    }
  }
}

template <auto kKernel>
struct Emulated;

template <typename... Parameters, void (*kKernel)(Parameters...)>
struct Emulated<kKernel> {
  static Task launch(void** arguments, unsigned blocks, int device) {
    return with_copies(arguments, blocks, device, std::index_sequence_for<Parameters...>());
  }

  template <size_t... kIndex>
  static Task with_copies(void** arguments, unsigned blocks, int device,
                          std::index_sequence<kIndex...>) {
    const auto copies = std::make_shared<std::tuple<std::remove_cv_t<Parameters>...>>(
        *static_cast<std::remove_cv_t<Parameters>*>(arguments[kIndex])...);
    return [=] {
      static std::minstd_rand random;  // on a GPU, any block may be the last
      (check(std::get<kIndex>(*copies), device), ...);
      emulator::launch(blocks, random() % blocks, [&] { kKernel(std::get<kIndex>(*copies)...); });
    };
  }
};

/// Adds a kernel under its mangled name, with which nvcc's code registers it.
template <auto kKernel>
void add_kernel(std::map<std::string, Launch>& ours) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(kKernel), &info) == 0 || info.dli_sname == nullptr) {
    stop("a kernel of the emulator is not exported");
  }
  ours[info.dli_sname] = Emulated<kKernel>::launch;
}

template <int kCapacity>
void add_usual_kernels(std::map<std::string, Launch>& ours) {
  using namespace gradclip::cuda;
  using Table = gradclip::LaunchTable<kCapacity>;
  add_kernel<&norm_kernel<L2, Table>>(ours);
  add_kernel<&scale_kernel<Table>>(ours);
  add_kernel<&clamp_kernel<Table>>(ours);
}

template <int kCapacity>
void add_kernels(std::map<std::string, Launch>& ours) {
  using namespace gradclip::cuda;
  using Table = gradclip::LaunchTable<kCapacity>;
  add_usual_kernels<kCapacity>(ours);
  add_kernel<&norm_kernel<L1, Table>>(ours);
  add_kernel<&norm_kernel<LInf, Table>>(ours);
  add_kernel<&norm_float64_kernel<Table>>(ours);
  add_kernel<&tensors_kernel<L2, NormPartial, Table>>(ours);
  add_kernel<&tensors_kernel<L1, StatisticsPartial, Table>>(ours);
  add_kernel<&tensors_kernel<L2, StatisticsPartial, Table>>(ours);
  add_kernel<&tensors_float64_kernel<Table>>(ours);
}

inline Launch launch_of(const std::string& name) {
  static const auto ours = [] {
    std::map<std::string, Launch> added;
    add_kernels<gradclip::kSmallLaunchTensors>(added);
    add_usual_kernels<gradclip::kMediumLaunchTensors>(added);
    add_kernels<gradclip::kLargeLaunchTensors>(added);
    add_kernel<&gradclip::cuda::adaptive_kernel>(added);
    return added;
  }();
  const auto found = ours.find(name);
  return found == ours.end() ? nullptr : found->second;
}

inline cudaError_t launch(const void* function, dim3 grid, dim3 threads, void** arguments,
                          cudaStream_t handle) {
  const auto found = kernels.find(function);
  if (found == kernels.end()) return fail(cudaErrorInvalidDeviceFunction);
  const auto& [name, launch] = found->second;
  if (name.find("spin_kernel") != std::string::npos) return cudaSuccess;  // torch.cuda._sleep
  if (launch == nullptr) stop("there is no emulation of " + name);
  Stream* stream = stream_of(handle);
  if (stream->device != current_device()) return fail(cudaErrorInvalidResourceHandle);
  if (threads.x != kBlock || grid.x == 0) return fail(cudaErrorInvalidConfiguration);
  return enqueue(stream, launch(arguments, grid.x, stream->device));
}

}  // namespace emulator
