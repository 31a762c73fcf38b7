// From a list of tensors to kernels on its chunks, on one thread or several, and the norm that
// their results add up to.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <vector>

#include "operations.h"

namespace gradclip::cpu {

// Longer lists get one thread for each so many bytes.
constexpr int64_t kBytesPerThread = 256 << 10;
// A thread takes several consecutive chunks, 1 MiB at most, with one atomic addition.
constexpr int64_t kMaxChunksPerRun = 16;

// ---------------------------------------------------------------- chunks

/// The arguments of a kernel for one chunk.
struct ChunkData {
  int64_t index;
  int64_t tensor;
  int dtype;
  void* data;
  int64_t numel;
};

/// Chunk number `index` of a list, which is part of a tensor of that list.
inline ChunkData chunk_data(const Span& span, int64_t index, const Chunk& chunk) {
  return {index, chunk.tensor, static_cast<int>(span.dtype),
          static_cast<char*>(span.data) + chunk.offset * item_size(span.dtype), chunk.length};
}

/// Calls `work` on up to `workers` threads.
template <typename Work>
void run_on(const Threads& threads, int64_t workers, Work& work) {
  if (workers <= 1) return work();
  threads.run(workers, [](void* context) { (*static_cast<Work*>(context))(); }, &work);
}

/// Calls body(chunk) for every chunk, on several threads. Each thread takes the next chunks when it
/// is done with its last ones, so that no thread waits for a slower one.
template <typename Body>
void for_each_chunk(const TensorList& list, Order order, const Threads& threads, const Body& body) {
  const int64_t chunks = list.chunks();
  if (chunks == 0) return;
  const bool serial = list.bytes() <= kSerialBytes;
  const int64_t workers =
      serial ? 1 : std::min({threads.max_workers, chunks, list.bytes() / kBytesPerThread});
  const int64_t run =
      serial ? chunks : std::clamp<int64_t>(chunks / (8 * workers), 1, kMaxChunksPerRun);

  std::atomic<int64_t> next{0};
  auto work = [&] {
    const int64_t* prefix = list.chunk_prefix();
    for (;;) {
      const int64_t taken = next.fetch_add(run, std::memory_order_relaxed);
      if (taken >= chunks) return;
      const int64_t count = std::min(run, chunks - taken);
      // The chunks of a run are processed forwards in both orders: the hardware prefetcher starts
      // again at every chunk that does not follow the previous one in memory.
      const int64_t first = order == Order::kForward ? taken : chunks - taken - count;
      int64_t tensor = list.tensor_of(first);
      for (int64_t index = first; index != first + count; ++index) {
        while (index >= prefix[tensor + 1]) ++tensor;
        body(chunk_data(list[tensor], index, list.chunk(index, tensor)));
      }
    }
  };
  run_on(threads, workers, work);
}

/// Calls body(chunk) for every chunk of one tensor, on this thread.
template <typename Body>
void for_each_chunk(const Span& span, const Body& body) {
  const int64_t full = chunk_numel(span.dtype, kChunkBytes);
  const int64_t chunks = chunk_count(span.numel, full);
  for (int64_t index = 0; index < chunks; ++index) {
    body(chunk_data(span, index, chunk_of(0, index, span.numel, full)));
  }
}

/// A negative coefficient stands for +0 in place of every element: NaN and inf times 0 are NaN.
void scale_chunk(const ChunkData& chunk, double coef, const ChunkKernels& kernels);

// ---------------------------------------------------------------- norms

/// The larger one; NaN if one is NaN.
inline double max_of(double a, double b) { return std::isnan(a) || a > b ? a : b; }

inline double pth_root(double total, double p) {
  return p == 1 ? total : p == 2 ? std::sqrt(total) : std::pow(total, 1 / p);
}

/// Tells whether the sum of `numel` magnitudes or squares tells their norm. In float64, squares of
/// elements of the other dtypes neither overflow nor underflow, so that a total of 0 or inf is
/// correct. The square of a float64 element that underflows is below 2^-1022, which is negligible
/// in a mean of 1e-300.
inline bool tells_norm(double total, int64_t numel, bool has_float64) {
  const double mean = total / static_cast<double>(numel);
  return !has_float64 || std::isnan(total) || (mean >= 1e-300 && mean <= DBL_MAX);
}

/// The norm of `numel` elements, of which some are float64 or none, from reductions over their
/// chunks: sum(kernel) adds the kernel's results in the order of the chunks, max(kernel) returns
/// the largest.
template <typename Sum, typename Max>
double norm_from(double p, int64_t numel, bool has_float64, const ChunkKernels& kernels,
                 const Sum& sum, const Max& max) {
  if (p == 1 || p == 2) {
    const auto& terms = p == 2 ? kernels.sum_squares : kernels.sum_magnitudes;
    const double total =
        sum([&](const ChunkData& chunk) { return terms[chunk.dtype](chunk.data, chunk.numel); });
    if (tells_norm(total, numel, has_float64)) return pth_root(total, p);
  }
  const double largest = max([&](const ChunkData& chunk) {
    return kernels.max_magnitude[chunk.dtype](chunk.data, chunk.numel);
  });
  if (std::isinf(p) || largest == 0 || !std::isfinite(largest)) return largest;
  // Divided by the largest magnitude, no power overflows, and at least one is 1. Finding that
  // magnitude takes little time compared with the powers.
  const double total = sum([&](const ChunkData& chunk) {
    return kernels.sum_powers[chunk.dtype](chunk.data, chunk.numel, p, largest);
  });
  return largest * pth_root(total, p);
}

/// The norm of one tensor, computed by this thread; the bits are those of norm() of that tensor.
inline double norm_of(const Span& span, double p, const ChunkKernels& kernels) {
  const auto sum = [&](const auto& kernel) {
    double total = 0;
    for_each_chunk(span, [&](const ChunkData& chunk) { total += kernel(chunk); });
    return total;
  };
  const auto max = [&](const auto& kernel) {
    double largest = 0;
    for_each_chunk(span, [&](const ChunkData& chunk) { largest = max_of(kernel(chunk), largest); });
    return largest;
  };
  return norm_from(p, span.numel, span.dtype == DType::kFloat64, kernels, sum, max);
}

}  // namespace gradclip::cpu
