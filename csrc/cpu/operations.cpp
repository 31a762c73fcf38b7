#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

namespace gradclip::cpu {

namespace {

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
        const Span& grad = list[tensor];
        const Chunk chunk = list.chunk(index, tensor);
        body({index, tensor, static_cast<int>(grad.dtype),
              static_cast<char*>(grad.data) + chunk.offset * item_size(grad.dtype), chunk.length});
      }
    }
  };
  if (workers == 1) return work();
  threads.run(workers, [](void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
}

/// Returns the partial result of every chunk, by index: the only memory that a norm allocates.
template <typename Kernel>
std::vector<double> partials(const TensorList& list, const Threads& threads, const Kernel& kernel) {
  std::vector<double> results(static_cast<size_t>(list.chunks()));
  for_each_chunk(list, Order::kForward, threads, [&](const ChunkData& chunk) {
    results[static_cast<size_t>(chunk.index)] = kernel(chunk);
  });
  return results;
}

// ---------------------------------------------------------------- finalize

double sum(const std::vector<double>& partials) {
  double total = 0;
  for (const double partial : partials) total += partial;
  return total;
}

/// The largest partial; NaN if one is NaN.
double max(const std::vector<double>& partials) {
  double largest = 0;
  for (const double partial : partials) {
    if (std::isnan(partial)) return partial;
    largest = std::max(largest, partial);
  }
  return largest;
}

/// A negative coefficient stands for +0 in place of every element: NaN and inf times 0 are NaN.
void scale_chunk(const ChunkData& chunk, double coef, const ChunkKernels& kernels) {
  if (coef < 0) {
    const auto dtype = static_cast<DType>(chunk.dtype);
    std::memset(chunk.data, 0, static_cast<size_t>(chunk.numel * item_size(dtype)));
  } else {
    kernels.scale[chunk.dtype](chunk.data, chunk.numel, coef);
  }
}

double pth_root(double total, double p) {
  return p == 1 ? total : p == 2 ? std::sqrt(total) : std::pow(total, 1 / p);
}

}  // namespace

double norm(const TensorList& list, double p, const Threads& threads, const ChunkKernels& kernels) {
  if (p == 1 || p == 2) {
    const auto& terms = p == 2 ? kernels.sum_squares : kernels.sum_magnitudes;
    const double total = sum(partials(list, threads, [&](const ChunkData& chunk) {
      return terms[chunk.dtype](chunk.data, chunk.numel);
    }));
    // In float64, squares of elements of the other dtypes neither overflow nor underflow, so that a
    // total of 0 or inf is correct. The square of a float64 element that underflows is below
    // 2^-1022, which is negligible in a mean of 1e-300.
    const double mean = total / static_cast<double>(list.numel());
    const bool in_range = mean >= 1e-300 && mean <= DBL_MAX;
    if (in_range || std::isnan(total) || !list.holds(DType::kFloat64)) return pth_root(total, p);
  }
  const double largest = max(partials(list, threads, [&](const ChunkData& chunk) {
    return kernels.max_magnitude[chunk.dtype](chunk.data, chunk.numel);
  }));
  if (std::isinf(p) || largest == 0 || !std::isfinite(largest)) return largest;
  // Divided by the largest magnitude, no power overflows, and at least one is 1. Finding that
  // magnitude takes little time compared with the powers.
  const double total = sum(partials(list, threads, [&](const ChunkData& chunk) {
    return kernels.sum_powers[chunk.dtype](chunk.data, chunk.numel, p, largest);
  }));
  return largest * pth_root(total, p);
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
