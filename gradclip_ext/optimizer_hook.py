"""Clipping inside of an optimizer's ``step``, whoever calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradclip_ext import arguments, calls
from gradclip_ext.backends import Selection
from gradclip_ext.checks import check_not_flattened
from gradclip_ext.clip import clip_grad_norm_
from gradclip_ext.gradient_list import GradientList
from gradclip_ext.gradients import check_group, read_gradients
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import Coefficient, Limit, Rule, combine_norms, on_device, widest_dtype
from gradclip_ext.skipping import skips_of

if TYPE_CHECKING:
    from gradclip_ext.clip import Group

_KEY = "max_norm"  # of a group of the optimizer


class ClipHandle:
    """The hook of one :func:`register_clip_hook` call; also a context manager that removes it.

    A copy, by pickle or ``copy.deepcopy``, has no hook: those of torch stay with the original optimizer.
    """

    def __init__(self, total_norm: Tensor | None = None) -> None:
        #: The norm before clipping, in the last step; None before the first one.
        self.total_norm = total_norm
        self._hook: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type[ClipHandle], tuple[Tensor | None]]:
        return type(self), (self.total_norm,)

    def remove(self) -> None:
        """Remove the hook; calling it again does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> ClipHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def register_clip_hook(
    optimizer: Optimizer,
    max_norm: Limit,
    norm_type: float = 2.0,
    *,
    skip_if_nonfinite: bool = False,
    backend: str | None = None,
    group: Group | Sequence[Group] | None = None,
    copies: Callable[[Any], int] | None = None,
) -> ClipHandle:
    """Clip gradients by norm inside of ``optimizer.step()``, whoever calls it.

    Equivalent to :func:`clip_grad_norm_` of the optimizer's parameters right before every step, also where
    a trainer (Lightning, accelerate, GradScaler) makes the step, and after the closure where there is one.

    A group of the optimizer may have limits of its own, under the key ``"max_norm"``::

        torch.optim.AdamW([
            {"params": body},                       # clipped by the joint norm of the groups without the key
            {"params": head, "max_norm": 0.5},      # clipped by its own norm
            {"params": matrices, "max_norm": None}, # neither clipped nor part of a norm
        ], lr=1e-3)

    The keys are read in every step, so they may change, and are saved in ``optimizer.state_dict()``.

    Args:
        optimizer: any optimizer of ``torch.optim`` or derived from it.
        max_norm: largest allowed norm for the groups without the key; as in :func:`clip_grad_norm_`.
        norm_type: as in :func:`clip_grad_norm_`.
        skip_if_nonfinite: a step changes nothing where a norm is infinite or NaN, as with
            :func:`skip_step_`, so only the fused optimizers that it takes are possible.
        backend: as in :func:`clip_grad_norm_`.
        group: as in :func:`clip_grad_norm_`, for each of the norms: all ranks need the same groups of the
            optimizer with limits of their own, in the same order.
        copies: as in :func:`clip_grad_norm_`.

    Returns:
        A handle: ``total_norm`` is the norm from before clipping of all gradients of the last step but those
        that are excluded (of a step with several closure calls, the last one's), ``remove()`` takes the hook
        off again, and it works in a ``with`` statement.

    Raises:
        TypeError: optimizer is no Optimizer or a wrapper that runs no hooks; a limit is neither a number, a
            real tensor, nor a function; skip_if_nonfinite for an optimizer that skip_step_ does not take;
            group or copies is of the wrong type.
        ValueError: a limit, a group's included, is negative or NaN; the backend does not exist;
            skip_if_nonfinite with a norm_type of 0 or less, which does not show infinities; as
            :func:`skip_step_`; copies without group.
        RuntimeError: FSDP1 manages a parameter, and group is None.
        In a step, as :func:`clip_grad_norm_`, before any gradient has changed.

    Note:
        Does not synchronise with an accelerator, but once for skip_if_nonfinite as :func:`skip_step_` does.
        Communicates as :func:`clip_grad_norm_` does with DTensors or group, once for each norm.

        With a ``GradScaler`` and a fused optimizer, gradients are still scaled inside of ``step`` unless
        ``unscale_`` was called: they are clipped by the norm that they will have and stay scaled. A step
        that GradScaler skips may be clipped or not: nobody uses its gradients.

        Hooks are on this optimizer, not on copies of it. Two hooks clip twice. After the step, ``.grad``
        holds the clipped gradients.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = register_clip_hook(optimizer, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> handle.total_norm
        tensor(5.)
        >>> weight.data
        tensor([-0.6000, -0.8000])
    """
    limit = arguments.as_limit(max_norm, allows_vector=False)
    norm_type = arguments.as_float("norm_type", norm_type)
    Selection(backend, None, False)  # raises for a name that does not exist
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} wraps an optimizer and runs no hooks of its own: pass the one that "
            "it wraps, often wrapper.optimizer or wrapper.optim"
        )
    if skip_if_nonfinite and not norm_type > 0.0:
        raise ValueError(
            f"skip_if_nonfinite=True with norm_type={norm_type}: such a norm does not show infinities, so "
            "nothing would be skipped: use an order above 0"
        )
    check_group(group, copies)
    if group is None:
        check_not_flattened(p for part in optimizer.param_groups for p in part["params"])
    handle = ClipHandle()
    reading = {"norm_type": norm_type, "group": group, "copies": copies}
    clip = _Clip(handle, limit, bool(skip_if_nonfinite), backend, reading)
    clip.parts(optimizer)
    if skip_if_nonfinite:
        skips_of(optimizer)  # its hook comes before this one
    handle._hook = optimizer.register_step_pre_hook(clip.before_step)
    return handle


class _Part(NamedTuple):
    """Parameters whose gradients have one norm, and what is made of it."""

    parameters: list[Any]
    rule: Rule


class _Clip:
    """What a hook does."""

    def __init__(
        self, handle: ClipHandle, limit: Limit, skips: bool, backend: str | None, reading: dict[str, Any]
    ) -> None:
        self._handle = handle
        self._limit = limit
        self._skips = skips
        self._backend = backend
        self._reading = reading  # the other arguments of clip_grad_norm_
        self._norm_type: float = reading["norm_type"]

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Clip before the step or, because hooks run before it, after its closure."""
        if "grad_scaler" in kwargs:
            raise RuntimeError(
                f"{type(optimizer).__name__} takes a GradScaler and unscales by itself, so the scale is not "
                "known here: call unscale_and_clip_grad_norm_ before the step instead"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._clip_before_step(optimizer)
            return None
        then = functools.partial(self._in_step, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": then}
        return (args[0], then, *args[2:]), kwargs

    def _in_step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._clip_before_step(optimizer)
        return loss

    def parts(self, optimizer: Optimizer) -> list[_Part]:
        """Return the parameters that are clipped together; raise if a limit is none."""
        joint: list[Any] = []
        parts: list[_Part] = []
        for index, group in enumerate(optimizer.param_groups):
            if _KEY not in group:
                joint += group["params"]
            elif group[_KEY] is not None:
                try:
                    limit = arguments.as_limit(group[_KEY], allows_vector=False)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"param_groups[{index}]: {error}") from error
                parts.append(_Part(group["params"], Rule(limit)))
        return [_Part(joint, Rule(self._limit)), *parts] if joint else parts

    @calls.profiled_as("register_clip_hook")
    @torch.no_grad()
    def _clip_before_step(self, optimizer: Optimizer) -> None:
        parts = self.parts(optimizer)
        scale = getattr(optimizer, "grad_scale", None)
        selection = Selection(self._backend, None, is_intercepted())
        clipped: list[tuple[GradientList, Rule]] = []
        is_torchs, failure = False, None
        for part in parts:
            try:
                gradients = read_gradients(part.parameters, selection, **self._reading)
            except Exception as error:  # other ranks wait for this one in the norms of the other parts
                failure = failure or error
                continue
            calls.count("register_clip_hook", gradients, selection)
            if gradients is None:
                is_torchs = True
            elif gradients.tensors or gradients.is_sharded:
                clipped.append((gradients, part.rule))
        if is_torchs and failure is None:
            self._handle.total_norm = self._clip_as_torch_does(parts, scale)
        else:
            self._handle.total_norm = self._clip_lists(optimizer, clipped, scale, failure)

    def _clip_lists(
        self,
        optimizer: Optimizer,
        clipped: list[tuple[GradientList, Rule]],
        scale: Tensor | None,
        failure: Exception | None,
    ) -> Tensor:
        """Clip each list by its norm; raise a failure after the norms that other ranks wait for."""
        norms: list[Tensor] = []
        coefs: list[Coefficient] = []
        for gradients, rule in clipped:
            try:
                norm, coef = self._norm(gradients, rule, scale)
            except Exception as error:
                failure = failure or error
                continue
            norms.append(norm)
            coefs.append(coef)
        if failure is not None:
            raise failure
        total_norm = self._combined(norms)
        if self._skips:
            skips_of(optimizer).install(optimizer, (~total_norm.isfinite()).to(torch.float32))
        for (gradients, _), coef in zip(clipped, coefs):
            gradients.scale_(coef)
        return clipped[0][0].as_result(total_norm) if len(clipped) == 1 else total_norm

    def _norm(self, gradients: GradientList, rule: Rule, scale: Tensor | None) -> tuple[Tensor, Coefficient]:
        """Return the norm that gradients will have when the optimizer has divided them by the scale."""
        if scale is None:
            return gradients.norm(self._norm_type, rule)
        norm = gradients.wide_norm(self._norm_type)
        if self._norm_type != 0.0:  # which counts
            norm = norm / on_device(scale, norm.device)
        norm = norm.to(gradients.norm_dtype())
        return norm, rule.clip_coef(norm)

    def _combined(self, norms: list[Tensor]) -> Tensor:
        if len(norms) <= 1:
            return norms[0] if norms else torch.tensor(0.0)
        device = norms[0].device
        dtype = torch.float64 if any(n.dtype is torch.float64 for n in norms) else torch.float32
        wide = widest_dtype(device)
        return combine_norms([on_device(n, device).to(wide) for n in norms], self._norm_type).to(dtype)

    def _clip_as_torch_does(self, parts: list[_Part], scale: Tensor | None) -> Tensor:
        """Clip lists with a tensor subclass that dispatches by itself."""
        if scale is not None or self._skips:
            raise NotImplementedError(
                "register_clip_hook: gradients that a GradScaler has scaled, and skip_if_nonfinite=True, are "
                "not supported for tensors that dispatch by themselves (FakeTensor, or DTensors of an "
                "unusual placement)"
            )
        norms = [
            clip_grad_norm_(p.parameters, p.rule.max_norm, backend=self._backend, **self._reading)
            for p in parts
        ]
        return self._combined(norms)
