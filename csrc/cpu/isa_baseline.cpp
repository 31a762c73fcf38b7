// The kernels for the compiler's default target: SSE2 on x86-64, NEON on aarch64.

#include "prelude.h"

#define GRADCLIP_ISA baseline
#define GRADCLIP_VECTOR_BYTES 16
#include "table.h"
