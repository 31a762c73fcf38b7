"""Unscaling and clipping in one pass over the gradients, for ``torch.amp.GradScaler``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradclip_ext import arguments, calls
from gradclip_ext.backends import Selection
from gradclip_ext.checks import check_not_flattened
from gradclip_ext.clip import clip_grad_norm_
from gradclip_ext.gradients import check_group, read_gradients
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import Limit, Rule, on_device

if TYPE_CHECKING:
    from gradclip_ext.clip import Group

_METHOD = "_unscale_grads_"  # what GradScaler.unscale_ calls between its checks and its bookkeeping
_ITS_PARAMETERS = ["self", "optimizer", "inv_scale", "found_inf", "allow_fp16"]


@calls.profiled
def unscale_and_clip_grad_norm_(
    scaler: GradScaler,
    optimizer: Optimizer,
    max_norm: Limit,
    norm_type: float = 2.0,
    *,
    backend: str | None = None,
    group: Group | Sequence[Group] | None = None,
    copies: Callable[[Any], int] | None = None,
) -> Tensor:
    """Unscale an optimizer's gradients and clip them by their joint norm; return the norm from before.

    Equivalent to ``scaler.unscale_(optimizer)`` and :func:`clip_grad_norm_` of the optimizer's parameters,
    with one read and one write of the gradients less: the norm of the scaled gradients says whether one of
    them is infinite or NaN, and dividing by the scale and clipping are one product. Where the scale is
    a power of two, as GradScaler's own are, gradients and norm have the same bits as by the two calls, except
    for subnormal numbers, and for float64 gradients with orders other than 1, 2 and inf.
    ``scaler.step(optimizer)`` and ``scaler.update()`` follow as usual.

    Args:
        scaler: a ``torch.amp.GradScaler``. If it is disabled, this is :func:`clip_grad_norm_`. A scaler with
            an unscaling of its own (FSDP's ShardedGradScaler) unscales first.
        optimizer: the optimizer whose parameters' gradients are scaled.
        max_norm: as in :func:`clip_grad_norm_`, for the unscaled gradients.
        norm_type: as in :func:`clip_grad_norm_`. Norms of order 0 or less do not show infinities, so that
            the scaler unscales first.
        backend: as in :func:`clip_grad_norm_`.
        group: as in :func:`clip_grad_norm_`. All of its ranks find the same infinities, too.
        copies: as in :func:`clip_grad_norm_`.

    Returns:
        The norm of the unscaled gradients, as :func:`clip_grad_norm_` returns it.

    Raises:
        TypeError: scaler is no GradScaler or optimizer no Optimizer; otherwise as :func:`clip_grad_norm_`.
        ValueError: a gradient is float16, which GradScaler does not unscale; otherwise as
            :func:`clip_grad_norm_`.
        RuntimeError: the optimizer has been unscaled or has stepped since the last ``update()``; a scaler
            with an unscaling of its own, FSDP1's parameters, and no group; otherwise as
            :func:`clip_grad_norm_`.
        AssertionError: ``scaler.scale`` has not been called, as from torch. No exception changes a gradient,
            unless the scaler unscales first.

    Note:
        Synchronises and communicates as :func:`clip_grad_norm_` does. Of DTensors and with group the norm is
        that of all ranks, so all of them find the same infinities and skip the same steps. An infinity
        counts for one device only, as the fused optimizers expect it.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
        >>> unscale_and_clip_grad_norm_(scaler, optimizer, max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    rule = Rule(arguments.as_limit(max_norm, allows_vector=False))
    norm_type = arguments.as_float("norm_type", norm_type)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not callable(getattr(scaler, "unscale_", None)) or not callable(getattr(scaler, "is_enabled", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    check_group(group, copies)
    selection = Selection(backend, None, is_intercepted())
    parameters = parameters_of(optimizer)
    if scaler.is_enabled():
        if norm_type > 0.0 and _unscales_as_torch_does(scaler):
            unscaling = _Unscaling(scaler, parameters, norm_type, rule, selection, group, copies)
            setattr(scaler, _METHOD, unscaling)
            try:
                scaler.unscale_(optimizer)
            finally:
                delattr(scaler, _METHOD)
            if unscaling.total_norm is not None:
                return unscaling.total_norm
        else:
            if group is None:
                check_not_flattened(parameters)
            scaler.unscale_(optimizer)
    return clip_grad_norm_(parameters, rule.max_norm, norm_type, backend=backend, group=group, copies=copies)


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer, or of a framework's wrapper of one."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _unscales_as_torch_does(scaler: Any) -> bool:
    """Tell whether the method that is replaced is torch's, and takes what it did in the releases known."""
    if not hasattr(GradScaler, _METHOD) or _METHOD in vars(scaler):
        return False
    if getattr(type(scaler), _METHOD, None) is not GradScaler._unscale_grads_:
        return False
    return list(inspect.signature(GradScaler._unscale_grads_).parameters) == _ITS_PARAMETERS


class _Unscaling:
    """Takes the place of a scaler's ``_unscale_grads_`` for one call, and clips."""

    def __init__(
        self,
        scaler: Any,
        parameters: list[Any],
        norm_type: float,
        rule: Rule,
        selection: Selection,
        group: Any,
        copies: Any,
    ) -> None:
        self.total_norm: Tensor | None = None  # None if the gradients were only unscaled
        self._scaler = scaler
        self._parameters = parameters
        self._norm_type = norm_type
        self._rule = rule
        self._selection = selection
        self._group = group
        self._copies = copies

    @torch.no_grad()
    def __call__(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Return, as torch's method does, for each device whether an infinity or NaN was found."""
        if not allow_fp16 and any(
            p.grad is not None and p.grad.dtype is torch.float16 for p in self._parameters
        ):
            raise ValueError(
                "Attempting to unscale FP16 gradients. GradScaler wants float32 parameters beside autocast: "
                "do not convert the model with half()"
            )
        gradients = read_gradients(
            self._parameters,
            self._selection,
            norm_type=self._norm_type,
            group=self._group,
            copies=self._copies,
        )
        calls.count("unscale_and_clip_grad_norm_", gradients, self._selection)
        if gradients is None:
            unscale = getattr(type(self._scaler), _METHOD)
            found: dict[torch.device, Tensor] = unscale(
                self._scaler, optimizer, inv_scale, found_inf, allow_fp16
            )
            return found
        if not gradients.tensors and not gradients.is_sharded:
            self.total_norm = torch.tensor(0.0)
            return {}
        scaled_norm = gradients.wide_norm(self._norm_type)
        inverse = on_device(inv_scale, scaled_norm.device)
        norm = (scaled_norm * inverse).to(gradients.norm_dtype())
        gradients.multiply_(inverse.to(norm.dtype) * self._rule.clip_coef(norm))
        self.total_norm = gradients.as_result(norm)
        # GradScaler adds up the devices for a fused optimizer, which skips at exactly 1.
        flag = (~scaled_norm.isfinite()).to(torch.float32)
        devices = list(dict.fromkeys(t.device for t in gradients.tensors)) or [flag.device]
        return {
            d: torch.zeros_like(flag, device=d) if i else on_device(flag, d) for i, d in enumerate(devices)
        }
