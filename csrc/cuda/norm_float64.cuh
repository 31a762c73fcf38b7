// The norm computed in float64: for any order p > 0, and for float64 tensors.

#pragma once

#include "norm.cuh"

namespace gradclip::cuda {

/// A sum of |x|^p, represented as sum * largest^p, so that it neither overflows nor underflows.
struct ScaledSum {
  double largest;  // the largest |x|; NaN if an element is NaN
  double sum;      // of (|x| / largest)^p; 0 if `largest` is 0, inf or NaN
};

/// A call: inlined wherever a power is computed, pow takes registers from the loops around it.
__device__ __noinline__ double general_power(double ratio, double p) { return pow(ratio, p); }

__device__ inline double power(double ratio, double p) {
  return p == 2.0 ? ratio * ratio : p == 1.0 ? ratio : general_power(ratio, p);
}

__device__ inline bool can_divide_by(double largest) { return largest > 0.0 && largest < INFINITY; }

/// Converts a sum that is scaled by `largest` to one that is scaled by `new_largest`.
__device__ inline double rescaled(double sum, double largest, double new_largest, double p) {
  return sum > 0.0 ? sum * power(largest / new_largest, p) : 0.0;
}

/// Returns the largest value of the block's threads to every thread. `shared` as in block_reduce.
__device__ inline double block_max(double value, double* shared) {
  value = block_reduce<LInf>(value, shared);
  if (threadIdx.x == 0) shared[0] = value;
  __syncthreads();
  value = shared[0];
  __syncthreads();
  return value;
}

__device__ inline double to_double(double x) { return x; }
template <typename T>
__device__ double to_double(T x) {
  return to_float(x);
}

/// Returns the scaled sum of a warp's tiles of a chunk, in two passes: the largest magnitude, then
/// the sum.
template <typename T>
__device__ ScaledSum warp_scaled_sum(const T* x, int length, WarpTiles tiles, double p, int lane) {
  const int first = tiles.first * kTileNumel<T>, stride = tiles.stride * kTileNumel<T>;
  double largest = 0.0;
  for (int tile = first; tile < length; tile += stride) {
    const int end = min(length, tile + kTileNumel<T>);
#pragma unroll 4
    for (int i = tile + lane; i < end; i += kWarp) {
      largest = nan_max(largest, fabs(to_double(x[i])));
    }
  }
  largest = warp_reduce<LInf>(largest);
  double sum = 0.0;
  if (can_divide_by(largest) && p < INFINITY) {
    const double inverse = 1.0 / largest;  // inf for the smallest subnormal numbers
    for (int tile = first; tile < length; tile += stride) {
      const int end = min(length, tile + kTileNumel<T>);
      for (int i = tile + lane; i < end; i += kWarp) {
        const double magnitude = fabs(to_double(x[i]));
        sum += power(inverse < INFINITY ? magnitude * inverse : magnitude / largest, p);
      }
    }
    sum = warp_reduce<L1>(sum);
  }
  return {largest, sum};
}

/// The norm for a scaled sum.
__device__ inline double norm_of(double largest, double sum, double p) {
  return p < INFINITY && can_divide_by(largest) ? largest * general_power(sum, 1.0 / p) : largest;
}

/// Reads a partial that other SMs wrote, so from L2.
template <typename Partial>
__device__ ScaledSum load_partial(const Partial* partial) {
  return {__ldcg(&partial->largest), __ldcg(&partial->sum)};
}

/// A partial of norm_kernel as a scaled sum. Unless it is 0, it is at least 1e-90, the square of
/// the smallest float32, so whatever underflows when it is scaled by 1 does not count beside it.
__device__ inline ScaledSum scaled(double partial, double p) {
  if (p == INFINITY || !can_divide_by(partial)) return {partial, 0.0};
  return {1.0, partial};
}

/// Returns the norm to thread 0, from partial(0) to partial(count - 1) in two passes, so that no
/// power depends on another one.
template <typename Partial>
__device__ double norm_of_partials(int64_t count, double p, Partial&& partial) {
  __shared__ double shared[kWarps];
  double largest = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    largest = nan_max(largest, partial(i).largest);
  }
  largest = block_max(largest, shared);
  double sum = 0.0;
  if (can_divide_by(largest)) {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const ScaledSum found = partial(i);
      sum += rescaled(found.sum, found.largest, largest, p);
    }
  }
  return norm_of(largest, block_reduce<L1>(sum, shared), p);
}

/// Completes the norm. A call: inlined, it takes registers from the loop before it.
__device__ __noinline__ void finalize_float64(const NormOutput& out, double p) {
  const auto* partials = reinterpret_cast<const ScaledSum*>(out.partials);
  const double norm = norm_of_partials(out.chunks + out.float32_chunks, p, [&](int64_t i) {
    return i < out.chunks ? load_partial(partials + i)
                          : scaled(__ldcg(out.float32_partials + (i - out.chunks)), p);
  });
  if (threadIdx.x == 0) write_norm(out, norm);
}

/// Contract: as norm_kernel, for tables of any dtype; out.partials holds one ScaledSum per chunk.
/// May follow norm_kernel's launches for the list's other tensors, and then finalizes these, too.
template <typename Table>
__global__ __launch_bounds__(kThreads,
                             4) void norm_float64_kernel(const __grid_constant__ Table table,
                                                         const __grid_constant__ NormOutput out,
                                                         const double p) {
  __shared__ double shared[kWarps];
  ScaledSum* partials = reinterpret_cast<ScaledSum*>(out.partials);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (out.ours_follows()) let_next_kernel_launch();
  const WarpTiles tiles{warp, kWarps};
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk(table, run, [&](int chunk, int, DType dtype, char* data, int length) {
    ScaledSum of_warp = {0.0, 0.0};
    with_dtype<true>(dtype, data, length,
                     [&](auto* x, int n) { of_warp = warp_scaled_sum(x, n, tiles, p, lane); });
    const double largest = block_max(of_warp.largest, shared);
    const bool has_sum = lane == 0 && can_divide_by(largest);
    const double sum = block_reduce<L1>(
        has_sum ? rescaled(of_warp.sum, of_warp.largest, largest, p) : 0.0, shared);
    if (threadIdx.x == 0) partials[table.first_chunk + chunk] = {largest, sum};
    __syncthreads();
  });
  wait_for_previous_kernel();
  if (out.arrivals != nullptr && is_last_block(out.arrivals)) finalize_float64(out, p);
}

}  // namespace gradclip::cuda
