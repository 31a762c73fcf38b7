"""Whether somebody follows what this thread computes."""

import torch
from torch._C import _functorch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def operations_are_followed() -> bool:
    """Tell whether a tracer, torch.func or a dispatch mode follows torch's operations.

    Then all that is done has to be an operation of torch, and nothing may depend on a value or an
    address: tensors may have neither. csrc/gradients.h asks the same for the compiled kernels.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_in_torch_dispatch_mode()
        or _functorch.peek_interpreter_stack() is not None
    )
