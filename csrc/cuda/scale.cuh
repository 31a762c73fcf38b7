// Multiply gradients by one coefficient in device memory, or each by its own.

#pragma once

#include "rule.cuh"
#include "walk.cuh"

namespace gradclip::cuda {

/// Multiplies in float32 (float64 for float64) and rounds once.
struct Multiply {
  template <typename T>
  __device__ bool applies(T) const {
    return true;
  }
  __device__ void apply(double& x) const { x *= coef; }
  template <typename T>
  __device__ void apply(T& x) const {
    from_float(to_float(x) * static_cast<float>(coef), x);
  }

  double coef;
};

struct SetZero {
  template <typename T>
  __device__ bool applies(T) const {
    return true;
  }
  __device__ void apply(double& x) const { x = 0.0; }
  template <typename T>
  __device__ void apply(T& x) const {
    from_float(0.0f, x);
  }
};

/// Multiplies a warp's tiles by a coefficient, or writes +0.0 if that is kZero. These are two
/// loops, because a choice for each element takes registers that the kernel does not have on sm_80.
template <typename T>
__device__ void scale_tiles(T* x, int length, WarpTiles tiles, int lane, double coef) {
  if (coef < 0.0) {
    update_tiles(x, length, tiles, lane, SetZero{});
  } else {
    update_tiles(x, length, tiles, lane, Multiply{coef});
  }
}

/// How scale_kernel divides its chunks: into runs, of which each block takes one, and then the next
/// ones that no block has taken.
struct Runs {
  unsigned count;  // at least one a block
  unsigned*
      taken;  // of the runs beyond the blocks' first; 0 between launches. Null if there are none

  /// Takes a run; its index is `count` or more if none is left. Each run that a block processes
  /// takes another, so the last of `count` calls sets the counter back to 0.
  __device__ unsigned take() const { return gridDim.x + atomicInc(taken, count - 1); }
};

/// Contract: kThreads threads, any grid, any dtypes. Neither reads nor writes a gradient whose
/// coefficient is 1 or more: multiplying by 1 is the identity, bit for bit. May start early.
///
/// Runs are taken from the list's end on, because some of what the norm read last is still in L2.
/// There are more runs than blocks for two reasons. Blocks at work are close to one another in
/// memory then, which is 2 % faster for large lists on an H200. And where nothing is to be done,
/// blocks beyond those that are resident would only be launched and end: 1 us for each four of a
/// multiprocessor.
template <typename Table>
__global__ __launch_bounds__(kThreads,
                             kResidentBlocks) void scale_kernel(const __grid_constant__ Table table,
                                                                const Coefficients coefs,
                                                                const bool ours_follows,
                                                                const Runs runs) {
  __shared__ unsigned next;
  Run run(table.chunks(), runs.count - 1 - blockIdx.x, runs.count);
  int begin = find_tensor<true>(table, run);
  // Early, so that the next launch's parameters are copied meanwhile. What it waits for is this
  // kernel's end, and with that all before it.
  if (ours_follows) let_next_kernel_launch();
  wait_for_previous_kernel();
  if (coefs.stride == 0 && read_float(coefs.values, 0, coefs.are_float64) >= 1.0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  while (true) {
    // Before the run, so that the answer is there after it.
    if (runs.taken != nullptr && threadIdx.x == 0) next = runs.take();
    for_each_chunk<true>(
        table, run, begin, [&](int chunk, int tensor, DType dtype, char* data, int length) {
          const int64_t index = int64_t{coefs.stride} * (table.first_tensor + tensor);
          const double coef = read_float(coefs.values, index, coefs.are_float64);
          if (coef >= 1.0) return;
          with_dtype<true>(dtype, data, length, [&](auto* x, int n) {
            scale_tiles(x, n, tiles_of_chunk(chunk, warp), lane, coef);
          });
        });
    if (runs.taken == nullptr) return;
    __syncthreads();
    const unsigned index = next;
    if (index >= runs.count) return;
    __syncthreads();  // before `next` is written again
    run = Run(table.chunks(), runs.count - 1 - index, runs.count);
    begin = find_tensor<true>(table, run);
  }
}

}  // namespace gradclip::cuda
