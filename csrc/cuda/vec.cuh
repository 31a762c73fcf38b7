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
// needs about 40 KB to cover its memory latency. Without read_full_tile's __syncwarp the compiler
// keeps only 4 loads in flight.
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

/// `kReadOnly`: this kernel does not write that memory later.
template <bool kReadOnly>
__device__ uint4 load_words(const void* address) {
  if constexpr (kReadOnly) return load_read_only(address);
  return *static_cast<const uint4*>(address);
}

// Three ways to read a lane's elements of a tile, all in the same order. `Lane` is what is made of
// them: add(vec) takes 16 bytes of elements, to which zeros may have been added, and result() is
// what is known in the end. Two are calls, because their vectors do not fit the registers beside
// those of a full tile: the compiler would put all of them into local memory, at a third of the
// speed (measured on an H200).

/// A tile of kTileNumel elements at an aligned address.
template <typename Lane, bool kReadOnly, typename T>
__device__ typename Lane::Result read_full_tile(const T* x, int lane) {
  Vec<T> vecs[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    vecs[j].words = load_words<kReadOnly>(x + (j * kWarp + lane) * kVecNumel<T>);
  }
  // Keeps the arithmetic after the last load; without it only 4 loads are in flight.
  __syncwarp();
  Lane found;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) found.add(vecs[j]);
  return found.result();
}

/// The last tile of a tensor, at an aligned address: whole vectors, half as many at a time as of a
/// full tile, and the elements of the one that the end cuts.
template <typename Lane, bool kReadOnly, typename T>
__device__ __noinline__ typename Lane::Result read_ragged_tile(const T* x, int length, int lane) {
  constexpr int kRows = kLoads / 2;
  const int whole = length / kVecNumel<T>, cut = whole * kVecNumel<T>;
  Lane found;
#pragma unroll 1
  for (int first = 0; first < whole; first += kRows * kWarp) {
    Vec<T> vecs[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int vec = first + j * kWarp + lane;
      if (vec < whole) vecs[j].words = load_words<kReadOnly>(x + vec * kVecNumel<T>);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kRows; ++j) found.add(vecs[j]);
  }
  if (cut == length || whole % kWarp != lane) return found.result();
  Vec<T> last;
#pragma unroll
  for (int k = 0; k + 1 < kVecNumel<T>; ++k) {
    if (cut + k < length) last.items[k] = x[cut + k];
  }
  found.add(last);
  return found.result();
}

/// A tile at any address. Reading aligned vectors and shifting them would take fewer instructions,
/// but spills registers.
template <typename Lane, typename T>
__device__ __noinline__ typename Lane::Result read_elements(const T* x, int length, int lane) {
  Lane found;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int begin = (j * kWarp + lane) * kVecNumel<T>;
    Vec<T> vec;
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) {
      if (begin + k < length) vec.items[k] = x[begin + k];
    }
    found.add(vec);
  }
  return found.result();
}

/// Reads a lane's elements of a tile that begins at `x`, of the `length` that are left of the
/// tensor. `kReadOnly`: this kernel does not write the tile later.
template <typename Lane, bool kReadOnly, typename T>
__device__ typename Lane::Result read_tile(const T* x, int length, int lane) {
  if (reinterpret_cast<uintptr_t>(x) % kVecBytes != 0) return read_elements<Lane>(x, length, lane);
  if (length < kTileNumel<T>) return read_ragged_tile<Lane, kReadOnly>(x, length, lane);
  return read_full_tile<Lane, kReadOnly>(x, lane);
}

/// The tiles that a warp processes: first, first + stride, first + 2 * stride ...
struct WarpTiles {
  int first;
  int stride;
};

// What is done in place is an `Update`: applies(element) tells whether it changes an element, and
// apply(element) makes the change. These are two, because a clamp mostly finds nothing to change:
// one that computed what to write in any case took a fifth longer on halves (measured on an H200).

/// Updates x[begin, end), one element at a time.
template <typename T, typename Update>
__device__ void update_elements(T* x, int begin, int end, int lane, const Update& update) {
#pragma unroll 4
  for (int i = begin + lane; i < end; i += kWarp) {
    T item = x[i];
    if (!update.applies(item)) continue;
    update.apply(item);
    x[i] = item;
  }
}

/// Updates kLoadsInPlace vectors of a lane, of which the first is at `words` and which are kWarp
/// apart. Writes those that change. With `kSome`, only those are there whose number is below
/// `count`.
template <typename T, bool kSome, typename Update>
__device__ void update_vectors(uint4* words, int count, const Update& update) {
  Vec<T> vecs[kLoadsInPlace];
#pragma unroll
  for (int j = 0; j < kLoadsInPlace; ++j) {
    if (!kSome || j * kWarp < count) vecs[j].words = words[j * kWarp];
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kLoadsInPlace; ++j) {
    bool changes = false;
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) changes |= update.applies(vecs[j].items[k]);
    if (!changes || (kSome && j * kWarp >= count)) continue;
#pragma unroll
    for (int k = 0; k < kVecNumel<T>; ++k) update.apply(vecs[j].items[k]);
    words[j * kWarp] = vecs[j].words;
  }
}

/// Updates a warp's tiles of a chunk. No result depends on the lane, so tiles begin at the first
/// aligned address; the elements before it belong to the first tile, and those after the last whole
/// vector to the last tile.
template <typename T, typename Update>
__device__ void update_tiles(T* x, int length, WarpTiles tiles, int lane, const Update& update) {
  const auto address = reinterpret_cast<uintptr_t>(x);
  const int head = static_cast<int>(split_vectors(address, length, sizeof(T), kVecBytes).head);
  if (tiles.first == 0) update_elements(x, 0, head, lane, update);
  x += head;
  length -= head;
  for (int tile = tiles.first * kTileNumel<T>; tile < length;
       tile += tiles.stride * kTileNumel<T>) {
    uint4* words = reinterpret_cast<uint4*>(x + tile) + lane;
    const int whole = (length - tile) / kVecNumel<T>;
    const bool is_full = whole >= kLoads * kWarp;
#pragma unroll 1
    for (int row = 0; row < min(whole, kLoads * kWarp); row += kLoadsInPlace * kWarp) {
      if (is_full) {
        update_vectors<T, false>(words + row, 0, update);
      } else {
        update_vectors<T, true>(words + row, whole - row - lane, update);
      }
    }
    if (!is_full) update_elements(x, tile + whole * kVecNumel<T>, length, lane, update);
  }
}

}  // namespace gradclip::cuda
