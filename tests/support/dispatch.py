"""What torch is given to do."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class RecordDispatch(TorchDispatchMode):
    """Records the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
