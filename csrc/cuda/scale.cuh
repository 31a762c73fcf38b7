// Multiply every gradient by a coefficient in device memory.

#pragma once

#include "walk.cuh"

namespace gradclip::cuda {

/// Multiplies in float32 (float64 for float64) and rounds once.
__device__ inline void multiply(double& x, double coef) { x *= coef; }
template <typename T>
__device__ void multiply(T& x, double coef) {
  from_float(to_float(x) * static_cast<float>(coef), x);
}

/// Contract: kThreads threads, any grid, any dtypes. `clip_coef` is a float or, with `is_float64`,
/// a double. Writes nothing if it is 1 or more: multiplying by 1 is the identity, bit for bit.
///
/// Each block goes through its chunks backwards, because what the norm kernel read last is still in
/// L2. In a grid of the norm kernel's size, a block has the same chunks as in the norm kernel.
template <typename Table>
__global__ __launch_bounds__(kThreads, 4) void scale_kernel(const __grid_constant__ Table table,
                                                            const void* clip_coef,
                                                            const bool is_float64) {
  wait_for_previous_kernel();
  const double coef = is_float64 ? *static_cast<const double*>(clip_coef)
                                 : static_cast<double>(*static_cast<const float*>(clip_coef));
  if (coef >= 1.0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk<true>(table, run, [&](int64_t chunk, DType dtype, char* data, int64_t length) {
    const WarpTiles tiles(chunk, length * item_size(dtype), warp);
    with_dtype<true>(dtype, data, length, [&](auto* x, int n) {
      update_tiles(x, n, tiles.first, tiles.stride, lane, [&](auto& item) {
        multiply(item, coef);
        return true;
      });
    });
  });
}

}  // namespace gradclip::cuda
