// The CUDA half of the bindings: streams, memory and error codes.

#include "bindings_cuda.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cuda/EmptyTensor.h>
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

  /// Not by at::empty, which torch.use_deterministic_algorithms lets fill what it returns.
  at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype) const {
    return at::detail::empty_cuda(size, at::TensorOptions().device(stream.device()).dtype(dtype));
  }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
};

/// The counter through which the blocks of a norm find out which of them is the last. Every norm
/// leaves it at zero, so each stream of a device keeps one as long as the process lives: clearing
/// it would be a kernel a step. A graph gets one of its own, which each replay clears, since other
/// work may be under way on the stream that it was captured on. So do calls on streams beyond the
/// thousandth, and on those that are not torch's: one may end with work still to do, and another
/// come by its handle.
class Ticket {
 public:
  explicit Ticket(const OnDevice& on) {
    const bool captured =
        c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    if (!captured && is_of_torch(on.stream)) counter_ = kept_by(on.stream);
    if (counter_ != nullptr) return;
    memory_ = on.empty({1}, at::kInt);
    counter_ = static_cast<unsigned*>(memory_.data_ptr());
    C10_CUDA_CHECK(cudaMemsetAsync(counter_, 0, sizeof *counter_, on.stream));
  }

  unsigned* counter() const { return counter_; }

 private:
  /// The id of an external stream is its handle; the default stream's are both 0.
  static bool is_of_torch(const c10::cuda::CUDAStream& stream) {
    return stream.id() == 0 || stream.id() != reinterpret_cast<c10::StreamId>(stream.stream());
  }

  static unsigned* kept_by(const c10::cuda::CUDAStream& stream) {
    static std::mutex mutex;
    static std::map<std::pair<c10::DeviceIndex, c10::StreamId>, unsigned*> counters;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [entry, is_new] =
        counters.try_emplace({stream.device_index(), stream.id()}, nullptr);
    const int slot = static_cast<int>(counters.size()) - 1;
    if (is_new && slot < cuda::kTickets) {
      C10_CUDA_CHECK(cuda::find_ticket(slot, &entry->second));
    }
    return entry->second;
  }

  unsigned* counter_ = nullptr;
  at::Tensor memory_;
};

/// A norm and the coefficient that goes with it, both enqueued.
struct Norm {
  at::Tensor total_norm;
  const void* clip_coef;
  at::Tensor scratch;  // holds the coefficient
};

/// Scratch memory goes back to torch's allocator with the last reference, which gives it to later
/// work on the same stream only.
Norm enqueue_norm(const GradList& list, const OnDevice& on, double norm_type, bool float64,
                  double max_norm) {
  constexpr int64_t kCoefBytes = 16;  // keeps the partials behind it aligned
  Norm norm;
  norm.total_norm = on.empty({}, float64 ? at::kDouble : at::kFloat);
  norm.scratch = on.empty({kCoefBytes + cuda::norm_partials_bytes(list)}, at::kByte);
  auto* scratch = static_cast<char*>(norm.scratch.data_ptr());
  norm.clip_coef = scratch;
  const Ticket ticket(on);
  cuda::NormBuffers buffers{};
  buffers.partials = scratch + kCoefBytes;
  buffers.ticket = ticket.counter();
  buffers.total_norm = norm.total_norm.data_ptr();
  buffers.clip_coef = scratch;
  buffers.wide = float64;
  C10_CUDA_CHECK(cuda::launch_norm(list, norm_type, max_norm, buffers, on.stream));
  return norm;
}

/// What will not change while the process lives, unlike too little memory to load the kernels.
bool lasts(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

}  // namespace

std::optional<Obstacle> obstacle(c10::DeviceIndex device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, std::optional<Obstacle>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  try {
    const c10::cuda::CUDAGuard guard(device);
    // Loading kernels is not for a stream that is being captured, and need not break its capture.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t error = cuda::probe();
    if (error == cudaSuccess) return known[device] = std::nullopt;
    const Obstacle reason(cudaGetErrorString(error), lasts(error));
    return reason.second ? known[device] = reason : reason;
  } catch (const c10::Error& error) {
    return Obstacle(error.what_without_backtrace(), false);
  }
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
    C10_CUDA_CHECK(cuda::launch_scale(list, norm.clip_coef, float64, on.stream));
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
