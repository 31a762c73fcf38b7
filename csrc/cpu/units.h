// Kernels on short units, slices of a few elements that lie one after the other: one unit is too
// short for vectors, so these take many at a time, and scalars. Included only by isa_*.cpp.

#pragma once

#include "rows.h"

namespace gradclip::cpu::GRADCLIP_ISA {

/// The elements of units in the type that is computed in, and in order: in place, or converted.
template <typename Format>
class Elements {
 public:
  using Item = typename Format::Item;
  using Number = LaneOf<typename Format::Vec>;

  GRADCLIP_INLINE explicit Elements(const void* data, int64_t numel) {
    if constexpr (kConverts) {
      Read kernel{numbers_};
      for_rows<Format>(kernel, data, numel);
    }
  }
  GRADCLIP_INLINE const Number* of(const void* data) const {
    if constexpr (kConverts) return numbers_;
    return static_cast<const Number*>(data);
  }
  GRADCLIP_INLINE Number* of(void* data) {
    if constexpr (kConverts) return numbers_;
    return static_cast<Number*>(data);
  }
  /// Writes the elements back.
  GRADCLIP_INLINE void write_to(void* data, int64_t numel) const {
    if constexpr (kConverts) {
      Write kernel{numbers_};
      for_rows<Format>(kernel, data, numel);
    }
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<Item, Number>;
  struct Read {
    Number* to;
    void rows(const Item* x, int64_t count) {
      for (count *= kVectors; count != 0; --count, x += kLanes<F32>, to += kLanes<F32>) {
        store(to, Format::widen(x));
      }
    }
  };
  struct Write {
    const Number* from;
    void rows(Item* x, int64_t count) {
      for (count *= kVectors; count != 0; --count, x += kLanes<F32>, from += kLanes<F32>) {
        Format::narrow(x, load<F32>(from));
      }
    }
  };
  Number numbers_[kConverts ? kShortUnit * kUnitsTogether + Format::kRow : 1];
};

template <typename Format>
void unit_sums(const void* data, int64_t units, int64_t length, double* sums) {
  const Elements<Format> elements(data, units * length);
  const auto* x = elements.of(data);
  int64_t unit = 0;
  // Four sums at a time: an addition takes as long as four others take to follow it.
  for (; unit + 4 <= units; unit += 4, x += 4 * length) {
    double total[4] = {};
    for (int64_t i = 0; i < length; ++i) {
      GRADCLIP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const double number = x[j * length + i];
        total[j] += number * number;
      }
    }
    GRADCLIP_UNROLL
    for (int j = 0; j < 4; ++j) sums[unit + j] = total[j];
  }
  for (; unit < units; ++unit, x += length) {
    double total = 0;
    for (int64_t i = 0; i < length; ++i) total += static_cast<double>(x[i]) * x[i];
    sums[unit] = total;
  }
}

template <typename Format>
void scale_units(void* data, int64_t units, int64_t length, const double* coefs) {
  Elements<Format> elements(data, units * length);
  auto* x = elements.of(data);
  for (int64_t unit = 0; unit < units; ++unit, x += length) {
    if (coefs[unit] == 1) continue;  // where denormals are flushed, a product by 1 may be 0
    const auto coef = static_cast<typename Elements<Format>::Number>(coefs[unit]);
    for (int64_t i = 0; i < length; ++i) x[i] *= coef;
  }
  elements.write_to(data, units * length);
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
