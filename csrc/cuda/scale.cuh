// Multiply every gradient by a coefficient that only the device knows.

#pragma once

#include "walk.cuh"

namespace gradclip::cuda {

/// Float32 arithmetic, rounded once; float64 for float64.
__device__ inline void multiply(double& x, double coef) { x *= coef; }
template <typename T>
__device__ void multiply(T& x, double coef) {
  from_float(to_float(x) * static_cast<float>(coef), x);
}

/// Contract: kThreads threads, any grid, any dtypes. `clip_coef` is a float or, with `float64`, a
/// double. Writes nothing if it is 1 or more: multiplying by 1 is the identity, bit for bit.
///
/// Walks each block's chunks backwards, because what the norm kernel read last is still in L2;
/// with its grid, a block meets the chunks that it read there.
template <typename Table>
__global__ __launch_bounds__(kThreads, 4) void scale_kernel(const __grid_constant__ Table table,
                                                            const void* clip_coef,
                                                            const bool float64) {
  wait_for_previous_kernel();
  const double coef = float64 ? *static_cast<const double*>(clip_coef)
                              : static_cast<double>(*static_cast<const float*>(clip_coef));
  if (coef >= 1.0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk<true>(table, run, [&](int64_t chunk, DType dtype, char* data, int64_t length) {
    const Share share(chunk, length * item_size(dtype), warp);
    visit<true>(dtype, data, length, [&](auto* x, int n) {
      change_tiles(x, n, share.first, share.stride, lane, [&](auto& item) {
        multiply(item, coef);
        return true;
      });
    });
  });
}

}  // namespace gradclip::cuda
