// The verbs on a CUDA device, for bindings.cpp. In a build without CUDA no device is usable, so
// none of them is ever called.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>

#include "grad_list.h"

namespace gradclip::bindings::on_cuda {

/// Why kernels cannot run on a device, and whether that is so as long as the process lives.
using Obstacle = std::pair<std::string, bool>;

#ifdef GRADCLIP_EXT_WITH_CUDA

/// Returns what keeps the kernels from a device, or nothing. Asks until the answer lasts.
std::optional<Obstacle> obstacle(c10::DeviceIndex device);

/// Returns the norm, not yet computed, and enqueues the scaling by the coefficient that goes with
/// it. With `error_if_nonfinite` the host waits for the norm; the second value tells that it is not
/// finite and that nothing was scaled.
std::pair<at::Tensor, bool> clip_norm_(const GradList& list, c10::Device device, double norm_type,
                                       bool float64, double max_norm, bool error_if_nonfinite);

/// Returns min(1, max_norm / (total_norm + 1e-6)), not yet computed.
at::Tensor clip_coef(const at::Tensor& total_norm, double max_norm);

/// Returns the norm, not yet computed, as a float or, with `float64`, a double.
at::Tensor norm(const GradList& list, c10::Device device, double norm_type, bool float64);

/// Enqueues the multiplication by a 0-d coefficient, float or double, on the same device.
void scale_(const GradList& list, c10::Device device, const at::Tensor& clip_coef);

/// Enqueues the clamp to [min, max].
void clamp_(const GradList& list, c10::Device device, double min, double max);

#else

inline std::optional<Obstacle> obstacle(c10::DeviceIndex) {
  return Obstacle("built without CUDA kernels", true);
}
inline std::pair<at::Tensor, bool> clip_norm_(const GradList&, c10::Device, double, bool, double,
                                              bool) {
  return {};
}
inline at::Tensor clip_coef(const at::Tensor&, double) { return {}; }
inline at::Tensor norm(const GradList&, c10::Device, double, bool) { return {}; }
inline void scale_(const GradList&, c10::Device, const at::Tensor&) {}
inline void clamp_(const GradList&, c10::Device, double, double) {}

#endif

}  // namespace gradclip::bindings::on_cuda
