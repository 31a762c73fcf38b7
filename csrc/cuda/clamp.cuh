// Clamp every gradient to [min, max] in one pass.

#pragma once

#include "walk.cuh"

namespace gradclip::cuda {

__device__ inline void round_bound(double bound, double& out) { out = bound; }
template <typename T>
__device__ void round_bound(double bound, T& out) {
  from_float(static_cast<float>(bound), out);
}

// Elements are compared as floats: a build with torch's flags has no operators for the half types.
__device__ inline double comparable(double x) { return x; }
template <typename T>
__device__ float comparable(T x) {
  return to_float(x);
}

/// Contract: kThreads threads, any grid, any dtypes; the bounds are in the range of every dtype in
/// the table and are rounded to it. Stores only vectors that changed: moves N bytes if no element
/// exceeds a bound, and at most 2N. All but the first launch of a list may start early.
template <typename Table>
__global__ __launch_bounds__(kThreads, 4) void clamp_kernel(const __grid_constant__ Table table,
                                                            const double min, const double max,
                                                            const bool ours_follows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (ours_follows) let_next_kernel_launch();
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk(table, run, [&](int chunk, int, DType dtype, char* data, int length) {
    with_dtype<true>(dtype, data, length, [&](auto* x, int n) {
      using T = std::remove_reference_t<decltype(*x)>;
      T low, high;
      round_bound(min, low);
      round_bound(max, high);
      update_tiles(x, n, tiles_of_chunk(chunk, warp), lane, [&](T& item) {
        const auto value = comparable(item);  // NaN is neither below nor above, and stays
        const bool below = value < comparable(low);
        const bool above = value > comparable(high);
        item = below ? low : above ? high : item;
        return below || above;
      });
    });
  });
  wait_for_previous_kernel();
}

}  // namespace gradclip::cuda
