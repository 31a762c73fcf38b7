#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <vector>

namespace gradclip::cpu {

namespace {

// Beyond that, a thread is worth having for this much memory.
constexpr int64_t kBytesPerThread = 256 << 10;
// Threads take chunks in runs, 1 MiB at most, for one atomic addition each.
constexpr int64_t kMostChunksPerRun = 16;

// ---------------------------------------------------------------- chunks

/// A chunk as its kernel wants it.
struct Piece {
  int64_t index;
  int dtype;
  void* data;
  int64_t numel;
};

/// Calls body(piece) for every chunk, on several threads. Which of them takes which run of chunks
/// is left to chance, so that none waits for a slower one.
template <typename Body>
void for_each_chunk(const TensorList& list, Order order, const Threads& threads, const Body& body) {
  const int64_t chunks = list.chunks();
  if (chunks == 0) return;
  const bool serial = list.bytes() <= kSerialBytes;
  const int64_t workers =
      serial ? 1 : std::min({threads.max_workers, chunks, list.bytes() / kBytesPerThread});
  const int64_t run =
      serial ? chunks : std::clamp<int64_t>(chunks / (8 * workers), 1, kMostChunksPerRun);

  std::atomic<int64_t> next{0};
  auto work = [&] {
    const int64_t* prefix = list.chunk_prefix();
    for (;;) {
      const int64_t taken = next.fetch_add(run, std::memory_order_relaxed);
      if (taken >= chunks) return;
      const int64_t count = std::min(run, chunks - taken);
      // Forwards within a run in either order: the hardware's prefetching starts anew at every
      // chunk that does not follow the one before.
      const int64_t first = order == Order::kForward ? taken : chunks - taken - count;
      int64_t tensor = list.tensor_of(first);
      for (int64_t index = first; index != first + count; ++index) {
        while (index >= prefix[tensor + 1]) ++tensor;
        const Span& grad = list[tensor];
        const Chunk chunk = list.chunk(index, tensor);
        body({index, static_cast<int>(grad.dtype),
              static_cast<char*>(grad.data) + chunk.offset * item_size(grad.dtype), chunk.length});
      }
    }
  };
  if (workers == 1) return work();
  threads.run(workers, [](void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
}

/// The partial of every chunk, by index: the only memory that a norm takes.
template <typename Kernel>
std::vector<double> partials(const TensorList& list, const Threads& threads, const Kernel& kernel) {
  std::vector<double> results(static_cast<size_t>(list.chunks()));
  for_each_chunk(list, Order::kForward, threads, [&](const Piece& piece) {
    results[static_cast<size_t>(piece.index)] = kernel(piece);
  });
  return results;
}

// ---------------------------------------------------------------- finalize

double sum(const std::vector<double>& partials) {
  double total = 0;
  for (const double partial : partials) total += partial;
  return total;
}

/// The largest partial; NaN if there is one.
double max(const std::vector<double>& partials) {
  double most = 0;
  for (const double partial : partials) {
    if (std::isnan(partial)) return partial;
    most = std::max(most, partial);
  }
  return most;
}

double root(double total, double p) {
  return p == 1 ? total : p == 2 ? std::sqrt(total) : std::pow(total, 1 / p);
}

}  // namespace

double norm(const TensorList& list, double p, const Threads& threads, const ChunkKernels& kernels) {
  if (p == 1 || p == 2) {
    const auto& terms = p == 2 ? kernels.sum_squares : kernels.sum_magnitudes;
    const double total = sum(partials(list, threads, [&](const Piece& piece) {
      return terms[piece.dtype](piece.data, piece.numel);
    }));
    // Squares of anything narrower than float64 stay in its range: there, 0 and inf are the truth.
    // A square of a float64 that underflows is below 2^-1022, nothing in a mean of 1e-300.
    const double mean = total / static_cast<double>(list.numel());
    const bool in_range = mean >= 1e-300 && mean <= DBL_MAX;
    if (in_range || std::isnan(total) || !list.holds(DType::kFloat64)) return root(total, p);
  }
  const double largest = max(partials(list, threads, [&](const Piece& piece) {
    return kernels.max_magnitude[piece.dtype](piece.data, piece.numel);
  }));
  if (std::isinf(p) || largest == 0 || !std::isfinite(largest)) return largest;
  // Divided by the largest element, no power overflows, and one is 1. Finding it costs little
  // beside the powers.
  const double total = sum(partials(list, threads, [&](const Piece& piece) {
    return kernels.sum_powers[piece.dtype](piece.data, piece.numel, p, largest);
  }));
  return largest * root(total, p);
}

void scale(const TensorList& list, double coef, const Threads& threads,
           const ChunkKernels& kernels) {
  for_each_chunk(list, Order::kBackward, threads, [&](const Piece& piece) {
    kernels.scale[piece.dtype](piece.data, piece.numel, coef);
  });
}

void clamp(const TensorList& list, double min, double max, const Threads& threads,
           const ChunkKernels& kernels) {
  for_each_chunk(list, Order::kForward, threads, [&](const Piece& piece) {
    kernels.clamp[piece.dtype](piece.data, piece.numel, min, max);
  });
}

}  // namespace gradclip::cpu
