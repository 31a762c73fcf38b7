// The kernels for AVX-512 F, BW, DQ and VL (2017 on). Empty on other processors than x86-64.

#if defined(__x86_64__)

#include "prelude.h"

#define GRADCLIP_ISA avx512
#define GRADCLIP_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2")
#endif

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86-64
