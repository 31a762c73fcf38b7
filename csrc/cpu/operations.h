// The three operations on a list of tensors on the CPU: norm, scale, clamp.

#pragma once

#include <cstdint>

#include "chunk_kernels.h"
#include "core/tensor_list.h"

namespace gradclip::cpu {

// What the list of a call to these functions must be cut into. A chunk is small enough to be still
// in a core's own cache when it has to be read again, and 3 us of work, some 200 times what it
// takes to start one.
constexpr int64_t kChunkBytes = 64 << 10;

// Lists up to this size stay on the calling thread: 50 us of work, where waking another thread
// takes 5 us, or milliseconds when every core is busy.
constexpr int64_t kSerialBytes = 1 << 20;

/// Where an operation gets its threads. The binding builds this on torch's thread pool.
struct Threads {
  /// How many threads may run at once. Not read for lists that one thread takes.
  int64_t max_workers;
  /// Calls work(context) on up to `workers` threads, this one included, and returns when every
  /// call has returned. At least one call must happen; all take their share from one counter.
  void (*run)(int64_t workers, void (*work)(void* context), void* context);
};

/// Returns the norm of order p of all elements as one vector, p > 0 or inf. Within 1e-6 of the
/// true one, finite whenever that is representable as a double; NaN if an element is. The bits
/// depend on the values, sizes and dtypes alone, not on threads or addresses.
double norm(const TensorList& list, double p, const Threads& threads,
            const ChunkKernels& kernels = chunk_kernels());

/// Multiplies every element by `coef` in float32 arithmetic (float64 for float64), last ones
/// first: those are what a norm just left in cache. No element may be listed twice.
void scale(const TensorList& list, double coef, const Threads& threads,
           const ChunkKernels& kernels = chunk_kernels());

/// Clamps every element to [min, max], rounded to its dtype, and writes only where that changes
/// something. NaN stays NaN. No element may be listed twice.
void clamp(const TensorList& list, double min, double max, const Threads& threads,
           const ChunkKernels& kernels = chunk_kernels());

}  // namespace gradclip::cpu
