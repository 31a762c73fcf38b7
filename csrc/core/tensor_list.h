// The list of gradients of one call, and how it is cut into chunks of work.
//
// Plain C++17 without torch. The functions marked GRADCLIP_HOST_DEVICE are the index arithmetic
// that every kernel runs, on the CPU and in CUDA; tests/kernels/test_index_arithmetic.py checks
// them from Python.
//
//   tensor   0          1   2 (empty)  3
//   chunks   0  1  2    3              4  5        chunk_prefix = {0, 3, 4, 4, 6}
//
// A chunk never crosses a tensor. The cut depends on sizes and dtypes alone, so a partial result
// stored at a chunk's index is the same for any number of threads, any grid and any address.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GRADCLIP_HOST_DEVICE __host__ __device__
#else
#define GRADCLIP_HOST_DEVICE
#endif

namespace gradclip {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

/// log2 of an element's size, so that a shift divides by the size.
GRADCLIP_HOST_DEVICE constexpr int item_shift(DType dtype) {
  return dtype == DType::kFloat64 ? 3 : dtype == DType::kFloat32 ? 2 : 1;
}
GRADCLIP_HOST_DEVICE constexpr int64_t item_size(DType dtype) {
  return int64_t{1} << item_shift(dtype);
}

/// One gradient: `numel` elements without gaps between them, in the order of their addresses.
struct Span {
  void* data;
  int64_t numel;
  DType dtype;
};

/// The order in which chunks are processed. Scaling goes backwards, because the chunks that the
/// norm read last are still in cache.
enum class Order { kForward, kBackward };

/// `length` elements of one tensor, from element `offset` on.
struct Chunk {
  int64_t tensor;
  int64_t offset;
  int64_t length;
};

// ---------------------------------------------------------------- chunks

/// The number of elements of a full chunk of `chunk_bytes`, a multiple of 8.
GRADCLIP_HOST_DEVICE constexpr int64_t chunk_numel(DType dtype, int64_t chunk_bytes) {
  return chunk_bytes >> item_shift(dtype);
}

/// The number of chunks of a tensor; an empty tensor has none.
GRADCLIP_HOST_DEVICE constexpr int64_t chunk_count(int64_t numel, int64_t chunk_numel) {
  if (numel <= chunk_numel) return numel != 0;  // most tensors of a model, without a division
  return (numel - 1) / chunk_numel + 1;
}

/// The tensor that holds a chunk: the only t with prefix[t] <= chunk < prefix[t + 1], found in
/// log2(tensors) steps. `prefix` has tensors + 1 entries, the first is 0, the last exceeds `chunk`.
template <typename Index>
GRADCLIP_HOST_DEVICE constexpr int64_t tensor_of(const Index* prefix, int64_t tensors,
                                                 int64_t chunk) {
  Index low = 0, high = static_cast<Index>(tensors);  // prefix[low] <= chunk < prefix[high]
  while (high - low > 1) {
    const Index middle = low + (high - low) / 2;
    if (prefix[middle] <= static_cast<Index>(chunk)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Chunk number `index` of the tensor `tensor` that has `numel` elements.
GRADCLIP_HOST_DEVICE constexpr Chunk chunk_of(int64_t tensor, int64_t index, int64_t numel,
                                              int64_t chunk_numel) {
  const int64_t offset = index * chunk_numel, remaining = numel - offset;
  return {tensor, offset, remaining < chunk_numel ? remaining : chunk_numel};
}

// ---------------------------------------------------------------- vectors

/// How a kernel accesses contiguous elements: `head` of them one by one up to the first address
/// that is aligned to a vector, then `body` in whole vectors, then `tail` one by one.
struct VectorSplit {
  int64_t head;
  int64_t body;
  int64_t tail;
};

/// Splits `numel` elements at `address`. All elements are head where no element begins at an
/// aligned address.
GRADCLIP_HOST_DEVICE constexpr VectorSplit split_vectors(uint64_t address, int64_t numel,
                                                         int64_t item_size, int64_t vector_bytes) {
  const int64_t misaligned = static_cast<int64_t>(address % static_cast<uint64_t>(vector_bytes));
  const int64_t head_bytes = misaligned == 0 ? 0 : vector_bytes - misaligned;
  if (head_bytes % item_size != 0 || head_bytes / item_size >= numel) return {numel, 0, 0};
  const int64_t head = head_bytes / item_size, per_vector = vector_bytes / item_size;
  const int64_t body = (numel - head) / per_vector * per_vector;
  return {head, body, numel - head - body};
}

// ---------------------------------------------------------------- the list

/// The gradients of one call and their chunks. Built on the host; takes 33 bytes per tensor.
class TensorList {
 public:
  explicit TensorList(int64_t chunk_bytes) : chunk_bytes_(chunk_bytes), chunk_prefix_{0} {}

  void reserve(int64_t tensors) {
    grads_.reserve(static_cast<size_t>(tensors));
    chunk_prefix_.reserve(static_cast<size_t>(tensors) + 1);
  }

  void add(void* data, int64_t numel, DType dtype) {
    grads_.push_back({data, numel, dtype});
    chunk_prefix_.push_back(chunks() + chunk_count(numel, chunk_numel(dtype, chunk_bytes_)));
    bytes_ += numel * item_size(dtype);
    numel_ += numel;
    dtypes_ |= 1u << static_cast<unsigned>(dtype);
  }

  /// The list of its float64 tensors, or of all others.
  TensorList only(bool are_float64) const {
    TensorList result(chunk_bytes_);
    for (const Span& grad : grads_) {
      const bool is_float64 = grad.dtype == DType::kFloat64;
      if (is_float64 == are_float64) result.add(grad.data, grad.numel, grad.dtype);
    }
    return result;
  }

  int64_t size() const { return static_cast<int64_t>(grads_.size()); }
  int64_t chunks() const { return chunk_prefix_.back(); }
  int64_t bytes() const { return bytes_; }
  int64_t numel() const { return numel_; }
  bool holds(DType dtype) const { return dtypes_ >> static_cast<unsigned>(dtype) & 1u; }
  const Span& operator[](int64_t tensor) const { return grads_[static_cast<size_t>(tensor)]; }
  const int64_t* chunk_prefix() const { return chunk_prefix_.data(); }

  int64_t tensor_of(int64_t chunk) const {
    return gradclip::tensor_of(chunk_prefix(), size(), chunk);
  }

  /// The chunk with this index, which belongs to `tensor`.
  Chunk chunk(int64_t index, int64_t tensor) const {
    const Span& grad = (*this)[tensor];
    return chunk_of(tensor, index - chunk_prefix()[tensor], grad.numel,
                    chunk_numel(grad.dtype, chunk_bytes_));
  }

 private:
  int64_t chunk_bytes_;
  int64_t bytes_ = 0;
  int64_t numel_ = 0;
  unsigned dtypes_ = 0;  // bit d: some gradient has DType d
  std::vector<Span> grads_;
  std::vector<int64_t> chunk_prefix_;
};

// ---------------------------------------------------------------- aliasing

enum class Aliasing {
  kNone,        // no byte belongs to two gradients
  kDuplicates,  // gradients that share bytes have the same address, numel and dtype
  kOverlap,     // two gradients share bytes and differ in address, numel or dtype
};

namespace detail {

struct SpanStart {
  uint64_t begin;
  int64_t tensor;
};

inline uint64_t begin_of(const Span& grad) { return reinterpret_cast<uintptr_t>(grad.data); }
inline uint64_t end_of(const Span& grad) {
  return begin_of(grad) + static_cast<uint64_t>(grad.numel * item_size(grad.dtype));
}

/// Sorts by `begin`, up to 11 bits of the key per pass, from the lowest to the highest bit in which
/// two keys differ. Two or three passes take 2 ns per entry each; std::sort takes up to 35 ns per
/// entry.
inline void sort_by_begin(std::vector<SpanStart>& starts) {
  uint64_t differing = 0;
  for (const SpanStart& start : starts) differing |= start.begin ^ starts.front().begin;
  int low = 0, high = 64;
  while (low < high && (differing >> low & 1) == 0) ++low;
  while (low < high && (differing >> (high - 1) & 1) == 0) --high;
  const int passes = (high - low + 10) / 11, bits = passes == 0 ? 0 : (high - low - 1) / passes + 1;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  const size_t count = starts.size();
  std::vector<SpanStart> buffer(count);
  SpanStart *from = starts.data(), *to = buffer.data();
  for (int shift = low; shift < high; shift += bits) {
    uint32_t offsets[(1 << 11) + 1] = {};
    for (size_t i = 0; i < count; ++i) ++offsets[(from[i].begin >> shift & mask) + 1];
    for (uint64_t digit = 0; digit < mask; ++digit) offsets[digit + 1] += offsets[digit];
    for (size_t i = 0; i < count; ++i) to[offsets[from[i].begin >> shift & mask]++] = from[i];
    std::swap(from, to);
  }
  if (from != starts.data()) starts.swap(buffer);
}

}  // namespace detail

/// Tells whether gradients share memory; empty ones never do. Takes linear time if the addresses
/// ascend or descend; otherwise they are sorted first.
inline Aliasing aliasing(const TensorList& list) {
  bool ascending = true, descending = true;
  uint64_t last_begin = UINT64_MAX, last_end = 0;
  for (int64_t tensor = 0; tensor < list.size(); ++tensor) {
    const Span& grad = list[tensor];
    if (grad.numel == 0) continue;
    const uint64_t begin = detail::begin_of(grad), end = detail::end_of(grad);
    ascending &= last_end <= begin;
    descending &= end <= last_begin;
    last_begin = begin;
    last_end = end;
  }
  if (ascending || descending) return Aliasing::kNone;
  std::vector<detail::SpanStart> starts(static_cast<size_t>(list.size()));
  size_t count = 0;
  for (int64_t tensor = 0; tensor < list.size(); ++tensor) {
    if (list[tensor].numel == 0) continue;
    starts[count++] = {detail::begin_of(list[tensor]), tensor};
  }
  starts.resize(count);
  detail::sort_by_begin(starts);
  Aliasing found = Aliasing::kNone;
  const Span* before = &list[starts.front().tensor];
  for (size_t i = 1; i < starts.size(); ++i) {
    const Span* after = &list[starts[i].tensor];
    if (detail::end_of(*before) > starts[i].begin) {
      const bool same = before->data == after->data && before->numel == after->numel &&
                        before->dtype == after->dtype;
      if (!same) return Aliasing::kOverlap;
      found = Aliasing::kDuplicates;
    }
    before = after;
  }
  return found;
}

// ---------------------------------------------------------------- one kernel launch

// The parameters of a launch, at most: 4 KiB before CUDA 12.1 or before sm_70, 32,764 bytes since
// then. A launch with 32 KB takes an H200 2.2 us longer than one with 4 KB, so the most usual
// kernels have a size between for models of a few hundred tensors. Part of each is reserved for the
// kernel's other parameters.
constexpr int64_t kSmallLaunchBytes = 4096;
constexpr int64_t kMediumLaunchBytes = 8704;
constexpr int64_t kLargeLaunchBytes = 32764;
constexpr int64_t kOtherParameterBytes = 128;

/// The tensors of one launch, passed by value; 14 bytes per tensor, and 20 beside.
template <int kCapacity>
struct LaunchTable {
  uint64_t data_and_dtype[kCapacity];  // no address uses the two highest bits
  int64_t first_chunk;                 // the index in the whole list of the launch's first chunk
  int32_t first_tensor;                // and of its first tensor
  int32_t tensors;
  int32_t chunk_prefix[kCapacity + 1];  // counted from first_chunk
  uint16_t last_chunk_numel_less_1[kCapacity];

  GRADCLIP_HOST_DEVICE int32_t chunks() const { return chunk_prefix[tensors]; }
  GRADCLIP_HOST_DEVICE char* data(int64_t tensor) const {
    return reinterpret_cast<char*>(data_and_dtype[tensor] & kAddressBits);
  }
  GRADCLIP_HOST_DEVICE DType dtype(int64_t tensor) const {
    return static_cast<DType>(data_and_dtype[tensor] >> kDTypeShift);
  }
  /// The number of elements of a chunk of `tensor`. All but its last have `chunk_numel`.
  GRADCLIP_HOST_DEVICE int32_t numel(int32_t chunk, int64_t tensor, int32_t chunk_numel) const {
    const bool is_last = chunk + 1 == chunk_prefix[tensor + 1];
    return is_last ? last_chunk_numel_less_1[tensor] + 1 : chunk_numel;
  }

  static constexpr int kDTypeShift = 62;
  static constexpr uint64_t kAddressBits = (uint64_t{1} << kDTypeShift) - 1;
};

constexpr int launch_capacity(int64_t parameter_bytes) {
  return static_cast<int>((parameter_bytes - kOtherParameterBytes - 24) / 14);
}
constexpr int kSmallLaunchTensors = launch_capacity(kSmallLaunchBytes);    // 281
constexpr int kMediumLaunchTensors = launch_capacity(kMediumLaunchBytes);  // 610
constexpr int kLargeLaunchTensors = launch_capacity(kLargeLaunchBytes);    // 2,329
static_assert(sizeof(LaunchTable<kSmallLaunchTensors>) + kOtherParameterBytes <= kSmallLaunchBytes);
static_assert(sizeof(LaunchTable<kMediumLaunchTensors>) + kOtherParameterBytes <=
              kMediumLaunchBytes);
static_assert(sizeof(LaunchTable<kLargeLaunchTensors>) + kOtherParameterBytes <= kLargeLaunchBytes);

/// Returns the end of a launch that begins at tensor `first` and holds at most `max_tensors`
/// tensors and 2^31 - 1 chunks. A launch holds whole tensors, so no tensor may have more chunks
/// than that.
inline int64_t launch_end(const TensorList& list, int64_t first, int64_t max_tensors) {
  const int64_t* prefix = list.chunk_prefix();
  const int64_t last = std::min(first + max_tensors, list.size());
  return std::upper_bound(prefix + first + 1, prefix + last + 1, prefix[first] + INT32_MAX) -
         prefix - 1;
}

/// Fills `table` with the tensors of the launch that begins at `first`; returns its end. Chunks
/// have at most 65,536 elements.
template <int kCapacity>
int64_t fill_launch(const TensorList& list, int64_t first, LaunchTable<kCapacity>& table) {
  const int64_t* prefix = list.chunk_prefix();
  const int64_t end = launch_end(list, first, kCapacity);
  table.first_chunk = prefix[first];
  table.first_tensor = static_cast<int32_t>(first);
  table.chunk_prefix[0] = 0;
  table.tensors = 0;
  for (int64_t tensor = first; tensor < end; ++tensor) {
    const Span& grad = list[tensor];
    const Chunk last = list.chunk(prefix[tensor + 1] - 1, tensor);
    table.data_and_dtype[table.tensors] =
        reinterpret_cast<uint64_t>(grad.data) | static_cast<uint64_t>(grad.dtype)
                                                    << LaunchTable<kCapacity>::kDTypeShift;
    table.last_chunk_numel_less_1[table.tensors] = static_cast<uint16_t>(last.length - 1);
    table.chunk_prefix[++table.tensors] = static_cast<int32_t>(prefix[tensor + 1] - prefix[first]);
  }
  return end;
}

}  // namespace gradclip
