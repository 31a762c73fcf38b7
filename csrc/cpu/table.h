// Defines kKernels, the kernels of this instruction set. Included only by isa_*.cpp, as the last
// file.

#pragma once

#include "norm.h"
#include "statistics.h"
#include "units.h"
#include "update.h"

namespace gradclip::cpu::GRADCLIP_ISA {

#define GRADCLIP_NAME(x) #x
#define GRADCLIP_NAME_OF(x) GRADCLIP_NAME(x)
// In the order of DType.
#define GRADCLIP_EACH(kernel) {kernel<Float32>, kernel<Float64>, kernel<BFloat16>, kernel<Float16>}

const ChunkKernels kKernels = {
    GRADCLIP_NAME_OF(GRADCLIP_ISA), GRADCLIP_EACH(sum_squares), GRADCLIP_EACH(sum_magnitudes),
    GRADCLIP_EACH(max_magnitude),   GRADCLIP_EACH(sum_powers),  GRADCLIP_EACH(statistics),
    GRADCLIP_EACH(scale),           GRADCLIP_EACH(unit_sums),   GRADCLIP_EACH(scale_units),
    GRADCLIP_EACH(clamp),
};

}  // namespace gradclip::cpu::GRADCLIP_ISA
