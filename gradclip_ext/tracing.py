"""Whether somebody follows what this thread computes."""

import torch
from torch._C import DispatchKey

# What dispatch modes, make_fx and torch.func put in the way of every operation of their thread.
_FOLLOWERS = (DispatchKey.Python, DispatchKey.PreDispatch, DispatchKey.FuncTorchDynamicLayerFrontMode)


def operations_are_followed() -> bool:
    """Tell whether a tracer, torch.func or a dispatch mode follows torch's operations.

    Then all that is done has to be an operation of torch, and nothing may depend on a value or an
    address: tensors may have neither. csrc/gradients.h asks the same for the compiled kernels.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or any(map(torch._C._dispatch_tls_is_dispatch_key_included, _FOLLOWERS))
    )
