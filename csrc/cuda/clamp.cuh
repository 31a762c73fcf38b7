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

/// To [low, high].
template <typename T>
struct Clamp {
  __device__ bool applies(T x) const {  // NaN is neither below nor above, and stays
    return comparable(x) < comparable(low) || comparable(x) > comparable(high);
  }
  __device__ void apply(T& x) const {
    const bool below = comparable(x) < comparable(low);
    const bool above = comparable(x) > comparable(high);
    x = below ? low : above ? high : x;
  }

  T low;
  T high;
};

/// Contract: kThreads threads, any grid, any dtypes; the bounds are in the range of every dtype in
/// the table and are rounded to it. Stores only vectors that changed: moves N bytes if no element
/// exceeds a bound, and at most 2N. All but the first launch of a list may start early.
template <typename Table>
__global__ __launch_bounds__(kThreads,
                             kResidentBlocks) void clamp_kernel(const __grid_constant__ Table table,
                                                                const double min, const double max,
                                                                const bool ours_follows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (ours_follows) let_next_kernel_launch();
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk(table, run, [&](int chunk, int, DType dtype, char* data, int length) {
    with_dtype<true>(dtype, data, length, [&](auto* x, int n) {
      using T = std::remove_reference_t<decltype(*x)>;
      Clamp<T> clamp;
      round_bound(min, clamp.low);
      round_bound(max, clamp.high);
      update_tiles(x, n, tiles_of_chunk(chunk, warp), lane, clamp);
    });
  });
  wait_for_previous_kernel();
}

}  // namespace gradclip::cuda
