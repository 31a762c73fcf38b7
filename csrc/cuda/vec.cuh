// Reading and writing 16-byte vectors of any gradient dtype.
//
// One warp moves a tile of 32 lanes x kLoads vectors = 4 KiB at a time. Which lane holds which
// element depends on its index alone: memory without 16-byte alignment is accessed element by
// element in the same mapping, so results have the same bits at any address.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

__device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kVecBytes == 0;
}

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

/// The index of the first element of vector `j` of a lane in the tile that starts at `tile`.
template <typename T>
__device__ int vec_begin(int tile, int j, int lane) {
  return tile + (j * kWarp + lane) * kVecNumel<T>;
}

/// Tells whether a tile can be moved in whole vectors.
template <typename T>
__device__ bool is_full_tile(const T* x, int tile, int length) {
  return tile + kTileNumel<T> <= length && is_aligned(x);
}

/// Reads a lane's vectors of any tile, in the mapping of a full one; zeros from `length` on.
template <typename T>
__device__ void load_tile(Vec<T> (&vecs)[kLoads], const T* x, int tile, int length, int lane) {
  if (is_full_tile(x, tile, length)) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      vecs[j].words = load_read_only(x + vec_begin<T>(tile, j, lane));
    }
    // Keeps the arithmetic behind the last load; without it only 4 loads stay in flight.
    __syncwarp();
    return;
  }
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int begin = vec_begin<T>(tile, j, lane);
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) {
      if (begin + k < length) vecs[j].items[k] = x[begin + k];
    }
  }
}

/// Applies `change(element) -> bool` in place to a warp's tiles of a chunk; what did not change
/// need not be written. Full tiles go in vectors, others element by element: no result depends
/// on which lane has it.
template <typename T, typename Change>
__device__ void change_tiles(T* x, int length, int first, int stride, int lane, Change&& change) {
  for (int tile = first * kTileNumel<T>; tile < length; tile += stride * kTileNumel<T>) {
    if (is_full_tile(x, tile, length)) {
#pragma unroll 1
      for (int first_j = 0; first_j < kLoads; first_j += kLoadsInPlace) {
        Vec<T> vecs[kLoadsInPlace];
        T* address = x + vec_begin<T>(tile, first_j, lane);
#pragma unroll
        for (int j = 0; j < kLoadsInPlace; ++j) {
          vecs[j].words = reinterpret_cast<const uint4*>(address)[j * kWarp];
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kLoadsInPlace; ++j) {
          bool changed = false;
#pragma unroll
          for (int k = 0; k < kVecNumel<T>; ++k) changed |= change(vecs[j].items[k]);
          if (changed) reinterpret_cast<uint4*>(address)[j * kWarp] = vecs[j].words;
        }
      }
    } else {
      const int end = min(length, tile + kTileNumel<T>);
#pragma unroll 4
      for (int i = tile + lane; i < end; i += kWarp) {
        T item = x[i];
        if (change(item)) x[i] = item;
      }
    }
  }
}

}  // namespace gradclip::cuda
