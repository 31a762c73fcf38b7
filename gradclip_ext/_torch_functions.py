"""torch's own clipping functions, for tensor subclasses, whatever was put in their place in torch.

``torch.nn.utils.clip_grad_norm_`` may be this package's function (``patch_torch``, even across a reload of
it) or another library's wrapper that calls it: to look it up there could recurse without end. This is a
second instance of torch's module, which nobody else has.
"""

from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from torch import Tensor


def _load() -> ModuleType:
    spec = find_spec("torch.nn.utils.clip_grad")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_module = _load()
clip_grad_norm_: Callable[..., Tensor] = _module.clip_grad_norm_
clip_grad_value_: Callable[..., None] = _module.clip_grad_value_
clip_grads_with_norm_: Callable[..., None] = _module._clip_grads_with_norm_
get_total_norm: Callable[..., Tensor] = _module._get_total_norm
