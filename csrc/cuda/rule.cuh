// From norms to coefficients, in the block that completes a norm.

#pragma once

#include "core/rule.h"
#include "launch.h"

namespace gradclip::cuda {

/// Reads a float or a double as a double.
__device__ inline double read_float(const void* values, int64_t index, bool is_float64) {
  return is_float64 ? static_cast<const double*>(values)[index]
                    : static_cast<double>(static_cast<const float*>(values)[index]);
}

/// Returns the coefficient for a norm in the precision of the result.
template <typename T>
__device__ T clip_coef(const Limits& limits, T norm, int64_t tensor) {
  double limit = limits.max_norm;
  if (limits.values != nullptr) {
    limit = read_float(limits.values, tensor * limits.stride, limits.are_float64);
  }
  if (limits.are_weight_norms) {
    const AdaptiveRule rule{2.0, limits.clip_factor, limits.eps};
    return static_cast<T>(rule.clip_coef(norm, limit));
  }
  return gradclip::clip_coef(norm, limit, limits.zero_if_nonfinite);
}

}  // namespace gradclip::cuda
