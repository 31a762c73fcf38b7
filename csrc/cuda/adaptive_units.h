// Which blocks clip a unit of adaptive clipping: one warp, one block, or all of them.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/tensor_list.h"
#include "launch.h"

namespace gradclip::cuda {

// A unit of so many bytes is clipped by one warp, in at most 4 tiles; a larger one by a block.
// Larger units than kMaxUnitBytes are treated as tensors, whose chunks are divided among all
// blocks.
constexpr int64_t kWarpUnitBytes = 16384;
constexpr int64_t kMaxUnitBytes = 4 * kChunkBytes;
constexpr int64_t kUnitsPerItem = 8;  // of those that a warp clips

/// The tensors of one launch, passed by value; up to 42 bytes per tensor. An item is the work of a
/// block: one unit or, where a warp clips one, kUnitsPerItem units.
struct UnitTable {
  static constexpr int kCapacity = (kSmallLaunchBytes - kOtherParameterBytes - 16) / 42;
  void* grads[kCapacity];
  void* weights[kCapacity];
  int64_t units[kCapacity];
  int64_t item_prefix[kCapacity + 1];
  int32_t unit_numel[kCapacity];
  int32_t tensors;
  bool is_by_warp[kCapacity];
  DType grad_dtypes[kCapacity];
  DType weight_dtypes[kCapacity];
};
static_assert(sizeof(UnitTable) + kOtherParameterBytes <= kSmallLaunchBytes);

inline int64_t unit_bytes(const AdaptiveLists& lists, int64_t tensor) {
  const Span &grad = lists.grads[tensor], &weight = lists.weights[tensor];
  return grad.numel / lists.units[tensor] *
         std::max(item_size(grad.dtype), item_size(weight.dtype));
}

/// The units that are too large for one block, as tensors.
struct LargeUnits {
  TensorList grads{kChunkBytes}, weights{kChunkBytes};

  explicit LargeUnits(const AdaptiveLists& lists) {
    for (int64_t tensor = 0; tensor < lists.grads.size(); ++tensor) {
      if (unit_bytes(lists, tensor) <= kMaxUnitBytes) continue;
      const int64_t numel = lists.grads[tensor].numel / lists.units[tensor];
      for (int64_t unit = 0; unit < lists.units[tensor]; ++unit) {
        add(grads, lists.grads[tensor], unit, numel);
        add(weights, lists.weights[tensor], unit, numel);
      }
    }
  }

  int64_t partials() const { return std::max(grads.chunks(), weights.chunks()); }

 private:
  static void add(TensorList& list, const Span& span, int64_t unit, int64_t numel) {
    list.add(static_cast<char*>(span.data) + unit * numel * item_size(span.dtype), numel,
             span.dtype);
  }
};

/// Enters a tensor whose units are not too large.
inline void add(UnitTable& table, const AdaptiveLists& lists, int64_t tensor) {
  const Span &grad = lists.grads[tensor], &weight = lists.weights[tensor];
  const int64_t units = lists.units[tensor];
  const int t = table.tensors++;
  table.grads[t] = grad.data;
  table.weights[t] = weight.data;
  table.grad_dtypes[t] = grad.dtype;
  table.weight_dtypes[t] = weight.dtype;
  table.units[t] = units;
  table.unit_numel[t] = static_cast<int32_t>(grad.numel / units);
  table.is_by_warp[t] = unit_bytes(lists, tensor) <= kWarpUnitBytes;
  const int64_t items = table.is_by_warp[t] ? (units - 1) / kUnitsPerItem + 1 : units;
  table.item_prefix[t + 1] = table.item_prefix[t] + items;
}

}  // namespace gradclip::cuda
