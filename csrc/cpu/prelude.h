// Everything the kernels use from outside. isa_*.cpp include it before they set the compiler to an
// instruction set: code from these headers must not be compiled for it, since the linker keeps one
// copy for the whole module and would have every processor run that one.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "chunk_kernels.h"
#include "core/tensor_list.h"
