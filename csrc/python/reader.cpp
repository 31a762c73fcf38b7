#include "python/reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/operations.h"

namespace gradclip::python {
namespace {

// ---------------------------------------------------------------- torch, as Python shows it

/// An attribute of torch.Tensor, by the C function behind it: 10 ns less than the attribute's
/// look-up.
class Attribute {
 public:
  Attribute() = default;
  Attribute(const py::object& type, const char* name)
      : name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)).release().ptr()) {
    const py::object descriptor = type.attr(name);
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) return;
    const auto* def = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    get_ = def->get;
    closure_ = def->closure;
  }

  /// Returns a new reference, or null with a Python error.
  PyObject* of(PyObject* object, bool is_plain) const {
    return is_plain && get_ != nullptr ? get_(object, closure_) : PyObject_GetAttr(object, name_);
  }

 private:
  PyObject* name_ = nullptr;  // lives as long as the process
  getter get_ = nullptr;      // null if torch implements the attribute in another way
  void* closure_ = nullptr;
};

/// What is asked of torch for every tensor, looked up once.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  Attribute grad;
  Attribute version;
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* is_inference_mode = nullptr;
  PyObject* unwatched = nullptr;        // the `__torch_function__` of those who decline to have one
  PyObject* unwatched_guard = nullptr;  // the class of a context in which nobody is asked for it

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    // Types live as long as the process: the references are never given back.
    tensor = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    parameter = reinterpret_cast<PyTypeObject*>(
        py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    is_neg = py::object(torch.attr("Tensor").attr("is_neg")).release().ptr();
    is_inference_mode = py::object(torch.attr("is_inference_mode_enabled")).release().ptr();
    const py::object internals = torch.attr("_C");
    unwatched = py::object(internals.attr("_disabled_torch_function_impl")).release().ptr();
    unwatched_guard = py::object(internals.attr("DisableTorchFunctionSubclass")).release().ptr();
    grad = Attribute(torch.attr("Tensor"), "grad");
    version = Attribute(torch.attr("Tensor"), "_version");
    if (!py::hasattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__")) return;
    const py::object capsule = torch.attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    if (api == nullptr) PyErr_Clear();
    while (api != nullptr && api->major > dlpack::kMajorVersion) api = api->older;
    if (api != nullptr && api->major == dlpack::kMajorVersion && api->view != nullptr) {
      exchange = api;
    }
  }

  /// Subclasses may see what is done with them (`__torch_function__`); these two do not.
  bool is_plain(PyObject* object) const {
    return Py_IS_TYPE(object, tensor) || Py_IS_TYPE(object, parameter);
  }
};

const Torch& torch() {
  static const Torch* const found = new Torch();
  return *found;
}

// ---------------------------------------------------------------- one tensor

std::optional<DType> dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::kBFloat16;
  if (type.code != dlpack::kFloat) return std::nullopt;
  if (type.bits == 32) return DType::kFloat32;
  if (type.bits == 64) return DType::kFloat64;
  if (type.bits == 16) return DType::kFloat16;
  return std::nullopt;
}

/// Tells whether the elements fill a range of memory, each once: contiguous, or a permutation of
/// it.
bool is_dense(const dlpack::Tensor& view) {
  int64_t expected = 1;
  int32_t dim = view.ndim;
  while (dim > 0 && (view.shape[dim - 1] == 1 || view.strides[dim - 1] == expected)) {
    expected *= view.shape[--dim];
  }
  if (dim == 0) return true;
  constexpr int32_t kMaxDims = 16;
  std::array<std::pair<int64_t, int64_t>, kMaxDims> dims;  // stride, size
  int32_t count = 0;
  for (dim = 0; dim < view.ndim; ++dim) {
    if (view.shape[dim] == 1) continue;
    if (count == kMaxDims) return false;
    dims[static_cast<size_t>(count++)] = {view.strides[dim], view.shape[dim]};
  }
  std::sort(dims.begin(), dims.begin() + count);
  expected = 1;
  for (dim = 0; dim < count; ++dim) {
    const auto& [stride, size] = dims[static_cast<size_t>(dim)];
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

/// Tells whether a plain tensor counts its changes. Those made in inference mode do not, and may be
/// changed in that mode only.
bool has_version(PyObject* object) {
  const auto version = py::reinterpret_steal<py::object>(torch().version.of(object, true));
  if (!version) PyErr_Clear();
  return static_cast<bool>(version);
}

/// Tells whether tensors that will be `written` have to count their changes.
bool must_count(bool written) {
  return written && !py::reinterpret_borrow<py::object>(torch().is_inference_mode)().cast<bool>();
}

/// A tensor as kernels take it.
struct Found {
  bool is_cuda;
  int32_t device_index;  // 0 in the memory of the host
  Span span;             // of 0 elements for an empty tensor

  bool is_on_the_device_of(const HeldList& held) const {
    return is_cuda == held.is_cuda && device_index == held.device_index;
  }
};

/// Reads a tensor, which may have to count its changes, or tells that the kernels do not take it.
std::optional<Found> find(PyObject* object, bool counts) {
  dlpack::Tensor view;
  if (!torch().is_plain(object)) return std::nullopt;
  if (torch().exchange->view(object, &view) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  const bool is_host = view.device.type == dlpack::kCpu || view.device.type == dlpack::kCudaHost ||
                       view.device.type == dlpack::kRocmHost;
  const bool is_cuda = view.device.type == dlpack::kCuda || view.device.type == dlpack::kRocm;
  const std::optional<DType> dtype = dtype_of(view.dtype);
  if (!(is_host || is_cuda) || !dtype) return std::nullopt;
  int64_t numel = 1;
  for (int32_t dim = 0; dim < view.ndim; ++dim) numel *= view.shape[dim];
  // Without memory: a tensor of torch._efficientzerotensor, or storage that FSDP has freed.
  if (numel != 0 && (view.data == nullptr || !is_dense(view))) return std::nullopt;
  if (counts && !has_version(object)) return std::nullopt;
  char* const data = static_cast<char*>(view.data) + (numel == 0 ? 0 : view.byte_offset);
  return Found{is_cuda, is_cuda ? view.device.index : 0, {data, numel, *dtype}};
}

// ---------------------------------------------------------------- types that decline to watch

/// The `__torch_function__` of DTensors is disabled, which torch finds out again at each access,
/// for half of its time. While this object is set for such a type, torch does not ask.
class Unwatched {
 public:
  Unwatched() = default;
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
  ~Unwatched() { leave(); }

  void set_for(PyTypeObject* type) {
    if (type == type_) return;
    type_ = type;
    leave();
    const auto as_object = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
    const py::object watcher = py::getattr(as_object, "__torch_function__", py::none());
    if (watcher.ptr() != torch().unwatched) return;
    guard_ = py::reinterpret_borrow<py::object>(torch().unwatched_guard)();
    guard_.attr("__enter__")();
  }

 private:
  void leave() {
    if (guard_) guard_.attr("__exit__")(py::none(), py::none(), py::none());
    guard_ = py::object();
  }

  PyTypeObject* type_ = nullptr;
  py::object guard_;
};

}  // namespace

// ---------------------------------------------------------------- lists

py::list gradients(const py::list& parameters) {
  py::list found;
  Unwatched unwatched;
  // The size is asked again each time: a subclass may run code of its own.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(parameters.ptr()); ++i) {
    const auto parameter = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(parameters.ptr(), i));
    const bool is_plain = torch().is_plain(parameter.ptr());
    if (!is_plain) unwatched.set_for(Py_TYPE(parameter.ptr()));
    const auto owned =
        py::reinterpret_steal<py::object>(torch().grad.of(parameter.ptr(), is_plain));
    if (!owned) throw py::error_already_set();
    if (!owned.is_none() && PyList_Append(found.ptr(), owned.ptr()) != 0) {
      throw py::error_already_set();
    }
  }
  return found;
}

bool are_distinct(const py::list& objects) {
  PyObject** const first = PySequence_Fast_ITEMS(objects.ptr());
  std::vector<PyObject*> addresses(first, first + PyList_GET_SIZE(objects.ptr()));
  std::sort(addresses.begin(), addresses.end());
  return std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end();
}

bool is_plain(PyObject* object) { return torch().is_plain(object); }

bool can_read() { return torch().exchange != nullptr; }

std::optional<HeldList> read_tensors(const py::list& tensors, bool written) {
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  HeldList held{TensorList(cpu::kChunkBytes), tensors};
  held.spans.reserve(size);
  const bool counts = must_count(written);
  for (Py_ssize_t i = 0; i < size; ++i) {
    const std::optional<Found> found = find(PyList_GET_ITEM(tensors.ptr(), i), counts);
    if (!found) return std::nullopt;
    if (i == 0) {
      held.is_cuda = found->is_cuda;
      held.device_index = found->device_index;
    }
    if (!found->is_on_the_device_of(held)) return std::nullopt;
    const Span& span = found->span;
    held.dtypes |= 1u << static_cast<unsigned>(span.dtype);
    if (span.numel == 0) {
      held.empty.push_back(i);
    } else {
      held.spans.add(span.data, span.numel, span.dtype);
    }
  }
  if (written && aliasing(held.spans) != Aliasing::kNone) return std::nullopt;
  return held;
}

std::pair<Positions, std::vector<int64_t>> set_apart(const py::list& tensors, bool written) {
  std::map<std::pair<bool, int32_t>, std::vector<int64_t>> by_device;
  std::vector<int64_t> others;
  const bool counts = must_count(written);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    const std::optional<Found> found = find(PyList_GET_ITEM(tensors.ptr(), i), counts);
    (found ? by_device[{found->is_cuda, found->device_index}] : others).push_back(i);
  }
  Positions positions;
  for (auto& entry : by_device) positions.push_back(std::move(entry.second));
  return {std::move(positions), std::move(others)};
}

HeldList from_columns(const py::list& tensors, const std::string& columns,
                      const std::vector<int64_t>& empty, unsigned dtypes, bool is_cuda,
                      int32_t device_index) {
  HeldList held{TensorList(cpu::kChunkBytes), tensors, is_cuda, device_index, dtypes, empty};
  const size_t count = columns.size() / 17;
  if (columns.size() != 17 * count) throw std::invalid_argument("columns of 17 bytes a tensor");
  held.spans.reserve(static_cast<int64_t>(count));
  for (size_t i = 0; i < count; ++i) {
    void* data;
    int64_t numel;
    std::memcpy(&data, &columns[8 * i], 8);
    std::memcpy(&numel, &columns[8 * (count + i)], 8);
    held.spans.add(data, numel, static_cast<DType>(columns[16 * count + i]));
  }
  return held;
}

std::vector<double> HeldList::of_spans(const double* of_tensors) const {
  std::vector<double> found;
  found.reserve(static_cast<size_t>(spans.size()));
  auto skipped = empty.begin();
  for (int64_t i = 0; i < spans.size() + static_cast<int64_t>(empty.size()); ++i) {
    if (skipped != empty.end() && *skipped == i) {
      ++skipped;
    } else {
      found.push_back(of_tensors[i]);
    }
  }
  return found;
}

void HeldList::to_tensors(const std::vector<double>& of_spans, double* of_tensors) const {
  auto skipped = empty.begin();
  int64_t position = 0;
  for (const double value : of_spans) {
    for (; skipped != empty.end() && *skipped == position; ++skipped) of_tensors[position++] = 0;
    of_tensors[position++] = value;
  }
  for (; skipped != empty.end(); ++skipped) of_tensors[position++] = 0;
}

bool HeldList::overlaps(uint64_t begin, uint64_t end) const {
  for (int64_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    if (detail::begin_of(span) < end && begin < detail::end_of(span)) return true;
  }
  return false;
}

std::string HeldList::columns() const {
  const auto count = static_cast<size_t>(spans.size());
  std::string packed(17 * count, '\0');
  for (size_t i = 0; i < count; ++i) {
    const Span& span = spans[static_cast<int64_t>(i)];
    std::memcpy(&packed[8 * i], &span.data, 8);
    std::memcpy(&packed[8 * (count + i)], &span.numel, 8);
    packed[16 * count + i] = static_cast<char>(span.dtype);
  }
  return packed;
}

bool any_negative(const py::list& tensors) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const auto answer =
        py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch().is_neg, tensor));
    if (!answer) throw py::error_already_set();
    if (answer.is(py::bool_(true))) return true;
  }
  return false;
}

}  // namespace gradclip::python
