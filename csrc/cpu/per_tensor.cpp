// Clipping by the norm of each tensor: every tensor is read, and scaled while it is in cache.

#include <cmath>

#include "chunks.h"

namespace gradclip::cpu {

namespace {

// What a thread clips by itself, with what it then reads again still in its own cache. All threads
// share the chunks of a larger tensor.
constexpr int64_t kOwnBytes = kSerialBytes;
// So many small tensors are taken with one atomic addition.
constexpr int64_t kMaxTensorsPerRun = 32;

int64_t bytes_of(const Span& span) { return span.numel * item_size(span.dtype); }

}  // namespace

void clip_each(const TensorList& list, double p, const EachRule& rule, const Threads& threads,
               double* norms, const ChunkKernels& kernels) {
  std::vector<int64_t> small;
  int64_t small_bytes = 0;
  for (int64_t tensor = 0; tensor < list.size(); ++tensor) {
    const Span& span = list[tensor];
    if (bytes_of(span) <= kOwnBytes) {
      small.push_back(tensor);
      small_bytes += bytes_of(span);
      continue;
    }
    TensorList alone(kChunkBytes);
    alone.add(span.data, span.numel, span.dtype);
    norms[tensor] = rule.rounded(norm(alone, p, threads, kernels));
    const double coef = rule.clip_coef(norms[tensor], tensor);
    if (!(coef >= 1)) scale(alone, coef, threads, kernels);
  }

  const auto count = static_cast<int64_t>(small.size());
  const int64_t workers =
      small_bytes <= kSerialBytes
          ? 1
          : std::min({threads.max_workers, count, small_bytes / kBytesPerThread});
  const int64_t run = std::clamp<int64_t>(count / (8 * workers), 1, kMaxTensorsPerRun);
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (;;) {
      const int64_t first = next.fetch_add(run, std::memory_order_relaxed);
      if (first >= count) return;
      for (int64_t i = first; i < std::min(first + run, count); ++i) {
        const int64_t tensor = small[static_cast<size_t>(i)];
        norms[tensor] = rule.rounded(norm_of(list[tensor], p, kernels));
        const double coef = rule.clip_coef(norms[tensor], tensor);
        if (coef >= 1) continue;
        for_each_chunk(list[tensor],
                       [&](const ChunkData& chunk) { scale_chunk(chunk, coef, kernels); });
      }
    }
  };
  run_on(threads, workers, work);
}

}  // namespace gradclip::cpu
