// The CUDA kernels behind a C interface, on the emulator. Called through ctypes by the tests.

// clang-format off
#include "emulator.h"  // first: it defines what nvcc has built in
// clang-format on

#include "cuda/clamp.cuh"
#include "cuda/norm.cuh"
#include "cuda/norm_float64.cuh"
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

}  // namespace

extern "C" {

/// Writes the norm and the coefficient to `results`. `partials` holds two doubles per chunk, which
/// the caller has poisoned.
void emulated_norm(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                   double norm_type, double max_norm, int is_float64, unsigned blocks,
                   unsigned first_block, double* partials, unsigned* arrivals, void* results) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  NormOutput out = {};
  out.partials = partials;
  out.chunks = list.chunks();
  out.total_norm = results;
  out.clip_coef = static_cast<char*>(results) + (is_float64 ? 8 : 4);
  out.is_float64 = is_float64 != 0;
  out.rule = {max_norm};
  const bool in_float32 =
      !is_float64 && (norm_type == 1.0 || norm_type == 2.0 || std::isinf(norm_type));
  for_each_launch(list, blocks, first_block, [&](const auto& table, bool is_last) {
    NormOutput launch_out = out;
    launch_out.arrivals = is_last ? arrivals : nullptr;
    if (!in_float32) {
      norm_float64_kernel(table, launch_out, norm_type);
    } else if (norm_type == 2.0) {
      norm_kernel<L2>(table, launch_out);
    } else if (norm_type == 1.0) {
      norm_kernel<L1>(table, launch_out);
    } else {
      norm_kernel<LInf>(table, launch_out);
    }
  });
}

void emulated_scale(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                    const void* clip_coef, int is_float64, unsigned blocks) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  for_each_launch(list, blocks, 0, [&](const auto& table, bool) {
    scale_kernel(table, clip_coef, is_float64 != 0);
  });
}

void emulated_clamp(int64_t tensors, void* const* data, const int64_t* numel, const int* dtypes,
                    double min, double max, unsigned blocks) {
  const TensorList list = make_list(tensors, data, numel, dtypes);
  for_each_launch(list, blocks, 0, [&](const auto& table, bool) { clamp_kernel(table, min, max); });
}

int64_t emulated_chunks(int64_t tensors, void* const* data, const int64_t* numel,
                        const int* dtypes) {
  return make_list(tensors, data, numel, dtypes).chunks();
}
}
