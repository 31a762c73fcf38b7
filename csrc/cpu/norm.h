// Norm kernels: what one chunk adds to a norm. Included only by isa_*.cpp.

#pragma once

#include "power.h"
#include "rows.h"

namespace gradclip::cpu::GRADCLIP_ISA {

// ---------------------------------------------------------------- maximum

/// Finds the largest magnitude on the bit patterns: without their sign, IEEE numbers are ordered
/// as integers, and NaN is above infinity.
template <typename Format>
struct MaxBits {
  using Bits = typename Format::Bits;
  static constexpr int kVectorsPerRow = Format::kRow / kLanes<Bits>;
  Bits largest = {};

  void rows(const typename Format::Item* x, int64_t count) {
    constexpr auto kMagnitude = std::numeric_limits<LaneOf<Bits>>::max();
    Bits most[2] = {largest, largest};
    for (; count != 0; --count, x += Format::kRow) {
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectorsPerRow; ++i) {
        const Bits bits = load<Bits>(x + i * kLanes<Bits>) & kMagnitude;
        most[i % 2] = bits > most[i % 2] ? bits : most[i % 2];
      }
    }
    largest = most[0] > most[1] ? most[0] : most[1];
  }
};

template <typename Format>
double max_magnitude(const void* data, int64_t numel) {
  using Bits = typename Format::Bits;
  MaxBits<Format> kernel;
  read_rows<Format>(kernel, data, numel);
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
    const I64 ordinary = (m > 0.0) & (m <= DBL_MAX);  // 0, inf and NaN are their own powers
    return sum + (ordinary ? power : m);
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
          const WideF64 wide = widen(row.v[i]);
          l = term.add(l, wide.low);
          h = term.add(h, wide.high);
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
  read_rows<Format>(kernel, data, numel);
  return sum(kernel.low + kernel.high);
}

template <typename Format>
double sum_powers(const void* data, int64_t numel, double p, double pivot) {
  const int exponent = std::ilogb(pivot);
  const double fraction = std::log2(std::scalbn(pivot, -exponent));
  return sum_in_float64<Format>(data, numel, Power{p, static_cast<double>(exponent), fraction});
}

// ---------------------------------------------------------------- float32 arithmetic

// Terms that a lane adds in float32 before the sums move to float64. Adding n terms of one sign
// rounds n times, by 2^-24 of the sum at most: 16 of them keep a sum within 16 x 2^-24 = 9.5e-7,
// its square root within 4.8e-7, whatever the values and however many follow in float64.
constexpr int64_t kFoldRows = 16;

/// Adds the terms of rows in float32, a few at a time, and those sums in float64.
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
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const WideF64 wide = widen(sums.v[i]);
        l += wide.low;
        h += wide.high;
      }
    }
    low = l;
    high = h;
  }
};

/// Adds the terms of a chunk: in float32, and again in float64 where that overflowed or may have
/// lost something to underflow. The second pass finds the chunk in cache.
template <typename Format, typename Term>
double sum_terms(const void* data, int64_t numel) {
  if constexpr (std::is_same_v<typename Format::Vec, F64>) {
    return sum_in_float64<Format>(data, numel, Term{});
  } else {
    Float32Sum<Format, Term> kernel{Term{}};
    read_rows<Format>(kernel, data, numel);
    const double total = sum(kernel.low + kernel.high);
    // Without denormals a term loses up to 2^-126 = 1.2e-38. The 32,768 terms of the longest
    // chunk lose 3.9e-34 together, which is less than 4e-7 of the least total let through.
    constexpr double kLeast = 1e-27;
    if (total >= kLeast && total <= DBL_MAX) return total;
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
