// The norm of all gradients, in one pass over memory.

#pragma once

#include "reduce.cuh"
#include "rule.cuh"
#include "walk.cuh"

namespace gradclip::cuda {

/// Where a norm kernel writes its results.
struct NormOutput {
  double* partials;    // one per chunk of the list, by index; of norm_float64_kernel, a ScaledSum
  unsigned* arrivals;  // 0 between launches; null in all launches of a list but the last
  int64_t chunks;      // of the list
  // Of norm_float64_kernel: what norm_kernel has left of the tensors that are not float64.
  const double* float32_partials;
  int64_t float32_chunks;
  void* total_norm;  // a float, or a double if is_float64
  void* clip_coef;   // the same
  bool is_float64;   // some gradient is float64
  Limits limits;

  /// Whether the next kernel on the stream is one of ours: the list's next norm kernel, or
  /// scale_kernel.
  __device__ bool ours_follows() const { return arrivals == nullptr || !limits.only_report(); }
};

/// Writes the norm and the coefficient in the precision of the result.
template <typename T>
__device__ void write_norm_as(const NormOutput& out, double norm) {
  const T total_norm = static_cast<T>(norm);
  *static_cast<T*>(out.total_norm) = total_norm;
  *static_cast<T*>(out.clip_coef) = clip_coef(out.limits, total_norm, 0);
}

__device__ inline void write_norm(const NormOutput& out, double norm) {
  if (out.is_float64) {
    write_norm_as<double>(out, norm);
  } else {
    write_norm_as<float>(out, norm);
  }
}

/// Combines the partials in an order that depends on their number alone, and writes the norm and
/// the coefficient. One block; thread 0 writes.
template <typename Norm>
__device__ void finalize(const NormOutput& out) {
  __shared__ double shared[kWarps];
  // So many are read at a time, because all other blocks have ended: nothing else hides latency.
  constexpr int kBatch = 16;
  double value = 0.0;
  for (int64_t first = threadIdx.x; first < out.chunks; first += kBatch * kThreads) {
    double batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kThreads;
      batch[j] = i < out.chunks ? __ldcg(out.partials + i) : 0.0;  // other SMs wrote it: read L2
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) value = Norm::combine(value, batch[j]);
  }
  value = block_reduce<Norm>(value, shared);
  if (threadIdx.x == 0) write_norm(out, Norm::finalize(value));
}

/// Sums the same tiles again in float64, one element at a time, for a warp whose float32 sum
/// overflowed or is so small that squares may have underflowed. Such warps are rare, and the data
/// is still in L2.
template <typename Norm, typename T>
__device__ __noinline__ double warp_sum_float64(const T* x, int length, WarpTiles tiles, int lane) {
  double sum = 0.0;
  for (int tile = tiles.first * kTileNumel<T>; tile < length;
       tile += tiles.stride * kTileNumel<T>) {
    const int end = min(length, tile + kTileNumel<T>);
    for (int i = tile + lane; i < end; i += kWarp) sum += Norm::float64_term(to_float(x[i]));
  }
  return warp_reduce<Norm>(sum);
}

/// A lane's part of a norm.
template <typename Norm>
struct NormLane {
  struct Result {
    typename Norm::Sum sum;
    unsigned bits;  // of all elements, where Norm::kMayLeaveRange
  };

  template <typename T>
  __device__ void add(const Vec<T>& vec) {
    if constexpr (Norm::kMayLeaveRange) {
      bits |= vec.words.x | vec.words.y | vec.words.z | vec.words.w;
    }
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) {
      sums[k % Norm::kSums] = Norm::add(sums[k % Norm::kSums], to_float(vec.items[k]));
    }
  }
  __device__ Result result() const { return {Norm::merge(sums), bits}; }

  typename Norm::Sum sums[Norm::kSums] = {};
  unsigned bits = 0;
};

/// Returns the sum of a warp's tiles of one chunk. `kReadOnly` as in read_tile.
template <typename Norm, bool kReadOnly = true, typename T>
__device__ double warp_sum(const T* x, int length, WarpTiles tiles, int lane) {
  if (tiles.first * kTileNumel<T> >= length) return 0.0;
  double total = 0.0;
  unsigned bits = 0;
  for (int tile = tiles.first * kTileNumel<T>; tile < length;
       tile += tiles.stride * kTileNumel<T>) {
    const auto found = read_tile<NormLane<Norm>, kReadOnly>(x + tile, length - tile, lane);
    total = Norm::combine(total, Norm::to_float64(found.sum));
    bits |= found.bits;
  }
  total = warp_reduce<Norm>(total);
  if constexpr (Norm::kMayLeaveRange) {
    // A sum of 0 is right if no bit of an element was set: gradients of embeddings have many zero
    // rows. A NaN among magnitudes comes from an element.
    const bool may_be_wrong = total < 1e-30 || total == INFINITY;
    if (may_be_wrong && __any_sync(kAllLanes, bits != 0)) {
      total = warp_sum_float64<Norm>(x, length, tiles, lane);
    }
  }
  return total;
}

/// Contract: kThreads threads; any grid; a table of float32, bfloat16 and float16 tensors. Writes
/// out.partials[c] for the chunks of the launch. In a launch that has `arrivals`, the last block to
/// finish writes the norm and the coefficient. The bits depend on values and sizes only. All but
/// the first launch of a list may start early: what they read, the first has found written.
template <typename Norm, typename Table>
__global__ __launch_bounds__(kThreads, kResidentBlocks) void norm_kernel(
    const __grid_constant__ Table table, const __grid_constant__ NormOutput out) {
  // Warps store their sums here, so that one barrier serves kBatch chunks.
  constexpr int kBatch = 16;
  __shared__ double sums[kBatch][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (out.ours_follows()) let_next_kernel_launch();
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk(table, run, [&](int chunk, int, DType dtype, char* data, int length) {
    double sum;
    with_dtype<false>(dtype, data, length, [&](auto* x, int n) {
      sum = warp_sum<Norm>(x, n, tiles_of_chunk(chunk, warp), lane);
    });
    const int slot = (chunk - run.begin) % kBatch;
    if (lane == 0) sums[slot][tiles_of_chunk(chunk, warp).first] = sum;
    if (slot == kBatch - 1 || chunk == run.end - 1) {
      __syncthreads();
      if (threadIdx.x <= slot) {
        double value = 0.0;
        for (int w = 0; w < kWarps; ++w) value = Norm::combine(value, sums[threadIdx.x][w]);
        out.partials[table.first_chunk + chunk - slot + threadIdx.x] = value;
      }
      __syncthreads();
    }
  });
  wait_for_previous_kernel();
  if (out.arrivals != nullptr && is_last_block(out.arrivals)) finalize<Norm>(out);
}

}  // namespace gradclip::cuda
