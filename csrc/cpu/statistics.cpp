// The statistics of each tensor, from one read of the list.

#include <cmath>

#include "chunks.h"

namespace gradclip::cpu {

namespace {

struct Partial {
  ChunkStatistics of_chunk;
  double power_sum;  // of order p
};

/// The norm of tensors whose power sum is known, where that did not leave the range of float64.
bool is_norm_known(double power_sum, int64_t numel, double p) {
  return (p == 1 || p == 2) && tells_norm(power_sum, numel, true);
}

/// Whether the largest magnitude alone does not tell the norm.
bool is_ordinary(double largest) { return largest > 0 && largest <= DBL_MAX; }

double norm_alone(const Span& span, double p, const Threads& threads, const ChunkKernels& kernels) {
  TensorList alone(kChunkBytes);
  alone.add(span.data, span.numel, span.dtype);
  return norm(alone, p, threads, kernels);
}

}  // namespace

double statistics(const TensorList& list, double p, const Threads& threads, TensorStatistics* out,
                  const ChunkKernels& kernels) {
  std::vector<Partial> partials(static_cast<size_t>(list.chunks()));
  for_each_chunk(list, Order::kForward, threads, [&](const ChunkData& chunk) {
    Partial& partial = partials[static_cast<size_t>(chunk.index)];
    kernels.statistics[chunk.dtype](chunk.data, chunk.numel, &partial.of_chunk);
    // Of another order than 2, the sum reads the chunk again, from cache.
    partial.power_sum = p == 1 ? kernels.sum_magnitudes[chunk.dtype](chunk.data, chunk.numel)
                               : partial.of_chunk.sum_squares;
  });

  double total = 0, largest = 0;
  for (int64_t tensor = 0; tensor < list.size(); ++tensor) {
    TensorStatistics& found = out[tensor] = {};
    double power_sum = 0;
    for (int64_t i = list.chunk_prefix()[tensor]; i < list.chunk_prefix()[tensor + 1]; ++i) {
      const Partial& partial = partials[static_cast<size_t>(i)];
      power_sum += partial.power_sum;
      total += partial.power_sum;
      found.largest = max_of(partial.of_chunk.largest, found.largest);
      found.zeros += static_cast<double>(partial.of_chunk.zeros);
      found.nonfinite += static_cast<double>(partial.of_chunk.nonfinite);
    }
    largest = max_of(found.largest, largest);
    found.norm = std::isinf(p) || !is_ordinary(found.largest) ? found.largest
                 : is_norm_known(power_sum, list[tensor].numel, p)
                     ? pth_root(power_sum, p)
                     : norm_alone(list[tensor], p, threads, kernels);
  }
  if (std::isinf(p) || !is_ordinary(largest)) return largest;
  return is_norm_known(total, list.numel(), p) ? pth_root(total, p)
                                               : norm(list, p, threads, kernels);
}

}  // namespace gradclip::cpu
