// Reading and writing 16-byte vectors of any gradient dtype.
//
// One warp processes a tile of 32 lanes x kLoads vectors = 4 KiB at a time. In a sum, the lane of
// an element depends on its index alone: memory without 16-byte alignment is read element by
// element into the same lanes, so results have the same bits at any address.

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
// Vectors in flight per lane. 4 blocks of 256 threads then have 128 KiB in flight on an SM; an H200
// needs about 40 KB to cover its memory latency. Without load_tile's __syncwarp the compiler keeps
// only 4 loads in flight.
constexpr int kLoads = 8;
// The same for kernels that write vectors back. Half as many leave enough registers for all dtypes
// in one kernel at the norm kernel's occupancy, so that both can have the same grid.
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

/// Rounds to nearest, ties to even.
__device__ inline void from_float(float x, float& out) { out = x; }
__device__ inline void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half& out) { out = __float2half_rn(x); }

/// 16 bytes of elements of type T, in registers: an index known only at run time would move them to
/// local memory.
template <typename T>
union Vec {
  uint4 words;
  T items[kVecNumel<T>];
  __device__ Vec() : words{0, 0, 0, 0} {}
};

/// Reads memory that this kernel does not write. Not cached in L1, because it is read once; cached
/// in L2, for the scale kernel.
__device__ inline uint4 load_read_only(const void* address) {
#ifdef __CUDA_ARCH__
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address));
  return words;
#else  // in the emulator of the tests
  return *static_cast<const uint4*>(address);
#endif
}

/// Reads a lane's vectors of a tile; elements from `length` on are 0. `kReadOnly`: this kernel does
/// not write the tile later.
template <bool kReadOnly, typename T>
__device__ void load_tile(Vec<T> (&vecs)[kLoads], const T* x, int tile, int length, int lane) {
  if (tile + kTileNumel<T> <= length && reinterpret_cast<uintptr_t>(x) % kVecBytes == 0) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const T* address = x + tile + (j * kWarp + lane) * kVecNumel<T>;
      if constexpr (kReadOnly) {
        vecs[j].words = load_read_only(address);
      } else {
        vecs[j].words = *reinterpret_cast<const uint4*>(address);
      }
    }
    // Keeps the arithmetic after the last load; without it only 4 loads are in flight.
    __syncwarp();
    return;
  }
  // Reading aligned vectors and shifting them would take fewer instructions, but spills registers.
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int begin = tile + (j * kWarp + lane) * kVecNumel<T>;
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) {
      if (begin + k < length) vecs[j].items[k] = x[begin + k];
    }
  }
}

/// Applies `update(element) -> bool` in place to x[begin, end), one element at a time. Writes an
/// element if `update` returns true.
template <typename T, typename Update>
__device__ void update_elements(T* x, int begin, int end, int lane, Update&& update) {
#pragma unroll 4
  for (int i = begin + lane; i < end; i += kWarp) {
    T item = x[i];
    if (update(item)) x[i] = item;
  }
}

/// Applies `update(element) -> bool` in place to a warp's tiles of a chunk. Writes a vector if
/// `update` returns true for one of its elements. No result depends on the lane, so tiles begin at
/// the first aligned address, and the elements before it belong to the first tile.
template <typename T, typename Update>
__device__ void update_tiles(T* x, int length, int first, int stride, int lane, Update&& update) {
  const auto address = reinterpret_cast<uintptr_t>(x);
  const int head = static_cast<int>(split_vectors(address, length, sizeof(T), kVecBytes).head);
  if (first == 0) update_elements(x, 0, head, lane, update);
  x += head;
  length -= head;
  for (int tile = first * kTileNumel<T>; tile < length; tile += stride * kTileNumel<T>) {
    if (tile + kTileNumel<T> > length) {
      update_elements(x, tile, length, lane, update);
      return;
    }
#pragma unroll 1
    for (int row = 0; row < kLoads; row += kLoadsInPlace) {
      Vec<T> vecs[kLoadsInPlace];
      uint4* words = reinterpret_cast<uint4*>(x + tile) + row * kWarp + lane;
#pragma unroll
      for (int j = 0; j < kLoadsInPlace; ++j) vecs[j].words = words[j * kWarp];
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kLoadsInPlace; ++j) {
        bool changed = false;
#pragma unroll
        for (int k = 0; k < kVecNumel<T>; ++k) changed |= update(vecs[j].items[k]);
        if (changed) words[j * kWarp] = vecs[j].words;
      }
    }
  }
}

}  // namespace gradclip::cuda
