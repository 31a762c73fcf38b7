// The CUDA half of the bindings: streams, memory and error codes.

#include "bindings_cuda.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <map>
#include <mutex>

#include "cpu/verbs.h"
#include "cuda/launch.h"

namespace gradclip::bindings::on_cuda {
namespace {

static_assert(cuda::kChunkBytes == cpu::kChunkBytes, "gradients.h cuts for every device alike");

/// The current stream of the gradients' device, and that device current, for one scope.
struct OnDevice {
  explicit OnDevice(c10::Device device)
      : guard(device), stream(c10::cuda::getCurrentCUDAStream(device.index())) {}

  at::TensorOptions options(at::ScalarType dtype) const {
    return at::TensorOptions().device(stream.device()).dtype(dtype);
  }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
};

/// The counter through which the blocks of a norm find out which of them is the last. Every norm
/// leaves it at zero, so each stream of a device keeps one as long as the process lives: clearing
/// it would be a kernel a step. A graph clears one of its own at each replay, since other work may
/// be under way on the stream that it was captured on.
at::Tensor ticket_of(const OnDevice& on) {
  const auto fresh = [&] { return at::zeros({1}, on.options(at::kInt)); };
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return fresh();
  }
  static std::mutex mutex;
  // Never destroyed: at exit the driver may be gone before the memory.
  static auto& tickets = *new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, at::Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& ticket = tickets[{on.stream.device_index(), on.stream.id()}];
  if (!ticket.defined()) ticket = fresh();
  return ticket;
}

/// A norm and the coefficient that goes with it, both enqueued.
struct Norm {
  at::Tensor total_norm;
  at::Tensor clip_coef;
};

/// Scratch memory goes back to torch's allocator on return, which gives it to later work on the
/// same stream only.
Norm enqueue_norm(const GradList& list, const OnDevice& on, double norm_type, bool float64,
                  double max_norm) {
  const auto dtype = float64 ? at::kDouble : at::kFloat;
  Norm norm{at::empty({}, on.options(dtype)), at::empty({}, on.options(dtype))};
  const at::Tensor partials = at::empty({cuda::norm_partials_bytes(list)}, on.options(at::kByte));
  const at::Tensor ticket = ticket_of(on);
  cuda::NormBuffers buffers{};
  buffers.partials = partials.data_ptr();
  buffers.ticket = static_cast<unsigned*>(ticket.data_ptr());
  buffers.total_norm = norm.total_norm.data_ptr();
  buffers.clip_coef = norm.clip_coef.data_ptr();
  buffers.wide = float64;
  C10_CUDA_CHECK(cuda::launch_norm(list, norm_type, max_norm, buffers, on.stream));
  return norm;
}

}  // namespace

std::optional<std::string> obstacle(c10::DeviceIndex device) {
  static std::mutex mutex;
  static auto& known = *new std::map<c10::DeviceIndex, std::optional<std::string>>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const c10::cuda::CUDAGuard guard(device);
  const cudaError_t error = cuda::probe();
  if (error == cudaSuccess) return known[device] = std::nullopt;
  const std::string reason = cudaGetErrorString(error);
  // Any other error, such as too little memory to load the kernels, may be gone next time.
  const bool lasts =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  return lasts ? known[device] = reason : reason;
}

std::pair<at::Tensor, bool> clip_norm_(const GradList& list, c10::Device device, double norm_type,
                                       bool float64, double max_norm, bool error_if_nonfinite) {
  const OnDevice on(device);
  const Norm norm = enqueue_norm(list, on, norm_type, float64, max_norm);
  if (error_if_nonfinite && !std::isfinite(norm.total_norm.item<double>())) {
    return {norm.total_norm, true};
  }
  // With max_norm = inf, only report: even a NaN norm must not scale by NaN.
  if (!std::isinf(max_norm)) {
    C10_CUDA_CHECK(cuda::launch_scale(list, norm.clip_coef.data_ptr(), float64, on.stream));
  }
  return {norm.total_norm, false};
}

at::Tensor norm(const GradList& list, c10::Device device, double norm_type, bool float64) {
  const OnDevice on(device);
  return enqueue_norm(list, on, norm_type, float64, INFINITY).total_norm;
}

at::Tensor clip_coef(const at::Tensor& total_norm, double max_norm) {
  const at::NoGradGuard no_grad;
  const at::Tensor norm =
      total_norm.scalar_type() == at::kDouble ? total_norm : total_norm.to(at::kFloat);
  return at::clamp_max((norm + 1e-6).reciprocal() * max_norm, 1.0);
}

void scale_(const GradList& list, c10::Device device, const at::Tensor& clip_coef) {
  const bool float64 = clip_coef.scalar_type() == at::kDouble;
  TORCH_CHECK(clip_coef.device() == device && clip_coef.dim() == 0 &&
                  (float64 || clip_coef.scalar_type() == at::kFloat),
              "the coefficient has to be a 0-d float32 or float64 tensor on ", device, ", not ",
              clip_coef.scalar_type(), " of ", clip_coef.dim(), " dimensions on ",
              clip_coef.device());
  const OnDevice on(device);
  C10_CUDA_CHECK(cuda::launch_scale(list, clip_coef.data_ptr(), float64, on.stream));
}

void clamp_(const GradList& list, c10::Device device, double min, double max) {
  const OnDevice on(device);
  C10_CUDA_CHECK(cuda::launch_clamp(list, min, max, on.stream));
}

}  // namespace gradclip::bindings::on_cuda
