// The arithmetic of each norm, and reductions across a warp and a block in a fixed order.

#pragma once

#include "vec.cuh"

namespace gradclip::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

/// max that keeps NaN, which fmax drops.
__device__ inline double nan_max(double a, double b) { return a > b || a != a ? a : b; }

// ---------------------------------------------------------------- in float32

/// p = 2. A lane adds at most 16 squares of a tile in each of 4 float32 sums and then merges these:
/// at most 18 roundings in a row. The error of a norm is half of that of the sum, at most
/// 18/2 * 2^-24 = 5.4e-7. Tiles are added in float64.
struct L2 {
  using Sum = float;
  static constexpr int kSums = 4;  // running sums of a lane
  static constexpr bool kMayLeaveRange = true;
  __device__ static float add(float sum, float x) { return fmaf(x, x, sum); }
  __device__ static float merge(const float (&s)[kSums]) { return (s[0] + s[1]) + (s[2] + s[3]); }
  __device__ static double to_float64(float sum) { return sum; }
  __device__ static double combine(double a, double b) { return a + b; }
  __device__ static double float64_term(double x) { return x * x; }
  __device__ static double finalize(double sum) { return sqrt(sum); }
};

/// p = 1.
struct L1 {
  using Sum = float;
  static constexpr int kSums = 4;  // running sums of a lane
  static constexpr bool kMayLeaveRange = true;
  __device__ static float add(float sum, float x) { return sum + fabsf(x); }
  __device__ static float merge(const float (&s)[kSums]) { return (s[0] + s[1]) + (s[2] + s[3]); }
  __device__ static double to_float64(float sum) { return sum; }
  __device__ static double combine(double a, double b) { return a + b; }
  __device__ static double float64_term(double x) { return fabs(x); }
  __device__ static double finalize(double sum) { return sum; }
};

/// p = inf. Magnitudes are compared as integers. In their order NaN is above inf, so NaN is kept.
struct LInf {
  using Sum = unsigned;
  static constexpr int kSums = 2;
  static constexpr bool kMayLeaveRange = false;
  __device__ static unsigned add(unsigned largest, float x) {
    return max(largest, __float_as_uint(x) & 0x7fffffffu);
  }
  __device__ static unsigned merge(const unsigned (&s)[kSums]) { return max(s[0], s[1]); }
  __device__ static double to_float64(unsigned largest) { return __uint_as_float(largest); }
  __device__ static double combine(double a, double b) { return nan_max(a, b); }
  __device__ static double float64_term(double x) { return fabs(x); }
  __device__ static double finalize(double largest) { return largest; }
};

// ---------------------------------------------------------------- across lanes

/// Returns the result to every lane; all lanes compute it in the same order.
template <typename Norm>
__device__ double warp_reduce(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = Norm::combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

/// Returns the result to thread 0. `shared` has kWarps entries, which may be reused after the
/// block's next barrier. Every thread of the block must call it.
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

/// Returns true in all threads of the block that arrives here last, to which everything that the
/// other blocks wrote before is visible, and false in all other blocks. `arrivals` has to be 0
/// before the launch and is 0 after it, so that the next launch can use it without clearing it. A
/// launch of one block leaves it alone.
__device__ inline bool is_last_block(unsigned* arrivals) {
  __shared__ bool last;
  __syncthreads();
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();  // makes what the whole block wrote before the barrier visible first
    last = atomicInc(arrivals, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace gradclip::cuda
