// The statistics kernel: everything that one chunk has to say, in one pass. Included only by
// isa_*.cpp.

#pragma once

#include "norm.h"

namespace gradclip::cpu::GRADCLIP_ISA {

// What is read ahead of half types, of which rows follow each other. This kernel has three times
// the instructions of a norm for each row, so that fewer reads are under way by themselves: without
// prefetching it takes a tenth longer. Reading ahead beyond the end of a tensor does nothing.
constexpr int kPrefetchBytes = 4096;

/// The sum of squares, by the additions of sum_squares in their order, the bits of the largest
/// magnitude (see MaxMagnitude), and how many elements are not 0.
template <typename Format>
struct Statistics {
  using Vec = typename Format::Vec;
  static constexpr bool kIsFloat64 = std::is_same_v<Vec, F64>;
  using Bits = std::conditional_t<kIsFloat64, I64, I32>;
  F64 low = {}, high = {};
  Bits largest = {}, nonzero = {};

  void rows(const typename Format::Item* x, int64_t count) {
    constexpr Square kTerm;
    F64 l = low, h = high;
    Bits max_bits = largest, counts = nonzero;
    Row<Vec> sums = {};
    read_rows<Format, kSumsInStreams<Format>>(
        x, count,
        [&](const typename Format::Item* at) GRADCLIP_INLINED {
          const Row<Vec> row = Format::load_row(at);
          if constexpr (!kSumsInStreams<Format>) {
            GRADCLIP_UNROLL
            for (size_t byte = 0; byte < Format::kRow * sizeof *at; byte += 64) {
              __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes + byte);
            }
          }
          GRADCLIP_UNROLL
          for (int i = 0; i < kVectors; ++i) {
            Vec& sum = sums.v[i];
            if constexpr (kIsFloat64) {
              (i % 2 == 0 ? l : h) = kTerm.add(i % 2 == 0 ? l : h, row.v[i]);
            } else {
              sum = kTerm.add(sum, row.v[i]);
            }
            const Bits bits = (Bits)magnitude(row.v[i]);
            max_bits = bits > max_bits ? bits : max_bits;
#if GRADCLIP_VECTOR_BYTES == 64
            counts += bits < 1 ? bits : 1;  // a comparison takes a third instruction in AVX-512
#else
            counts -= (Bits)(bits > 0);
#endif
          }
        },
        [&]() GRADCLIP_INLINED {
          if constexpr (!kIsFloat64) add_in_float64(l, h, sums);
          sums = {};
        });
    low = l;
    high = h;
    largest = max_bits;
    nonzero = counts;
  }
};

/// Counts elements that are NaN or infinite.
template <typename Format>
struct Nonfinite {
  using Bits = typename Statistics<Format>::Bits;
  Bits found = {};

  void rows(const typename Format::Item* x, int64_t count) {
    const auto infinite = (Bits)(typename Format::Vec{} + HUGE_VALF);
    for (; count != 0; --count, x += Format::kRow) {
      const auto row = Format::load_row(x);
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectors; ++i) found -= (Bits)((Bits)magnitude(row.v[i]) >= infinite);
    }
  }
};

template <typename Bits>
int64_t sum_of_lanes(Bits counts) {
  int64_t total = 0;
  for (int i = 0; i < kLanes<Bits>; ++i) total += counts[i];
  return total;
}

template <typename Format>
void statistics(const void* data, int64_t numel, ChunkStatistics* out) {
  using Vec = typename Format::Vec;
  Statistics<Format> kernel;
  for_rows<Format>(kernel, data, numel);
  LaneOf<typename Statistics<Format>::Bits> bits = 0;
  for (int i = 0; i < kLanes<Vec>; ++i) {
    bits = kernel.largest[i] > bits ? kernel.largest[i] : bits;
  }
  LaneOf<Vec> largest;
  __builtin_memcpy(&largest, &bits, sizeof largest);
  out->largest = largest;
  out->zeros = numel - sum_of_lanes(kernel.nonzero);
  out->nonfinite = 0;
  if (!(largest <= DBL_MAX)) {
    Nonfinite<Format> counter;
    for_rows<Format>(counter, data, numel);
    out->nonfinite = sum_of_lanes(counter.found);
  }
  out->sum_squares = sum(kernel.low + kernel.high);
  if (!std::is_same_v<Vec, F64> && !is_exact(out->sum_squares) && largest != 0) {
    out->sum_squares = sum_in_float64<Format>(data, numel, Square{});
  }
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
