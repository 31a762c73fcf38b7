// What the binding calls: CUDA kernels over a grad list, enqueued on a stream. No torch here.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "grad_list.h"

namespace gradclip::cuda {

/// Bytes of the chunks into which a list for these kernels is to be cut.
constexpr int64_t kChunkBytes = 65536;

/// Where launch_norm finds scratch memory on the device and leaves its results.
struct NormBuffers {
  void* partials;    // norm_partials_bytes(list), uninitialised
  unsigned* ticket;  // zero, and zero again when the norm is done; not shared between streams
  void* total_norm;  // one float or, with `wide`, one double
  void* clip_coef;   // the same
  bool wide;
};

int64_t norm_partials_bytes(const GradList& list);

/// Tells whether the binary holds code for the current device: cudaSuccess, or why not. Clears the
/// error.
cudaError_t probe();

/// Counters that are zero, as NormBuffers wants one, on every device.
constexpr int kTickets = 1024;
cudaError_t find_ticket(int slot, unsigned** ticket);

/// Enqueues the norm of order `norm_type`, which is positive or inf, and the coefficient
/// min(1, max_norm / (total_norm + 1e-6)). The list holds at least one element and no empty tensor.
cudaError_t launch_norm(const GradList& list, double norm_type, double max_norm,
                        const NormBuffers& buffers, cudaStream_t stream);

/// Enqueues the multiplication by a device coefficient, a float or, with `wide`, a double.
cudaError_t launch_scale(const GradList& list, const void* clip_coef, bool wide,
                         cudaStream_t stream);

/// Enqueues the clamp to [min, max].
cudaError_t launch_clamp(const GradList& list, double min, double max, cudaStream_t stream);

}  // namespace gradclip::cuda
