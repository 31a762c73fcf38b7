// The threads on which CPU operations run: torch's own.

#pragma once

#include "cpu/operations.h"

namespace gradclip::python {

/// Returns torch's thread pool for a list of this size, with as many threads as
/// torch.get_num_threads() says. Needs Python's lock; what it returns does not.
cpu::Threads threads_for(const TensorList& list);

/// Called once, when the module is imported.
void prepare_threads();

}  // namespace gradclip::python
