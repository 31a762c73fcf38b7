// The statistics of each tensor, from the read that its norm needs.

#pragma once

#include "per_tensor.cuh"

namespace gradclip::cuda {

constexpr unsigned kInfinityBits = 0x7f800000u;

__device__ inline unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ inline bool is_nonfinite(float x) { return magnitude_bits(x) >= kInfinityBits; }
__device__ inline bool is_nonfinite(double x) { return !(fabs(x) < INFINITY); }

__device__ inline unsigned warp_reduce_max(unsigned value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}
__device__ inline unsigned warp_reduce_add(unsigned value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

/// Counts the elements of a warp's tiles for which `counts(element)` holds, one at a time: for the
/// few warps that need it, while the data is in L2.
template <typename T, typename Counts>
__device__ unsigned warp_count(const T* x, int length, WarpTiles tiles, int lane, Counts counts) {
  unsigned found = 0;
  for (int tile = tiles.first * kTileNumel<T>; tile < length;
       tile += tiles.stride * kTileNumel<T>) {
    const int end = min(length, tile + kTileNumel<T>);
    for (int i = tile + lane; i < end; i += kWarp) found += counts(x[i]);
  }
  return warp_reduce_add(found);
}

template <typename T>
__device__ __noinline__ unsigned warp_nonfinite(const T* x, int length, WarpTiles tiles, int lane) {
  return warp_count(x, length, tiles, lane, [](T item) { return is_nonfinite(to_float(item)); });
}

/// A lane's part of a norm and of the statistics.
template <typename Norm>
struct StatisticsLane {
  struct Result {
    typename Norm::Sum sum;
    unsigned largest;  // the bits of the largest magnitude; above those of inf if there is a NaN
    unsigned nonzeros;
  };

  template <typename T>
  __device__ void add(const Vec<T>& vec) {
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) {
      const float item = to_float(vec.items[k]);
      const unsigned bits = magnitude_bits(item);
      sums[k % Norm::kSums] = Norm::add(sums[k % Norm::kSums], item);
      largest = max(largest, bits);
      nonzeros += bits != 0;
    }
  }
  __device__ Result result() const { return {Norm::merge(sums), largest, nonzeros}; }

  typename Norm::Sum sums[Norm::kSums] = {};
  unsigned largest = 0, nonzeros = 0;
};

/// Sums as warp_sum does, in the same order, and so with its error; the largest magnitude and the
/// number of zeros are exact.
template <typename Norm, typename T>
__device__ void read_tiles(const T* x, int length, WarpTiles tiles, int lane,
                           StatisticsPartial& found) {
  if (tiles.first * kTileNumel<T> >= length) return;
  double total = 0.0;
  unsigned largest = 0, nonzeros = 0;
  int elements = 0;
  for (int tile = tiles.first * kTileNumel<T>; tile < length;
       tile += tiles.stride * kTileNumel<T>) {
    const auto part = read_tile<StatisticsLane<Norm>, true>(x + tile, length - tile, lane);
    total = Norm::combine(total, Norm::to_float64(part.sum));
    largest = max(largest, part.largest);
    nonzeros += part.nonzeros;
    elements += min(length - tile, kTileNumel<T>);
  }
  total = warp_reduce<Norm>(total);
  largest = warp_reduce_max(largest);
  found.largest = __uint_as_float(largest);
  found.zeros = elements - static_cast<int>(warp_reduce_add(nonzeros));
  found.nonfinite = 0.0;
  if (largest >= kInfinityBits) {
    total = found.largest;  // inf, or NaN: the norm, too
    found.nonfinite = warp_nonfinite(x, length, tiles, lane);
  } else if (largest != 0 && !(total >= 1e-30 && total < INFINITY)) {
    total = warp_sum_float64<Norm>(x, length, tiles, lane);
  }
  found.sum = total;
}

}  // namespace gradclip::cuda
