// Cuts a list into launches and enqueues them.

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "adaptive_units.h"
#include "device.cuh"
#include "launch.h"

namespace gradclip::cuda {
namespace {

constexpr int64_t kCounterBytes = 16;  // in scratch memory; keeps the partials after it aligned

// Of kernels whose blocks have one run each. On an H200 this is as fast as half or twice as many
// within 1 %, and up to 6 % faster than half as many for clamping: a block that ends early makes
// room for another.
constexpr int kBlocksPerMultiprocessor = 2 * kResidentBlocks;

/// As many runs of chunks as there is work for, but no more than have a tile, or a small tensor,
/// for each warp of a block.
template <typename Table>
unsigned runs_for(const TensorList& list, const Table& table) {
  const int64_t chunks = table.chunks();
  const int64_t useful = list.bytes() / (kWarps * kTileBytes) + chunks / kWarps + 1;
  return static_cast<unsigned>(std::min(chunks, useful));
}

template <typename Table>
unsigned blocks_for(const TensorList& list, const Table& table, const Device& device,
                    int per_multiprocessor = kBlocksPerMultiprocessor) {
  const auto most = static_cast<unsigned>(per_multiprocessor * device.multiprocessors);
  return std::min(runs_for(list, table), most);
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
  // Arguments are passed by address: the typed launch would copy a table of 32 KB once more.
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "read as the kernel's own types");
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}

/// Calls `launch(table, device, is_first, is_last)` for one table after the other, in the given
/// order.
template <int kCapacity, typename Launch>
cudaError_t for_each_table(const TensorList& list, Order order, const Device& device,
                           Launch&& launch) {
  std::vector<int64_t> firsts;
  for (int64_t first = 0; first < list.size(); first = launch_end(list, first, kCapacity)) {
    firsts.push_back(first);
  }
  if (order == Order::kBackward) std::reverse(firsts.begin(), firsts.end());
  LaunchTable<kCapacity> table;
  for (const int64_t& first : firsts) {
    fill_launch(list, first, table);
    const cudaError_t error =
        launch(table, device, &first == &firsts.front(), &first == &firsts.back());
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

/// Calls `launch` as for_each_table does, with the smallest table that holds the list: parameters
/// are copied whole. `kWithMedium` is for the kernels of load_usual_kernels: if all had a medium
/// table, compile time and binary would grow by half, instead of by 8 %.
template <bool kWithMedium = false, typename Launch>
cudaError_t for_each_launch(const TensorList& list, Order order, Launch&& launch) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
#if CUDART_VERSION >= 12010 && !defined(GRADCLIP_EXT_SMALL_LAUNCHES)
  if (device.large_parameters && list.size() > kSmallLaunchTensors) {
    if constexpr (kWithMedium) {
      if (list.size() <= kMediumLaunchTensors) {
        return for_each_table<kMediumLaunchTensors>(list, order, device, launch);
      }
    }
    return for_each_table<kLargeLaunchTensors>(list, order, device, launch);
  }
#endif
  return for_each_table<kSmallLaunchTensors>(list, order, device, launch);
}

/// Finds a counter in static memory that is 0 whenever the kernels of this call begin: clearing one
/// before each norm would be one more kernel per step. A stream of torch's pool keeps its counter
/// until the process ends. A captured call keeps one of its own, because other work may run on the
/// captured stream while the graph is replayed. Null where all counters are in use, and for a
/// stream that may be destroyed: a new stream may get its handle while its work is unfinished.
cudaError_t find_counter(cudaStream_t stream, bool is_pool_stream, unsigned** counter) {
  *counter = nullptr;
  Device device;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = cudaStreamIsCapturing(stream, &capture);
  const bool is_captured = capture != cudaStreamCaptureStatusNone;
  if (error != cudaSuccess || !(is_captured || is_pool_stream)) return error;
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, int> of_streams;
  static int in_use = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = of_streams.find({device.index, stream});
  if (!is_captured && found != of_streams.end()) {
    *counter = device.counters + found->second;
  } else if (in_use < kCounters) {
    if (!is_captured) of_streams[{device.index, stream}] = in_use;
    *counter = device.counters + in_use++;
  }
  return cudaSuccess;
}

/// As find_counter, but where that finds none, takes one in scratch memory and clears it first.
cudaError_t require_counter(void* scratch, cudaStream_t stream, bool is_pool_stream,
                            unsigned** counter) {
  const cudaError_t error = find_counter(stream, is_pool_stream, counter);
  if (error != cudaSuccess || *counter != nullptr) return error;
  *counter = static_cast<unsigned*>(scratch);
  return cudaMemsetAsync(scratch, 0, sizeof **counter, stream);
}

/// Whether norms of this order have kernels that sum in float32, for all dtypes but float64.
bool has_float32_kernel(double norm_type) {
  return norm_type == 1.0 || norm_type == 2.0 || std::isinf(norm_type);
}

/// Enqueues norm_kernel for a list without float64. `counter` is for its last launch; null if more
/// launches follow.
template <typename Norm>
cudaError_t enqueue_norm(const TensorList& list, NormOutput out, unsigned* counter,
                         cudaStream_t stream) {
  const auto launch = [&](const auto& table, const Device& device, bool is_first, bool is_last) {
    using Table = std::decay_t<decltype(table)>;
    out.arrivals = is_last ? counter : nullptr;
    return enqueue(norm_kernel<Norm, Table>, blocks_for(list, table, device),
                   device.dependent_launch && !is_first, stream, table, out);
  };
  return for_each_launch<std::is_same_v<Norm, L2>>(list, Order::kForward, launch);
}

cudaError_t enqueue_norm(const TensorList& list, double norm_type, const NormOutput& out,
                         unsigned* counter, cudaStream_t stream) {
  const auto enqueue_kernel = norm_type == 2.0   ? enqueue_norm<L2>
                              : norm_type == 1.0 ? enqueue_norm<L1>
                                                 : enqueue_norm<LInf>;
  return enqueue_kernel(list, out, counter, stream);
}

/// Enqueues norm_float64_kernel. `is_plain`: what precedes its first launch may be anybody's
/// kernel.
cudaError_t enqueue_norm_float64(const TensorList& list, double norm_type, NormOutput out,
                                 unsigned* counter, bool is_plain, cudaStream_t stream) {
  const auto launch = [&](const auto& table, const Device& device, bool is_first, bool is_last) {
    using Table = std::decay_t<decltype(table)>;
    out.arrivals = is_last ? counter : nullptr;
    return enqueue(norm_float64_kernel<Table>, blocks_for(list, table, device),
                   device.dependent_launch && !(is_first && is_plain), stream, table, out,
                   norm_type);
  };
  return for_each_launch(list, Order::kForward, launch);
}

cudaError_t enqueue_tensors(const TensorList& list, double norm_type, TensorOutput out,
                            cudaStream_t stream) {
  out.chunks = list.chunks();
  out.tensors = list.size();
  out.largest_is_norm = std::isinf(norm_type);
  const auto launch = [&](const auto& table, const Device& device, bool, bool is_last) {
    using Table = std::decay_t<decltype(table)>;
    out.is_last_launch = is_last;
    if (list.holds(DType::kFloat64) || !has_float32_kernel(norm_type)) {
      const unsigned blocks = blocks_for(list, table, device, kTensorsFloat64Blocks);
      return enqueue(tensors_float64_kernel<Table>, blocks, false, stream, table, out, norm_type);
    }
    const unsigned blocks = blocks_for(list, table, device);
    // Of another order than 2, norms come from the kernel for statistics.
    const auto kernel = norm_type == 1.0            ? tensors_kernel<L1, StatisticsPartial, Table>
                        : out.statistics != nullptr ? tensors_kernel<L2, StatisticsPartial, Table>
                        : out.largest_is_norm       ? tensors_kernel<L2, StatisticsPartial, Table>
                                                    : tensors_kernel<L2, NormPartial, Table>;
    return enqueue(kernel, blocks, false, stream, table, out);
  };
  return for_each_launch(list, Order::kForward, launch);
}

// ---------------------------------------------------------------- adaptive clipping

/// Clips each by its norm and its weight's. `scratch` holds two norms and a coefficient of each
/// unit, and then the partials of each chunk.
cudaError_t clip_large_units(const LargeUnits& units, const AdaptiveRule& rule, void* scratch,
                             cudaStream_t stream, bool is_pool_stream) {
  TensorOutput out = {};
  cudaError_t error = require_counter(scratch, stream, is_pool_stream, &out.arrivals);
  if (error != cudaSuccess) return error;
  double* weight_norms = reinterpret_cast<double*>(static_cast<char*>(scratch) + kCounterBytes);
  double* norms = weight_norms + units.grads.size();
  double* coefs = norms + units.grads.size();
  out.partials = coefs + units.grads.size();
  out.is_float64 = true;
  out.norms = weight_norms;
  error = enqueue_tensors(units.weights, rule.p, out, stream);
  if (error != cudaSuccess) return error;
  out.norms = norms;
  out.clip_coefs = coefs;
  out.limits.values = weight_norms;
  out.limits.stride = 1;
  out.limits.are_float64 = out.limits.are_weight_norms = true;
  out.limits.clip_factor = rule.clip_factor;
  out.limits.eps = rule.eps;
  error = enqueue_tensors(units.grads, rule.p, out, stream);
  if (error != cudaSuccess) return error;
  return launch_scale(units.grads, {coefs, 1, true}, stream, is_pool_stream);
}

}  // namespace

cudaError_t probe() {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) cudaGetLastError();  // else the next CUDA call would report it
  return error;
}

int64_t norm_scratch_bytes(const TensorList& list) {
  return kCounterBytes + list.chunks() * static_cast<int64_t>(sizeof(ScaledSum));
}

cudaError_t launch_norm(const TensorList& list, double norm_type, const Limits& limits,
                        const NormBuffers& buffers, cudaStream_t stream, bool is_pool_stream) {
  unsigned* counter = nullptr;
  cudaError_t error = require_counter(buffers.scratch, stream, is_pool_stream, &counter);
  if (error != cudaSuccess) return error;
  NormOutput out = {};
  out.partials = reinterpret_cast<double*>(static_cast<char*>(buffers.scratch) + kCounterBytes);
  out.chunks = list.chunks();
  out.total_norm = buffers.total_norm;
  out.clip_coef = buffers.clip_coef;
  out.is_float64 = buffers.is_float64;
  out.limits = limits;
  if (!has_float32_kernel(norm_type)) {
    return enqueue_norm_float64(list, norm_type, out, counter, true, stream);
  }
  if (!list.holds(DType::kFloat64)) return enqueue_norm(list, norm_type, out, counter, stream);
  // Its float64 tensors alone take the slow kernel, which finalizes what is known of the others,
  // too.
  const TensorList float32s = list.only(false), float64s = list.only(true);
  NormOutput float32_out = out;
  float32_out.partials += 2 * float64s.chunks();
  error = enqueue_norm(float32s, norm_type, float32_out, nullptr, stream);
  if (error != cudaSuccess) return error;
  out.chunks = float64s.chunks();
  out.float32_partials = float32_out.partials;
  out.float32_chunks = float32s.chunks();
  return enqueue_norm_float64(float64s, norm_type, out, counter, float32s.size() == 0, stream);
}

int64_t tensors_scratch_bytes(const TensorList& list) {
  return kCounterBytes + list.chunks() * static_cast<int64_t>(sizeof(StatisticsPartial));
}

cudaError_t launch_tensors(const TensorList& list, double norm_type, const Limits& limits,
                           const TensorBuffers& buffers, cudaStream_t stream, bool is_pool_stream) {
  TensorOutput out = {};
  const cudaError_t error = require_counter(buffers.scratch, stream, is_pool_stream, &out.arrivals);
  if (error != cudaSuccess) return error;
  out.partials = static_cast<char*>(buffers.scratch) + kCounterBytes;
  out.norms = buffers.norms;
  out.clip_coefs = buffers.clip_coefs;
  out.statistics = buffers.statistics;
  out.is_float64 = buffers.is_float64;
  out.limits = limits;
  return enqueue_tensors(list, norm_type, out, stream);
}

int64_t adaptive_scratch_bytes(const AdaptiveLists& lists) {
  const LargeUnits large(lists);
  return kCounterBytes + 3 * large.grads.size() * static_cast<int64_t>(sizeof(double)) +
         large.partials() * static_cast<int64_t>(sizeof(StatisticsPartial));
}

cudaError_t launch_clip_adaptive(const AdaptiveLists& lists, const AdaptiveRule& rule,
                                 void* scratch, cudaStream_t stream, bool is_pool_stream) {
  Device device;
  cudaError_t error = current_device(device);
  UnitTable table = {};
  for (int64_t tensor = 0; tensor < lists.grads.size() && error == cudaSuccess; ++tensor) {
    if (unit_bytes(lists, tensor) <= kMaxUnitBytes) add(table, lists, tensor);
    const bool is_last = tensor == lists.grads.size() - 1;
    if (table.tensors == 0 || (table.tensors < UnitTable::kCapacity && !is_last)) continue;
    const int64_t resident = int64_t{kAdaptiveBlocks} * device.multiprocessors;
    const auto blocks = static_cast<unsigned>(std::min(table.item_prefix[table.tensors], resident));
    error = enqueue(adaptive_kernel, blocks, false, stream, table, rule);
    table.tensors = 0;
  }
  const LargeUnits large(lists);
  if (error != cudaSuccess || large.grads.size() == 0) return error;
  return clip_large_units(large, rule, scratch, stream, is_pool_stream);
}

cudaError_t launch_scale(const TensorList& list, const Coefficients& coefs, cudaStream_t stream,
                         bool is_pool_stream) {
  unsigned* counter = nullptr;
  const cudaError_t error = find_counter(stream, is_pool_stream, &counter);
  if (error != cudaSuccess) return error;
  const auto launch = [&](const auto& table, const Device& device, bool, bool is_last) {
    using Table = std::decay_t<decltype(table)>;
    const int most = counter != nullptr ? kResidentBlocks : kBlocksPerMultiprocessor;
    const unsigned blocks = blocks_for(list, table, device, most);
    const unsigned count = counter != nullptr ? runs_for(list, table) : blocks;
    const Runs runs = {count, count > blocks ? counter : nullptr};
    return enqueue(scale_kernel<Table>, blocks, device.dependent_launch, stream, table, coefs,
                   !is_last, runs);
  };
  return for_each_launch<true>(list, Order::kBackward, launch);
}

cudaError_t launch_clamp(const TensorList& list, double min, double max, cudaStream_t stream) {
  const auto launch = [&](const auto& table, const Device& device, bool is_first, bool is_last) {
    using Table = std::decay_t<decltype(table)>;
    const bool dependent = device.dependent_launch && !is_first;
    return enqueue(clamp_kernel<Table>, blocks_for(list, table, device), dependent, stream, table,
                   min, max, !is_last);
  };
  return for_each_launch<true>(list, Order::kForward, launch);
}

}  // namespace gradclip::cuda
