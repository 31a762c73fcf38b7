// gradclip_ext._testing: entry points for tests, not built into wheels. Compares the kernels' index
// arithmetic with simple loops, and calls every CPU kernel of every instruction set directly.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/tensor_list.h"
#include "cpu/chunk_kernels.h"

namespace py = pybind11;

namespace gradclip {

namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("no such dtype: " + name);
}

TensorList list_of(const std::vector<int64_t>& numels, const std::vector<std::string>& dtypes,
                   int64_t chunk_bytes) {
  TensorList list(chunk_bytes);
  for (size_t i = 0; i < numels.size(); ++i) list.add(nullptr, numels[i], dtype_named(dtypes[i]));
  return list;
}

// ---------------------------------------------------------------- for one list

/// (tensor, offset, length) of every chunk, each found by its index.
std::vector<std::tuple<int64_t, int64_t, int64_t>> chunks(const std::vector<int64_t>& numels,
                                                          const std::vector<std::string>& dtypes,
                                                          int64_t chunk_bytes) {
  const TensorList list = list_of(numels, dtypes, chunk_bytes);
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  for (int64_t index = 0; index < list.chunks(); ++index) {
    const Chunk chunk = list.chunk(index, list.tensor_of(index));
    result.emplace_back(chunk.tensor, chunk.offset, chunk.length);
  }
  return result;
}

/// (first tensor, tensors, first chunk, chunks) of every kernel launch with the large table.
std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> launches(
    const std::vector<int64_t>& numels, const std::vector<std::string>& dtypes,
    int64_t chunk_bytes) {
  const TensorList list = list_of(numels, dtypes, chunk_bytes);
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> result;
  LaunchTable<kLargeLaunchTensors> table;
  for (int64_t first = 0; first < list.size(); first += table.tensors) {
    fill_launch(list, first, table);
    result.emplace_back(first, table.tensors, table.first_chunk, table.chunks());
  }
  return result;
}

std::tuple<int64_t, int64_t, int64_t> split(uint64_t address, int64_t numel, int64_t item_size,
                                            int64_t vector_bytes) {
  const VectorSplit result = split_vectors(address, numel, item_size, vector_bytes);
  return {result.head, result.body, result.tail};
}

/// "none", "duplicates" or "overlap" for memory at these addresses, all of one dtype.
std::string aliasing_of(const std::vector<uint64_t>& addresses, const std::vector<int64_t>& numels,
                        const std::string& dtype) {
  TensorList list(64);
  for (size_t i = 0; i < numels.size(); ++i) {
    list.add(reinterpret_cast<void*>(addresses[i]), numels[i], dtype_named(dtype));
  }
  const Aliasing found = aliasing(list);
  return found == Aliasing::kNone ? "none" : found == Aliasing::kOverlap ? "overlap" : "duplicates";
}

// ---------------------------------------------------------------- for millions of random lists

/// Random numbers (splitmix64), and the exception when a test with them fails.
class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed), state_(seed) {}

  int64_t below(int64_t limit) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return static_cast<int64_t>((z ^ z >> 31) % static_cast<uint64_t>(limit));
  }
  void expect(bool holds) const {
    if (!holds) throw std::runtime_error("unlike the simple way, seed " + std::to_string(seed_));
  }

 private:
  uint64_t seed_;
  uint64_t state_;
};

/// Cuts a random list into chunks and goes through them: each must be the one that is found by its
/// index, both in the list and in its launch.
void check_cut(Random& random) {
  const int64_t chunk_bytes = int64_t{8} << random.below(40);
  TensorList list(chunk_bytes);
  for (int64_t tensors = random.below(12); tensors != 0; --tensors) {
    const auto dtype = static_cast<DType>(random.below(kDTypes));
    const int64_t whole = random.below(4) * chunk_numel(dtype, chunk_bytes);
    list.add(nullptr, std::max<int64_t>(0, whole + random.below(3) - 1), dtype);
  }
  LaunchTable<3> launch;
  int64_t index = 0, in_launch = 0;
  for (int64_t tensor = 0; tensor < list.size(); ++tensor) {
    const int64_t max_length = chunk_numel(list[tensor].dtype, chunk_bytes);
    if (tensor % 3 == 0) {
      const int64_t next = fill_launch(list, tensor, launch);
      random.expect(next == std::min(tensor + 3, list.size()) && launch.first_chunk == index);
      in_launch = 0;
    }
    random.expect(launch.dtype(tensor % 3) == list[tensor].dtype);
    for (int64_t offset = 0; offset < list[tensor].numel;
         offset += max_length, ++index, ++in_launch) {
      random.expect(list.tensor_of(index) == tensor);
      random.expect(tensor_of(launch.chunk_prefix, launch.tensors, in_launch) == tensor % 3);
      const Chunk chunk = list.chunk(index, tensor);
      random.expect(chunk.tensor == tensor && chunk.offset == offset);
      random.expect(chunk.length == std::min(max_length, list[tensor].numel - offset));
      random.expect(chunk_bytes > 65536 ||
                    launch.numel(static_cast<int32_t>(in_launch), tensor % 3,
                                 static_cast<int32_t>(max_length)) == chunk.length);
    }
  }
  random.expect(index == list.chunks());
}

/// Splits random contiguous elements, and compares with a search for the first aligned element.
void check_split(Random& random) {
  const int64_t item_size = int64_t{1} << random.below(4), vector_bytes = 16 << random.below(3);
  const auto address = static_cast<uint64_t>(random.below(256) * (random.below(8) ? item_size : 1));
  const int64_t numel = random.below(200);
  const auto is_boundary = [&](int64_t element) {
    return (static_cast<int64_t>(address) + element * item_size) % vector_bytes == 0;
  };
  int64_t head = 0;
  while (head < numel && !is_boundary(head)) ++head;
  const int64_t body = (numel - head) * item_size / vector_bytes * vector_bytes / item_size;
  const VectorSplit split = split_vectors(address, numel, item_size, vector_bytes);
  random.expect(split.head == head && split.body == body && split.tail == numel - head - body);
}

/// Compares every pair of tensors in a random list whose tensors are disjoint, overlap or are
/// equal.
void check_aliasing(Random& random) {
  TensorList list(64);
  const int64_t space = int64_t{1} << random.below(20);
  for (int64_t tensors = random.below(12); tensors != 0; --tensors) {
    if (list.size() != 0 && random.below(8) == 0) {
      const Span again = list[random.below(list.size())];
      list.add(again.data, again.numel, again.dtype);
    } else {
      const auto dtype = static_cast<DType>(random.below(kDTypes));
      const int64_t address = random.below(space) * item_size(dtype);
      list.add(reinterpret_cast<void*>(address), random.below(6), dtype);
    }
  }
  bool overlap = false, duplicates = false;
  for (int64_t i = 0; i < list.size(); ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const Span &a = list[i], &b = list[j];
      const auto begin_a = reinterpret_cast<uintptr_t>(a.data);
      const auto begin_b = reinterpret_cast<uintptr_t>(b.data);
      const uint64_t end_a = begin_a + static_cast<uint64_t>(a.numel * item_size(a.dtype));
      const uint64_t end_b = begin_b + static_cast<uint64_t>(b.numel * item_size(b.dtype));
      if (std::max(begin_a, begin_b) >= std::min(end_a, end_b)) continue;
      const bool same = begin_a == begin_b && a.numel == b.numel && a.dtype == b.dtype;
      (same ? duplicates : overlap) = true;
    }
  }
  random.expect(aliasing(list) == (overlap      ? Aliasing::kOverlap
                                   : duplicates ? Aliasing::kDuplicates
                                                : Aliasing::kNone));
}

template <void check(Random&)>
void check_many(uint64_t first_seed, int64_t count) {
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    Random random(first_seed + static_cast<uint64_t>(i));
    check(random);
  }
}

// ---------------------------------------------------------------- kernels

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::ChunkKernels* kernels : cpu::usable_chunk_kernels()) {
    names.push_back(kernels->isa);
  }
  return names;
}

const cpu::ChunkKernels& kernels_of(const std::string& isa) {
  for (const cpu::ChunkKernels* kernels : cpu::usable_chunk_kernels()) {
    if (kernels->isa == isa) return *kernels;
  }
  throw py::value_error("no such instruction set: " + isa);
}

/// Runs one kernel on memory at an address, which the caller keeps alive; `x` and `y` are its other
/// arguments.
double run_kernel(const std::string& isa, const std::string& kernel, const std::string& dtype,
                  uint64_t address, int64_t numel, double x, double y) {
  const cpu::ChunkKernels& kernels = kernels_of(isa);
  const auto d = static_cast<int>(dtype_named(dtype));
  void* data = reinterpret_cast<void*>(address);
  if (kernel == "sum_squares") return kernels.sum_squares[d](data, numel);
  if (kernel == "sum_magnitudes") return kernels.sum_magnitudes[d](data, numel);
  if (kernel == "max_magnitude") return kernels.max_magnitude[d](data, numel);
  if (kernel == "sum_powers") return kernels.sum_powers[d](data, numel, x, y);
  if (kernel.rfind("statistics.", 0) == 0) {
    cpu::ChunkStatistics found;
    kernels.statistics[d](data, numel, &found);
    if (kernel == "statistics.sum_squares") return found.sum_squares;
    if (kernel == "statistics.largest") return found.largest;
    if (kernel == "statistics.zeros") return static_cast<double>(found.zeros);
    if (kernel == "statistics.nonfinite") return static_cast<double>(found.nonfinite);
  }
  if (kernel == "scale") return kernels.scale[d](data, numel, x), 0;
  if (kernel == "clamp") return kernels.clamp[d](data, numel, x, y), 0;
  throw py::value_error("no such kernel: " + kernel);
}

std::vector<double> unit_sums(const std::string& isa, const std::string& dtype, uint64_t address,
                              int64_t units, int64_t length) {
  std::vector<double> sums(static_cast<size_t>(units));
  kernels_of(isa).unit_sums[static_cast<int>(dtype_named(dtype))](
      reinterpret_cast<const void*>(address), units, length, sums.data());
  return sums;
}

/// There are as many units as coefficients.
void scale_units(const std::string& isa, const std::string& dtype, uint64_t address, int64_t length,
                 const std::vector<double>& coefs) {
  kernels_of(isa).scale_units[static_cast<int>(dtype_named(dtype))](
      reinterpret_cast<void*>(address), static_cast<int64_t>(coefs.size()), length, coefs.data());
}

}  // namespace

}  // namespace gradclip

PYBIND11_MODULE(_testing, m) {
  using namespace gradclip;
  m.def("chunks", &chunks);
  m.def("launches", &launches);
  m.def("split", &split);
  m.def("aliasing", &aliasing_of);
  m.def("check_cuts", &check_many<check_cut>);
  m.def("check_splits", &check_many<check_split>);
  m.def("check_aliasing", &check_many<check_aliasing>);
  m.def("instruction_sets", &instruction_sets);
  m.def("run_kernel", &run_kernel, py::arg("isa"), py::arg("kernel"), py::arg("dtype"),
        py::arg("address"), py::arg("numel"), py::arg("x") = 0.0, py::arg("y") = 0.0);
  m.def("unit_sums", &unit_sums);
  m.def("scale_units", &scale_units);
}
