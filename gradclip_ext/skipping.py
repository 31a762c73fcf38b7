"""Skipping an optimizer's step where only the device knows that it has to be skipped: ``skip_step_``.

torch's fused optimizers read ``optimizer.found_inf``, which GradScaler sets, and change nothing where it is
exactly 1.0, a 0-d tensor of float32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from gradclip_ext import arguments, calls
from gradclip_ext.norms import on_device, whole

_FUSED = (AdamW, Adam, SGD, Adagrad)  # AdamW is an Adam in newer releases of torch
_ATTRIBUTE = "_gradclip_ext_skips"

# Optimizers and types of devices for which torch has been seen to skip a step.
_PROVEN: set[tuple[type[Optimizer], str]] = set()


@calls.profiled
def skip_step_(optimizer: Optimizer, when: Tensor | bool) -> None:
    """Let the optimizer's next ``step()`` change nothing where ``when`` is true, without asking on the host.

    Equivalent to ``if not when.item(): optimizer.step()``, except that the host does not wait: parameters,
    momentum and step counts are bit for bit as if ``step`` had not been called. That is more than gradients
    of 0, for which Adam and momentum still move the parameters. Several calls before one step: it is skipped
    if one ``when`` is true.

    Sets ``optimizer.found_inf`` until that step has ended; what a step that raised leaves there, the next one
    removes. With a ``GradScaler``, the step is skipped if either says so, and the scaler's factor follows
    its own findings only.

    Args:
        optimizer: Adam, AdamW, SGD or Adagrad of ``torch.optim`` with ``fused=True`` in all groups.
        when: a tensor of booleans or integers with one element, on any device, or a Python bool. It is read
            now: what happens to the tensor afterwards does not matter. Over many ranks it has to be the
            same on all of them, as what follows from a joint norm is.

    Raises:
        TypeError: the optimizer is none of these, overrides their ``step``, has groups that are not fused or
            parameters on MPS; ``when`` is no boolean, for instance a norm.
        ValueError: ``when`` has not one element; SGD has momentum with dampening, where the first step
            is computed otherwise than the later ones.
        RuntimeError: this release of torch does not skip as described above, or torch.compile is at work.
            No exception changes anything.

    Note:
        Never synchronises but for once in a process: the first call for a class of optimizers and a type
        of device tries the step on one element and looks at the result.

        The step takes its usual time. State that a first step creates is there after it, as zeros. The
        request is a part neither of ``state_dict()`` nor of a copy of the optimizer. ``zero_grad`` as usual.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        >>> weight.grad = torch.tensor([300.0, 400.0])
        >>> total_norm = clip_grad_norm_([weight], max_norm=1.0)
        >>> skip_step_(optimizer, total_norm > 100.0)
        >>> optimizer.step()
        >>> weight.data
        tensor([1., 1.])
    """
    kind = _check(optimizer)
    flag = _as_flag(when)
    _skips_of(optimizer, kind).request(optimizer, flag)


def skips_of(optimizer: Optimizer) -> Skips:
    """Return what is kept for an optimizer; raise if its steps cannot be skipped."""
    return _skips_of(optimizer, _check(optimizer))


def _skips_of(optimizer: Optimizer, kind: type[Optimizer]) -> Skips:
    skips: Skips | None = vars(optimizer).get(_ATTRIBUTE)
    if skips is None or skips.groups != len(optimizer.param_groups):
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        if any(device.type == "mps" for device in devices):
            raise TypeError(
                "the optimizer has parameters on MPS, whose fused kernels do not skip: decide on the host, "
                "`if not when.item(): optimizer.step()`"
            )
        for device in devices:
            _prove(kind, device)
        if skips is None:
            skips = Skips()
            setattr(optimizer, _ATTRIBUTE, skips)
            optimizer.register_step_pre_hook(skips.before_step)
            optimizer.register_step_post_hook(skips.after_step)
            # Without this, which copies of an optimizer lack, GradScaler does not call step where it found
            # an infinity, and the request would wait for the step after that.
            optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
            _make_momentum_buffers(optimizer)  # this may be inside of a closure
        skips.groups = len(optimizer.param_groups)
    return skips


class Skips:
    """What one optimizer's next step has been asked, and what of it is in ``optimizer.found_inf``."""

    def __init__(self) -> None:
        self.groups = 0
        self._requested: Tensor | None = None  # by calls since the last step
        self._taken: Tensor | None = None  # by calls before the step that runs
        self._installed: Tensor | None = None  # the found_inf that is ours
        self._replaced: Tensor | None = None  # the found_inf that was there, GradScaler's

    def request(self, optimizer: Optimizer, flag: Tensor) -> None:
        """Ask the next step, or in a closure this one, to change nothing where the flag is 1.0."""
        flag = on_device(flag, _device_of(optimizer))
        self._requested = _either(self._requested, flag)
        self._restore(optimizer)  # a step may have raised
        self.install(optimizer, self._requested)

    def install(self, optimizer: Optimizer, flag: Tensor) -> None:
        """Let the step that runs change nothing where the flag is 1.0, or where it would not anyway."""
        present = getattr(optimizer, "found_inf", None)
        if present is not None and present is not self._installed:
            self._replaced = present
            # GradScaler adds up what it found on several devices, and 2.0 would not skip.
            present = on_device((present != 0).reshape(()).to(torch.float32), flag.device)
        self._installed = _either(present, on_device(flag, _device_of(optimizer)))
        optimizer.found_inf = self._installed  # type: ignore[attr-defined]

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give ``step`` a closure: what runs there runs after all other hooks and the caller's closure."""
        self._restore(optimizer)  # the step before may have raised, GradScaler may have come in between
        self._taken, self._requested = self._requested, None
        kwargs = dict(kwargs)
        closure = kwargs.pop("closure", args[1] if len(args) > 1 else None)
        return (args[0], functools.partial(self._in_step, optimizer, closure)), kwargs

    def _in_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        try:
            loss = None if closure is None else closure()
        except BaseException:
            self._taken = self._requested = None
            self._restore(optimizer)
            raise
        with torch.no_grad():
            _make_momentum_buffers(optimizer)
            if self._taken is not None or self._requested is not None:  # the closure may have asked, too
                flag = _either(self._taken, self._requested)
                self._taken = self._requested = None
                self._restore(optimizer)
                self.install(optimizer, flag)
        return loss

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._taken = self._requested = None
        self._restore(optimizer)

    def _restore(self, optimizer: Optimizer) -> None:
        """Remove what is ours from the optimizer, and put back what was there."""
        if self._installed is not None and getattr(optimizer, "found_inf", None) is self._installed:
            if self._replaced is None:
                del optimizer.found_inf  # type: ignore[attr-defined]
            else:  # GradScaler deletes it
                optimizer.found_inf = self._replaced  # type: ignore[attr-defined]
        self._installed = self._replaced = None


def _either(one: Tensor | None, other: Tensor | None) -> Tensor:
    """Return 1.0 where one of two flags is."""
    if one is None or other is None:
        flag = other if one is None else one
        assert flag is not None
        return flag
    return torch.maximum(one, other)


def _as_flag(when: Any) -> Tensor:
    """Return 1.0 for true and 0.0 for false, 0-d in float32, as memory of its own."""
    if not isinstance(when, Tensor):
        try:
            when = torch.as_tensor(when, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"when must be a tensor with one boolean, or a bool, got {arguments.describe(when)}"
            ) from error
    if when.is_floating_point() or when.is_complex():
        raise TypeError(
            f"when must be a boolean, got a tensor of {when.dtype}: pass a comparison, such as "
            "total_norm > 100.0 or ~total_norm.isfinite()"
        )
    if when.numel() != 1:
        raise ValueError(f"when must have one element, got shape {tuple(when.shape)}: pass when.any()")
    with torch.no_grad():
        return (whole(when.detach()).reshape(()) != 0).to(torch.float32)


def _device_of(optimizer: Optimizer) -> torch.device:
    """Return the device of the first parameter; torch copies found_inf to other devices."""
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    return torch.device("cpu") if first is None else first.device


# ---------------------------------------------------------------- which optimizers


def _check(optimizer: Any) -> type[Optimizer]:
    """Return the class of torch's whose step will run; raise if that cannot be skipped."""
    name = type(optimizer).__name__
    if torch.compiler.is_compiling():
        raise RuntimeError("skip_step_ cannot be traced by torch.compile: call it outside")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}")
    kind = next((k for k in _FUSED if isinstance(optimizer, k)), None)
    if kind is None:
        _raise_no_fused_step(f"{name} has no fused step")
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(kind.step):
        _raise_no_fused_step(f"{name} replaces the step of {kind.__name__}, and may not skip as that does")
    unfused = [i for i, group in enumerate(optimizer.param_groups) if not group["fused"]]
    if unfused:
        which = "all" if len(unfused) == len(optimizer.param_groups) else ", ".join(map(str, unfused))
        raise TypeError(
            f"param_groups ({which}) of {name} are not fused, and would step or raise: construct it as "
            f"{kind.__name__}(..., fused=True), or set group['fused'] = True before the first step"
        )
    if kind is SGD:
        for index, group in enumerate(optimizer.param_groups):
            if group["momentum"] != 0 and group["dampening"] != 0:
                raise ValueError(
                    f"param_groups[{index}] has momentum with dampening={group['dampening']}: torch's first "
                    "step ignores dampening, so one after a skipped first step would differ. Set "
                    "dampening=0, or decide on the host: `if not when.item(): optimizer.step()`"
                )
    return kind


def _raise_no_fused_step(why: str) -> NoReturn:
    raise TypeError(
        f"{why}. Only a fused step of torch's can be skipped without waiting for the device: use AdamW, "
        "Adam, SGD or Adagrad of torch.optim with fused=True (pass what a wrapper wraps, often "
        "wrapper.optimizer or wrapper.optim), or decide on the host: `if not when.item(): optimizer.step()`"
    )


def _make_momentum_buffers(optimizer: Optimizer) -> None:
    """Create the momentum buffers that SGD's step is going to need, as zeros.

    A first fused step creates them without values and fills them, but not where it is skipped, and the step
    after that takes them for momentum. Zeros make an ordinary step of the first one; negative ones, because
    0.0 + -0.0 is not -0.0.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] == 0 or group["dampening"] != 0:
            continue
        for param in group["params"]:
            if param.grad is None or param.grad.layout is not torch.strided:
                continue
            state = optimizer.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.full_like(param.grad, -0.0, requires_grad=False)


@torch.no_grad()
def _prove(kind: type[Optimizer], device: torch.device) -> None:
    """Raise unless torch skips a step of this class on this type of device, and only where it should.

    One element, two steps: the first is to be skipped, the second is not. Waits for the device, once.
    """
    if (kind, device.type) in _PROVEN:
        return
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float32, device=device))
    weight.grad = torch.ones_like(weight)
    options: dict[str, Any] = {"momentum": 0.5} if kind is SGD else {}
    seen: list[Tensor] = []
    try:
        optimizer: Any = kind([weight], lr=0.5, fused=True, **options)  # type: ignore[call-arg]
        step = inspect.unwrap(kind.step)  # hooks on all optimizers must not see this one
        for found in (1.0, 0.0):
            optimizer.found_inf = torch.full((), found, dtype=torch.float32, device=device)
            _make_momentum_buffers(optimizer)
            step(optimizer)
            state = [value.reshape(1).to(weight) for value in optimizer.state[weight].values()]
            seen.append(torch.cat([weight, *state]))
        skipped, stepped = torch.stack(seen).tolist()
    except Exception as error:
        _raise_contract(kind, device, error)
    if skipped[0] != 1.0 or any(skipped[1:]) or stepped[0] == 1.0:
        _raise_contract(kind, device)
    _PROVEN.add((kind, device.type))


def _raise_contract(kind: type[Optimizer], device: torch.device, cause: Exception | None = None) -> NoReturn:
    raise RuntimeError(
        f"the fused {kind.__name__} of torch {torch.__version__} on {device.type} does not skip its step by "
        "optimizer.found_inf as earlier releases do, so nothing was changed: decide on the host, "
        "`if not when.item(): optimizer.step()`, and report this"
    ) from cause
