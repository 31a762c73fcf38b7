// The norm in float64 for what float32 cannot do: any order p > 0, and lists with a float64 tensor.

#pragma once

#include "norm.cuh"

namespace gradclip::cuda {

/// A sum of |x|^p as sum * most^p, where `most` is the largest |x|: the ratio to it never leaves
/// the range, whatever p is.
struct Scaled {
  double most;  // NaN if there is one
  double sum;   // of (|x| / most)^p; 0 where `most` is 0, inf or NaN
};

__device__ inline double power(double ratio, double p) {
  return p == 2.0 ? ratio * ratio : p == 1.0 ? ratio : pow(ratio, p);
}

__device__ inline bool can_divide_by(double most) { return most > 0.0 && most < INFINITY; }

/// The sum of a part, in units of a larger one's magnitude.
__device__ inline double rescaled(double sum, double most, double larger, double p) {
  return sum > 0.0 ? sum * power(most / larger, p) : 0.0;
}

/// The largest magnitude of the block's threads, in every thread. `shared` as in block_reduce.
__device__ inline double block_most(double most, double* shared) {
  most = block_reduce<LInf>(most, shared);
  if (threadIdx.x == 0) shared[0] = most;
  __syncthreads();
  most = shared[0];
  __syncthreads();
  return most;
}

__device__ inline double to_double(double x) { return x; }
template <typename T>
__device__ double to_double(T x) {
  return to_float(x);
}

/// A warp's share of a chunk, in two readings: the largest magnitude, then the sum.
template <typename T>
__device__ Scaled warp_scaled(const T* x, int length, Share share, double p, int lane) {
  const int first = share.first * kTileNumel<T>, stride = share.stride * kTileNumel<T>;
  double most = 0.0;
  for (int tile = first; tile < length; tile += stride) {
    const int end = min(length, tile + kTileNumel<T>);
#pragma unroll 4
    for (int i = tile + lane; i < end; i += kWarp) most = nan_max(most, fabs(to_double(x[i])));
  }
  most = warp_reduce<LInf>(most);
  double sum = 0.0;
  if (can_divide_by(most) && p < INFINITY) {
    const double inverse = 1.0 / most;  // inf for the least of the subnormal numbers
    for (int tile = first; tile < length; tile += stride) {
      const int end = min(length, tile + kTileNumel<T>);
      for (int i = tile + lane; i < end; i += kWarp) {
        const double magnitude = fabs(to_double(x[i]));
        sum += power(inverse < INFINITY ? magnitude * inverse : magnitude / most, p);
      }
    }
    sum = warp_reduce<L1>(sum);
  }
  return {most, sum};
}

/// As finalize(), in two readings of the partials: no power waits for another.
__device__ inline void finalize_float64(const NormOutput& out, double p) {
  __shared__ double shared[kWarps];
  const Scaled* partials = reinterpret_cast<const Scaled*>(out.partials);
  double most = 0.0;
  for (int64_t i = threadIdx.x; i < out.chunks; i += kThreads) {
    most = nan_max(most, __ldcg(&partials[i].most));
  }
  most = block_most(most, shared);
  double sum = 0.0;
  if (can_divide_by(most)) {
    for (int64_t i = threadIdx.x; i < out.chunks; i += kThreads) {
      sum += rescaled(__ldcg(&partials[i].sum), __ldcg(&partials[i].most), most, p);
    }
  }
  sum = block_reduce<L1>(sum, shared);
  if (threadIdx.x != 0) return;
  const bool whole = p < INFINITY && can_divide_by(most);
  write_norm(out, whole ? most * pow(sum, 1.0 / p) : most);
}

/// Contract: as norm_kernel, for tables of any dtype; out.partials holds one Scaled per chunk.
template <typename Table>
__global__ __launch_bounds__(kThreads,
                             4) void norm_float64_kernel(const __grid_constant__ Table table,
                                                         const __grid_constant__ NormOutput out,
                                                         const double p) {
  __shared__ double shared[kWarps];
  Scaled* partials = reinterpret_cast<Scaled*>(out.partials);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk<false>(table, run, [&](int64_t chunk, DType dtype, char* data, int64_t length) {
    const Share share(chunk, length * item_size(dtype), warp);
    Scaled own = {0.0, 0.0};
    visit<true>(dtype, data, length,
                [&](auto* x, int n) { own = warp_scaled(x, n, share, p, lane); });
    const double most = block_most(own.most, shared);
    const bool counts = lane == 0 && can_divide_by(most);
    const double sum =
        block_reduce<L1>(counts ? rescaled(own.sum, own.most, most, p) : 0.0, shared);
    if (threadIdx.x == 0) partials[table.first_chunk + chunk] = {most, sum};
    __syncthreads();
  });
  if (out.scale_follows()) let_next_kernel_launch();
  if (out.arrivals != nullptr && is_last_block(out.arrivals)) finalize_float64(out, p);
}

}  // namespace gradclip::cuda
