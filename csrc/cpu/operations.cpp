#include "operations.h"

#include <cstring>

#include "chunks.h"

namespace gradclip::cpu {

namespace {

/// Returns the partial result of every chunk, by index: the only memory that a norm allocates.
template <typename Kernel>
std::vector<double> partials(const TensorList& list, const Threads& threads, const Kernel& kernel) {
  std::vector<double> results(static_cast<size_t>(list.chunks()));
  for_each_chunk(list, Order::kForward, threads, [&](const ChunkData& chunk) {
    results[static_cast<size_t>(chunk.index)] = kernel(chunk);
  });
  return results;
}

}  // namespace

double norm(const TensorList& list, double p, const Threads& threads, const ChunkKernels& kernels) {
  const auto sum = [&](const auto& kernel) {
    double total = 0;
    for (const double partial : partials(list, threads, kernel)) total += partial;
    return total;
  };
  const auto max = [&](const auto& kernel) {
    double largest = 0;
    for (const double partial : partials(list, threads, kernel)) largest = max_of(partial, largest);
    return largest;
  };
  return norm_from(p, list.numel(), list.holds(DType::kFloat64), kernels, sum, max);
}

void scale_chunk(const ChunkData& chunk, double coef, const ChunkKernels& kernels) {
  if (coef < 0) {
    const auto dtype = static_cast<DType>(chunk.dtype);
    std::memset(chunk.data, 0, static_cast<size_t>(chunk.numel * item_size(dtype)));
  } else {
    kernels.scale[chunk.dtype](chunk.data, chunk.numel, coef);
  }
}

void scale(const TensorList& list, double coef, const Threads& threads,
           const ChunkKernels& kernels) {
  for_each_chunk(list, Order::kBackward, threads,
                 [&](const ChunkData& chunk) { scale_chunk(chunk, coef, kernels); });
}

void scale_each(const TensorList& list, const double* coefs, const Threads& threads,
                const ChunkKernels& kernels) {
  for_each_chunk(list, Order::kBackward, threads, [&](const ChunkData& chunk) {
    if (coefs[chunk.tensor] >= 1) return;
    scale_chunk(chunk, coefs[chunk.tensor], kernels);
  });
}

void clamp(const TensorList& list, double min, double max, const Threads& threads,
           const ChunkKernels& kernels) {
  for_each_chunk(list, Order::kForward, threads, [&](const ChunkData& chunk) {
    kernels.clamp[chunk.dtype](chunk.data, chunk.numel, min, max);
  });
}

}  // namespace gradclip::cpu
