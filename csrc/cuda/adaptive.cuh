// Adaptive clipping of units that fit a cache: both norms, and the scaling while a unit is there.

#pragma once

#include <type_traits>

#include "adaptive_units.h"
#include "norm_float64.cuh"
#include "scale.cuh"

namespace gradclip::cuda {

static_assert(kUnitsPerItem == kWarps, "each warp of a block clips one");
static_assert(kWarpUnitBytes == 4 * kTileBytes, "so a lane reads 4 times");

// Blocks per multiprocessor: with 4, as other kernels have, what lives across two norms would
// spill.
constexpr int kAdaptiveBlocks = 3;

/// Returns the result to every thread. `shared` as in block_reduce.
template <typename Norm>
__device__ double block_reduce_to_all(double value, double* shared) {
  value = block_reduce<Norm>(value, shared);
  if (threadIdx.x == 0) shared[0] = value;
  __syncthreads();
  value = shared[0];
  __syncthreads();
  return value;
}

/// Returns the scaled sum of a warp's tiles of a unit. Of order 2 it is summed in float32 by tiles,
/// within the error that L2 states, and is scaled by 1.
template <bool kReadOnly>
__device__ __noinline__ ScaledSum unit_sum(DType dtype, char* data, int numel, WarpTiles tiles,
                                           double p, int lane) {
  ScaledSum found = {0.0, 0.0};
  with_dtype<true>(dtype, data, numel, [&](auto* x, int n) {
    using T = std::remove_reference_t<decltype(*x)>;
    if constexpr (!std::is_same_v<T, double>) {
      if (p == 2.0) {
        const double sum = warp_sum<L2, kReadOnly>(x, n, tiles, lane);
        if (can_divide_by(sum)) {
          found = {1.0, sum};
        } else {
          found = {sum, 0.0};  // 0, inf or NaN
        }
        return;
      }
    }
    found = warp_scaled_sum(x, n, tiles, p, lane);
  });
  return found;
}

/// Multiplies a warp's tiles of a unit. A call, as unit_sum is: what the kernel holds in registers
/// does not fit beside the loop.
__device__ __noinline__ void scale_unit(DType dtype, char* data, int numel, WarpTiles tiles,
                                        double coef, int lane) {
  with_dtype<true>(dtype, data, numel,
                   [&](auto* x, int n) { update_tiles(x, n, tiles, lane, Multiply{coef}); });
}

/// The norm of a unit from the sums of its warps, for every thread.
__device__ inline double unit_norm(ScaledSum of_warp, bool is_by_warp, double p, double* shared) {
  double largest = of_warp.largest, sum = of_warp.sum;
  if (!is_by_warp) {
    largest = block_reduce_to_all<LInf>(largest, shared);
    const bool has_sum = threadIdx.x % kWarp == 0 && can_divide_by(largest);
    sum = block_reduce_to_all<L1>(
        has_sum ? rescaled(of_warp.sum, of_warp.largest, largest, p) : 0.0, shared);
  }
  return norm_of(largest, sum, p);
}

/// Contract: kThreads threads, any grid, any dtypes; units of at most kMaxUnitBytes. Writes a unit
/// only if its coefficient is not 1. No result depends on the grid.
__global__ __launch_bounds__(kThreads, kAdaptiveBlocks) void adaptive_kernel(
    const __grid_constant__ UnitTable table, const AdaptiveRule rule) {
  __shared__ double shared[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t items = table.item_prefix[table.tensors], blocks = gridDim.x;
  const int64_t end = items * (blockIdx.x + int64_t{1}) / blocks;
  int64_t item = items * blockIdx.x / blocks;
  int t = static_cast<int>(tensor_of(table.item_prefix, table.tensors, item));
  for (; item < end; ++item) {
    while (item >= table.item_prefix[t + 1]) ++t;
    const bool is_by_warp = table.is_by_warp[t];
    int64_t unit = item - table.item_prefix[t];
    if (is_by_warp) unit = unit * kWarps + warp;
    if (unit >= table.units[t]) continue;
    const int numel = table.unit_numel[t];
    const DType dtype = table.grad_dtypes[t], weight_dtype = table.weight_dtypes[t];
    char* grad = static_cast<char*>(table.grads[t]) + unit * numel * item_size(dtype);
    char* weight = static_cast<char*>(table.weights[t]) + unit * numel * item_size(weight_dtype);
    const WarpTiles tiles{is_by_warp ? 0 : warp, is_by_warp ? 1 : kWarps};
    const ScaledSum of_weight = unit_sum<true>(weight_dtype, weight, numel, tiles, rule.p, lane);
    const double weight_norm = unit_norm(of_weight, is_by_warp, rule.p, shared);
    const ScaledSum of_grad = unit_sum<false>(dtype, grad, numel, tiles, rule.p, lane);
    const double norm = unit_norm(of_grad, is_by_warp, rule.p, shared);
    const double coef = rule.clip_coef(norm, weight_norm);
    if (coef != 1.0) scale_unit(dtype, grad, numel, tiles, coef, lane);
  }
}

}  // namespace gradclip::cuda
