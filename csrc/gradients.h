// What the kernels take of a Python list of tensors, and how it is reached: the torch side of a
// grad list, shared by the bindings of every device.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/verbs.h"
#include "grad_list.h"

namespace gradclip::bindings {

// ---------------------------------------------------------------- what the kernels take

/// Tells whether `keys` are among `allowed`. (Their operator- keeps the bits of devices.)
inline bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

/// Tells whether something in this thread (a dispatch mode, functorch, a tracer) follows the
/// operations that torch runs: the kernels would escape it.
inline bool operations_are_followed() {
  constexpr auto ordinary = c10::default_included_set | c10::autocast_dispatch_keyset;
  return !within(c10::impl::tls_local_dispatch_key_set().included_, ordinary);
}

/// Tells whether a tensor is memory of this type of device and nothing else. Whatever else a tensor
/// can be (sparse, a lazy conjugate, a Python subclass, wrapped by functorch) adds a key.
inline bool is_plain(const c10::TensorImpl& tensor, c10::DeviceType type) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet cpu({DispatchKey::CPU, DispatchKey::AutogradCPU,
                                     DispatchKey::AutocastCPU, DispatchKey::ADInplaceOrView});
  constexpr c10::DispatchKeySet cuda({DispatchKey::CUDA, DispatchKey::AutogradCUDA,
                                      DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView});
  return within(tensor.key_set(), type == c10::kCUDA ? cuda : cpu);
}

inline std::optional<DType> kernel_dtype(const c10::TensorImpl& tensor) {
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

using TensorPtr = c10::intrusive_ptr<c10::TensorImpl>;

// From a parameter to its gradient's memory there are six objects, and a list that has left the
// cache costs a miss for each. A block takes each step for all of its tensors before the next, so
// that their misses overlap, and is small enough to stay in the first cache: a quarter off the time
// of thousands of small tensors that are in the second.
constexpr Py_ssize_t kBlock = 64;
using Block = std::array<c10::TensorImpl*, kBlock>;

// Objects start at any multiple of 16 bytes: what is read together may lie in two cache lines, and
// touching an object's first byte would fetch the wrong one.

/// Storage, history and version at one end of a tensor; dtype, size and keys at the other.
inline void prefetch(const c10::TensorImpl* tensor) {
  const char* end = reinterpret_cast<const char*>(tensor + 1);
  __builtin_prefetch(&tensor->unsafe_storage());
  __builtin_prefetch(&tensor->version_counter());
  __builtin_prefetch(end - 32);
  __builtin_prefetch(end - 1);
}

/// The data pointer and the flags behind it.
inline void prefetch(const c10::StorageImpl* storage) {
  if (storage == nullptr) return;
  const char* begin = reinterpret_cast<const char*>(storage);
  __builtin_prefetch(begin + 16);
  __builtin_prefetch(begin + 63);
}

/// Replaces parameters by the gradients of those that have one and returns their number; nothing if
/// reading a .grad would warn.
inline std::optional<Py_ssize_t> to_gradients(Block& block, Py_ssize_t count) {
  using torch::autograd::AutogradMeta;
  std::array<const AutogradMeta*, kBlock> metas;
  for (Py_ssize_t i = 0; i < count; ++i) {
    metas[i] = static_cast<const AutogradMeta*>(block[i]->autograd_meta());
    if (metas[i] != nullptr) __builtin_prefetch(&metas[i]->grad_);
  }
  Py_ssize_t gradients = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (metas[i] != nullptr && metas[i]->grad_.defined()) {
      block[gradients] = metas[i]->grad_.unsafeGetTensorImpl();
      prefetch(block[gradients++]);
    } else if (!at::Tensor(TensorPtr::reclaim_copy(block[i])).is_leaf()) {
      return std::nullopt;
    }
  }
  return gradients;
}

/// Calls use(tensor) for the tensors of a Python list, or for the gradients of its parameters that
/// have one, until it returns false. Returns false then, and if an element is not exactly a Tensor
/// or Parameter. Runs no Python code, so nothing changes meanwhile.
template <typename Use>
bool for_each_tensor(const py::list& listed, Source source, const Use& use) {
  if (operations_are_followed()) return false;
  const Py_ssize_t size = PyList_GET_SIZE(listed.ptr());
  Block block;
  for (Py_ssize_t first = 0; first < size; first += kBlock) {
    Py_ssize_t count = std::min(size - first, kBlock);
    for (Py_ssize_t i = first + kBlock; i < std::min(size, first + 2 * kBlock); ++i) {
      __builtin_prefetch(PyList_GET_ITEM(listed.ptr(), i));  // while this block's steps are taken
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* object = PyList_GET_ITEM(listed.ptr(), first + i);
      if (!THPVariable_CheckExact(object)) return false;
      block[i] = THPVariable_Unpack(object).unsafeGetTensorImpl();
      if (source == Source::kTensors) {
        prefetch(block[i]);
      } else {
        __builtin_prefetch(&block[i]->unsafe_storage());  // its history lies beside it
      }
    }
    if (source == Source::kParameters) {
      const auto gradients = to_gradients(block, count);
      if (!gradients) return false;
      count = *gradients;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      prefetch(block[i]->unsafe_storage().unsafeGetStorageImpl());
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!use(block[i])) return false;
    }
  }
  return true;
}

/// The gradients of one call, all of one device. Their parameters own them, which is enough as long
/// as no other Python code can run.
class Gradients {
 public:
  explicit Gradients(size_t count = 0) {
    list.reserve(static_cast<int64_t>(count));
    tensors.reserve(count);
  }

  /// Adds a tensor, or tells that the kernels do not take it. The first one decides on the device.
  bool add(c10::TensorImpl* tensor, Access access) {
    if (tensors.empty()) device = tensor->device();
    const std::optional<DType> dtype = kernel_dtype(*tensor);
    if (!dtype || tensor->device() != device || !is_plain(*tensor, device.type()) ||
        !tensor->is_non_overlapping_and_dense()) {
      return false;
    }
    const bool write = access == Access::kWrite;
    if (write && tensor->is_inference()) return false;
    void* data = write ? tensor->mutable_data() : const_cast<void*>(tensor->data());
    const int64_t numel = tensor->numel();
    if (numel != 0 && data == nullptr) return false;
    if (numel != 0) list.add(data, numel, *dtype);
    tensors.push_back(tensor);
    dtypes_ |= 1u << static_cast<unsigned>(*dtype);
    return true;
  }

  /// References the tensors, before other Python code runs that may drop them. Two atomic
  /// operations each in all, as long as a small tensor takes on the CPU.
  void hold() {
    held_.reserve(tensors.size());
    for (c10::TensorImpl* tensor : tensors) held_.push_back(TensorPtr::reclaim_copy(tensor));
  }

  /// As torch's in-place operations do: a backward that saved a gradient relies on it.
  void bump_versions() const {
    // An atomic addition waits for its cache miss and holds up the next: reading a block's versions
    // first overlaps them.
    for (size_t first = 0; first < tensors.size(); first += kBlock) {
      const size_t last = std::min<size_t>(first + kBlock, tensors.size());
      for (size_t i = first; i < last; ++i) tensors[i]->version_counter().current_version();
      for (size_t i = first; i < last; ++i) tensors[i]->bump_version();
    }
  }

  /// Tells whether some gradient, be it empty, has this dtype.
  bool holds(DType dtype) const { return dtypes_ >> static_cast<unsigned>(dtype) & 1u; }

  GradList list{cpu::kChunkBytes};  // without the empty ones: kernels for GPUs do not take them
  std::vector<c10::TensorImpl*> tensors;
  c10::Device device{c10::kCPU};

 private:
  std::vector<TensorPtr> held_;
  unsigned dtypes_ = 0;  // bit d: DType d
};

/// All gradients of a list, or nothing if the kernels do not take one of them, if the first one's
/// device is not served, or if two share memory: gradients listed twice count once, which the
/// general path sees to.
template <typename Serves>
std::optional<Gradients> take_all(const py::list& listed, Source source, Access access,
                                  const Serves& serves) {
  std::optional<Gradients> taken(std::in_place, listed.size());
  const auto add = [&](c10::TensorImpl* tensor) {
    if (taken->tensors.empty() && !serves(tensor->device())) return false;
    return taken->add(tensor, access);
  };
  if (!for_each_tensor(listed, source, add)) return std::nullopt;
  if (aliasing(taken->list) != Aliasing::kNone) return std::nullopt;
  return taken;
}

inline std::vector<int64_t> all_indices(const py::list& listed) {
  std::vector<int64_t> indices(listed.size());
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

/// The tensors of a list that the kernels take, and the indices of the others.
inline std::pair<Gradients, std::vector<int64_t>> take_some(const py::list& tensors,
                                                            Access access) {
  Gradients taken(tensors.size());
  std::vector<int64_t> left;
  int64_t index = 0;
  const bool ordinary = for_each_tensor(tensors, Source::kTensors, [&](c10::TensorImpl* tensor) {
    if (!taken.add(tensor, access)) left.push_back(index);
    ++index;
    return true;
  });
  // Where tensors share memory the order of writing counts.
  const bool shared = access == Access::kWrite && aliasing(taken.list) != Aliasing::kNone;
  if (ordinary && !shared) return {std::move(taken), std::move(left)};
  return {Gradients(), all_indices(tensors)};
}

/// Lets other Python threads run: on the CPU while a list takes a while, on a GPU because a launch
/// waits where a thousand others are queued.
class ReleaseGil {
 public:
  explicit ReleaseGil(Gradients& gradients) {
    if (gradients.device.is_cpu() && gradients.list.bytes() <= cpu::kSerialBytes) return;
    gradients.hold();
    released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

}  // namespace gradclip::bindings
