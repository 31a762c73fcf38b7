// DTensors, as Python shows them: a wrapper with two slots, the local tensor and the spec, which
// has the mesh and the placements.

#include <pybind11/pybind11.h>
#include <structmember.h>  // after Python.h

#include <algorithm>
#include <vector>

#include "python/reader.h"

namespace gradclip::python {
namespace {

/// A slot of a Python class (`__slots__`): read without a look-up.
class Slot {
 public:
  Slot(const py::object& type, const char* name) : name_(name) {
    const py::object descriptor = type.attr(name);
    if (Py_IS_TYPE(descriptor.ptr(), &PyMemberDescr_Type)) {
      member_ = reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
    }
  }

  py::object of(PyObject* object) const {
    PyObject* const value = member_ != nullptr
                                ? PyMember_GetOne(reinterpret_cast<const char*>(object), member_)
                                : PyObject_GetAttrString(object, name_);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  const char* name_;
  PyMemberDef* member_ = nullptr;  // null if the class has no slot of that name
};

/// Tensors with one mesh and the same types of placements.
struct Class {
  py::object mesh, placements;

  /// Placements of one type, on whatever dimension of the tensor, divide it alike.
  bool holds(const py::object& other_mesh, const py::object& other) const {
    if (!mesh.is(other_mesh)) return false;
    if (placements.is(other)) return true;
    const Py_ssize_t size = PyTuple_GET_SIZE(placements.ptr());
    if (PyTuple_GET_SIZE(other.ptr()) != size) return false;
    for (Py_ssize_t dim = 0; dim < size; ++dim) {
      if (Py_TYPE(PyTuple_GET_ITEM(placements.ptr(), dim)) !=
          Py_TYPE(PyTuple_GET_ITEM(other.ptr(), dim))) {
        return false;
      }
    }
    return true;
  }
};

py::str interned(const char* name) {
  return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
}

bool are_known(const py::object& placements, const py::tuple& known) {
  if (!PyTuple_CheckExact(placements.ptr())) return false;
  return std::all_of(placements.begin(), placements.end(), [&](py::handle placement) {
    return std::any_of(known.begin(), known.end(), [&](py::handle type) {
      return Py_IS_TYPE(placement.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr()));
    });
  });
}

}  // namespace

py::object unwrap(const py::list& tensors, const py::object& dtensor, const py::tuple& placements) {
  const Slot local_slot(dtensor, "_local_tensor"), spec_slot(dtensor, "_spec");
  const auto mesh_name = interned("mesh"), placements_name = interned("placements");
  const py::object none = py::none(), nowhere = py::tuple();
  py::list parts, numbers, examples;
  std::vector<Class> classes;
  size_t number = 0;  // neighbours are often alike
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    const auto tensor = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(tensors.ptr(), i));
    py::object part = tensor, mesh = none, placed = nowhere;
    if (Py_IS_TYPE(tensor.ptr(), reinterpret_cast<PyTypeObject*>(dtensor.ptr()))) {
      part = local_slot.of(tensor.ptr());
      const py::object spec = spec_slot.of(tensor.ptr());
      mesh = spec.attr(mesh_name);
      placed = spec.attr(placements_name);
    }
    if (!is_plain(part.ptr())) return none;
    if (number >= classes.size() || !classes[number].holds(mesh, placed)) {
      if (!are_known(placed, placements)) return none;
      number = 0;
      while (number < classes.size() && !classes[number].holds(mesh, placed)) ++number;
      if (number == classes.size()) {
        classes.push_back({mesh, placed});
        examples.append(tensor);
      }
    }
    parts.append(part);
    numbers.append(number);
  }
  return py::make_tuple(parts, numbers, examples);
}

}  // namespace gradclip::python
