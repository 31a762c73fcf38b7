// gradclip_ext._C: the one crossing from Python to the kernels. The files of the bindings (this
// one, gradients.h, bindings_cuda.*) are the only ones that include torch.
//
// A function here checks its whole list before it touches the first element. What the kernels do
// not handle is handed back untouched, and the general path in Python takes over: it serves the
// unusual and words the errors.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <pthread.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "bindings_cuda.h"
#include "cpu/verbs.h"
#include "gradients.h"
#include "testing.h"

namespace gradclip::bindings {
namespace {

// ---------------------------------------------------------------- threads and numbers

/// Whether this process was forked: the threads of GNU's OpenMP stayed behind in the parent, and
/// at::parallel_for would wait for them forever.
bool forked = false;

void run_on_new_threads(int64_t workers, void (*work)(void*), void* context) {
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 1; i < workers; ++i) threads.emplace_back(work, context);
  } catch (const std::system_error&) {  // as many as there may be
  }
  work(context);
  for (std::thread& thread : threads) thread.join();
}

void run_on_torch_threads(int64_t workers, void (*work)(void*), void* context) {
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) { work(context); });
}

/// torch's own thread pool. Built without OpenMP, at::parallel_for would run on one thread.
cpu::Threads torch_threads() {
  return {[] { return static_cast<int64_t>(at::get_num_threads()); },
          forked ? run_on_new_threads : run_on_torch_threads};
}

/// A new 0-d tensor on the CPU.
at::Tensor scalar_tensor(double value, bool float64) {
  at::Tensor result(at::detail::empty_cpu({}, float64 ? at::kDouble : at::kFloat));
  if (float64) {
    *result.mutable_data_ptr<double>() = value;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return result;
}

/// min(1, max_norm / (total_norm + 1e-6)) by the operations of clip.py and in the precision of the
/// norm. NaN stays NaN.
template <typename T>
double clip_coef(T total_norm, double max_norm) {
  const T coef = 1 / (total_norm + static_cast<T>(1e-6)) * static_cast<T>(max_norm);
  return coef > 1 ? 1 : coef;
}

double clip_coef(double total_norm, bool float64, double max_norm) {
  if (std::isinf(max_norm)) return 1;  // only report: even a NaN norm must not scale by NaN
  return float64 ? clip_coef<double>(total_norm, max_norm)
                 : clip_coef<float>(static_cast<float>(total_norm), max_norm);
}

/// The same where the norm lives: on a GPU nothing waits for it.
at::Tensor clip_coef(const at::Tensor& total_norm, double max_norm) {
  if (total_norm.is_cuda()) return on_cuda::clip_coef(total_norm, max_norm);
  const bool float64 = total_norm.scalar_type() == at::kDouble;
  return scalar_tensor(clip_coef(total_norm.item<double>(), float64, max_norm), true);
}

/// Tells whether the kernels know the norm of this order. The others are minima or counts.
bool has_kernel(double norm_type) { return norm_type > 0; }

/// Tells whether every gradient can hold a bound.
bool is_representable(const Gradients& gradients, double bound) {
  constexpr std::pair<DType, double> kLargest[] = {
      {DType::kFloat16, 65504.0},
      {DType::kBFloat16, 0x1.fep127},
      {DType::kFloat32, std::numeric_limits<float>::max()},
  };
  for (const auto& [dtype, largest] : kLargest) {
    if (gradients.holds(dtype) && std::isfinite(bound) && std::abs(bound) > largest) return false;
  }
  return true;
}

// ---------------------------------------------------------------- verbs, by device

/// Multiplies on the CPU; writes nothing if the coefficient is 1 or more.
void scale(const GradList& list, double coef) {
  if (!(coef >= 1)) cpu::scale(list, coef, torch_threads());
}

/// Returns the norm and whether the gradients were left alone because it is not finite.
std::pair<at::Tensor, bool> clip_norm_(const Gradients& gradients, double norm_type,
                                       double max_norm, bool error_if_nonfinite) {
  const GradList& list = gradients.list;
  const bool float64 = gradients.holds(DType::kFloat64);
  if (gradients.device.is_cuda()) {
    return on_cuda::clip_norm_(list, gradients.device, norm_type, float64, max_norm,
                               error_if_nonfinite);
  }
  const double norm = cpu::norm(list, norm_type, torch_threads());
  const bool refused =
      error_if_nonfinite && !std::isfinite(float64 ? norm : static_cast<float>(norm));
  if (!refused) scale(list, clip_coef(norm, float64, max_norm));
  return {scalar_tensor(norm, float64), refused};
}

at::Tensor norm_of(const Gradients& gradients, double norm_type, bool float64) {
  const GradList& list = gradients.list;
  if (gradients.device.is_cuda()) return on_cuda::norm(list, gradients.device, norm_type, float64);
  return scalar_tensor(cpu::norm(list, norm_type, torch_threads()), float64);
}

/// Multiplies by a coefficient on the device of the gradients; writes nothing if it is 1 or more.
void scale(const Gradients& gradients, const at::Tensor& clip_coef) {
  if (gradients.device.is_cuda()) {
    return on_cuda::scale_(gradients.list, gradients.device, clip_coef);
  }
  scale(gradients.list, clip_coef.item<double>());
}

void clamp(const Gradients& gradients, double min, double max) {
  if (gradients.device.is_cuda()) {
    return on_cuda::clamp_(gradients.list, gradients.device, min, max);
  }
  cpu::clamp(gradients.list, min, max, torch_threads());
}

// ---------------------------------------------------------------- what Python sees

/// The device types to which a backend asked for by name is limited.
enum class Serves { kAny, kCpu, kCuda };

py::object to_python(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

/// The kernels of one device type or, choosing by where the gradients are, of any.
class Kernels {
 public:
  explicit Kernels(Serves serves) : serves_(serves) {}

  /// Returns the norm and whether it was refused, or None if the call was not for the kernels. With
  /// error_if_nonfinite, a norm that is not finite is refused: nothing has changed.
  py::object clip_grad_norm_(const py::list& parameters, double max_norm, double norm_type,
                             bool error_if_nonfinite) const {
    if (!has_kernel(norm_type)) return py::none();
    auto gradients = take(parameters, Source::kParameters, Access::kWrite);
    if (!gradients) return py::none();
    std::pair<at::Tensor, bool> norm_and_refused;
    {
      const ReleaseGil release(*gradients);
      norm_and_refused = clip_norm_(*gradients, norm_type, max_norm, error_if_nonfinite);
    }
    const auto& [norm, refused] = norm_and_refused;
    if (!refused) gradients->bump_versions();
    return py::make_tuple(to_python(norm), refused);
  }

  /// Returns the norm, or None if the call was not for the kernels.
  py::object get_total_norm(const py::list& tensors, double norm_type) const {
    if (!has_kernel(norm_type)) return py::none();
    auto taken = take(tensors, Source::kTensors, Access::kRead);
    if (!taken) return py::none();
    at::Tensor norm;
    {
      const ReleaseGil release(*taken);
      norm = norm_of(*taken, norm_type, taken->holds(DType::kFloat64));
    }
    return to_python(norm);
  }

  /// Returns whether the call was for the kernels.
  bool clip_grads_with_norm_(const py::list& parameters, double max_norm,
                             const py::object& norm) const {
    if (!THPVariable_CheckExact(norm.ptr())) return false;
    const at::Tensor& total_norm = THPVariable_Unpack(norm.ptr());
    const c10::TensorImpl& impl = *total_norm.unsafeGetTensorImpl();
    if (!is_plain(impl, impl.device_type()) || !kernel_dtype(impl) || total_norm.dim() != 0) {
      return false;
    }
    auto gradients = take(parameters, Source::kParameters, Access::kWrite);
    if (!gradients || gradients->device != total_norm.device()) return false;
    {
      const ReleaseGil release(*gradients);
      if (!std::isinf(max_norm)) scale(*gradients, clip_coef(total_norm, max_norm));
    }
    gradients->bump_versions();
    return true;
  }

  /// Returns whether the call was for the kernels.
  bool clamp_grad_(const py::list& parameters, double min, double max) const {
    auto gradients = take(parameters, Source::kParameters, Access::kWrite);
    if (!gradients || !is_representable(*gradients, min) || !is_representable(*gradients, max)) {
      return false;
    }
    {
      const ReleaseGil release(*gradients);
      clamp(*gradients, min, max);
    }
    gradients->bump_versions();
    return true;
  }

  /// Returns the float64 norm of the tensors that the kernels take, None if they take none, and the
  /// indices of the others.
  py::tuple norm(const py::list& tensors, double norm_type) const {
    auto [taken, left] = take_some(tensors, Access::kRead);
    if (!is_served(taken)) return py::make_tuple(py::none(), all_indices(tensors));
    at::Tensor norm;
    {
      const ReleaseGil release(taken);
      norm = norm_of(taken, norm_type, true);
    }
    return py::make_tuple(to_python(norm), left);
  }

  /// Returns the indices of the tensors that the kernels do not take. The coefficient is 0-d,
  /// float32 or float64, and on the device of the tensors.
  std::vector<int64_t> scale_(const py::list& tensors, const at::Tensor& coef) const {
    return update(tensors, [&](const Gradients& taken) { scale(taken, coef); });
  }

  /// Returns the indices of the tensors that the kernels do not take.
  std::vector<int64_t> clamp_(const py::list& tensors, double min, double max) const {
    return update(tensors, [&](const Gradients& taken) { clamp(taken, min, max); });
  }

 private:
  bool is_served(c10::Device device) const {
    if (device.is_cpu()) return serves_ != Serves::kCuda;
    return device.is_cuda() && serves_ != Serves::kCpu && !on_cuda::obstacle(device.index());
  }

  /// Without any gradient torch's defaults decide on device and dtype, which Python knows; on a GPU
  /// the kernels want one that is not empty.
  bool is_served(const Gradients& gradients) const {
    return !gradients.tensors.empty() && is_served(gradients.device) &&
           (gradients.device.is_cpu() || gradients.list.size() != 0);
  }

  std::optional<Gradients> take(const py::list& listed, Source source, Access access) const {
    const auto serves = [this](c10::Device device) { return is_served(device); };
    auto taken = take_all(listed, source, access, serves);
    return taken && is_served(*taken) ? std::move(taken) : std::nullopt;
  }

  template <typename Verb>
  std::vector<int64_t> update(const py::list& tensors, const Verb& verb) const {
    auto [taken, left] = take_some(tensors, Access::kWrite);
    if (!is_served(taken)) return all_indices(tensors);
    {
      const ReleaseGil release(taken);
      verb(taken);
    }
    taken.bump_versions();
    return left;
  }

  Serves serves_;
};

/// A list for kernels that are not in this module, on any device: what Python would have to ask
/// every tensor for.
class Gathered {
 public:
  explicit Gathered(Gradients gradients) : gradients_(std::move(gradients)) { gradients_.hold(); }

  /// Three columns, of the tensors that are not empty: addresses and numbers of elements as int64,
  /// DTypes as bytes.
  py::bytes columns() const {
    const GradList& list = gradients_.list;
    const size_t count = static_cast<size_t>(list.size());
    std::string packed(17 * count, '\0');
    for (size_t i = 0; i < count; ++i) {
      const Grad& grad = list[static_cast<int64_t>(i)];
      std::memcpy(&packed[8 * i], &grad.data, 8);
      std::memcpy(&packed[8 * (count + i)], &grad.numel, 8);
      packed[16 * count + i] = static_cast<char>(grad.dtype);
    }
    return packed;
  }

  c10::Device device() const { return gradients_.device; }
  /// The DTypes of the list, of the empty tensors, too.
  std::vector<int> dtypes() const {
    std::vector<int> found;
    for (int dtype = 0; dtype < kDTypes; ++dtype) {
      if (gradients_.holds(static_cast<DType>(dtype))) found.push_back(dtype);
    }
    return found;
  }
  void bump_versions() const { gradients_.bump_versions(); }

 private:
  Gradients gradients_;
};

/// Returns the gradients of parameters or the tensors themselves, or None if the list holds
/// anything that compiled kernels would not take, or no element at all, or, with cuda_only, if it
/// begins on another device.
std::optional<Gathered> gather(const py::list& listed, bool parameters, bool write,
                               bool cuda_only) {
  const auto source = parameters ? Source::kParameters : Source::kTensors;
  const auto serves = [&](c10::Device device) { return !cuda_only || device.is_cuda(); };
  auto gradients = take_all(listed, source, write ? Access::kWrite : Access::kRead, serves);
  if (!gradients || gradients->list.size() == 0) return std::nullopt;
  return Gathered(std::move(*gradients));
}

/// Returns an environment variable, or None if it is not set or empty. os.environ takes 20 us for
/// that when its code has left the cache, as between training steps.
const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

}  // namespace
}  // namespace gradclip::bindings

PYBIND11_MODULE(_C, m) {
  namespace bindings = gradclip::bindings;
  using bindings::Gathered;
  using bindings::Kernels;
  m.doc() = "Compiled kernels. Call gradclip_ext's functions instead: these check no arguments.";
  pthread_atfork(nullptr, nullptr, [] { bindings::forked = true; });
  m.attr("CPU_CAPABILITY") = gradclip::cpu::chunk_kernels().isa;
  m.def("cuda_obstacle", &bindings::on_cuda::obstacle);
  py::class_<Kernels>(m, "Kernels")
      .def("clip_grad_norm_", &Kernels::clip_grad_norm_)
      .def("get_total_norm", &Kernels::get_total_norm)
      .def("clip_grads_with_norm_", &Kernels::clip_grads_with_norm_)
      .def("clamp_grad_", &Kernels::clamp_grad_)
      .def("norm", &Kernels::norm)
      .def("scale_", &Kernels::scale_)
      .def("clamp_", &Kernels::clamp_);
  py::class_<Gathered>(m, "Gathered")
      .def("columns", &Gathered::columns)
      .def_property_readonly("device", &Gathered::device)
      .def("dtypes", &Gathered::dtypes)
      .def("bump_versions", &Gathered::bump_versions);
  m.def("gather", &bindings::gather);
  m.def("environment", &bindings::environment);
  m.attr("any_device") = Kernels(bindings::Serves::kAny);
  m.attr("cpu") = Kernels(bindings::Serves::kCpu);
  m.attr("cuda") = Kernels(bindings::Serves::kCuda);
  auto testing =
      m.def_submodule("_testing", "Index arithmetic and kernels, one by one, for tests.");
  gradclip::define_testing(testing);
}
