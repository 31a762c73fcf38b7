// Results for each tensor, computed in float64: for any order p > 0, and for float64 tensors.

#pragma once

#include "norm_float64.cuh"
#include "statistics.cuh"

namespace gradclip::cuda {

// Blocks per multiprocessor: with 4, as other kernels have, counts beside float64 sums would spill.
constexpr int kTensorsFloat64Blocks = 3;

__device__ inline bool is_zero(double x) { return x == 0.0; }

/// Counts a warp's tiles once more, which are in cache by then.
template <typename T>
__device__ __noinline__ void warp_counts(const T* x, int length, WarpTiles tiles, int lane,
                                         StatisticsPartial& found) {
  found.zeros = warp_count(x, length, tiles, lane, [](T item) { return is_zero(to_double(item)); });
  found.nonfinite =
      warp_count(x, length, tiles, lane, [](T item) { return is_nonfinite(to_double(item)); });
}

/// Completes the launch's tensors of several chunks, one after the other: with powers, eight sums
/// for a lane, as in finalize_tensors, do not fit the registers.
template <typename Table>
__device__ __noinline__ void finalize_tensors_float64(const Table& table, const TensorOutput& out,
                                                      double p) {
  for (int t = 0; t < table.tensors; ++t) {
    const int begin = table.chunk_prefix[t], count = table.chunk_prefix[t + 1] - begin;
    if (count == 1) continue;
    const auto* partials =
        static_cast<const StatisticsPartial*>(out.partials) + table.first_chunk + begin;
    const double norm =
        norm_of_partials(count, p, [&](int64_t i) { return load_partial(partials + i); });
    if (threadIdx.x < kWarp) {
      StatisticsPartial total = {};
      add_all(total, partials, count, threadIdx.x);
      if (threadIdx.x == 0) write_tensor(out, table.first_tensor + t, norm, total);
    }
    __syncthreads();  // before norm_of_partials uses its shared memory again
  }
}

/// Contract: as tensors_kernel, for tables of any dtype. In a partial, `sum` is scaled by
/// `largest`.
template <typename Table>
__global__ __launch_bounds__(kThreads, kTensorsFloat64Blocks) void tensors_float64_kernel(
    const __grid_constant__ Table table, const __grid_constant__ TensorOutput out, const double p) {
  __shared__ double shared[kWarps], counted[2][kWarps];
  auto* partials = static_cast<StatisticsPartial*>(out.partials);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const WarpTiles tiles{warp, kWarps};
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk(table, run, [&](int chunk, int tensor, DType dtype, char* data, int length) {
    ScaledSum of_warp = {0.0, 0.0};
    StatisticsPartial found = {};
    with_dtype<true>(dtype, data, length, [&](auto* x, int n) {
      of_warp = warp_scaled_sum(x, n, tiles, p, lane);
      if (out.statistics != nullptr) warp_counts(x, n, tiles, lane, found);
    });
    found.largest = block_max(of_warp.largest, shared);
    const bool has_sum = lane == 0 && can_divide_by(found.largest);
    found.sum = block_reduce<L1>(
        has_sum ? rescaled(of_warp.sum, of_warp.largest, found.largest, p) : 0.0, shared);
    found.zeros = block_reduce<L1>(lane == 0 ? found.zeros : 0.0, counted[0]);
    found.nonfinite = block_reduce<L1>(lane == 0 ? found.nonfinite : 0.0, counted[1]);
    if (threadIdx.x == 0) {
      partials[table.first_chunk + chunk] = found;
      if (table.chunk_prefix[tensor + 1] - table.chunk_prefix[tensor] == 1) {
        const double norm = norm_of(found.largest, found.sum, p);
        write_tensor(out, table.first_tensor + tensor, norm, found);
      }
    }
    __syncthreads();
  });
  if (out.scale_follows()) let_next_kernel_launch();
  if (table.chunks() == table.tensors && !out.has_total()) return;  // all are complete
  if (!is_last_block(out.arrivals)) return;
  finalize_tensors_float64(table, out, p);
  if (!out.has_total()) return;
  const double norm =
      norm_of_partials(out.chunks, p, [&](int64_t i) { return load_partial(partials + i); });
  if (threadIdx.x == 0) *out.statistics = norm;
}

}  // namespace gradclip::cuda
