// What the binding calls: CUDA kernels on a tensor list, enqueued on a stream of the current
// device.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/rule.h"
#include "core/tensor_list.h"

namespace gradclip::cuda {

/// Bytes of the chunks into which a list for these kernels is to be cut.
constexpr int64_t kChunkBytes = 65536;

/// Where launch_norm finds scratch memory on the device and leaves its results.
struct NormBuffers {
  void* scratch;     // norm_scratch_bytes(list), uninitialised, 16-byte aligned
  void* total_norm;  // one float or, with `float64`, one double
  void* clip_coef;   // the same
  bool float64;
};

int64_t norm_scratch_bytes(const TensorList& list);

/// Tells whether the binary holds code for the current device: cudaSuccess, or why not. Clears the
/// error. The first call on a device loads the kernels.
cudaError_t probe();

/// Enqueues the norm of order `norm_type`, which is positive or inf, and the coefficient that the
/// rule makes of it. The list holds at least one element and no empty tensor. `is_pool_stream`: the
/// stream lives as long as the process, as torch's own do.
cudaError_t launch_norm(const TensorList& list, double norm_type, Rule rule,
                        const NormBuffers& buffers, cudaStream_t stream, bool is_pool_stream);

/// Enqueues the multiplication by a device coefficient, a float or, with `float64`, a double.
cudaError_t launch_scale(const TensorList& list, const void* clip_coef, bool float64,
                         cudaStream_t stream);

/// Enqueues the clamp to [min, max].
cudaError_t launch_clamp(const TensorList& list, double min, double max, cudaStream_t stream);

}  // namespace gradclip::cuda
