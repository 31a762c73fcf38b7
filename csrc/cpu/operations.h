// The operations on a list of tensors on the CPU.

#pragma once

#include <cstdint>

#include "chunk_kernels.h"
#include "core/rule.h"
#include "core/tensor_list.h"

namespace gradclip::cpu {

// The chunk size of the lists that are passed to these functions. A chunk is small enough to be
// still in a core's own cache when it has to be read again, and takes 3 us, some 200 times as long
// as starting it.
constexpr int64_t kChunkBytes = 64 << 10;

// Lists up to this size are processed by the calling thread alone. They take 50 us; waking another
// thread takes 5 us, or milliseconds when every core is busy.
constexpr int64_t kSerialBytes = 1 << 20;

/// The threads of an operation. The Python binding implements this with torch's thread pool.
struct Threads {
  /// How many threads may run at once. Not used for lists up to kSerialBytes.
  int64_t max_workers;
  /// Calls work(context) on up to `workers` threads, the calling one included, and returns when
  /// every call has returned. One call is enough: the calls divide the chunks among themselves.
  void (*run)(int64_t workers, void (*work)(void* context), void* context);
};

/// Returns the norm of order p > 0 or inf of all elements as one vector. Its relative error is
/// below 1e-6. It is finite whenever the exact norm is representable as a double, and NaN if an
/// element is NaN. The bits depend on the values, sizes and dtypes alone, not on threads or
/// addresses.
double norm(const TensorList& list, double p, const Threads& threads,
            const ChunkKernels& kernels = chunk_kernels());

/// Multiplies every element by `coef` in float32 arithmetic (float64 for float64), or writes +0 if
/// it is negative. Begins with the last chunks, which a preceding norm left in cache. No element
/// may be listed twice.
void scale(const TensorList& list, double coef, const Threads& threads,
           const ChunkKernels& kernels = chunk_kernels());

/// The same with a coefficient for each tensor. Writes nothing where it is 1 or more.
void scale_each(const TensorList& list, const double* coefs, const Threads& threads,
                const ChunkKernels& kernels = chunk_kernels());

/// What the norm of each tensor is compared with.
struct EachRule {
  const double* max_norms;  // of the tensors, or of all of them
  int64_t stride;           // 1 or 0
  bool is_float64;          // the dtype of the norms: float64 or float32
  bool zero_if_nonfinite;

  /// The norm as the caller gets it; one beyond float32 is inf.
  double rounded(double norm) const {
    return is_float64 ? norm : static_cast<double>(static_cast<float>(norm));
  }
  /// The coefficient for a rounded norm.
  double clip_coef(double norm, int64_t tensor) const {
    const double max_norm = max_norms[tensor * stride];
    return is_float64 ? gradclip::clip_coef(norm, max_norm, zero_if_nonfinite)
                      : gradclip::clip_coef(static_cast<float>(norm), max_norm, zero_if_nonfinite);
  }
};

/// Clips each tensor by its own norm, which it writes to `norms`. The bits are those of norm() and
/// scale() of that tensor alone. No element may be listed twice, unless every limit is inf.
void clip_each(const TensorList& list, double p, const EachRule& rule, const Threads& threads,
               double* norms, const ChunkKernels& kernels = chunk_kernels());

/// What is known of one tensor. Counts are exact as doubles.
struct TensorStatistics {
  double norm;
  double largest;  // the largest |x|; NaN if an element is NaN
  double zeros;
  double nonfinite;
};

/// Writes the statistics of each tensor, with the norm of order p, and returns the norm of all
/// elements; both norms are those of norm(). Reads the list once for the orders 1, 2 and inf,
/// unless a sum of float64 elements leaves the range, and five times for others.
double statistics(const TensorList& list, double p, const Threads& threads, TensorStatistics* out,
                  const ChunkKernels& kernels = chunk_kernels());

/// Clips each unit of each gradient. A tensor has `units` of them, which lie one after the other;
/// the lists are of equal lengths, the tensors of equal sizes. No element may be listed twice among
/// the gradients.
void clip_adaptive(const TensorList& grads, const TensorList& weights, const int64_t* units,
                   const AdaptiveRule& rule, const Threads& threads,
                   const ChunkKernels& kernels = chunk_kernels());

/// Clamps every element to [min, max], both rounded to its dtype, and writes only rows that change.
/// NaN stays NaN. No element may be listed twice.
void clamp(const TensorList& list, double min, double max, const Threads& threads,
           const ChunkKernels& kernels = chunk_kernels());

}  // namespace gradclip::cpu
