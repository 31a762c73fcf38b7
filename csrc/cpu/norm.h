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
    read_rows<Format, true>(
        x, count,
        [&](const typename Format::Item* at) GRADCLIP_INLINED {
          GRADCLIP_UNROLL
          for (int i = 0; i < kVectorsPerRow; ++i) {
            const Bits bits = load<Bits>(at + i * kLanes<Bits>) & kMagnitude;
            max_bits[i % 2] = bits > max_bits[i % 2] ? bits : max_bits[i % 2];
          }
        },
        [] {});
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
    read_rows<Format, kSumsInStreams<Format>>(
        x, count,
        [&](const typename Format::Item* at) GRADCLIP_INLINED {
          const auto row = Format::load_row(at);
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
        },
        [] {});
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
    Row<F32> sums = {};
    read_rows<Format, kSumsInStreams<Format>>(
        x, count,
        [&](const typename Format::Item* at) GRADCLIP_INLINED {
          const Row<F32> row = Format::load_row(at);
          GRADCLIP_UNROLL
          for (int i = 0; i < kVectors; ++i) sums.v[i] = term.add(sums.v[i], row.v[i]);
        },
        [&]() GRADCLIP_INLINED {
          add_in_float64(l, h, sums);
          sums = {};
        });
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
