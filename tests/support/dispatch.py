"""What torch is given to do."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero")


class NoReads(TorchDispatchMode):
    """Raises when an operation reads a value of a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in _READS:
            raise AssertionError(f"{func} reads a value: on an accelerator the host would wait here")
        return func(*args, **(kwargs or {}))


class RecordDispatch(TorchDispatchMode):
    """Records the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
