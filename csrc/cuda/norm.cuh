// The norm of all gradients of a launch, in one pass at memory speed.

#pragma once

#include "core/rule.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace gradclip::cuda {

/// Where a norm goes, and what becomes of it.
struct NormOutput {
  double* partials;    // one per chunk of the whole list, by index
  unsigned* arrivals;  // 0 between launches; null in all launches of a list but the last
  int64_t chunks;      // of the whole list
  void* total_norm;    // one float or double
  void* clip_coef;     // the same
  bool float64;        // both are double, because a gradient is
  Rule rule;

  /// A kernel that lets the next one start early obliges it to wait, so only ours may follow.
  __device__ bool scale_follows() const { return arrivals != nullptr && !rule.only_reports(); }
};

/// Writes the norm and the coefficient in the precision of the result.
template <typename T>
__device__ void write_norm_as(const NormOutput& out, double norm) {
  const T total_norm = static_cast<T>(norm);
  *static_cast<T*>(out.total_norm) = total_norm;
  *static_cast<T*>(out.clip_coef) = out.rule.clip_coef(total_norm);
}

__device__ inline void write_norm(const NormOutput& out, double norm) {
  if (out.float64) {
    write_norm_as<double>(out, norm);
  } else {
    write_norm_as<float>(out, norm);
  }
}

/// Adds the partials in an order that depends on their number alone. One block; thread 0 writes.
template <typename Norm>
__device__ void finalize(const NormOutput& out) {
  __shared__ double shared[kWarps];
  double value = 0.0;
  for (int64_t i = threadIdx.x; i < out.chunks; i += kThreads) {
    value = Norm::combine(value, __ldcg(out.partials + i));  // written by other SMs: from L2
  }
  value = block_reduce<Norm>(value, shared);
  if (threadIdx.x == 0) write_norm(out, Norm::finish(value));
}

/// The same tiles again in float64, one element after the other: for the rare warp whose float32
/// sum overflowed, or is so small that squares may have vanished. The data is still in L2.
template <typename Norm, typename T>
__device__ __noinline__ double warp_sum_again(const T* x, int length, Share share, int lane) {
  double sum = 0.0;
  for (int tile = share.first * kTileNumel<T>; tile < length;
       tile += share.stride * kTileNumel<T>) {
    const int end = min(length, tile + kTileNumel<T>);
    for (int i = tile + lane; i < end; i += kWarp) sum += Norm::wide_term(to_float(x[i]));
  }
  return warp_reduce<Norm>(sum);
}

/// A warp's share of one chunk.
template <typename Norm, typename T>
__device__ double warp_sum(const T* x, int length, Share share, int lane) {
  double total = 0.0;
  unsigned bits = 0;
  for (int tile = share.first * kTileNumel<T>; tile < length;
       tile += share.stride * kTileNumel<T>) {
    Vec<T> vecs[kLoads];
    load_tile(vecs, x, tile, length, lane);
    typename Norm::Sum sums[4] = {};
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if constexpr (Norm::kCanLeaveRange) {
        bits |= vecs[j].words.x | vecs[j].words.y;
        bits |= vecs[j].words.z | vecs[j].words.w;
      }
#pragma unroll
      for (int k = 0; k < kVecNumel<T>; ++k) {
        sums[k % 4] = Norm::add(sums[k % 4], to_float(vecs[j].items[k]));
      }
    }
    total = Norm::combine(total, Norm::widen(Norm::merge(Norm::merge(sums[0], sums[1]),
                                                         Norm::merge(sums[2], sums[3]))));
  }
  total = warp_reduce<Norm>(total);
  if constexpr (Norm::kCanLeaveRange) {
    // Zero is no reason to look again unless a bit was set: rows of zeros are common in embeddings.
    const bool in_range = total >= 1e-30 && total < INFINITY;
    if (!in_range && __any_sync(kAllLanes, bits != 0)) {
      total = warp_sum_again<Norm>(x, length, share, lane);
    }
  }
  return total;
}

/// Contract: kThreads threads; any grid; table of float32, bfloat16 and float16 tensors. Writes
/// out.partials[c] for the launch's chunks, and the last block to finish a launch that has
/// `arrivals` writes the norm and the coefficient. The bits depend on values and sizes only.
template <typename Norm, typename Table>
__global__ __launch_bounds__(kThreads, 4) void norm_kernel(const __grid_constant__ Table table,
                                                           const __grid_constant__ NormOutput out) {
  // Warps leave their sums here and meet once in kBatch chunks, not in each.
  constexpr int kBatch = 16;
  __shared__ double sums[kBatch][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk<false>(table, run, [&](int64_t chunk, DType dtype, char* data, int64_t length) {
    const Share share(chunk, length * item_size(dtype), warp);
    double sum = 0.0;
    visit<false>(dtype, data, length,
                 [&](auto* x, int n) { sum = warp_sum<Norm>(x, n, share, lane); });
    const int slot = static_cast<int>((chunk - run.begin) % kBatch);
    if (lane == 0) sums[slot][warp] = sum;
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
  if (out.scale_follows()) let_next_kernel_launch();
  if (out.arrivals != nullptr && is_last_block(out.arrivals)) finalize<Norm>(out);
}

}  // namespace gradclip::cuda
