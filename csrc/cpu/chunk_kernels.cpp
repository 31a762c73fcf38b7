#include "chunk_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gradclip::cpu {

namespace {

std::vector<const ChunkKernels*> find_usable() {
  std::vector<const ChunkKernels*> usable = {&baseline::kKernels};
#if defined(__x86_64__)
  unsigned eax, ebx, ecx = 0, edx;
  // clang 14 does not know F16C by name.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2) usable.push_back(&avx2::kKernels);
  if (avx512) usable.push_back(&avx512::kKernels);
#endif
  return usable;
}

}  // namespace

const std::vector<const ChunkKernels*>& usable_chunk_kernels() {
  static const std::vector<const ChunkKernels*> usable = find_usable();
  return usable;
}

}  // namespace gradclip::cpu
