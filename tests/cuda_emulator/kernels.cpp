// The CUDA kernels behind a C interface, on the emulator. Called through ctypes by the tests.

// clang-format off
#include "emulator.h"  // first: it defines what nvcc has built in
// clang-format on

#include "cuda/adaptive.cuh"
#include "cuda/clamp.cuh"
#include "cuda/norm.cuh"
#include "cuda/norm_float64.cuh"
#include "cuda/per_tensor_float64.cuh"
#include "cuda/scale.cuh"

using namespace gradclip;
using namespace gradclip::cuda;

namespace {

TensorList make_list(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes) {
  TensorList list(kChunkBytes);
  for (int64_t t = 0; t < tensors; ++t) {
    if (numel[t] > 0) list.add(data[t], numel[t], static_cast<DType>(dtypes[t]));
  }
  return list;
}

/// Runs `kernel(table, is_last)` for every launch of the list. The table is small, so that a short
/// list takes several launches.
template <typename Kernel>
void for_each_launch(const TensorList& list, unsigned blocks, unsigned first_block,
                     Kernel&& kernel) {
  static LaunchTable<16> table;
  for (int64_t first = 0; first < list.size();) {
    first = fill_launch(list, first, table);
    emulator::launch(blocks, first_block, [&] { kernel(table, first == list.size()); });
  }
}

Limits make_limits(double max_norm, const void* values, int are_float64, int stride,
                   int zero_if_nonfinite) {
  Limits limits = {};
  limits.max_norm = max_norm;
  limits.values = values;
  limits.are_float64 = are_float64 != 0;
  limits.stride = stride;
  limits.zero_if_nonfinite = zero_if_nonfinite != 0;
  return limits;
}

}  // namespace

extern "C" {

/// Writes the norm and the coefficient to `results`. `partials` holds two doubles per chunk, which
/// the caller has poisoned. A null `limit` stands for `max_norm`.
void emulated_norm(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                   double norm_type, double max_norm, const void* limit, int limit_is_float64,
                   int zero_if_nonfinite, int is_float64, unsigned blocks, unsigned first_block,
                   double* partials, unsigned* arrivals, void* results) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  NormOutput out = {};
  out.partials = partials;
  out.chunks = list.chunks();
  out.total_norm = results;
  out.clip_coef = static_cast<char*>(results) + (is_float64 ? 8 : 4);
  out.is_float64 = is_float64 != 0;
  out.limits = make_limits(max_norm, limit, limit_is_float64, 0, zero_if_nonfinite);
  const bool has_float32_kernel = norm_type == 1.0 || norm_type == 2.0 || std::isinf(norm_type);
  const bool is_split = has_float32_kernel && list.holds(DType::kFloat64);
  const TensorList float32s = is_split ? list.only(false) : list;
  const TensorList float64s = is_split ? list.only(true) : list;
  NormOutput launch_out = out;
  if (is_split) {
    launch_out.partials += 2 * float64s.chunks();
    out.chunks = float64s.chunks();
    out.float32_partials = launch_out.partials;
    out.float32_chunks = float32s.chunks();
  }
  if (has_float32_kernel) {
    for_each_launch(float32s, blocks, first_block, [&](const auto& table, bool is_last) {
      launch_out.arrivals = is_last && !is_split ? arrivals : nullptr;
      if (norm_type == 2.0) {
        norm_kernel<L2>(table, launch_out);
      } else if (norm_type == 1.0) {
        norm_kernel<L1>(table, launch_out);
      } else {
        norm_kernel<LInf>(table, launch_out);
      }
    });
  }
  if (has_float32_kernel && !is_split) return;
  for_each_launch(float64s, blocks, first_block, [&](const auto& table, bool is_last) {
    launch_out = out;
    launch_out.arrivals = is_last ? arrivals : nullptr;
    norm_float64_kernel(table, launch_out, norm_type);
  });
}

/// Every launch has `runs` runs of chunks, at least as many as blocks. `taken` is 0 before and
/// after, and null for as many as blocks.
void emulated_scale(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                    const void* coefs, int are_float64, int stride, unsigned blocks, unsigned runs,
                    unsigned* taken) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  for_each_launch(list, blocks, 0, [&](const auto& table, bool) {
    scale_kernel(table, Coefficients{coefs, stride, are_float64 != 0}, false, Runs{runs, taken});
  });
}

/// Writes norms, coefficients and statistics where these are not null. `partials` holds four
/// doubles per chunk, which the caller has poisoned; `limits` one limit for each tensor that has
/// elements, or null for `max_norm`.
void emulated_tensors(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                      double norm_type, double max_norm, const void* limits, int limits_are_float64,
                      int stride, int zero_if_nonfinite, int is_float64, unsigned blocks,
                      unsigned first_block, void* partials, unsigned* arrivals, void* norms,
                      void* coefs, double* statistics) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  TensorOutput out = {};
  out.partials = partials;
  out.arrivals = arrivals;
  out.chunks = list.chunks();
  out.tensors = list.size();
  out.norms = norms;
  out.clip_coefs = coefs;
  out.statistics = statistics;
  out.is_float64 = is_float64 != 0;
  out.largest_is_norm = std::isinf(norm_type);
  out.limits = make_limits(max_norm, limits, limits_are_float64, stride, zero_if_nonfinite);
  const bool in_float32 = !list.holds(DType::kFloat64) &&
                          (norm_type == 1.0 || norm_type == 2.0 || std::isinf(norm_type));
  for_each_launch(list, blocks, first_block, [&](const auto& table, bool is_last) {
    TensorOutput launch_out = out;
    launch_out.is_last_launch = is_last;
    if (!in_float32) {
      tensors_float64_kernel(table, launch_out, norm_type);
    } else if (norm_type == 1.0) {
      tensors_kernel<L1, StatisticsPartial>(table, launch_out);
    } else if (statistics != nullptr || out.largest_is_norm) {
      tensors_kernel<L2, StatisticsPartial>(table, launch_out);
    } else {
      tensors_kernel<L2, NormPartial>(table, launch_out);
    }
  });
}

void emulated_clamp(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                    double min, double max, unsigned blocks) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  for_each_launch(list, blocks, 0,
                  [&](const auto& table, bool) { clamp_kernel(table, min, max, false); });
}

int64_t emulated_chunks(int64_t tensors, void* const* data, const int64_t* numel,
                        const int* dtypes) {
  return make_list(tensors, data, numel, dtypes).chunks();
}
}
