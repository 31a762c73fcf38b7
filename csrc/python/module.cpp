// gradclip_ext._C: the crossing from Python to the kernels, without torch's headers or libraries.
//
// reader.h turns Python lists into tensor lists; the functions here run an operation on one. They
// trust their caller (gradclip_ext/backends/compiled.py) with devices, dtypes and orders.

#include "python/cuda/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "core/rule.h"
#include "cpu/operations.h"
#include "python/reader.h"
#include "python/threads.h"

namespace gradclip::python {
namespace {

/// Lets other Python threads run while a list takes a while.
class ReleaseGil {
 public:
  explicit ReleaseGil(const HeldList& list) {
    if (list.spans.bytes() > cpu::kSerialBytes) released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

/// Returns the norm of order p > 0 or inf in the precision of the result, where a norm beyond
/// float32 is inf, and the coefficient that the rule makes of it.
std::pair<double, double> cpu_norm(const HeldList& list, double p, double max_norm,
                                   bool is_float64) {
  const cpu::Threads threads = threads_for(list.spans);
  const ReleaseGil release(list);
  const double norm = cpu::norm(list.spans, p, threads);
  const Rule rule{max_norm};
  if (is_float64) return {norm, rule.clip_coef(norm)};
  const auto rounded = static_cast<float>(norm);
  return {rounded, rule.clip_coef(rounded)};
}

/// Writes nothing if the coefficient is 1 or more.
void cpu_scale(const HeldList& list, double clip_coef) {
  if (clip_coef >= 1) return;
  const cpu::Threads threads = threads_for(list.spans);
  const ReleaseGil release(list);
  cpu::scale(list.spans, clip_coef, threads);
}

void cpu_clamp(const HeldList& list, double min, double max) {
  const cpu::Threads threads = threads_for(list.spans);
  const ReleaseGil release(list);
  cpu::clamp(list.spans, min, max, threads);
}

}  // namespace
}  // namespace gradclip::python

PYBIND11_MODULE(_C, m) {
  using namespace gradclip;
  using namespace gradclip::python;
  m.doc() = "Compiled kernels. Call gradclip_ext's functions instead: these check no arguments.";
  prepare_threads();
  m.attr("CPU_CAPABILITY") = cpu::chunk_kernels().isa;
  m.attr("CAN_READ") = can_read();
  py::class_<HeldList>(m, "TensorList")
      .def_readonly("tensors", &HeldList::tensors)
      .def_readonly("is_cuda", &HeldList::is_cuda)
      .def_readonly("device_index", &HeldList::device_index)
      .def_property_readonly("has_elements",
                             [](const HeldList& list) { return list.spans.size() != 0; })
      .def_readonly("dtypes", &HeldList::dtypes)
      .def_property_readonly("columns",
                             [](const HeldList& list) { return py::bytes(list.columns()); });
  m.def("gradients", &gradients);
  m.def("read_tensors", &read_tensors);
  m.def("from_columns", &from_columns);
  m.def("are_distinct", &are_distinct);
  m.def("unwrap", &unwrap);
  m.def("any_negative", &any_negative);
  m.def("cpu_norm", &cpu_norm);
  m.def("cpu_scale_", &cpu_scale);
  m.def("cpu_clamp_", &cpu_clamp);
#ifdef GRADCLIP_EXT_WITH_CUDA
  define_cuda(m);
#endif
}
