// How a block finds its work: a contiguous range of the launch's chunks.

#pragma once

#include "core/tensor_list.h"
#include "vec.cuh"

namespace gradclip::cuda {

// Blocks that a multiprocessor holds at once of the kernels that follow the chunks of a list: the
// number of registers is bounded by it.
constexpr int kResidentBlocks = 4;

// Programmatic dependent launch, sm_90 and later: blocks of one of our kernels start as soon as all
// blocks of the one before have started and some have ended, not only after the last has ended. On
// other GPUs both functions do nothing, and the kernels run in stream order.

/// Lets the next kernel on the stream start early, which has to be one of ours, because only those
/// call the next function before they read what this kernel writes.
__device__ inline void let_next_kernel_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// To be called before reading anything that the previous kernel wrote, and by each kernel that may
/// start early before it ends: so that whoever waits for it waits for all kernels before it, too.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// The chunks [begin, end) of block `block` out of `blocks`; the lengths differ by one at most.
struct Run {
  int begin;
  int end;
  __device__ Run(unsigned chunks, unsigned block, unsigned blocks) {
    const unsigned length = chunks / blocks, longer = chunks % blocks;
    begin = static_cast<int>(block * length + min(block, longer));
    end = begin + static_cast<int>(length + (block < longer ? 1 : 0));
  }
};

/// The tiles of a chunk for this warp. The warps of a block take turns at the first tile, so that
/// they process several small tensors at a time. Otherwise the other warps would wait for warp 0.
__device__ inline WarpTiles tiles_of_chunk(int chunk, int warp) {
  return {(warp - chunk) & (kWarps - 1), kWarps};
}

/// Calls `work(data, n)` with the address of a chunk as a pointer to its element type.
template <bool kWithFloat64, typename Work>
__device__ void with_dtype(DType dtype, char* data, int n, Work&& work) {
  switch (dtype) {
    case DType::kFloat32:
      work(reinterpret_cast<float*>(data), n);
      break;
    case DType::kBFloat16:
      work(reinterpret_cast<__nv_bfloat16*>(data), n);
      break;
    case DType::kFloat16:
      work(reinterpret_cast<__half*>(data), n);
      break;
    case DType::kFloat64:
      if constexpr (kWithFloat64) work(reinterpret_cast<double*>(data), n);
      break;
  }
}

/// The tensor of the chunk at which for_each_chunk begins. Reads the table alone, which is in the
/// launch's parameters: so it can be found before wait_for_previous_kernel.
///
/// Each tensor before it, and each after it, has a chunk at least. So where most have only one,
/// there are few to search among: each step may miss the cache of parameters.
template <bool kBackwards, typename Table>
__device__ int find_tensor(const Table& table, const Run& run) {
  const int chunk = kBackwards ? run.end - 1 : run.begin;
  const int first = max(0, chunk - (table.chunks() - table.tensors));
  const int end = min(chunk + 1, table.tensors);
  return first + static_cast<int>(tensor_of(table.chunk_prefix + first, end - first, chunk));
}

/// Calls `work(chunk, tensor, dtype, data, length)` for every chunk of the run, forwards or
/// backwards; `chunk` and `tensor` are counted from the first ones of the launch.
template <bool kBackwards, typename Table, typename Work>
__device__ void for_each_chunk(const Table& table, const Run& run, int tensor, Work&& work) {
  for (int step = 0; step < run.end - run.begin; ++step) {
    const int chunk = kBackwards ? run.end - 1 - step : run.begin + step;
    if constexpr (kBackwards) {
      while (chunk < table.chunk_prefix[tensor]) --tensor;
    } else {
      while (chunk >= table.chunk_prefix[tensor + 1]) ++tensor;
    }
    const DType dtype = table.dtype(tensor);
    const int length =
        table.numel(chunk, tensor, static_cast<int>(chunk_numel(dtype, kChunkBytes)));
    char* data = table.data(tensor) + (chunk - table.chunk_prefix[tensor]) * kChunkBytes;
    work(chunk, tensor, dtype, data, length);
  }
}
template <typename Table, typename Work>
__device__ void for_each_chunk(const Table& table, const Run& run, Work&& work) {
  for_each_chunk<false>(table, run, find_tensor<false>(table, run), work);
}

}  // namespace gradclip::cuda
