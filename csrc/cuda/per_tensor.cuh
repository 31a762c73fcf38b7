// Results for each tensor of a list, in one pass over memory: norms, coefficients, statistics.
//
//   partials     one per chunk, by index, as norm_kernel writes them
//   tensors      of one chunk: completed by the block that has the chunk; others: by a warp of the
//                launch's last block, in the order in which finalize() adds a whole list. So the
//                bits of a tensor's norm are those of the norm of a list of this tensor alone.

#pragma once

#include "norm.cuh"

namespace gradclip::cuda {

/// Where a kernel writes results for each tensor.
struct TensorOutput {
  void* partials;      // one Partial per chunk of the whole list, by index
  unsigned* arrivals;  // 0 between launches
  int64_t chunks;      // of the whole list
  int64_t tensors;     // of the whole list
  void* norms;         // null, or one float for each tensor, or one double if is_float64
  void* clip_coefs;    // null, or the same
  double* statistics;  // null, or the rows of Backend.statistics: 1 + 4 * tensors
  bool is_float64;
  bool largest_is_norm;  // p = inf
  bool is_last_launch;
  Limits limits;

  /// Whether scale_kernel follows, which may start early.
  __device__ bool scale_follows() const { return is_last_launch && clip_coefs != nullptr; }
  __device__ bool has_total() const { return is_last_launch && statistics != nullptr; }
};

/// What is known of a part of a tensor, or of all of it, where only the norm is asked for.
struct NormPartial {
  double sum;
};

/// The same with statistics. Counts are exact as doubles.
struct StatisticsPartial {
  double sum;
  double largest;  // NaN if an element is NaN
  double zeros;
  double nonfinite;
};

template <typename T>
__device__ void write_tensor_as(const TensorOutput& out, int64_t tensor, double norm) {
  const T rounded = static_cast<T>(norm);
  static_cast<T*>(out.norms)[tensor] = rounded;
  if (out.clip_coefs == nullptr) return;
  static_cast<T*>(out.clip_coefs)[tensor] = clip_coef(out.limits, rounded, tensor);
}

// These two are calls: inlined, they take registers from the loop around them, which would spill.

__device__ __noinline__ void write_norm(const TensorOutput& out, int64_t tensor, double norm) {
  if (out.norms == nullptr) return;
  if (out.is_float64) {
    write_tensor_as<double>(out, tensor, norm);
  } else {
    write_tensor_as<float>(out, tensor, norm);
  }
}

__device__ __noinline__ void write_statistics(double* row, int64_t tensors, double norm,
                                              double largest, double zeros, double nonfinite) {
  row[0] = norm;
  row[tensors] = largest;
  row[2 * tensors] = zeros;
  row[3 * tensors] = nonfinite;
}

/// Writes all that is known of a tensor. `norm` is that for p < inf.
__device__ inline void write_tensor(const TensorOutput& out, int64_t tensor, double norm,
                                    NormPartial) {
  write_norm(out, tensor, norm);
}
__device__ inline void write_tensor(const TensorOutput& out, int64_t tensor, double norm,
                                    const StatisticsPartial& found) {
  if (out.largest_is_norm) norm = found.largest;
  write_norm(out, tensor, norm);
  if (out.statistics == nullptr) return;
  write_statistics(out.statistics + 1 + tensor, out.tensors, norm, found.largest, found.zeros,
                   found.nonfinite);
}

__device__ inline void add(NormPartial&, NormPartial) {}
/// Adds all but the sums.
__device__ inline void add(StatisticsPartial& total, const StatisticsPartial& part) {
  total.largest = nan_max(total.largest, part.largest);
  total.zeros += part.zeros;
  total.nonfinite += part.nonfinite;
}

/// Adds what a warp's lanes know of the partials [0, count), all but the sums.
__device__ inline void add_all(NormPartial&, const NormPartial*, int, int) {}
__device__ inline void add_all(StatisticsPartial& total, const StatisticsPartial* partials,
                               int count, int lane) {
  for (int i = lane; i < count; i += kWarp) {
    total.largest = nan_max(total.largest, __ldcg(&partials[i].largest));
    total.zeros += __ldcg(&partials[i].zeros);
    total.nonfinite += __ldcg(&partials[i].nonfinite);
  }
  total.largest = warp_reduce<LInf>(total.largest);
  total.zeros = warp_reduce<L1>(total.zeros);
  total.nonfinite = warp_reduce<L1>(total.nonfinite);
}

/// Combines term(0) to term(count - 1) in the order in which a block's finalize() does: there,
/// thread t takes the terms t, t + kThreads ...; here, a lane does for a thread of each warp.
template <typename Norm, typename Term>
__device__ double warp_combine(int count, int lane, Term&& term) {
  double values[kWarps] = {};
  for (int i = lane; i < count; i += kThreads) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int at = i + w * kWarp;
      if (at < count) values[w] = Norm::combine(values[w], term(at));
    }
  }
  double value = warp_reduce<Norm>(values[0]);
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = Norm::combine(value, warp_reduce<Norm>(values[w]));
  return value;
}

/// Combines all partials as finalize() does, for a block; thread 0 has the result.
template <typename Norm, typename Term>
__device__ double block_combine(int64_t count, Term&& term) {
  __shared__ double shared[kWarps];
  double value = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) value = Norm::combine(value, term(i));
  value = block_reduce<Norm>(value, shared);
  __syncthreads();
  return value;
}

/// Completes the launch's tensors of several chunks, a warp each.
template <typename Norm, typename Partial, typename Table>
__device__ __noinline__ void finalize_tensors(const Table& table, const TensorOutput& out) {
  const int lane = threadIdx.x % kWarp;
  for (int t = threadIdx.x / kWarp; t < table.tensors; t += kWarps) {
    const int begin = table.chunk_prefix[t], count = table.chunk_prefix[t + 1] - begin;
    if (count == 1) continue;
    const Partial* partials = static_cast<const Partial*>(out.partials) + table.first_chunk + begin;
    Partial total = {};
    add_all(total, partials, count, lane);
    total.sum = warp_combine<Norm>(count, lane, [&](int i) { return __ldcg(&partials[i].sum); });
    if (lane == 0) write_tensor(out, table.first_tensor + t, Norm::finalize(total.sum), total);
  }
}

/// Writes the norm of the whole list, where statistics are asked for.
template <typename Norm>
__device__ void finalize_total(const TensorOutput& out, NormPartial) {}
template <typename Norm>
__device__ __noinline__ void finalize_total(const TensorOutput& out, StatisticsPartial) {
  const auto* partials = static_cast<const StatisticsPartial*>(out.partials);
  const double norm =
      out.largest_is_norm
          ? block_combine<LInf>(out.chunks, [&](int64_t i) { return __ldcg(&partials[i].largest); })
          : Norm::finalize(block_combine<Norm>(
                out.chunks, [&](int64_t i) { return __ldcg(&partials[i].sum); }));
  if (threadIdx.x == 0) *out.statistics = norm;
}

/// What a warp finds in its tiles of a chunk.
template <typename Norm, typename T>
__device__ void read_tiles(const T* x, int length, WarpTiles tiles, int lane, NormPartial& found) {
  found.sum = warp_sum<Norm>(x, length, tiles, lane);
}

/// Contract: kThreads threads; any grid; a table of float32, bfloat16 and float16 tensors. Writes a
/// Partial for each chunk of the launch, and the results of its tensors. The bits depend on values
/// and sizes only. `is_last_launch` also writes the norm of the list, if there are statistics.
template <typename Norm, typename Partial, typename Table>
__global__ __launch_bounds__(kThreads,
                             4) void tensors_kernel(const __grid_constant__ Table table,
                                                    const __grid_constant__ TensorOutput out) {
  constexpr int kBatch = 16;  // as in norm_kernel
  __shared__ Partial found[kBatch][kWarps];
  __shared__ int alone[kBatch];  // the tensor that has no other chunk than this one, or -1
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (out.scale_follows()) let_next_kernel_launch();
  const Run run(table.chunks(), blockIdx.x, gridDim.x);
  for_each_chunk(table, run, [&](int chunk, int tensor, DType dtype, char* data, int length) {
    const WarpTiles tiles = tiles_of_chunk(chunk, warp);
    const int slot = (chunk - run.begin) % kBatch;
    with_dtype<false>(dtype, data, length, [&](auto* x, int n) {
      Partial of_warp = {};
      read_tiles<Norm>(x, n, tiles, lane, of_warp);
      if (lane == 0) found[slot][tiles.first] = of_warp;
    });
    if (threadIdx.x == 0) {
      const int chunks = table.chunk_prefix[tensor + 1] - table.chunk_prefix[tensor];
      alone[slot] = chunks == 1 ? tensor : -1;
    }
    if (slot == kBatch - 1 || chunk == run.end - 1) {
      __syncthreads();
      if (threadIdx.x <= slot) {
        Partial value = {};
        for (int w = 0; w < kWarps; ++w) {
          value.sum = Norm::combine(value.sum, found[threadIdx.x][w].sum);
          add(value, found[threadIdx.x][w]);
        }
        const int of = alone[threadIdx.x];
        static_cast<Partial*>(out.partials)[table.first_chunk + chunk - slot + threadIdx.x] = value;
        if (of >= 0) write_tensor(out, table.first_tensor + of, Norm::finalize(value.sum), value);
      }
      __syncthreads();
    }
  });
  if (table.chunks() == table.tensors && !out.has_total()) return;  // all are complete
  if (!is_last_block(out.arrivals)) return;
  finalize_tensors<Norm, Partial>(table, out);
  if (out.has_total()) finalize_total<Norm>(out, Partial{});
}

}  // namespace gradclip::cuda
