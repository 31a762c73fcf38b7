// Adaptive gradient clipping: every unit of a gradient (a slice along dimension 0) is compared with
// the same unit of its weight. Weights and gradients are read once, and a unit is scaled while it
// is in cache.

#include <cmath>

#include "chunks.h"

namespace gradclip::cpu {

namespace {

// A thread takes neighbouring units of so many bytes with one atomic addition.
constexpr int64_t kBytesPerRun = 128 << 10;

Span unit_of(const Span& span, int64_t unit, int64_t length) {
  return {static_cast<char*>(span.data) + unit * length * item_size(span.dtype), length,
          span.dtype};
}

void clip_unit(const Span& grad, const Span& weight, const AdaptiveRule& rule,
               const ChunkKernels& kernels) {
  const double norm = norm_of(grad, rule.p, kernels);
  const double coef = rule.clip_coef(norm, norm_of(weight, rule.p, kernels));
  if (coef == 1) return;
  for_each_chunk(grad, [&](const ChunkData& chunk) { scale_chunk(chunk, coef, kernels); });
}

}  // namespace

void clip_adaptive(const TensorList& grads, const TensorList& weights, const int64_t* units,
                   const AdaptiveRule& rule, const Threads& threads, const ChunkKernels& kernels) {
  // The runs of a tensor, like the chunks of a list: the index of a run tells its tensor.
  std::vector<int64_t> units_per_run, first_run = {0};
  for (int64_t tensor = 0; tensor < grads.size(); ++tensor) {
    const int64_t unit_bytes = grads[tensor].numel / units[tensor] * item_size(grads[tensor].dtype);
    units_per_run.push_back(std::clamp<int64_t>(kBytesPerRun / unit_bytes, 1, units[tensor]));
    first_run.push_back(first_run.back() + chunk_count(units[tensor], units_per_run.back()));
  }
  const int64_t runs = first_run.back();
  const int64_t workers =
      grads.bytes() <= kSerialBytes
          ? 1
          : std::min({threads.max_workers, runs, grads.bytes() / kBytesPerThread});
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (;;) {
      const int64_t run = next.fetch_add(1, std::memory_order_relaxed);
      if (run >= runs) return;
      const int64_t tensor = tensor_of(first_run.data(), grads.size(), run);
      const auto at = static_cast<size_t>(tensor);
      const Chunk part = chunk_of(tensor, run - first_run[at], units[tensor], units_per_run[at]);
      const int64_t length = grads[tensor].numel / units[tensor];
      for (int64_t unit = part.offset; unit < part.offset + part.length; ++unit) {
        clip_unit(unit_of(grads[tensor], unit, length), unit_of(weights[tensor], unit, length),
                  rule, kernels);
      }
    }
  };
  run_on(threads, workers, work);
}

}  // namespace gradclip::cpu
