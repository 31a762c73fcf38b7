#pragma once

#include <pybind11/pybind11.h>

namespace gradclip {

/// Adds what tests/test_core.py calls.
void define_testing(pybind11::module_& m);

}  // namespace gradclip
