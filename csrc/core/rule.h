// Computes the coefficient that gradients are multiplied by from their norm. Plain C++17 without
// torch; the CPU operations and the CUDA kernels share it.

#pragma once

#include "core/tensor_list.h"

namespace gradclip {

/// The threshold of one call. gradclip_ext/norms.py has the same rule in torch operations.
struct Rule {
  double max_norm;

  /// Whether max_norm is inf or NaN: the call reports the norm and must not scale, not even by NaN.
  GRADCLIP_HOST_DEVICE bool only_reports() const { return max_norm - max_norm != 0; }

  /// min(1, max_norm / (total_norm + 1e-6)) in the precision of the norm and in torch's order of
  /// operations, reciprocal first: a true division differs by one unit in the last place for a
  /// quarter of the inputs. NaN stays NaN.
  template <typename T>
  GRADCLIP_HOST_DEVICE T clip_coef(T total_norm) const {
    if (only_reports()) return 1;
    const T coef = 1 / (total_norm + static_cast<T>(1e-6)) * static_cast<T>(max_norm);
    return coef > 1 ? 1 : coef;
  }
};

}  // namespace gradclip
