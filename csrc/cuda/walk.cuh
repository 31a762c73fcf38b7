// How a block finds its work: a contiguous range of the launch's chunks.

#pragma once

#include "core/tensor_list.h"
#include "vec.cuh"

namespace gradclip::cuda {

// Programmatic dependent launch, sm_90 and later: blocks of the scale kernel start as soon as
// blocks of the norm kernel end, not only after the last of them. On other GPUs both functions do
// nothing, and the kernels run in stream order.

/// To be called when a block has read its gradients.
__device__ inline void let_next_kernel_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// To be called before reading anything that the previous kernel wrote.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// The chunks [begin, end) of block `block` out of `blocks`; the lengths differ by one at most. A
/// launch has less than 2^31 chunks, and half as wide indices save eight registers.
struct Run {
  int begin;
  int end;
  __device__ Run(int64_t chunks, int64_t block, int64_t blocks)
      : begin(static_cast<int>(chunks * block / blocks)),
        end(static_cast<int>(chunks * (block + 1) / blocks)) {}
};

/// The tiles of a chunk that this warp processes: first, first + stride, first + 2 * stride ...
///
/// A chunk of one tile is processed by one warp, chosen by the chunk's index, so that the warps of
/// a block process several small tensors at a time. Otherwise seven warps would wait for the first.
struct WarpTiles {
  int first;
  int stride;
  __device__ WarpTiles(int first, int stride) : first(first), stride(stride) {}
  __device__ WarpTiles(int chunk, int64_t chunk_bytes, int warp)
      : first(chunk_bytes <= kTileBytes ? (chunk % kWarps == warp ? 0 : 1) : warp),
        stride(kWarps) {}
};

/// Calls `work(data, length)` with the address of a chunk as a pointer to its element type.
template <bool kWithFloat64, typename Work>
__device__ void with_dtype(DType dtype, char* data, int64_t length, Work&& work) {
  const int n = static_cast<int>(length);
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

/// Calls `work(chunk, tensor, dtype, data, length)` for every chunk of the run, forwards or
/// backwards; `chunk` and `tensor` are counted from the first ones of the launch. The first tensor
/// is found by binary search.
template <bool kBackwards, typename Table, typename Work>
__device__ void for_each_chunk(const Table& table, const Run& run, Work&& work) {
  if (run.begin == run.end) return;
  int tensor = static_cast<int>(
      tensor_of(table.chunk_prefix, table.tensors, kBackwards ? run.end - 1 : run.begin));
  for (int step = 0; step < run.end - run.begin; ++step) {
    const int chunk = kBackwards ? run.end - 1 - step : run.begin + step;
    if constexpr (kBackwards) {
      while (chunk < table.chunk_prefix[tensor]) --tensor;
    } else {
      while (chunk >= table.chunk_prefix[tensor + 1]) ++tensor;
    }
    const DType dtype = table.dtype(tensor);
    const Chunk part = chunk_of(tensor, chunk - table.chunk_prefix[tensor], table.numel(tensor),
                                chunk_numel(dtype, kChunkBytes));
    char* data = static_cast<char*>(table.data[tensor]) + part.offset * item_size(dtype);
    work(chunk, tensor, dtype, data, part.length);
  }
}

}  // namespace gradclip::cuda
