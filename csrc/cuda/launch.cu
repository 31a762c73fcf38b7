// Cuts a list into launches and enqueues them.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "clamp.cuh"
#include "launch.h"
#include "norm.cuh"
#include "norm_wide.cuh"
#include "scale.cuh"

namespace gradclip::cuda {
namespace {

/// What a launch needs to know of the device it goes to.
struct Device {
  int multiprocessors = 0;
  bool dependent_launch = false;
  bool large_parameters = false;

  cudaError_t query() {
    int device = 0, major = 0, driver = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
    // Captured into a graph since CUDA 12.3; before that, capturing it is an error.
    dependent_launch = major >= 9 && driver >= 12030;
#if CUDART_VERSION >= 12010 && !defined(GRADCLIP_EXT_SMALL_LAUNCHES)
    large_parameters = driver >= 12010;
#endif
    return error;
  }
};

/// As many blocks as are resident at once, but no more than there is work for: a block wants a
/// tile for each of its warps, or a small tensor for each.
template <typename Table>
unsigned blocks_for(const GradList& list, const Table& table, const Device& device) {
  constexpr int kBlocksPerMultiprocessor = 4;
  const int64_t chunks = table.chunks();
  const int64_t busy = list.bytes() / (kWarps * kTileBytes) + chunks / kWarps + 1;
  const int64_t resident = int64_t{kBlocksPerMultiprocessor} * device.multiprocessors;
  return static_cast<unsigned>(std::min({chunks, busy, resident}));
}

template <typename... Parameters, typename... Arguments>
cudaError_t enqueue(void (*kernel)(Parameters...), unsigned blocks, bool dependent,
                    cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  // By address: the typed launch would copy a table of 32 KB once more.
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "read as the kernel's own types");
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}

/// Calls `launch(table, device, is_last)` for one table after the other.
template <int kCapacity, typename Launch>
cudaError_t for_each_table(const GradList& list, const Device& device, Launch&& launch) {
  LaunchTable<kCapacity> table;
  for (int64_t first = 0; first < list.size();) {
    first = fill_launch(list, first, table);
    const cudaError_t error = launch(table, device, first == list.size());
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

/// Copying 4 KiB of parameters costs less than 32, so short lists take the small table.
template <typename Launch>
cudaError_t for_each_launch(const GradList& list, Launch&& launch) {
  Device device;
  const cudaError_t error = device.query();
  if (error != cudaSuccess) return error;
#if CUDART_VERSION >= 12010 && !defined(GRADCLIP_EXT_SMALL_LAUNCHES)
  if (device.large_parameters && list.size() > kSmallLaunchTensors) {
    return for_each_table<kLargeLaunchTensors>(list, device, launch);
  }
#endif
  return for_each_table<kSmallLaunchTensors>(list, device, launch);
}

}  // namespace

cudaError_t probe() {
  cudaFuncAttributes attributes;
  const auto kernel = norm_kernel<L2, LaunchTable<kSmallLaunchTensors>>;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) cudaGetLastError();  // the next call must not find it
  return error;
}

int64_t norm_partials_bytes(const GradList& list) {
  return list.chunks() * static_cast<int64_t>(sizeof(Scaled));
}

cudaError_t launch_norm(const GradList& list, double norm_type, double max_norm,
                        const NormBuffers& buffers, cudaStream_t stream) {
  NormOutput out = {};
  out.partials = static_cast<double*>(buffers.partials);
  out.chunks = list.chunks();
  out.total_norm = buffers.total_norm;
  out.clip_coef = buffers.clip_coef;
  out.wide = buffers.wide;
  out.max_norm = max_norm;
  return for_each_launch(list, [&](const auto& table, const Device& device, bool is_last) {
    using Table = std::decay_t<decltype(table)>;
    out.ticket = is_last ? buffers.ticket : nullptr;
    const unsigned blocks = blocks_for(list, table, device);
    if (list.holds(DType::kFloat64) ||
        !(norm_type == 1.0 || norm_type == 2.0 || std::isinf(norm_type))) {
      return enqueue(norm_wide_kernel<Table>, blocks, false, stream, table, out, norm_type);
    }
    const auto kernel = norm_type == 2.0   ? norm_kernel<L2, Table>
                        : norm_type == 1.0 ? norm_kernel<L1, Table>
                                           : norm_kernel<LInf, Table>;
    return enqueue(kernel, blocks, false, stream, table, out);
  });
}

cudaError_t launch_scale(const GradList& list, const void* clip_coef, bool wide,
                         cudaStream_t stream) {
  return for_each_launch(list, [&](const auto& table, const Device& device, bool) {
    using Table = std::decay_t<decltype(table)>;
    return enqueue(scale_kernel<Table>, blocks_for(list, table, device), device.dependent_launch,
                   stream, table, clip_coef, wide);
  });
}

cudaError_t launch_clamp(const GradList& list, double min, double max, cudaStream_t stream) {
  return for_each_launch(list, [&](const auto& table, const Device& device, bool) {
    using Table = std::decay_t<decltype(table)>;
    return enqueue(clamp_kernel<Table>, blocks_for(list, table, device), false, stream, table, min,
                   max);
  });
}

}  // namespace gradclip::cuda
