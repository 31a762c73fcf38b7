// Multiply gradients by one coefficient in device memory, or each by its own.

#pragma once

#include "rule.cuh"
#include "walk.cuh"

namespace gradclip::cuda {

/// Multiplies in float32 (float64 for float64) and rounds once.
__device__ inline void multiply(double& x, double coef) { x *= coef; }
template <typename T>
__device__ void multiply(T& x, double coef) {
  from_float(to_float(x) * static_cast<float>(coef), x);
}

__device__ inline void set_zero(double& x) { x = 0.0; }
template <typename T>
__device__ void set_zero(T& x) {
  from_float(0.0f, x);
}

/// Multiplies a warp's tiles by a coefficient, or writes +0.0 if that is kZero. These are two
/// loops, because a choice for each element takes registers that the kernel does not have on sm_80.
template <typename T>
__device__ void scale_tiles(T* x, int length, WarpTiles tiles, int lane, double coef) {
  if (coef < 0.0) {
    update_tiles(x, length, tiles, lane, [](T& item) {
      set_zero(item);
      return true;
    });
  } else {
    update_tiles(x, length, tiles, lane, [coef](T& item) {
      multiply(item, coef);
      return true;
    });
  }
}

/// Contract: kThreads threads, any grid, any dtypes. Neither reads nor writes a gradient whose
/// coefficient is 1 or more: multiplying by 1 is the identity, bit for bit.
///
/// The blocks, and each block's chunks, are in the norm kernel's order backwards, because what that
/// read last is still in L2. May start early.
template <typename Table>
__global__ __launch_bounds__(kThreads, 4) void scale_kernel(const __grid_constant__ Table table,
                                                            const Coefficients coefs,
                                                            const bool ours_follows) {
  const Run run(table.chunks(), gridDim.x - 1 - blockIdx.x, gridDim.x);
  const int begin = find_tensor<true>(table, run);
  wait_for_previous_kernel();
  if (ours_follows) let_next_kernel_launch();
  if (coefs.stride == 0 && read_float(coefs.values, 0, coefs.are_float64) >= 1.0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for_each_chunk<true>(
      table, run, begin, [&](int chunk, int tensor, DType dtype, char* data, int length) {
        const int64_t index = int64_t{coefs.stride} * (table.first_tensor + tensor);
        const double coef = read_float(coefs.values, index, coefs.are_float64);
        if (coef >= 1.0) return;
        with_dtype<true>(dtype, data, length, [&](auto* x, int n) {
          scale_tiles(x, n, tiles_of_chunk(chunk, warp), lane, coef);
        });
      });
}

}  // namespace gradclip::cuda
