"""Lets torch's own operations run on the emulated GPU. Python imports this file if PYTHONPATH has its folder.

runtime.cpp emulates the package's kernels but none of torch's. So every operation that torch implements for
CUDA, except those that launch nothing, is replaced by one that computes on the CPU, in the same memory and in
stream order.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

RUNTIME = ctypes.CDLL(None)
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
LAUNCH_NOTHING = {
    "_local_scalar_dense", "_pin_memory", "detach", "empty", "empty_like", "empty_strided", "is_pinned",
    "new_empty", "new_empty_strided", "record_stream", "resize_", "set_",
}  # fmt: skip
WAIT = {"equal", "is_nonzero", "masked_select", "nonzero"}

kept: list[Any] = []  # never freed: graphs call these functions


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the same memory."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(whole, *layout)


class Call:
    """One call of an operation, its tensors replaced by CPU tensors over the same memory."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.twins = func, []  # type: ignore[var-annotated]
        flat, spec = tree_flatten((args, kwargs))
        wanted = kwargs.get("device")
        self.target = None if wanted is None else torch.device(wanted)
        self.device = next((a.device for a in flat if isinstance(a, Tensor) and a.is_cuda), self.target)
        with torch.cuda.device(self.device):
            self.captured = torch.cuda.is_current_stream_capturing()
        self.args, self.kwargs = tree_unflatten([self._converted(a) for a in flat], spec)
        # A number in the place of a tensor arrives here as a number, which not every overload takes.
        kinds = [argument.type.kind() for argument in func._schema.arguments]
        if any(isinstance(a, (int, float, complex)) for a, k in zip(self.args, kinds) if k == "TensorType"):
            self.func = func.overloadpacket

    def _converted(self, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            return None
        if not isinstance(value, Tensor) or not value.is_cuda:
            return value
        for original, twin in self.twins:
            if original is value:
                return twin
        self.twins.append((value, on_cpu(value)))
        return self.twins[-1][1]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def result(self, value: Any) -> Any:
        """Return the result on the emulated GPU for a result on the CPU."""
        if not isinstance(value, Tensor) or (self.target is not None and self.target.type == "cpu"):
            return value
        for original, twin in self.twins:
            if twin is value:
                return original
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        if not self.captured:
            run_stream(moved.device)  # another thread's work may still use the memory
        on_cpu(moved).copy_(value)
        return moved


class OnCpu:
    """Replaces one of torch's operations on CUDA."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.name = func._schema.name.split("::")[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(self.func, args, kwargs)
        if (call.captured or torch.cuda.get_sync_debug_mode() == 2) and self._waits(call, args):
            raise RuntimeError("called a synchronizing CUDA operation")
        if call.captured:
            return self._captured(call)
        for device in {call.device, *(original.device for original, _ in call.twins)}:
            run_stream(device)
        results = call.run()
        for original, twin in call.twins:
            if original.shape != twin.shape:  # an `out` that was resized
                original.resize_(twin.shape)
                on_cpu(original).copy_(twin)
        if self.name.startswith("_foreach_") and self.name.endswith("_"):
            torch.autograd.graph.increment_version(args[0])  # as torch's foreach kernels do
        return tree_map(call.result, results)

    def _waits(self, call: Call, args: Any) -> bool:
        """Tell whether the host would wait for the GPU."""
        if self.name == "copy_":
            return args[0].is_cuda != args[1].is_cuda and not any(t.is_pinned() for t in args[:2] if t.is_cpu)
        if self.name == "_to_copy" and call.target is not None:
            return call.target.type != args[0].device.type and not args[0].is_pinned()
        return self.name in WAIT

    def _captured(self, call: Call) -> Any:
        """Add the call to the graph. Computing it now serves only to know the shapes of its results."""
        before = [(twin, twin.clone()) for _, twin in call.twins]
        for twin, _ in before:
            if twin.dtype == torch.int64:  # an index that no call has computed yet may be anything
                twin.zero_()
        results = call.run()
        for original, twin in call.twins:
            if original.shape != twin.shape:  # an `out` that was resized
                original.resize_(twin.shape)
        results = tree_map(call.result, results)
        for twin, values in before:
            if twin.shape == values.shape:
                twin.copy_(values)
        outputs = tree_flatten(results)[0]

        def node() -> None:
            for output, value in zip(outputs, tree_flatten(call.run())[0]):
                if isinstance(output, Tensor) and output.is_cuda:
                    on_cpu(output).copy_(value)

        with torch.cuda.device(call.device):
            enqueue(node)
        return results


def run_stream(device: torch.device) -> None:
    """Run all work of the device's current stream."""
    with torch.cuda.device(device):
        assert RUNTIME.cudaStreamSynchronize(_current_stream()) == 0


def enqueue(function: Callable[[], object]) -> None:
    """Enqueue the call of a function on the current stream."""
    kept.append(HOST_FUNCTION(lambda _: function()))
    assert RUNTIME.cudaLaunchHostFunc(_current_stream(), kept[-1], None) == 0


def _current_stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _is_view(func: Any) -> bool:
    infos = [returned.alias_info for returned in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _replace_operations() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL", "CUDA")
    names = {*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about overridden operations
        for name in sorted(names):
            namespace, _, rest = name.partition("::")
            packet, _, overload = rest.partition(".")
            if namespace != "aten" or packet in LAUNCH_NOTHING or not hasattr(torch.ops.aten, packet):
                continue
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if not _is_view(func):
                library.impl(rest, OnCpu(func), "CUDA")
    return library


kept.append(_replace_operations())
