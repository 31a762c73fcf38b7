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

__device__ inline Scaled merge(Scaled a, Scaled b, double p) {
  const double most = nan_max(a.most, b.most);
  if (!can_divide_by(most)) return {most, 0.0};
  return {most, a.sum * power(a.most / most, p) + b.sum * power(b.most / most, p)};
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
    for (int tile = first; tile < length; tile += stride) {
      const int end = min(length, tile + kTileNumel<T>);
      for (int i = tile + lane; i < end; i += kWarp) sum += power(fabs(to_double(x[i])) / most, p);
    }
    sum = warp_reduce<L1>(sum);
  }
  return {most, sum};
}

/// Contract: as norm_kernel, for tables of any dtype; out.partials holds one Scaled per chunk.
template <typename Table>
__global__ __launch_bounds__(kThreads,
                             2) void norm_wide_kernel(const __grid_constant__ Table table,
                                                      const __grid_constant__ NormOutput out,
                                                      const double p) {
  __shared__ Scaled shared[kWarps];
  Scaled* partials = reinterpret_cast<Scaled*>(out.partials);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk<false>(table, run, [&](int64_t chunk, DType dtype, char* data, int64_t length) {
    const Share share(chunk, length * item_size(dtype), warp);
    visit<true>(dtype, data, length, [&](auto* x, int n) {
      const Scaled scaled = warp_scaled(x, n, share, p, lane);
      if (lane == 0) shared[warp] = scaled;
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      Scaled total = shared[0];
      for (int w = 1; w < kWarps; ++w) total = merge(total, shared[w], p);
      partials[table.first_chunk + chunk] = total;
    }
    __syncthreads();
  });
  if (out.scale_follows()) let_next_kernel_launch();
  if (out.ticket == nullptr || !is_last_block(out.ticket)) return;

  // As finalize(): first every thread its share of the partials, then the threads in order.
  __shared__ Scaled per_thread[kThreads];
  Scaled total = {0.0, 0.0};
  for (int64_t i = threadIdx.x; i < out.chunks; i += kThreads) {
    total = merge(total, {__ldcg(&partials[i].most), __ldcg(&partials[i].sum)}, p);
  }
  per_thread[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 1; t < kThreads; ++t) total = merge(total, per_thread[t], p);
  const bool whole = p < INFINITY && can_divide_by(total.most);
  const double norm = whole ? total.most * pow(total.sum, 1.0 / p) : total.most;
  if (out.wide) {
    write_norm<double>(out, norm);
  } else {
    write_norm<float>(out, norm);
  }
}

}  // namespace gradclip::cuda
