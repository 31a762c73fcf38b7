// Kernels that change gradients in place: scale and clamp. Included only by isa_*.cpp.

#pragma once

#include "rows.h"

namespace gradclip::cpu::GRADCLIP_ISA {

/// Multiplies rows by `coef`.
template <typename Format>
struct Scale {
  LaneOf<typename Format::Vec> coef;

  void rows(typename Format::Item* x, int64_t count) const {
    for (; count != 0; --count, x += Format::kRow) {
      auto row = Format::load_row(x);
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectors; ++i) row.v[i] *= coef;
      Format::store_row(x, row);
    }
  }
};

template <typename Format>
void scale(void* data, int64_t numel, double coef) {
  const Scale<Format> kernel{static_cast<LaneOf<typename Format::Vec>>(coef)};
  for_rows<Format>(kernel, data, numel);
}

/// Clamps rows to [min, max] and writes those that change. NaN compares as inside and stays NaN.
template <typename Format>
struct Clamp {
  using Vec = typename Format::Vec;
  Vec min, max;

  void rows(typename Format::Item* x, int64_t count) const {
    const Vec low = min, high = max;
    for (; count != 0; --count, x += Format::kRow) {
      auto row = Format::load_row(x);
      auto outside = (row.v[0] < low) | (row.v[0] > high);
      GRADCLIP_UNROLL
      for (int i = 1; i < kVectors; ++i) outside |= (row.v[i] < low) | (row.v[i] > high);
      if (!any(outside)) continue;
      GRADCLIP_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        row.v[i] = row.v[i] < low ? low : row.v[i] > high ? high : row.v[i];
      }
      Format::store_row(x, row);
    }
  }
};

template <typename Format>
void clamp(void* data, int64_t numel, double min, double max) {
  const Clamp<Format> kernel{rounded<Format>(min), rounded<Format>(max)};
  for_rows<Format>(kernel, data, numel);
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
