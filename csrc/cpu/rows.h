// Rows: the unit that kernels process, and how each dtype is converted to one. Included only by
// isa_*.cpp.

#pragma once

#include "vec.h"

namespace gradclip::cpu::GRADCLIP_ISA {

// A row is 64 elements, or 32 of float64: converted to the type that is computed in, they fill 256
// bytes of vectors. Element i of a chunk is always element i % 64 (i % 32) of its row, so a result
// depends neither on the address nor on how chunks are divided among threads.
constexpr int kRowBytes = 256;
constexpr int kVectors = kRowBytes / kVectorBytes;

template <typename V>
struct Row {
  V v[kVectors];
};

// ---------------------------------------------------------------- formats

/// A dtype that is computed in without conversion.
template <typename T, typename B, typename V>
struct Native {
  using Item = T;
  using Bits = B;
  using Vec = V;
  static constexpr int64_t kRow = kRowBytes / sizeof(T);

  static GRADCLIP_INLINE Row<V> load_row(const T* x) {
    Row<V> row;
    GRADCLIP_UNROLL
    for (int i = 0; i < kVectors; ++i) row.v[i] = load<V>(x + i * kLanes<V>);
    return row;
  }
  static GRADCLIP_INLINE void store_row(T* x, const Row<V>& row) {
    GRADCLIP_UNROLL
    for (int i = 0; i < kVectors; ++i) store(x + i * kLanes<V>, row.v[i]);
  }
};

using Float32 = Native<float, I32, F32>;
using Float64 = Native<double, I64, F64>;

/// A dtype of 16 bits that is converted to float32.
struct Half {
  using Item = uint16_t;
  using Bits = I16;
  using Vec = F32;
  static constexpr int64_t kRow = kRowBytes / 4;
};

/// A bfloat16 is the upper half of a float32. Two elements are read as one 32-bit word: the even
/// one is in the lower half and the odd one in the upper half (little-endian). A shift or a mask
/// converts them, and no element has to move to another lane.
struct BFloat16 : Half {
  static GRADCLIP_INLINE Row<F32> load_row(const Item* x) {
    Row<F32> row;
    GRADCLIP_UNROLL
    for (int i = 0; i < kVectors; i += 2) {
      const U32 pairs = load<U32>(x + i * kLanes<F32>);
      row.v[i] = (F32)(pairs << 16);
      row.v[i + 1] = (F32)(pairs & 0xffff0000u);
    }
    return row;
  }
  static GRADCLIP_INLINE void store_row(Item* x, const Row<F32>& row) {
    GRADCLIP_UNROLL
    for (int i = 0; i < kVectors; i += 2) {
      const U32 even = round(row.v[i]) >> 16, odd = round(row.v[i + 1]) & 0xffff0000u;
      store(x + i * kLanes<F32>, even | odd);
    }
  }
  /// As many elements as a vector has floats, in their order, and back.
  static GRADCLIP_INLINE F32 widen(const Item* x) {
    return (F32)(__builtin_convertvector(load<HalfU16>(x), U32) << 16);
  }
  static GRADCLIP_INLINE void narrow(Item* to, F32 x) {
    store(to, __builtin_convertvector(round(x) >> 16, HalfU16));
  }

 private:
  /// Rounds to nearest, ties to even, into the upper half of each word; NaN becomes a quiet NaN.
  static GRADCLIP_INLINE U32 round(F32 x) {
    const U32 bits = (U32)x;
    const U32 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return x == x ? rounded : bits | 0x00400000u;
  }
};

struct Float16 : Half {
  static GRADCLIP_INLINE Row<F32> load_row(const Item* x) {
    Row<F32> row;
    GRADCLIP_UNROLL
    for (int i = 0; i < kVectors; ++i) row.v[i] = load_halves(x + i * kLanes<F32>);
    return row;
  }
  static GRADCLIP_INLINE void store_row(Item* x, const Row<F32>& row) {
    GRADCLIP_UNROLL
    for (int i = 0; i < kVectors; ++i) store_halves(x + i * kLanes<F32>, row.v[i]);
  }
  static GRADCLIP_INLINE F32 widen(const Item* x) { return load_halves(x); }
  static GRADCLIP_INLINE void narrow(Item* to, F32 x) { store_halves(to, x); }
};

/// Returns a number rounded to the format, in every lane.
template <typename Format>
GRADCLIP_INLINE typename Format::Vec rounded(double number) {
  using Vec = typename Format::Vec;
  Row<Vec> row = {};
  row.v[0][0] = static_cast<LaneOf<Vec>>(number);
  typename Format::Item items[Format::kRow];
  Format::store_row(items, row);
  return Format::load_row(items).v[0][0] - Vec{};  // adding 0 would turn -0 into +0
}

// ---------------------------------------------------------------- chunks by rows

// AVX-512 reads and writes the last few elements of a tensor under a mask, which halves the time of
// a small tensor. The address sanitizer checks neither masked accesses nor every short memcpy.
#if GRADCLIP_VECTOR_BYTES == 64 && !defined(__SANITIZE_ADDRESS__)

GRADCLIP_INLINE __mmask64 first_bytes(int64_t bytes) {
  return bytes >= 64 ? ~0ull : bytes > 0 ? ~0ull >> (64 - bytes) : 0;
}

/// Reads `count` elements, less than a row, and fills the row with zeros.
template <typename Format>
GRADCLIP_INLINE void read_part(typename Format::Item* row, const void* from, int64_t count) {
  constexpr int64_t kItem = sizeof(typename Format::Item);
  GRADCLIP_UNROLL
  for (int64_t at = 0; at < Format::kRow * kItem; at += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(count * kItem - at),
                                                  static_cast<const char*>(from) + at);
    store(reinterpret_cast<char*>(row) + at, bytes);
  }
}

/// Writes the first `count` elements of a row.
template <typename Format>
GRADCLIP_INLINE void write_part(void* to, const typename Format::Item* row, int64_t count) {
  constexpr int64_t kItem = sizeof(typename Format::Item);
  GRADCLIP_UNROLL
  for (int64_t at = 0; at < Format::kRow * kItem; at += 64) {
    _mm512_mask_storeu_epi8(static_cast<char*>(to) + at, first_bytes(count * kItem - at),
                            load<__m512i>(reinterpret_cast<const char*>(row) + at));
  }
}

#else

/// Copies `count` elements, less than a row. Calling memcpy would take longer than all other work
/// on a small tensor.
template <typename Item>
GRADCLIP_INLINE void copy_part(Item* to, const Item* from, int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
#else
  GRADCLIP_UNROLL
  for (int64_t size = kRowBytes / 8; size != 0; size /= 2) {
    if ((count & size) == 0) continue;
    __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(Item));
    to += size;
    from += size;
  }
#endif
}

/// Reads `count` elements, less than a row, and fills the row with zeros.
template <typename Format>
GRADCLIP_INLINE void read_part(typename Format::Item* row, const typename Format::Item* from,
                               int64_t count) {
  __builtin_memset(row, 0, Format::kRow * sizeof(typename Format::Item));
  copy_part(row, from, count);
}

/// Writes the first `count` elements of a row.
template <typename Format>
GRADCLIP_INLINE void write_part(typename Format::Item* to, const typename Format::Item* row,
                                int64_t count) {
  copy_part(to, row, count);
}

#endif

/// Calls `kernel.rows(x, count)` for the elements of a chunk: first for its whole rows in place,
/// then for the remaining elements, copied to a row that is padded with zeros. Unless `data` is
/// const, that row is written back.
template <typename Format, typename Kernel, typename Data>
GRADCLIP_INLINE void for_rows(Kernel& kernel, Data* data, int64_t numel) {
  using Item = typename Format::Item;
  constexpr bool kIsConst = std::is_const_v<Data>;
  auto* x = static_cast<std::conditional_t<kIsConst, const Item, Item>*>(data);
  const int64_t rows = numel / Format::kRow, remaining = numel % Format::kRow;
  if (rows != 0) kernel.rows(x, rows);
  if (remaining != 0) {
    Item last[Format::kRow];
    read_part<Format>(last, x + rows * Format::kRow, remaining);
    kernel.rows(last, 1);
    if constexpr (!kIsConst) write_part<Format>(x + rows * Format::kRow, last, remaining);
  }
}

// ---------------------------------------------------------------- rows of several places in turn

// A core that reads memory in four places waits for it less than one that reads in one: an AMD EPYC
// takes float32 at 21 GB/s instead of 17. Sums of half types do not gain: they read half the bytes
// for the same work.
constexpr int64_t kStreams = 4;
// What is shorter is in cache soon, or already.
constexpr int64_t kStreamedRows = 64;
template <typename Format>
constexpr bool kSumsInStreams = sizeof(typename Format::Item) >= 4;

// The number of terms that a lane adds in float32 before the sum is added to a float64 one. Adding
// n terms of one sign rounds n times, each time by at most 2^-24 of the sum. With 16 terms, the
// error of a sum is at most 16 x 2^-24 = 9.5e-7 and that of its square root 4.8e-7, whatever the
// values and however many sums are added in float64.
constexpr int64_t kFoldRows = 16;

/// Calls add(row) for each of `count` rows, and fold() after kFoldRows of them or fewer. The order
/// depends on `count` alone: rows of the four quarters in turn, if kInStreams, or one after the
/// other. Each is called in one place, because the compiler copies them there.
template <typename Format, bool kInStreams, typename Add, typename Fold>
GRADCLIP_INLINE void read_rows(const typename Format::Item* x, int64_t count, const Add& add,
                               const Fold& fold) {
  while (count != 0) {
    const int64_t streams = kInStreams && count >= kStreamedRows ? kStreams : 1;
    const int64_t rows = streams == 1 ? count : count / kStreams, stride = rows * Format::kRow;
    const int64_t most = streams == 1 ? kFoldRows : kFoldRows / kStreams;
    for (int64_t left = rows; left != 0;) {
      int64_t fold_rows = left < most ? left : most;
      left -= fold_rows;
      for (; fold_rows != 0; --fold_rows, x += Format::kRow) {
        for (int64_t stream = 0; stream != streams; ++stream) add(x + stream * stride);
      }
      fold();
    }
    x += (streams - 1) * stride;
    count -= streams * rows;
  }
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
