// gradclip_ext._C: the crossing from Python to the kernels, without torch's headers or libraries.
//
// reader.h turns Python lists into tensor lists; the functions here run an operation on one. They
// trust their caller (gradclip_ext/backends/compiled.py) with devices, dtypes and orders.

#include "python/cuda/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

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

/// `coefs`: the address of one double for each tensor of the list, also for those without elements.
void cpu_scale_each(const HeldList& list, uint64_t coefs) {
  const std::vector<double> of_spans = list.of_spans(reinterpret_cast<const double*>(coefs));
  const cpu::Threads threads = threads_for(list.spans);
  const ReleaseGil release(list);
  cpu::scale_each(list.spans, of_spans.data(), threads);
}

/// Clips each tensor by its own norm. Every address is that of doubles, one for each tensor of the
/// list, also for those without elements; `max_norms` with `stride` 0 is that of one double.
void cpu_clip_each(const HeldList& list, double p, uint64_t max_norms, int64_t stride,
                   bool is_float64, bool zero_if_nonfinite, uint64_t norms) {
  const auto* limits = reinterpret_cast<const double*>(max_norms);
  const std::vector<double> of_spans = stride == 0 ? std::vector<double>{*limits}  //
                                                   : list.of_spans(limits);
  std::vector<double> found(static_cast<size_t>(list.spans.size()));
  {
    const cpu::EachRule rule{of_spans.data(), stride, is_float64, zero_if_nonfinite};
    const cpu::Threads threads = threads_for(list.spans);
    const ReleaseGil release(list);
    cpu::clip_each(list.spans, p, rule, threads, found.data());
  }
  list.to_tensors(found, reinterpret_cast<double*>(norms));
}

/// Writes the norm of the list and then, one after the other, the norms, largest magnitudes, and
/// numbers of zero and of non-finite elements of its tensors: 1 + 4 n doubles.
void cpu_statistics(const HeldList& list, double p, uint64_t packed) {
  std::vector<cpu::TensorStatistics> found(static_cast<size_t>(list.spans.size()));
  auto* out = reinterpret_cast<double*>(packed);
  {
    const cpu::Threads threads = threads_for(list.spans);
    const ReleaseGil release(list);
    *out++ = cpu::statistics(list.spans, p, threads, found.data());
  }
  const size_t tensors = found.size() + list.empty.size();
  std::vector<double> column(found.size());
  for (const auto field : {&cpu::TensorStatistics::norm, &cpu::TensorStatistics::largest,
                           &cpu::TensorStatistics::zeros, &cpu::TensorStatistics::nonfinite}) {
    for (size_t i = 0; i < found.size(); ++i) column[i] = found[i].*field;
    list.to_tensors(column, out);
    out += tensors;
  }
}

/// `units`: the number of units of each tensor that has elements.
void cpu_clip_adaptive(const HeldList& grads, const HeldList& weights,
                       const std::vector<int64_t>& units, double p, double clip_factor,
                       double eps) {
  const cpu::Threads threads = threads_for(grads.spans);
  const ReleaseGil release(grads);
  cpu::clip_adaptive(grads.spans, weights.spans, units.data(), {p, clip_factor, eps}, threads);
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
      .def_readonly("empty", &HeldList::empty)
      .def("overlaps", &HeldList::overlaps)
      .def_property_readonly("columns",
                             [](const HeldList& list) { return py::bytes(list.columns()); });
  m.def("gradients", &gradients);
  m.def("read_tensors", &read_tensors);
  m.def("set_apart", &set_apart);
  m.def("from_columns", &from_columns);
  m.def("are_distinct", &are_distinct);
  m.def("unwrap", &unwrap);
  m.def("any_negative", &any_negative);
  m.def("cpu_norm", &cpu_norm);
  m.def("cpu_scale_", &cpu_scale);
  m.def("cpu_scale_each_", &cpu_scale_each);
  m.def("cpu_clip_each_", &cpu_clip_each);
  m.def("cpu_statistics", &cpu_statistics);
  m.def("cpu_clip_adaptive_", &cpu_clip_adaptive);
  m.def("cpu_clamp_", &cpu_clamp);
#ifdef GRADCLIP_EXT_WITH_CUDA
  define_cuda(m);
#endif
}
