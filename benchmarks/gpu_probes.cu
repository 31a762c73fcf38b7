// The kernels of gpu_design.py: the access patterns of csrc/cuda, with the parameters of the design
// (loads in flight, blocks, direction, dependent launch) as arguments. Plain C
// functions, so that they compile in seconds and load with ctypes; each returns a cudaError_t.
//
// A buffer is 16-byte aligned and a multiple of kThreads * 16 loads * 16 bytes = 64 KiB; the
// rest is not accessed.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
// Leaves registers for 16 loads in flight; by default the compiler keeps only four.
constexpr int kBlocksPerSm = 2;
constexpr int kSmallParameters = 4080, kLargeParameters = 32736;

__device__ float4 load_once(const float4* at) {
  float4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(at));
  return v;
}

__device__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // nothing to wait for after a plain launch
#endif
}

template <int kLoads>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    read_kernel(const float4* x, int64_t tiles, float* sums) {
  float sum = 0.0f;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const float4* at = x + tile * kThreads * kLoads + threadIdx.x;
    float4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = load_once(at + i * kThreads);
    __syncwarp();  // keeps the arithmetic after the last load; otherwise fewer are in flight
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      sum = fmaf(v[i].x, v[i].x,
                 fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w, sum))));
    }
  }
  sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <int kLoads>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    update_kernel(float4* x, int64_t tiles, const float* coef_at, bool reverse) {
  wait_for_previous_kernel();
  const float coef = *coef_at;
  if (coef >= 1.0f) return;
  for (int64_t step = blockIdx.x; step < tiles; step += gridDim.x) {
    float4* at = x + (reverse ? tiles - 1 - step : step) * kThreads * kLoads + threadIdx.x;
    float4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = at[i * kThreads];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at[i * kThreads] = make_float4(v[i].x * coef, v[i].y * coef, v[i].z * coef, v[i].w * coef);
    }
  }
}

template <int kBytes>
struct Parameters {
  unsigned char bytes[kBytes];
};

template <int kBytes>
__global__ void parameters_kernel(const __grid_constant__ Parameters<kBytes> parameters,
                                  unsigned* out) {
  if (threadIdx.x == 0) *out = parameters.bytes[kBytes - 1 - *out % 2];
}

template <int kLoads>
cudaError_t read(const void* x, int64_t bytes, int blocks, float* sums, cudaStream_t stream) {
  const int64_t tiles = bytes / (int64_t{kThreads} * kLoads * sizeof(float4));
  read_kernel<kLoads><<<blocks, kThreads, 0, stream>>>(static_cast<const float4*>(x), tiles, sums);
  return cudaGetLastError();
}

template <int kLoads>
cudaError_t update(void* x, int64_t bytes, int blocks, const float* coef, bool reverse,
                   bool dependent, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  const int64_t tiles = bytes / (int64_t{kThreads} * kLoads * sizeof(float4));
  return cudaLaunchKernelEx(&config, update_kernel<kLoads>, static_cast<float4*>(x), tiles, coef,
                            reverse);
}

}  // namespace

extern "C" {

int probe_read(const void* x, int64_t bytes, int loads, int blocks, float* sums,
               cudaStream_t stream) {
  switch (loads) {
    case 2:
      return read<2>(x, bytes, blocks, sums, stream);
    case 4:
      return read<4>(x, bytes, blocks, sums, stream);
    case 8:
      return read<8>(x, bytes, blocks, sums, stream);
    case 16:
      return read<16>(x, bytes, blocks, sums, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int probe_update(void* x, int64_t bytes, int loads, int blocks, const float* coef, int reverse,
                 int dependent, cudaStream_t stream) {
  switch (loads) {
    case 2:
      return update<2>(x, bytes, blocks, coef, reverse, dependent, stream);
    case 4:
      return update<4>(x, bytes, blocks, coef, reverse, dependent, stream);
    case 8:
      return update<8>(x, bytes, blocks, coef, reverse, dependent, stream);
    case 16:
      return update<16>(x, bytes, blocks, coef, reverse, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// One block with about 4 KB, or 32 KB, of parameters. `out` holds any number.
int probe_parameters(int large, unsigned* out, cudaStream_t stream) {
  static const Parameters<kSmallParameters> few{};
  static const Parameters<kLargeParameters> many{};
  if (large) {
    parameters_kernel<<<1, 32, 0, stream>>>(many, out);
  } else {
    parameters_kernel<<<1, 32, 0, stream>>>(few, out);
  }
  return cudaGetLastError();
}

}  // extern "C"
