// Computes the coefficient that gradients are multiplied by from their norm. Plain C++17 without
// torch; the CPU operations and the CUDA kernels share it.

#pragma once

#include "core/tensor_list.h"

namespace gradclip {

/// The coefficient that stands for +0.0 in place of every element: NaN and inf times 0 are NaN.
constexpr int kZero = -1;

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

/// The coefficient for a limit that nobody has checked: below 0 it acts as 0, and NaN as a NaN
/// norm. It is kZero where the norm or the coefficient is not finite, if `zero_if_nonfinite`.
template <typename T>
GRADCLIP_HOST_DEVICE T clip_coef(T total_norm, double max_norm, bool zero_if_nonfinite) {
  const T coef = max_norm != max_norm ? static_cast<T>(max_norm)
                                      : Rule{max_norm < 0 ? 0 : max_norm}.clip_coef(total_norm);
  const bool is_finite = total_norm - total_norm == 0 && coef == coef;
  return zero_if_nonfinite && !is_finite ? kZero : coef;
}

/// Compares the norm of a unit of a gradient with that of its weight.
struct AdaptiveRule {
  double p;
  double clip_factor;
  double eps;

  /// limit / norm where the norm is not below the limit, clip_factor * max(weight_norm, eps);
  /// else 1. NaN stays NaN.
  GRADCLIP_HOST_DEVICE double clip_coef(double norm, double weight_norm) const {
    const double limit = clip_factor * (weight_norm < eps ? eps : weight_norm);
    return norm < limit ? 1 : limit / (norm < 1e-6 ? 1e-6 : norm);
  }
};

}  // namespace gradclip
