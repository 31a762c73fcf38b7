"""Tells whether something sees or replaces the operations that this thread gives to torch."""

import torch
from torch._C import DispatchKey
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

# Dispatch modes and make_fx include one of these in every operation of their thread.
_INTERCEPTING_KEYS = (DispatchKey.Python, DispatchKey.PreDispatch)


def is_intercepted() -> bool:
    """Tell whether a tracer, torch.func, forward-mode AD or a mode intercepts torch's operations.

    Then everything has to be an operation of torch: a kernel of this package would not be seen. And nothing
    may depend on a value or an address, because the tensors may have neither.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_transformed()
        or any(map(torch._C._dispatch_tls_is_dispatch_key_included, _INTERCEPTING_KEYS))
        or (torch._C._len_torch_function_stack() > 0 and not _only_sets_the_default_device())
    )


def is_transformed() -> bool:
    """Tell whether torch.func or forward-mode AD transforms operations, also while it is compiled."""
    return forward_ad._current_level >= 0 or torch._C._dispatch_tls_is_dispatch_key_included(
        DispatchKey.FuncTorchDynamicLayerFrontMode
    )


# As torch.compiler.assume_constant_result does, which would import the compiler: it calls the function while
# it traces, and what it compiles is for that state alone.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _only_sets_the_default_device() -> bool:
    # torch.set_default_device is a mode, too. It changes nothing here: every device is given explicitly.
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
