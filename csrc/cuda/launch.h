// The interface to the CUDA kernels: operations on a tensor list, enqueued on a stream of the
// current device.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/rule.h"
#include "core/tensor_list.h"

namespace gradclip::cuda {

/// The chunk size of the lists that are passed to these functions. It is not larger for lists over
/// 1 GB, because to add the 245,000 partials of Llama-3-8B takes less than 0.5 % of its norm, and
/// the bits of a tensor's norm would depend on the tensors beside it.
constexpr int64_t kChunkBytes = 65536;

/// What norms are compared with: a number or, unless `values` is null, memory of the device.
struct Limits {
  double max_norm;
  const void* values;  // one float, or double if `are_float64`, or one for each tensor
  int32_t stride;      // 0 or 1
  bool are_float64;
  bool zero_if_nonfinite;
  bool are_weight_norms;  // of adaptive clipping, with the two below
  double clip_factor;
  double eps;

  /// Whether no gradient is to be scaled, not even by NaN. A limit in memory is unknown here.
  GRADCLIP_HOST_DEVICE bool only_report() const {
    return values == nullptr && !zero_if_nonfinite && Rule{max_norm}.only_reports();
  }
};

/// Coefficients in device memory: floats, or doubles if `are_float64`. kZero is one, too.
struct Coefficients {
  const void* values;
  int32_t stride;  // 1 for one for each tensor, 0 for one for all
  bool are_float64;
};

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

/// Enqueues the norm of order `norm_type`, which is positive or inf, and the coefficient for it.
/// The list holds at least one element and no empty tensor. `is_pool_stream`: the stream exists as
/// long as the process, as torch's own streams do.
cudaError_t launch_norm(const TensorList& list, double norm_type, const Limits& limits,
                        const NormBuffers& buffers, cudaStream_t stream, bool is_pool_stream);

/// The device memory of launch_tensors; what is null is not asked for.
struct TensorBuffers {
  void* scratch;       // tensors_scratch_bytes(list), uninitialised, 16-byte aligned
  void* norms;         // one float for each tensor or, with `is_float64`, one double
  void* clip_coefs;    // the same
  double* statistics;  // 1 + 4 * list.size(): the norm of the list, then rows of norms, largest
                       // magnitudes, zeros and non-finite elements of its tensors
  bool is_float64;
};

int64_t tensors_scratch_bytes(const TensorList& list);

/// Enqueues the norm of each tensor, its coefficient, and its statistics, in one pass if the order
/// is 1, 2 or inf and no tensor is float64. The list is as in launch_norm. If coefficients are
/// asked for, the next kernel on the stream has to be launch_scale's.
cudaError_t launch_tensors(const TensorList& list, double norm_type, const Limits& limits,
                           const TensorBuffers& buffers, cudaStream_t stream, bool is_pool_stream);

/// Gradients, weights of the same sizes, and how many units each of them has.
struct AdaptiveLists {
  const TensorList& grads;
  const TensorList& weights;
  const int64_t* units;
};

int64_t adaptive_scratch_bytes(const AdaptiveLists& lists);

/// Enqueues adaptive clipping. `scratch` has adaptive_scratch_bytes(lists), 16-byte aligned.
cudaError_t launch_clip_adaptive(const AdaptiveLists& lists, const AdaptiveRule& rule,
                                 void* scratch, cudaStream_t stream, bool is_pool_stream);

/// Enqueues the multiplication by coefficients. Writes nothing where one is 1 or more, and +0.0
/// where it is kZero. `is_pool_stream` as in launch_norm.
cudaError_t launch_scale(const TensorList& list, const Coefficients& coefs, cudaStream_t stream,
                         bool is_pool_stream);

/// Enqueues the clamp to [min, max].
cudaError_t launch_clamp(const TensorList& list, double min, double max, cudaStream_t stream);

}  // namespace gradclip::cuda
