// Norms as a kernel computes them, and sums across a warp and a block in a fixed order.

#pragma once

#include "vec.cuh"

namespace gradclip::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

/// max that keeps NaN, which fmax drops.
__device__ inline double nan_max(double a, double b) { return a > b || a != a ? a : b; }

// ---------------------------------------------------------------- in float32

/// p = 2. A lane adds at most 64 squares of a tile in 4 sums of float32, so 16 roundings follow
/// one another: 16/2 * 2^-24 of a sum of squares at worst, 2.4e-7 of a norm. Tiles are added in
/// float64.
struct L2 {
  using Sum = float;
  static constexpr bool kCanLeaveRange = true;
  __device__ static float add(float sum, float x) { return fmaf(x, x, sum); }
  __device__ static float merge(float a, float b) { return a + b; }
  __device__ static double widen(float sum) { return sum; }
  __device__ static double combine(double a, double b) { return a + b; }
  __device__ static double wide_term(double x) { return x * x; }
  __device__ static double finish(double sum) { return sqrt(sum); }
};

/// p = 1.
struct L1 {
  using Sum = float;
  static constexpr bool kCanLeaveRange = true;
  __device__ static float add(float sum, float x) { return sum + fabsf(x); }
  __device__ static float merge(float a, float b) { return a + b; }
  __device__ static double widen(float sum) { return sum; }
  __device__ static double combine(double a, double b) { return a + b; }
  __device__ static double wide_term(double x) { return fabs(x); }
  __device__ static double finish(double sum) { return sum; }
};

/// p = inf. Magnitudes are compared as integers, whose order puts NaN above inf: it survives.
struct LInf {
  using Sum = unsigned;
  static constexpr bool kCanLeaveRange = false;
  __device__ static unsigned add(unsigned most, float x) {
    return max(most, __float_as_uint(x) & 0x7fffffffu);
  }
  __device__ static unsigned merge(unsigned a, unsigned b) { return max(a, b); }
  __device__ static double widen(unsigned most) { return __uint_as_float(most); }
  __device__ static double combine(double a, double b) { return nan_max(a, b); }
  __device__ static double wide_term(double x) { return fabs(x); }
  __device__ static double finish(double most) { return most; }
};

// ---------------------------------------------------------------- across lanes

/// Every lane gets the result; the tree is the same in every lane's view.
template <typename Norm>
__device__ double warp_reduce(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = Norm::combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

/// Thread 0 gets the result. `shared` has kWarps entries, which are free again at the block's next
/// barrier; every thread of the block takes part.
template <typename Norm>
__device__ double block_reduce(double value, double* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_reduce<Norm>(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) value = Norm::combine(value, shared[w]);
  }
  return value;
}

/// Tells all threads of one block, and one only, that every block has come here; what the others
/// wrote before is then visible to it. `arrivals` starts at 0 and is 0 again afterwards, so it
/// serves one launch after the other without being cleared.
__device__ inline bool is_last_block(unsigned* arrivals) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block: what it wrote before the barrier comes first
    last = atomicInc(arrivals, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace gradclip::cuda
