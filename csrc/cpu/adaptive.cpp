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

/// The norm of one of short units, of which `sum` is the sum of squares.
double norm_of_short(const Span& span, int64_t unit, int64_t length, double sum,
                     const ChunkKernels& kernels) {
  return tells_norm(sum, length, span.dtype == DType::kFloat64)
             ? std::sqrt(sum)
             : norm_of(unit_of(span, unit, length), 2, kernels);
}

/// Clips short units by norms of order 2. One at a time, each would cost two calls of kernels and
/// sums over vectors of which most lanes are empty.
void clip_short_units(const Span& grad, const Span& weight, int64_t first, int64_t count,
                      int64_t length, const AdaptiveRule& rule, const ChunkKernels& kernels) {
  double sums[kUnitsTogether], weight_sums[kUnitsTogether], coefs[kUnitsTogether];
  const Span grads = unit_of(grad, first, length), weights = unit_of(weight, first, length);
  kernels.unit_sums[static_cast<int>(grad.dtype)](grads.data, count, length, sums);
  kernels.unit_sums[static_cast<int>(weight.dtype)](weights.data, count, length, weight_sums);
  bool all_kept = true;
  for (int64_t unit = 0; unit < count; ++unit) {
    coefs[unit] = rule.clip_coef(norm_of_short(grads, unit, length, sums[unit], kernels),
                                 norm_of_short(weights, unit, length, weight_sums[unit], kernels));
    all_kept &= coefs[unit] == 1;
  }
  if (all_kept) return;
  kernels.scale_units[static_cast<int>(grad.dtype)](grads.data, count, length, coefs);
}

void clip_units(const Span& grad, const Span& weight, int64_t first, int64_t count, int64_t length,
                const AdaptiveRule& rule, const ChunkKernels& kernels) {
  const int64_t end = first + count;
  if (length <= kShortUnit && rule.p == 2) {
    for (; first < end; first += kUnitsTogether) {
      const int64_t together = std::min(kUnitsTogether, end - first);
      clip_short_units(grad, weight, first, together, length, rule, kernels);
    }
    return;
  }
  for (; first < end; ++first) {
    clip_unit(unit_of(grad, first, length), unit_of(weight, first, length), rule, kernels);
  }
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
      clip_units(grads[tensor], weights[tensor], part.offset, part.length, length, rule, kernels);
    }
  };
  run_on(threads, workers, work);
}

}  // namespace gradclip::cpu
