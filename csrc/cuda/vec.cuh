// Reading and writing 16-byte vectors of any gradient dtype.
//
// One warp moves a tile of 32 lanes x kLoads vectors = 4 KiB at a time. In a sum, which lane holds
// which element depends on its index alone: memory without 16-byte alignment is read element by
// element in the same mapping, so results have the same bits at any address.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/tensor_list.h"
#include "launch.h"

namespace gradclip::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVecBytes = 16;
// Vectors in flight per lane. 4 blocks of 256 threads keep 128 KiB in flight on an SM, where an
// H200 needs about 40 KB to cover its memory latency; a compiler left alone stops at 4 loads.
constexpr int kLoads = 8;
// The same where vectors are written back. Half of it leaves registers for all dtypes in one
// kernel at the norm kernel's occupancy, so that both may have the same grid.
constexpr int kLoadsInPlace = 4;
constexpr int64_t kTileBytes = kWarp * kLoads * kVecBytes;
static_assert(kChunkBytes == 2 * kWarps * kTileBytes, "two tiles a warp fill a chunk");

template <typename T>
constexpr int kVecNumel = kVecBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kTileNumel = static_cast<int>(kTileBytes / sizeof(T));

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

/// Rounds once, to nearest even.
__device__ inline void from_float(float x, float& out) { out = x; }
__device__ inline void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half& out) { out = __float2half_rn(x); }

/// 16 bytes of elements of type T; bit patterns in registers, never indexed at run time.
template <typename T>
union Vec {
  uint4 words;
  T items[kVecNumel<T>];
  __device__ Vec() : words{0, 0, 0, 0} {}
};

/// Reads once what this kernel never writes: kept out of L1, left in L2 for the scale pass.
__device__ inline uint4 load_read_only(const void* address) {
#ifdef __CUDA_ARCH__
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address));
  return words;
#else  // the emulator of the tests
  return *static_cast<const uint4*>(address);
#endif
}

/// Reads a lane's vectors of any tile, in the mapping of a full one; zeros from `length` on.
template <typename T>
__device__ void load_tile(Vec<T> (&vecs)[kLoads], const T* x, int tile, int length, int lane) {
  if (tile + kTileNumel<T> <= length && reinterpret_cast<uintptr_t>(x) % kVecBytes == 0) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      vecs[j].words = load_read_only(x + tile + (j * kWarp + lane) * kVecNumel<T>);
    }
    // Keeps the arithmetic behind the last load; without it only 4 loads stay in flight.
    __syncwarp();
    return;
  }
  // Shifting aligned vectors into place would be fewer instructions, but spills registers.
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int begin = tile + (j * kWarp + lane) * kVecNumel<T>;
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) {
      if (begin + k < length) vecs[j].items[k] = x[begin + k];
    }
  }
}

/// Applies `change(element) -> bool` in place to x[begin, end), one element at a time.
template <typename T, typename Change>
__device__ void change_each(T* x, int begin, int end, int lane, Change&& change) {
#pragma unroll 4
  for (int i = begin + lane; i < end; i += kWarp) {
    T item = x[i];
    if (change(item)) x[i] = item;
  }
}

/// Applies `change(element) -> bool` in place to a warp's tiles of a chunk; what did not change
/// need not be written. No result depends on which lane has it, so tiles begin at the first
/// boundary of a vector, and what comes before goes with the first.
template <typename T, typename Change>
__device__ void change_tiles(T* x, int length, int first, int stride, int lane, Change&& change) {
  const auto address = reinterpret_cast<uintptr_t>(x);
  const int head = static_cast<int>(split_vectors(address, length, sizeof(T), kVecBytes).head);
  if (first == 0) change_each(x, 0, head, lane, change);
  x += head;
  length -= head;
  for (int tile = first * kTileNumel<T>; tile < length; tile += stride * kTileNumel<T>) {
    if (tile + kTileNumel<T> > length) {
      change_each(x, tile, length, lane, change);
      return;
    }
#pragma unroll 1
    for (int row = 0; row < kLoads; row += kLoadsInPlace) {
      Vec<T> vecs[kLoadsInPlace];
      uint4* own = reinterpret_cast<uint4*>(x + tile) + row * kWarp + lane;
#pragma unroll
      for (int j = 0; j < kLoadsInPlace; ++j) vecs[j].words = own[j * kWarp];
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kLoadsInPlace; ++j) {
        bool changed = false;
#pragma unroll
        for (int k = 0; k < kVecNumel<T>; ++k) changed |= change(vecs[j].items[k]);
        if (changed) own[j * kWarp] = vecs[j].words;
      }
    }
  }
}

}  // namespace gradclip::cuda
