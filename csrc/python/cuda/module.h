#pragma once

#include <pybind11/pybind11.h>

namespace gradclip::python {

/// Adds the operations on CUDA devices; only in a build with CUDA.
void define_cuda(pybind11::module_& m);

}  // namespace gradclip::python
