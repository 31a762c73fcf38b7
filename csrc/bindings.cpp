// gradclip_ext._C: the one crossing from Python to the kernels, and the only file that includes
// torch.
//
// A function here checks its whole list before it touches the first element. What the kernels do
// not handle is handed back untouched, and the general path in Python takes over: it serves the
// unusual and words the errors.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/verbs.h"
#include "grad_list.h"
#include "testing.h"

namespace {

using gradclip::DType;
namespace cpu = gradclip::cpu;

// ---------------------------------------------------------------- what the kernels take

/// Tells whether `keys` are among `allowed`. (Their operator- keeps the bits of devices.)
bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

/// Tells whether something in this thread (a dispatch mode, functorch, a tracer) follows the
/// operations that torch runs: the kernels would escape it.
bool operations_are_followed() {
  constexpr auto ordinary = c10::default_included_set | c10::autocast_dispatch_keyset;
  return !within(c10::impl::tls_local_dispatch_key_set().included_, ordinary);
}

/// Tells whether a tensor is CPU memory and nothing else. Whatever else a tensor can be (sparse, a
/// lazy conjugate, a Python subclass, wrapped by functorch, on another device) adds a key.
bool is_plain(const at::TensorBase& tensor) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::AutocastCPU,
                                       c10::DispatchKey::ADInplaceOrView});
  return within(tensor.key_set(), plain);
}

std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

enum class Access { kRead, kWrite };
enum class Source { kTensors, kParameters };

/// The gradients of one call. They stay referenced, so that their memory outlives the call even if
/// another thread drops them while the GIL is released.
struct Gradients {
  gradclip::GradList list{cpu::kChunkBytes};
  std::vector<at::Tensor> tensors;

  /// Adds a tensor, or tells that the kernels do not take it.
  bool add(const at::Tensor& tensor, Access access) {
    const std::optional<DType> dtype = kernel_dtype(tensor.scalar_type());
    if (!dtype || !is_plain(tensor) || !tensor.is_non_overlapping_and_dense()) return false;
    const bool write = access == Access::kWrite;
    if (write && tensor.is_inference()) return false;
    void* data = write ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    const int64_t numel = tensor.numel();
    if (numel != 0 && data == nullptr) return false;
    list.add(data, numel, *dtype);
    tensors.push_back(tensor);
    return true;
  }

  /// As torch's in-place operations do: a backward that saved a gradient relies on it.
  void bump_versions() const {
    for (const at::Tensor& tensor : tensors) tensor.unsafeGetTensorImpl()->bump_version();
  }

  bool has_float64() const { return list.holds(DType::kFloat64); }
};

/// Adds the tensors of a list, or the gradients of its parameters that have one, to `taken` and
/// returns the indices of those that the kernels do not take. Stops at the first of them if
/// `all_or_none`. Runs no Python code, so the list cannot change meanwhile.
std::vector<int64_t> take(Gradients& taken, const py::list& listed, Source source, Access access,
                          bool all_or_none) {
  std::vector<int64_t> left;
  const bool followed = operations_are_followed();
  const auto count = static_cast<int64_t>(PyList_GET_SIZE(listed.ptr()));
  taken.list.reserve(count);
  taken.tensors.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count && !(all_or_none && !left.empty()); ++i) {
    PyObject* object = PyList_GET_ITEM(listed.ptr(), i);
    bool fits = !followed && THPVariable_CheckExact(object);
    if (fits) {
      const at::Tensor& tensor = THPVariable_Unpack(object);
      if (source == Source::kTensors) {
        fits = taken.add(tensor, access);
      } else if (const at::Tensor& grad = tensor.unsafeGetTensorImpl()->grad(); grad.defined()) {
        fits = taken.add(grad, access);
      } else {
        fits = tensor.is_leaf();  // reading .grad of any other warns
      }
    }
    if (!fits) left.push_back(i);
  }
  return left;
}

/// All gradients of a list, or nothing if the kernels do not take one of them or if two share
/// memory: gradients listed twice count once, which the general path sees to.
std::optional<Gradients> take_all(const py::list& listed, Source source, Access access) {
  std::optional<Gradients> taken(std::in_place);
  if (!take(*taken, listed, source, access, true).empty()) return std::nullopt;
  if (aliasing(taken->list) != gradclip::Aliasing::kNone) return std::nullopt;
  return taken;
}

// ---------------------------------------------------------------- threads and numbers

/// torch's own thread pool. Built without OpenMP, at::parallel_for would run on one thread.
cpu::Threads torch_threads() {
  return {at::get_num_threads(), [](int64_t workers, void (*work)(void*), void* context) {
            at::parallel_for(0, workers, 1, [&](int64_t, int64_t) { work(context); });
          }};
}

/// A new 0-d tensor.
py::object scalar_tensor(double value, bool float64) {
  at::Tensor result(at::detail::empty_cpu({}, float64 ? at::kDouble : at::kFloat));
  if (float64) {
    *result.mutable_data_ptr<double>() = value;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(result));
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

/// Multiplies by the coefficient; writes nothing if it is 1 or more.
void scale(const Gradients& gradients, double coef) {
  if (!(coef >= 1)) cpu::scale(gradients.list, coef, torch_threads());
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
    if (gradients.list.holds(dtype) && std::isfinite(bound) && std::abs(bound) > largest) {
      return false;
    }
  }
  return true;
}

// ---------------------------------------------------------------- public functions, whole

/// Returns the norm, or None if the call was not for the kernels. With error_if_nonfinite, a norm
/// that is not finite is returned before anything has changed.
py::object clip_grad_norm_(const py::list& parameters, double max_norm, double norm_type,
                           bool error_if_nonfinite) {
  if (!has_kernel(norm_type)) return py::none();
  const auto gradients = take_all(parameters, Source::kParameters, Access::kWrite);
  if (!gradients) return py::none();
  const bool float64 = gradients->has_float64();
  double norm;
  bool refused;
  {
    py::gil_scoped_release release;
    norm = cpu::norm(gradients->list, norm_type, torch_threads());
    refused = error_if_nonfinite && !std::isfinite(float64 ? norm : static_cast<float>(norm));
    if (!refused) scale(*gradients, clip_coef(norm, float64, max_norm));
  }
  if (!refused) gradients->bump_versions();
  return scalar_tensor(norm, float64);
}

/// Returns the norm, or None if the call was not for the kernels.
py::object get_total_norm(const py::list& tensors, double norm_type) {
  if (!has_kernel(norm_type)) return py::none();
  const auto taken = take_all(tensors, Source::kTensors, Access::kRead);
  if (!taken) return py::none();
  double norm;
  {
    py::gil_scoped_release release;
    norm = cpu::norm(taken->list, norm_type, torch_threads());
  }
  return scalar_tensor(norm, taken->has_float64());
}

/// Returns whether the call was for the kernels.
bool clip_grads_with_norm_(const py::list& parameters, double max_norm, const py::object& norm) {
  if (!THPVariable_CheckExact(norm.ptr())) return false;
  const at::Tensor& total_norm = THPVariable_Unpack(norm.ptr());
  if (!is_plain(total_norm) || total_norm.dim() != 0) return false;
  if (!kernel_dtype(total_norm.scalar_type())) return false;
  const auto gradients = take_all(parameters, Source::kParameters, Access::kWrite);
  if (!gradients) return false;
  const bool float64 = total_norm.scalar_type() == at::kDouble;
  const double coef = clip_coef(total_norm.item<double>(), float64, max_norm);
  {
    py::gil_scoped_release release;
    scale(*gradients, coef);
  }
  gradients->bump_versions();
  return true;
}

/// Returns whether the call was for the kernels.
bool clamp_grad_(const py::list& parameters, double min, double max) {
  const auto gradients = take_all(parameters, Source::kParameters, Access::kWrite);
  if (!gradients || !is_representable(*gradients, min) || !is_representable(*gradients, max)) {
    return false;
  }
  {
    py::gil_scoped_release release;
    cpu::clamp(gradients->list, min, max, torch_threads());
  }
  gradients->bump_versions();
  return true;
}

// ---------------------------------------------------------------- verbs, in parts

/// Returns the float64 norm of the tensors that the kernels take, and the indices of the others.
py::tuple norm(const py::list& tensors, double norm_type) {
  Gradients taken;
  const auto left = take(taken, tensors, Source::kTensors, Access::kRead, false);
  double norm;
  {
    py::gil_scoped_release release;
    norm = cpu::norm(taken.list, norm_type, torch_threads());
  }
  return py::make_tuple(scalar_tensor(norm, true), left);
}

/// Applies `verb` to the tensors that the kernels take; returns the indices of the others, which
/// are all of them if some share memory, where order matters.
template <typename Verb>
std::vector<int64_t> update(const py::list& tensors, const Verb& verb) {
  Gradients taken;
  auto left = take(taken, tensors, Source::kTensors, Access::kWrite, false);
  if (aliasing(taken.list) != gradclip::Aliasing::kNone) {
    left.resize(tensors.size());
    std::iota(left.begin(), left.end(), 0);
    return left;
  }
  {
    py::gil_scoped_release release;
    verb(taken);
  }
  taken.bump_versions();
  return left;
}

std::vector<int64_t> scale_(const py::list& tensors, double coef) {
  return update(tensors, [&](const Gradients& taken) { scale(taken, coef); });
}

std::vector<int64_t> clamp_(const py::list& tensors, double min, double max) {
  return update(tensors,
                [&](const Gradients& taken) { cpu::clamp(taken.list, min, max, torch_threads()); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels. Call gradclip_ext's functions instead: these check no arguments.";
  m.attr("CPU_CAPABILITY") = cpu::chunk_kernels().isa;
  m.def("clip_grad_norm_", &clip_grad_norm_);
  m.def("get_total_norm", &get_total_norm);
  m.def("clip_grads_with_norm_", &clip_grads_with_norm_);
  m.def("clamp_grad_", &clamp_grad_);
  m.def("norm", &norm);
  m.def("scale_", &scale_);
  m.def("clamp_", &clamp_);
  auto testing =
      m.def_submodule("_testing", "Index arithmetic and kernels, one by one, for tests.");
  gradclip::define_testing(testing);
}
