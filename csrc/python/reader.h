// From a Python list of tensors to a TensorList, by Python's and DLPack's C interfaces alone.

#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor_list.h"
#include "python/dlpack.h"

namespace gradclip::python {

namespace py = pybind11;

/// Tensors of one device, with the references that keep them alive.
struct HeldList {
  TensorList spans;      // of the tensors that have elements
  py::list tensors;      // all of them; nobody else changes this list
  bool is_cuda = false;  // CUDA or ROCm; otherwise in the memory of the host
  int32_t device_index = 0;
  unsigned dtypes = 0;              // bit d: some tensor, possibly an empty one, has DType d
  std::vector<int64_t> empty = {};  // the positions of the tensors without elements, ascending

  bool holds(DType dtype) const { return dtypes >> static_cast<unsigned>(dtype) & 1u; }

  /// From one value for each tensor, those of the tensors that have elements, and back, with 0 for
  /// the others.
  std::vector<double> of_spans(const double* of_tensors) const;
  void to_tensors(const std::vector<double>& of_spans, double* of_tensors) const;

  /// Tells whether a span has a byte in this range of addresses.
  bool overlaps(uint64_t begin, uint64_t end) const;

  /// The spans as three columns: addresses and numbers of elements as int64, DTypes as bytes.
  /// Equal columns mean equal lists.
  std::string columns() const;
};

/// Tells a torch.Tensor or Parameter from anything else, subclasses included.
bool is_plain(PyObject* object);

/// Returns the gradients of those parameters that have one, in order, as `[p.grad for p in ...]`
/// does. Raises AttributeError for an element that has no `.grad`.
py::list gradients(const py::list& parameters);

/// Whether this torch offers what read_tensors() needs (torch >= 2.10).
bool can_read();

/// Returns the tensors as kernels take them: each exactly a torch.Tensor or Parameter, strided, of
/// a kernel dtype, without gaps in memory, on one CPU or GPU, and, if they will be `written`,
/// without shared memory and, unless in that mode, not made in inference mode. Returns nothing if
/// one of them is not.
std::optional<HeldList> read_tensors(const py::list& tensors, bool written);

/// Positions in a list of tensors, a list for each device.
using Positions = std::vector<std::vector<int64_t>>;

/// Returns the positions of the tensors that read_tensors() takes, those of each device together,
/// and of the others. Whether tensors share memory is not asked.
std::pair<Positions, std::vector<int64_t>> set_apart(const py::list& tensors, bool written);

/// The same as read_tensors() from columns that Python has read, for an older torch. The caller has
/// checked them.
HeldList from_columns(const py::list& tensors, const std::string& columns,
                      const std::vector<int64_t>& empty, unsigned dtypes, bool is_cuda,
                      int32_t device_index);

/// Tells whether no object is listed twice.
bool are_distinct(const py::list& objects);

/// Returns three lists: each tensor's part on this rank, the number of its class, and the first
/// tensor of each class. Tensors of a class have one mesh and the same types of placements; plain
/// tensors are one. None if there is a placement of another type than the given ones, or a part of
/// a subclass.
py::object unwrap(const py::list& tensors, const py::object& dtensor, const py::tuple& placements);

/// Tells whether a tensor is a lazy negative (its memory holds the negated values): DLPack does not
/// say so. Norms, products and symmetric clamps come out right without knowing, other clamps do
/// not.
bool any_negative(const py::list& tensors);

}  // namespace gradclip::python
