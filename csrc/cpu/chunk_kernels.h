// The kernels, each on one chunk of one dtype, compiled once per instruction set.

#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_list.h"

namespace gradclip::cpu {

/// What get_grad_stats asks of a chunk.
struct ChunkStatistics {
  double sum_squares;
  double largest;  // the largest |x|; NaN if an element is NaN
  int64_t zeros;
  int64_t nonfinite;
};

// A unit, a slice of a tensor, is short up to so many elements, and so many of them are processed
// together: enough that a call costs little, and few enough that they stay in the first cache.
constexpr int64_t kShortUnit = 32;
constexpr int64_t kUnitsTogether = 64;

/// The kernels of one instruction set. Each works on one chunk of up to 64 KiB.
struct ChunkKernels {
  /// Name of the instruction set, for reports.
  const char* isa;

  // One entry per DType. `data` is aligned to its elements; no memory beyond `numel` elements is
  // accessed; the result depends on the values alone, not on the address.
  double (*sum_squares[kDTypes])(const void* data, int64_t numel);
  double (*sum_magnitudes[kDTypes])(const void* data, int64_t numel);
  /// The largest |x|; NaN if an element is NaN.
  double (*max_magnitude[kDTypes])(const void* data, int64_t numel);
  /// The sum of |x / pivot|^p in float64, for p > 0 and a finite pivot > 0.
  double (*sum_powers[kDTypes])(const void* data, int64_t numel, double p, double pivot);
  /// All of these in one pass; the sum has the bits of sum_squares.
  void (*statistics[kDTypes])(const void* data, int64_t numel, ChunkStatistics* out);
  /// x *= coef, computed in float32 (float64 for float64) and rounded once.
  void (*scale[kDTypes])(void* data, int64_t numel, double coef);
  /// The sums of squares of short units that lie one after the other, in float64.
  void (*unit_sums[kDTypes])(const void* data, int64_t units, int64_t length, double* sums);
  /// Scales short units, each by its own coefficient. One of 1 leaves the bits as they are.
  void (*scale_units[kDTypes])(void* data, int64_t units, int64_t length, const double* coefs);
  /// Clamps to [min, max], both rounded to the dtype; NaN stays NaN. Writes only rows that change.
  void (*clamp[kDTypes])(void* data, int64_t numel, double min, double max);
};

/// Returns the kernels of every instruction set that this processor has, best last.
const std::vector<const ChunkKernels*>& usable_chunk_kernels();

/// Returns the best of them.
inline const ChunkKernels& chunk_kernels() { return *usable_chunk_kernels().back(); }

namespace baseline {
extern const ChunkKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const ChunkKernels kKernels;
}
namespace avx512 {
extern const ChunkKernels kKernels;
}
#endif

}  // namespace gradclip::cpu
