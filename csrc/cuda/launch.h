// The interface to the CUDA kernels: operations on a tensor list, enqueued on a stream of the
// current device.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/rule.h"
#include "core/tensor_list.h"

namespace gradclip::cuda {

/// The chunk size of the lists that are passed to these functions.
constexpr int64_t kChunkBytes = 65536;

/// The device memory of launch_norm: for intermediate results and for its results.
struct NormBuffers {
  void* scratch;     // norm_scratch_bytes(list), uninitialised, 16-byte aligned
  void* total_norm;  // one float or, with `is_float64`, one double
  void* clip_coef;   // the same
  bool is_float64;
};

int64_t norm_scratch_bytes(const TensorList& list);

/// Returns cudaSuccess if the binary holds code for the current device, else the error, which is
/// cleared. The first call on a device loads the kernels.
cudaError_t probe();

/// Enqueues the norm of order `norm_type`, which is positive or inf, and the coefficient of the
/// rule. The list holds at least one element and no empty tensor. `is_pool_stream`: the stream
/// exists as long as the process, as torch's own streams do.
cudaError_t launch_norm(const TensorList& list, double norm_type, Rule rule,
                        const NormBuffers& buffers, cudaStream_t stream, bool is_pool_stream);

/// Enqueues the multiplication by a coefficient in device memory, a float or, with `is_float64`, a
/// double.
cudaError_t launch_scale(const TensorList& list, const void* clip_coef, bool is_float64,
                         cudaStream_t stream);

/// Enqueues the clamp to [min, max].
cudaError_t launch_clamp(const TensorList& list, double min, double max, cudaStream_t stream);

}  // namespace gradclip::cuda
