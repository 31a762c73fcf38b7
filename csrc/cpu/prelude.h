// All headers that the kernels need. isa_*.cpp include this file before they select an instruction
// set: inline functions of these headers must not be compiled for it, because the linker keeps one
// copy for the whole module, and processors without that instruction set would run it.

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
