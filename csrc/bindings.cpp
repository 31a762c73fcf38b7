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
bool is_plain(const c10::TensorImpl& tensor) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::AutocastCPU,
                                       c10::DispatchKey::ADInplaceOrView});
  return within(tensor.key_set(), plain);
}

std::optional<DType> kernel_dtype(const c10::TensorImpl& tensor) {
  switch (c10::typeMetaToScalarType(tensor.dtype())) {
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

using Tensors = std::vector<c10::TensorImpl*>;

/// The tensors of a Python list, or the gradients of its parameters that have one; nothing if an
/// element is not exactly a Tensor or Parameter. Runs no Python code, so nothing changes meanwhile.
std::optional<Tensors> unpack(const py::list& listed, Source source) {
  if (operations_are_followed()) return std::nullopt;
  const Py_ssize_t count = PyList_GET_SIZE(listed.ptr());
  Tensors tensors;
  tensors.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(listed.ptr(), i);
    if (!THPVariable_CheckExact(object)) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (source == Source::kParameters) {
      const at::Tensor& grad = impl->grad();
      if (!grad.defined()) {
        if (tensor.is_leaf()) continue;
        return std::nullopt;  // reading the .grad of any other warns
      }
      impl = grad.unsafeGetTensorImpl();
    }
    tensors.push_back(impl);
  }
  return tensors;
}

/// The gradients of one call. Their parameters own them, which is enough while the GIL is held.
struct Gradients {
  gradclip::GradList list{cpu::kChunkBytes};
  Tensors tensors;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held;

  /// Adds a tensor, or tells that the kernels do not take it.
  bool add(c10::TensorImpl* tensor, Access access) {
    const std::optional<DType> dtype = kernel_dtype(*tensor);
    if (!dtype || !is_plain(*tensor) || !tensor->is_non_overlapping_and_dense()) return false;
    const bool write = access == Access::kWrite;
    if (write && tensor->is_inference()) return false;
    void* data = write ? tensor->mutable_data() : const_cast<void*>(tensor->data());
    const int64_t numel = tensor->numel();
    if (numel != 0 && data == nullptr) return false;
    list.add(data, numel, *dtype);
    tensors.push_back(tensor);
    return true;
  }

  void reserve(size_t count) {
    list.reserve(static_cast<int64_t>(count));
    tensors.reserve(count);
  }

  /// As torch's in-place operations do: a backward that saved a gradient relies on it.
  void bump_versions() const {
    for (c10::TensorImpl* tensor : tensors) tensor->bump_version();
  }

  bool has_float64() const { return list.holds(DType::kFloat64); }
};

/// All gradients of a list, or nothing if the kernels do not take one of them or if two share
/// memory: gradients listed twice count once, which the general path sees to.
std::optional<Gradients> take_all(const py::list& listed, Source source, Access access) {
  const std::optional<Tensors> tensors = unpack(listed, source);
  if (!tensors) return std::nullopt;
  std::optional<Gradients> taken(std::in_place);
  taken->reserve(tensors->size());
  for (c10::TensorImpl* tensor : *tensors) {
    if (!taken->add(tensor, access)) return std::nullopt;
  }
  if (aliasing(taken->list) != gradclip::Aliasing::kNone) return std::nullopt;
  return taken;
}

/// Lets other Python threads run, for lists that take a while. They may drop their gradients, so
/// from here on these are referenced; two atomic operations each, as long as a small tensor takes.
class ReleaseGil {
 public:
  explicit ReleaseGil(Gradients& gradients) {
    if (gradients.list.bytes() <= cpu::kSerialBytes) return;
    gradients.held.reserve(gradients.tensors.size());
    for (c10::TensorImpl* tensor : gradients.tensors) {
      gradients.held.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor));
    }
    released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

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
  auto gradients = take_all(parameters, Source::kParameters, Access::kWrite);
  if (!gradients) return py::none();
  const bool float64 = gradients->has_float64();
  double norm;
  bool refused;
  {
    const ReleaseGil release(*gradients);
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
  auto taken = take_all(tensors, Source::kTensors, Access::kRead);
  if (!taken) return py::none();
  double norm;
  {
    const ReleaseGil release(*taken);
    norm = cpu::norm(taken->list, norm_type, torch_threads());
  }
  return scalar_tensor(norm, taken->has_float64());
}

/// Returns whether the call was for the kernels.
bool clip_grads_with_norm_(const py::list& parameters, double max_norm, const py::object& norm) {
  if (!THPVariable_CheckExact(norm.ptr())) return false;
  const at::Tensor& total_norm = THPVariable_Unpack(norm.ptr());
  const c10::TensorImpl& impl = *total_norm.unsafeGetTensorImpl();
  if (!is_plain(impl) || !kernel_dtype(impl) || total_norm.dim() != 0) return false;
  auto gradients = take_all(parameters, Source::kParameters, Access::kWrite);
  if (!gradients) return false;
  const bool float64 = total_norm.scalar_type() == at::kDouble;
  const double coef = clip_coef(total_norm.item<double>(), float64, max_norm);
  {
    const ReleaseGil release(*gradients);
    scale(*gradients, coef);
  }
  gradients->bump_versions();
  return true;
}

/// Returns whether the call was for the kernels.
bool clamp_grad_(const py::list& parameters, double min, double max) {
  auto gradients = take_all(parameters, Source::kParameters, Access::kWrite);
  if (!gradients || !is_representable(*gradients, min) || !is_representable(*gradients, max)) {
    return false;
  }
  {
    const ReleaseGil release(*gradients);
    cpu::clamp(gradients->list, min, max, torch_threads());
  }
  gradients->bump_versions();
  return true;
}

// ---------------------------------------------------------------- verbs, in parts

/// Adds the tensors of a list to `taken` and returns the indices of those that stay behind.
std::vector<int64_t> take_some(const py::list& listed, Access access, Gradients& taken) {
  const std::optional<Tensors> tensors = unpack(listed, Source::kTensors);
  std::vector<int64_t> left;
  for (int64_t i = 0; i < static_cast<int64_t>(listed.size()); ++i) {
    if (!tensors || !taken.add((*tensors)[static_cast<size_t>(i)], access)) left.push_back(i);
  }
  return left;
}

/// Returns the float64 norm of the tensors that the kernels take, and the indices of the others.
py::tuple norm(const py::list& tensors, double norm_type) {
  Gradients taken;
  const auto left = take_some(tensors, Access::kRead, taken);
  double norm;
  {
    const ReleaseGil release(taken);
    norm = cpu::norm(taken.list, norm_type, torch_threads());
  }
  return py::make_tuple(scalar_tensor(norm, true), left);
}

/// Applies `verb` to the tensors that the kernels take and returns the indices of the others. Where
/// tensors share memory their order counts, and all stay behind.
template <typename Verb>
std::vector<int64_t> update(const py::list& tensors, const Verb& verb) {
  Gradients taken;
  auto left = take_some(tensors, Access::kWrite, taken);
  if (aliasing(taken.list) != gradclip::Aliasing::kNone) {
    left.resize(tensors.size());
    std::iota(left.begin(), left.end(), 0);
    return left;
  }
  {
    const ReleaseGil release(taken);
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
