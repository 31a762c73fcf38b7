// The kernels for AVX2 with FMA and F16C (2013 on). Empty on other processors than x86-64.

#if defined(__x86_64__)

#include "prelude.h"

#define GRADCLIP_ISA avx2
#define GRADCLIP_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86-64
