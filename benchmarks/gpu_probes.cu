// What gpu_design.py measures: the kernels of csrc/cuda with launches of any kind, and two smaller
// ones with their access pattern, in which the loads in flight are a parameter, too. Plain C
// functions, so that they load with ctypes; each returns a cudaError_t.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cuda/clamp.cuh"
#include "cuda/norm.cuh"
#include "cuda/scale.cuh"

using namespace gradclip;
using namespace gradclip::cuda;

namespace {

/// How kernels are launched.
struct Launches {
  int blocks;      // at most
  bool dependent;  // on our kernel before
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t enqueue(void (*kernel)(Parameters...), int64_t chunks, const Launches& launches,
                    const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "read as the kernel's own types");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(chunks, launches.blocks)));
  config.blockDim = dim3(kThreads);
  config.stream = launches.stream;
  config.attrs = &attribute;
  config.numAttrs = launches.dependent ? 1 : 0;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}

// ---------------------------------------------------------------- loads in flight

// A buffer is 16-byte aligned and a multiple of kThreads * 16 loads * 16 bytes = 64 KiB; the rest
// is not accessed. As in csrc/cuda, a block has a contiguous run of its tiles.

// Leaves registers for 16 loads in flight; by default the compiler keeps only four.
constexpr int kMinBlocks = 2;

template <int kVectors>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    read_kernel(const uint4* x, int tiles, float* sums) {
  let_next_kernel_launch();
  const Run run(tiles, blockIdx.x, gridDim.x);
  float sum = 0.0f;
#pragma unroll 1  // or more loads would be in flight
  for (int tile = run.begin; tile < run.end; ++tile) {
    const uint4* at = x + int64_t{tile} * kThreads * kVectors + threadIdx.x;
    Vec<float> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i].words = load_read_only(at + i * kThreads);
    __syncwarp();  // keeps the arithmetic after the last load; otherwise fewer are in flight
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kVecNumel<float>; ++k) sum = fmaf(v[i].items[k], v[i].items[k], sum);
    }
  }
  sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    update_kernel(uint4* x, int tiles, const float* coef_at, bool reverse) {
  const unsigned block = reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const Run run(tiles, block, gridDim.x);
  wait_for_previous_kernel();  // for nothing after a plain launch
  const float coef = *coef_at;
  if (coef >= 1.0f) return;
#pragma unroll 1
  for (int step = 0; step < run.end - run.begin; ++step) {
    const int tile = reverse ? run.end - 1 - step : run.begin + step;
    uint4* at = x + int64_t{tile} * kThreads * kVectors + threadIdx.x;
    Vec<float> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i].words = at[i * kThreads];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kVecNumel<float>; ++k) v[i].items[k] *= coef;
      at[i * kThreads] = v[i].words;
    }
  }
}

template <int kVectors>
int tiles_of(int64_t bytes) {
  return static_cast<int>(bytes / (int64_t{kThreads} * kVectors * kVecBytes));
}

template <int kVectors>
cudaError_t read(const uint4* x, int64_t bytes, float* sums, const Launches& launches) {
  const int tiles = tiles_of<kVectors>(bytes);
  return enqueue(read_kernel<kVectors>, tiles, launches, x, tiles, sums);
}

template <int kVectors>
cudaError_t update(uint4* x, int64_t bytes, const float* coef, bool reverse,
                   const Launches& launches) {
  const int tiles = tiles_of<kVectors>(bytes);
  return enqueue(update_kernel<kVectors>, tiles, launches, x, tiles, coef, reverse);
}

// ---------------------------------------------------------------- the package's kernels

/// Calls `launch(table, is_first, is_last)` for the tables of a list, in the given order.
template <int kCapacity, typename Launch>
cudaError_t for_each_table(const TensorList& list, Order order, Launch&& launch) {
  std::vector<int64_t> firsts;
  for (int64_t first = 0; first < list.size(); first = launch_end(list, first, kCapacity)) {
    firsts.push_back(first);
  }
  if (order == Order::kBackward) std::reverse(firsts.begin(), firsts.end());
  static LaunchTable<kCapacity> table;
  cudaError_t error = cudaSuccess;
  for (size_t i = 0; i < firsts.size() && error == cudaSuccess; ++i) {
    fill_launch(list, firsts[i], table);
    error = launch(table, i == 0, i + 1 == firsts.size());
  }
  return error;
}

enum class Operation { kNorm, kScale, kClamp };

/// A run for each chunk, of which there are more than blocks.
Runs runs_of(int64_t chunks, const Launches& launches, void* scratch) {
  const auto count = static_cast<unsigned>(chunks);
  return {count, chunks > launches.blocks ? static_cast<unsigned*>(scratch) : nullptr};
}

/// As launch.cu does it, but for the number of blocks and of runs, and for dependent launches on
/// demand. The first 16 bytes of `scratch` are zeros between calls.
template <int kCapacity>
cudaError_t run(Operation operation, const TensorList& list, double max_norm, void* scratch,
                float* results, Launches launches) {
  using Table = LaunchTable<kCapacity>;
  const bool is_dependent = launches.dependent;
  const Coefficients coefs = {results + 1, 0, false};
  NormOutput out = {};
  out.partials = static_cast<double*>(scratch) + 2;
  out.chunks = list.chunks();
  out.total_norm = results;
  out.clip_coef = results + 1;
  out.limits.max_norm = max_norm;
  const auto launch = [&](const Table& table, bool is_first, bool is_last) {
    launches.dependent = is_dependent && (!is_first || operation == Operation::kScale);
    out.arrivals = is_last ? static_cast<unsigned*>(scratch) : nullptr;
    switch (operation) {
      case Operation::kNorm:
        return enqueue(norm_kernel<L2, Table>, table.chunks(), launches, table, out);
      case Operation::kScale:
        return enqueue(scale_kernel<Table>, table.chunks(), launches, table, coefs, !is_last,
                       runs_of(table.chunks(), launches, scratch));
      default:
        return enqueue(clamp_kernel<Table>, table.chunks(), launches, table, -max_norm, max_norm,
                       !is_last);
    }
  };
  const Order order = operation == Operation::kScale ? Order::kBackward : Order::kForward;
  return for_each_table<kCapacity>(list, order, launch);
}

// ---------------------------------------------------------------- parameters

template <int kBytes>
struct Parameters {
  unsigned char bytes[kBytes];
};

template <int kBytes>
__global__ void parameters_kernel(const __grid_constant__ Parameters<kBytes> parameters,
                                  unsigned* out) {
  if (threadIdx.x == 0) *out = parameters.bytes[kBytes - 1 - *out % 2];
}

/// One block with about as many bytes of parameters as a table of `kLaunchBytes` takes.
template <int kLaunchBytes>
cudaError_t parameters(unsigned* out, const Launches& launches) {
  static const Parameters<kLaunchBytes / 16 * 16 - 16> given{};
  return enqueue(parameters_kernel<kLaunchBytes / 16 * 16 - 16>, 1, launches, given, out);
}

}  // namespace

extern "C" {

int probe_read(const uint4* x, int64_t bytes, int loads, int blocks, float* sums,
               cudaStream_t stream) {
  const Launches launches = {blocks, false, stream};
  switch (loads) {
    case 2:
      return read<2>(x, bytes, sums, launches);
    case 4:
      return read<4>(x, bytes, sums, launches);
    case 8:
      return read<8>(x, bytes, sums, launches);
    case 16:
      return read<16>(x, bytes, sums, launches);
    default:
      return cudaErrorInvalidValue;
  }
}

int probe_update(uint4* x, int64_t bytes, int loads, int blocks, const float* coef, int reverse,
                 int dependent, cudaStream_t stream) {
  const Launches launches = {blocks, dependent != 0, stream};
  switch (loads) {
    case 2:
      return update<2>(x, bytes, coef, reverse != 0, launches);
    case 4:
      return update<4>(x, bytes, coef, reverse != 0, launches);
    case 8:
      return update<8>(x, bytes, coef, reverse != 0, launches);
    case 16:
      return update<16>(x, bytes, coef, reverse != 0, launches);
    default:
      return cudaErrorInvalidValue;
  }
}

// One of the package's kernels (enum Operation) on `tensors` tensors of a dtype (enum DType), which
// begin `stride` bytes after one another. `capacity` is that of a table. A norm writes `results`,
// [norm, coefficient]; scaling reads them; a clamp is to [-max_norm, max_norm].
int probe_list(int operation, char* x, int64_t tensors, int64_t numel, int64_t stride, int dtype,
               int capacity, double max_norm, int blocks, int dependent, void* scratch,
               float* results, cudaStream_t stream) {
  TensorList list(kChunkBytes);
  for (int64_t t = 0; t < tensors; ++t) list.add(x + t * stride, numel, static_cast<DType>(dtype));
  const auto op = static_cast<Operation>(operation);
  const Launches launches = {blocks, dependent != 0, stream};
  switch (capacity) {
    case kSmallLaunchTensors:
      return run<kSmallLaunchTensors>(op, list, max_norm, scratch, results, launches);
    case kMediumLaunchTensors:
      return run<kMediumLaunchTensors>(op, list, max_norm, scratch, results, launches);
    case kLargeLaunchTensors:
      return run<kLargeLaunchTensors>(op, list, max_norm, scratch, results, launches);
    default:
      return cudaErrorInvalidValue;
  }
}

// `out` holds any number.
int probe_parameters(int capacity, unsigned* out, cudaStream_t stream) {
  const Launches launches = {1, false, stream};
  switch (capacity) {
    case kSmallLaunchTensors:
      return parameters<kSmallLaunchBytes>(out, launches);
    case kMediumLaunchTensors:
      return parameters<kMediumLaunchBytes>(out, launches);
    case kLargeLaunchTensors:
      return parameters<kLargeLaunchBytes>(out, launches);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // extern "C"
