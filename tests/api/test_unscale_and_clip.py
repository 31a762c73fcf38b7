"""unscale_and_clip_grad_norm_: the bits of unscaling and clipping, in one product."""

from __future__ import annotations

import math
from typing import Any

import optimizers
import oracle
import pytest
import torch
from cases import NORM_TYPES, Target, clones, grads_of, random
from dispatch import NoReads
from optimizers import assert_same_training, deliver, params_of, random_grads
from oracle import parameter
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from gradclip_ext import amp, clip_grad_norm_, unscale_and_clip_grad_norm_
from gradclip_ext.backends import foreach

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def scaler_of(scale: float, device: str = "cpu", **options: Any) -> GradScaler:
    scaler = GradScaler(device, init_scale=scale, **options)
    scaler.scale(torch.ones((), device=device))
    return scaler


def twins(backend: Target, scale: float, dtype: torch.dtype) -> tuple[SGD, SGD]:
    """Return two optimizers with the same scaled gradients, of several layouts."""
    grads = [backend.random(*shape, dtype=dtype) for shape in ((30,), (), (4, 5), (0,))]
    grads.append(backend.random(8, 6, dtype=dtype)[::2, 1::2])
    pair = []
    for _ in range(2):
        params = [parameter((g * scale).clone()) for g in grads]
        params.append(torch.nn.Parameter(torch.ones(2, device=backend.device)))  # has no gradient
        pair.append(SGD(params, lr=0.1))
    return pair[0], pair[1]


def reference(scaler: GradScaler, optimizer: Optimizer, *args: Any, **options: Any) -> Tensor:
    scaler.unscale_(optimizer)
    return clip_grad_norm_(params_of(optimizer), *args, **options)


def product(scaler: GradScaler, optimizer: Optimizer, *args: Any, **options: Any) -> Tensor:
    """As reference does it for a scale that is a power of two."""
    for grad in grads_of(params_of(optimizer)):
        grad.mul_(1.0 / scaler.get_scale())
    return clip_grad_norm_(params_of(optimizer), *args, **options)


def found(scaler: GradScaler, optimizer: Optimizer) -> list[float]:
    return [f.item() for f in scaler._found_inf_per_device(optimizer).values()]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [65536.0, 1024.0, 1.0, 0.5, 2.0**-10], ids=str)
def test_bits_at_powers_of_two(backend: Target, scale: float, dtype: torch.dtype) -> None:
    """Scales below 1 included, where a factor larger than 1 is left.

    Only a float64 result shows two roundings that differ for a scaled list. 1/3 is 2**-55.6 off, by which
    ``pow`` multiplies the logarithm of the sum: for 2**48 times a sum below e**10, 43 * 2**-55.6, or 8 ulps,
    for each tensor's norm and again for the joint one, with 2 for what ``pow`` rounds each time. The root of
    half a number is rounded, for order 0.5. Coefficient and product add an ulp each.
    """
    # On a GPU, torch does not unscale bfloat16. We do, but for the orders that are left to torch.
    by_torch = dtype is not torch.bfloat16 or backend.device == "cpu"
    for max_norm in (0.0, 0.3, 1e6, INF, torch.tensor(0.25), lambda norm: norm / 3):
        for norm_type in NORM_TYPES if by_torch else [p for p in NORM_TYPES if p > 0.0]:
            ours, theirs = twins(backend, scale, dtype)
            scalers = [scaler_of(scale, backend.device) for _ in range(2)]
            norm = unscale_and_clip_grad_norm_(scalers[0], ours, max_norm, norm_type, backend=backend.name)
            unscale = reference if by_torch else product
            expected = unscale(scalers[1], theirs, max_norm, norm_type, backend=backend.name)
            what = f"{max_norm}, {norm_type}"
            is_rounded = dtype is torch.float64 and norm_type in (0.5, 3.0)
            oracle.assert_within_ulps(norm, expected, 20 if is_rounded else 0, what)
            # On an accelerator the gradients go to torch's product, which may differ by the last bit.
            ulps = 22 if is_rounded else 0 if backend.sees_values else 1
            for a, b in zip(grads_of(params_of(ours)), grads_of(params_of(theirs)), strict=True):
                oracle.assert_within_ulps(a, b, ulps, what)
            assert found(scalers[0], ours) == [0.0]
            assert not by_torch or found(scalers[1], theirs) == [0.0]


def test_other_scales(backend: Target) -> None:
    """Roundings: of 1 / scale and of its products with the coefficient and the gradient, half an ulp each,
    and the scaled norm's own."""
    for scale in (1000.0, 3.0, 0.7):
        ours, theirs = twins(backend, scale, torch.float32)
        norm = unscale_and_clip_grad_norm_(scaler_of(scale, backend.device), ours, 0.3, backend=backend.name)
        expected = reference(scaler_of(scale, backend.device), theirs, 0.3, backend=backend.name)
        oracle.assert_within_ulps(norm, expected, 2)
        for a, b in zip(grads_of(params_of(ours)), grads_of(params_of(theirs)), strict=True):
            oracle.assert_within_ulps(a, b, 6)


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_nonfinite_gradients_are_found(backend: Target, value: float) -> None:
    for max_norm in (0.5, INF):
        for norm_type in NORM_TYPES:
            ours, theirs = twins(backend, 1024.0, torch.float32)
            for optimizer in (ours, theirs):
                params_of(optimizer)[2].grad[1, 2] = value
            scalers = [scaler_of(1024.0, backend.device) for _ in range(2)]
            norm = unscale_and_clip_grad_norm_(scalers[0], ours, max_norm, norm_type, backend=backend.name)
            expected = reference(scalers[1], theirs, max_norm, norm_type, backend=backend.name)
            oracle.assert_same_specials(norm, expected)
            assert found(scalers[0], ours) == [1.0], norm_type
            for a, b in zip(grads_of(params_of(ours)), grads_of(params_of(theirs)), strict=True):
                oracle.assert_same_specials(a, b)


def test_norms_that_overflow_while_scaled(backend: Target) -> None:
    """The norm of finite float32 gradients may be beyond float32 as long as they are scaled."""
    grads = [torch.full((50,), 3e38, device=backend.device) for _ in range(2)]
    optimizer = SGD([parameter(g) for g in grads], lr=0.1)
    scaler = scaler_of(65536.0, backend.device)
    norm = unscale_and_clip_grad_norm_(scaler, optimizer, INF, backend=backend.name)
    assert found(scaler, optimizer) == [0.0]
    assert norm.item() == pytest.approx(3e39 / 65536.0, rel=1e-6)


def test_without_gradients() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    scaler = scaler_of(4.0)
    oracle.assert_same_bits(unscale_and_clip_grad_norm_(scaler, optimizer, 1.0), torch.tensor(0.0))
    assert found(scaler, optimizer) == []


# ---------------------------------------------------------------- the scaler's bookkeeping


@pytest.mark.parametrize("name", [*optimizers.FUSED, "loop"])
def test_training(name: str) -> None:
    """Steps, infinities, backing off and growing are those of unscaling and clipping."""
    make = optimizers.fused(name) if name in optimizers.FUSED else AdamW
    ours, theirs = optimizers.twins(make)
    scalers = [GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for index in range(6):
        grads = random_grads()
        if index == 3:
            grads[2].fill_(INF)
        for scaler, optimizer in zip(scalers, (ours, theirs)):
            deliver([scaler.scale(g) for g in grads], optimizer)
        norm = unscale_and_clip_grad_norm_(scalers[0], ours, 0.5)
        oracle.assert_same_bits(norm, reference(scalers[1], theirs, 0.5))
        for scaler, optimizer in zip(scalers, (ours, theirs)):
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale(), index
        assert_same_training(ours, theirs, f"step {index}")
    assert scalers[0].get_scale() != 1024.0
    assert "_unscale_grads_" not in vars(scalers[0])


def test_stages_are_checked() -> None:
    optimizer = SGD([parameter(random(3))], lr=0.1)
    scaler = scaler_of(4.0)
    unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    with oracle.unchanged(grads_of(params_of(optimizer))):
        with pytest.raises(RuntimeError, match="already been called"):
            unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"after step\(\)"):
        unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    scaler.update()
    unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    with pytest.raises(AssertionError, match="_scale is None"):
        unscale_and_clip_grad_norm_(GradScaler("cpu"), optimizer, 1.0)


def test_disabled_scaler() -> None:
    ours, theirs = parameter(grad := random(5)), parameter(grad.clone())
    norm = unscale_and_clip_grad_norm_(GradScaler("cpu", enabled=False), SGD([ours], lr=0.1), 0.5)
    oracle.assert_same_bits(norm, clip_grad_norm_([theirs], 0.5))
    oracle.assert_same_bits(ours.grad, theirs.grad)


class Own(GradScaler):
    """Unscales in its own way, as ShardedGradScaler does."""

    def _unscale_grads_(self, *args: Any) -> Any:
        self.was_asked = True
        return super()._unscale_grads_(*args)


class Renamed(GradScaler):
    """Does not ask the method that ours replaces."""

    def unscale_(self, optimizer: Optimizer) -> None:
        self.was_asked = True
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = GradScaler._unscale_grads_(
            self, optimizer, self._scale.reciprocal(), torch.zeros(()), False
        )


@pytest.mark.parametrize("kind", [Own, Renamed, "of the instance", "signature"], ids=str)
def test_scalers_that_unscale_by_themselves(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    grad = random(5)
    ours, theirs = parameter(grad * 8.0), parameter(grad.clone())
    scaler = (kind if isinstance(kind, type) else GradScaler)("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    torchs, asked = GradScaler._unscale_grads_, []

    def other(*args: Any, more: Any = None) -> Any:
        asked.append(args)
        return torchs(*args)

    if kind == "of the instance":
        scaler._unscale_grads_ = lambda *args: other(scaler, *args)
    elif kind == "signature":
        monkeypatch.setattr(GradScaler, "_unscale_grads_", other)
    norm = unscale_and_clip_grad_norm_(scaler, SGD([ours], lr=0.1), 0.5)
    oracle.assert_same_bits(norm, clip_grad_norm_([theirs], 0.5))
    oracle.assert_same_bits(ours.grad, theirs.grad)
    assert asked or scaler.was_asked


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler")
def test_torchs_scaler_is_known() -> None:
    """Otherwise every call unscales first, and nothing but time would tell."""
    assert amp._unscales_as_torch_does(scaler_of(2.0))
    assert amp._unscales_as_torch_does(torch.cuda.amp.GradScaler(enabled=False))


def test_nobody_reads_a_value(backend: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where the host would wait."""
    if backend.way != "blind":
        pytest.skip("on the CPU the host may look at values; the blind way must not")
    for module in (amp, foreach):  # otherwise the mode below would itself change what runs
        monkeypatch.setattr(module, "is_intercepted", lambda: False)
    for max_norm in (0.3, INF, lambda norm: norm / 3):
        ours, _ = twins(backend, 1024.0, torch.float32)
        scaler = scaler_of(1024.0)
        with NoReads():
            unscale_and_clip_grad_norm_(scaler, ours, max_norm, backend="foreach")
        assert found(scaler, ours) == [0.0]


# ---------------------------------------------------------------- errors


def refused(
    optimizer: Any, error: type[Exception], match: str, *args: Any, scaler: Any = None, **options: Any
) -> None:
    scaler = scaler or scaler_of(4.0)
    grads = grads_of(params_of(optimizer)) if isinstance(optimizer, Optimizer) else []
    before = clones(grads)
    with pytest.raises(error, match=match):
        unscale_and_clip_grad_norm_(scaler, optimizer, *args, **options)
    assert all(torch.equal(g, b) for g, b in zip(grads, before))
    if isinstance(scaler, GradScaler):
        assert "_unscale_grads_" not in vars(scaler)
        good = SGD([parameter(random(2))], lr=0.1)
        unscale_and_clip_grad_norm_(scaler, good, 1.0)  # the scaler is as it was


def test_bad_arguments() -> None:
    optimizer = SGD([parameter(random(3))], lr=0.1)
    refused(optimizer, ValueError, "max_norm must be 0 or more", -1.0)
    refused(optimizer, TypeError, "max_norm", object())
    refused(optimizer, TypeError, "max_norm returned None", lambda norm: None)
    refused(optimizer, ValueError, "one element", torch.ones(2))
    refused(optimizer, ValueError, "does not exist", 1.0, backend="none")
    refused(optimizer, TypeError, "GradScaler, got str", 1.0, scaler="scaler")
    refused([parameter(random(3))], TypeError, "Optimizer, got list", 1.0)


def test_bad_gradients() -> None:
    half = SGD([parameter(random(2)), parameter(random(3, dtype=torch.float16))], lr=0.1)
    refused(half, ValueError, "FP16 gradients", 1.0)
    expanded = SGD([parameter(random(2)), parameter(torch.ones(1).expand(3))], lr=0.1)
    refused(expanded, RuntimeError, "expanded", 1.0)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        unscale_and_clip_grad_norm_(scaler_of(4.0), SGD(embedding.parameters(), lr=0.1), 1.0)
    assert (embedding.weight.grad.coalesce().values() == 1.0).all()
