// Norm kernels: the partial result of one chunk. Included only by isa_*.cpp.

#pragma once

#include "power.h"
#include "rows.h"

namespace gradclip::cpu::GRADCLIP_ISA {

// ---------------------------------------------------------------- maximum

/// Finds the largest magnitude by comparing bit patterns: without the sign bit, IEEE numbers have
/// the order of integers, and NaN is above infinity.
template <typename Format>
struct MaxMagnitude {
  using Bits = typename Format::Bits;
  static constexpr int kVectorsPerRow = Format::kRow / kLanes<Bits>;
  Bits largest = {};

  void rows(const typename Format::Item* x, int64_t count) {
    constexpr auto kMagnitude = std::numeric_limits<LaneOf<Bits>>::max();
    Bits max_bits[2] = {largest, largest};
    for (; count != 0; --count, x += Format::kRow) {
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectorsPerRow; ++i) {
        const Bits bits = load<Bits>(x + i * kLanes<Bits>) & kMagnitude;
        max_bits[i % 2] = bits > max_bits[i % 2] ? bits : max_bits[i % 2];
      }
    }
    largest = max_bits[0] > max_bits[1] ? max_bits[0] : max_bits[1];
  }
};

template <typename Format>
double max_magnitude(const void* data, int64_t numel) {
  using Bits = typename Format::Bits;
  MaxMagnitude<Format> kernel;
  for_rows<Format>(kernel, data, numel);
  LaneOf<Bits> largest = 0;
  for (int i = 0; i < kLanes<Bits>; ++i) {
    largest = kernel.largest[i] > largest ? kernel.largest[i] : largest;
  }
  typename Format::Item row[Format::kRow] = {};
  __builtin_memcpy(row, &largest, sizeof largest);
  return Format::load_row(row).v[0][0];
}

// ---------------------------------------------------------------- terms of the sum

struct Square {
  template <typename V>
  GRADCLIP_INLINE V add(V sum, V x) const {
    return sum + x * x;
  }
};

struct Magnitude {
  template <typename V>
  GRADCLIP_INLINE V add(V sum, V x) const {
    return sum + magnitude(x);
  }
};

/// |x / pivot|^p as a power of 2.
struct Power {
  double p, exponent, fraction;  // pivot = 2^(exponent + fraction)

  GRADCLIP_INLINE F64 add(F64 sum, F64 x) const {
    const F64 m = magnitude(x);
    const F64 power = exp2(p * log2_ratio(m, exponent, fraction));
    const I64 in_domain = (m > 0.0) & (m <= DBL_MAX);  // 0, inf and NaN are their own powers
    return sum + (in_domain ? power : m);
  }
};

// ---------------------------------------------------------------- float64 arithmetic

/// Adds the terms of rows in float64.
template <typename Format, typename Term>
struct Float64Sum {
  Term term;
  F64 low = {}, high = {};

  void rows(const typename Format::Item* x, int64_t count) {
    F64 l = low, h = high;
    for (; count != 0; --count, x += Format::kRow) {
      const auto row = Format::load_row(x);
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (std::is_same_v<typename Format::Vec, F32>) {
          const PairF64 pair = to_float64(row.v[i]);
          l = term.add(l, pair.low);
          h = term.add(h, pair.high);
        } else {
          (i % 2 == 0 ? l : h) = term.add(i % 2 == 0 ? l : h, row.v[i]);
        }
      }
    }
    low = l;
    high = h;
  }
};

template <typename Format, typename Term>
double sum_in_float64(const void* data, int64_t numel, Term term) {
  Float64Sum<Format, Term> kernel{term};
  for_rows<Format>(kernel, data, numel);
  return sum(kernel.low + kernel.high);
}

template <typename Format>
double sum_powers(const void* data, int64_t numel, double p, double pivot) {
  const int exponent = std::ilogb(pivot);
  const double fraction = std::log2(std::scalbn(pivot, -exponent));
  return sum_in_float64<Format>(data, numel, Power{p, static_cast<double>(exponent), fraction});
}

// ---------------------------------------------------------------- float32 arithmetic

// The number of terms that a lane adds in float32 before the sum is added to a float64 one. Adding
// n terms of one sign rounds n times, each time by at most 2^-24 of the sum. With 16 terms, the
// error of a sum is at most 16 x 2^-24 = 9.5e-7 and that of its square root 4.8e-7, whatever the
// values and however many sums are added in float64.
constexpr int64_t kFoldRows = 16;

GRADCLIP_INLINE void add_in_float64(F64& low, F64& high, const Row<F32>& sums) {
  GRADCLIP_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const PairF64 pair = to_float64(sums.v[i]);
    low += pair.low;
    high += pair.high;
  }
}

/// Adds the terms of rows in float32, kFoldRows at a time, and adds those sums in float64.
template <typename Format, typename Term>
struct Float32Sum {
  Term term;
  F64 low = {}, high = {};

  void rows(const typename Format::Item* x, int64_t count) {
    F64 l = low, h = high;
    while (count != 0) {
      const int64_t fold = count < kFoldRows ? count : kFoldRows;
      count -= fold;
      Row<F32> sums = {};
      for (const auto* end = x + fold * Format::kRow; x != end; x += Format::kRow) {
        const Row<F32> row = Format::load_row(x);
        GRADCLIP_UNROLL
        for (int i = 0; i < kVectors; ++i) sums.v[i] = term.add(sums.v[i], row.v[i]);
      }
      add_in_float64(l, h, sums);
    }
    low = l;
    high = h;
  }
};

/// Tells whether a float32 sum of a chunk neither overflowed nor may have lost terms to underflow.
/// If denormals are flushed to zero, a term loses up to 2^-126 = 1.2e-38. The 32,768 terms of the
/// longest chunk together lose 3.9e-34, less than 4e-7 of the smallest total that passes.
inline bool is_exact(double total) { return total >= 1e-27 && total <= DBL_MAX; }

/// Adds the terms of a chunk in float32, and once more in float64 if that sum is not exact. The
/// second pass reads the chunk from cache.
template <typename Format, typename Term>
double sum_terms(const void* data, int64_t numel) {
  if constexpr (std::is_same_v<typename Format::Vec, F64>) {
    return sum_in_float64<Format>(data, numel, Term{});
  } else {
    Float32Sum<Format, Term> kernel{Term{}};
    for_rows<Format>(kernel, data, numel);
    const double total = sum(kernel.low + kernel.high);
    if (is_exact(total)) return total;
    if (total == 0 && max_magnitude<Format>(data, numel) == 0) return 0;
    return sum_in_float64<Format>(data, numel, Term{});
  }
}

template <typename Format>
double sum_squares(const void* data, int64_t numel) {
  return sum_terms<Format, Square>(data, numel);
}

template <typename Format>
double sum_magnitudes(const void* data, int64_t numel) {
  return sum_terms<Format, Magnitude>(data, numel);
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
