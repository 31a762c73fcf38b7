"""get_grad_stats: norms, largest magnitudes, zeros and non-finite values of each gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import oracle
import pytest
import torch
from cases import (
    CONTAINERS,
    Target,
    clones,
    grads_of,
    layout_cases,
    over_dtypes,
    over_norm_types,
    raises_untouched,
)
from oracle import parameter
from torch import Tensor

import gradclip_ext
from gradclip_ext import GradStats, reference

NAN, INF = math.nan, math.inf


def assert_stats(stats: GradStats, grads: Sequence[Tensor], norm_type: float, what: str = "") -> None:
    """Compare with float64, counts exactly."""
    exact = reference.statistics(grads, norm_type)
    device = grads[0].device
    for name in ("norms", "absmax", "zeros", "nonfinite"):
        found = getattr(stats, name)
        assert found.shape == (len(grads),) and found.device == device, f"{what}: {name}"
        values = [getattr(e, "norm" if name == "norms" else name) for e in exact]
        expected = torch.tensor(values, dtype=torch.float64)
        if name in ("zeros", "nonfinite"):
            assert found.dtype == torch.int64 and found.tolist() == expected.tolist(), f"{what}: {name}"
        else:
            oracle.assert_same_specials(found.cpu().double(), expected.double(), f"{what}: {name}")
            # A GPU's magnitude of a complex number may differ by a rounding from a CPU's.
            is_inexact = device.type != "cpu" and any(g.is_complex() for g in grads)
            tolerance = 1e-6 if name == "norms" else 1e-15 if is_inexact else 0.0
            torch.testing.assert_close(
                found.cpu().double(), expected.double(), rtol=tolerance, atol=0.0, equal_nan=True
            )
    assert stats.numel == tuple(g.numel() for g in grads), what
    oracle.assert_norm(stats.total_norm, grads, norm_type, what)


def with_specials(grads: Sequence[Tensor]) -> None:
    """Spoil some gradients with zeros of both signs, infinities and NaN."""
    for index, grad in enumerate(grads):
        if grad.numel() > 2 and grad.dim():
            row = grad[0] if grad.dim() > 1 else grad
            row.flatten()[0] = 0.0
            for at, value in enumerate((0.0, -0.0, (INF, NAN, 0.0)[index % 3])):
                if at < row.shape[0]:
                    row[at] = value


# ---------------------------------------------------------------- against float64


@over_norm_types
@over_dtypes
def test_layouts_and_containers(backend: Target, dtype: torch.dtype, norm_type: float) -> None:
    for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
        with_specials(grads)
        with oracle.unchanged(grads, layout):
            stats = backend.get_grad_stats(CONTAINERS[container]([parameter(g) for g in grads]), norm_type)
        assert_stats(stats, grads, norm_type, f"{layout}, {container}")


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
def test_many_chunks_and_threads(backend: Target, norm_type: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        grads = [backend.random(n, dtype=dtype) for n in (300_000, 5, 70_001, 3, 400_000)]
        grads[0][100::7] = 0.0
        grads[2][-1] = -0.0
        grads[4][[5, 100_000, -1]] = torch.tensor([INF, -INF, NAN], dtype=dtype, device=backend.device)
        stats = backend.get_grad_stats([parameter(g) for g in grads], norm_type)
        assert_stats(stats, grads, norm_type, f"{dtype}")


def test_the_squares_of_the_norms_add_up(backend: Target) -> None:
    grads = [backend.random(n, dtype=torch.float64) for n in (300_000, 5, 70_001)]
    stats = backend.get_grad_stats([parameter(g) for g in grads])
    assert stats.norms.square().sum().item() == pytest.approx(stats.total_norm.item() ** 2, rel=1e-12)


@over_dtypes
def test_same_bits_as_get_total_norm(backend: Target, dtype: torch.dtype) -> None:
    for norm_type in (1.0, 2.0, INF, 3.0):
        grads = [backend.random(n, dtype=dtype) for n in (70_001, 5, 300, 1)]
        total = backend.get_grad_stats([parameter(g) for g in grads], norm_type).total_norm
        expected = backend.get_total_norm(grads, norm_type)
        if backend.name == "cpu" or (backend.name == "cuda" and not dtype.is_complex):
            oracle.assert_same_bits(total, expected)
        else:
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0.0)


def test_values_beyond_the_range_of_squares(backend: Target) -> None:
    if not backend.sees_values and backend.name != "cuda":
        pytest.skip("elsewhere torch's own operations square in float64")
    for values in ((1e200, 1e-200), (3.0, 1e-170), (1e-200, 0.0), (5e-324,)):
        grads = [torch.full((9,), value, dtype=torch.float64, device=backend.device) for value in values]
        assert_stats(backend.get_grad_stats([parameter(g) for g in grads]), grads, 2.0, f"{values}")


def test_clipping_from_the_same_read(backend: Target) -> None:
    params = backend.parameters((30,), (4, 5))
    before = clones(grads_of(params))
    stats = backend.get_grad_stats(params)
    backend.clip_grads_with_norm_(params, 0.5, stats.total_norm)
    oracle.assert_scaled(grads_of(params), before, stats.total_norm, 0.5)
    stats = backend.get_grad_stats(params)
    before = clones(grads_of(params))
    backend.clip_grads_with_norm_(params, 0.1, stats.norms)
    for grad, old, norm in zip(grads_of(params), before, stats.norms):
        oracle.assert_scaled([grad], [old], norm, 0.1)


# ---------------------------------------------------------------- which parameter is which


def test_every_parameter_has_its_place(backend: Target) -> None:
    a, b, c = backend.parameters((4,), (2, 3), (0,))
    frozen = torch.nn.Parameter(torch.ones(2, device=backend.device))
    stats = backend.get_grad_stats([frozen, a, b, a, c, frozen])
    alone = backend.get_grad_stats([a, b, c])
    assert stats.numel == (0, 4, 6, 0) and stats.names == ("0", "1", "2", "3")
    for name in ("norms", "absmax", "zeros", "nonfinite"):
        assert getattr(stats, name).tolist() == [0, *getattr(alone, name).tolist()], name
    oracle.assert_same_bits(stats.total_norm, alone.total_norm)


def test_names(backend: Target) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)).to(backend.device)
    model[1].weight = model[1].weight  # registered, as a tied one is, under two names
    model.tied = model[0].weight
    model(torch.ones(4, 3, device=backend.device)).sum().backward()
    names = tuple(name for name, _ in model.named_parameters())
    expected = backend.get_grad_stats(list(model.parameters()))
    assert expected.names == tuple(map(str, range(4)))
    for given in (model, model.named_parameters(), list(model.named_parameters(remove_duplicate=False))):
        stats = backend.get_grad_stats(given)
        assert stats.names == names
        oracle.assert_same_bits(stats.norms, expected.norms)
    assert repr(stats) == f"GradStats(total_norm={stats.total_norm}, 4 parameters)"


def test_nothing_there(backend: Target) -> None:
    for params in ([], [torch.nn.Parameter(torch.ones(2)) for _ in range(3)], torch.nn.Module()):
        stats = backend.get_grad_stats(params)
        count = 0 if isinstance(params, torch.nn.Module) else len(params)
        assert stats.norms.tolist() == [0.0] * count and stats.numel == (0,) * count
        oracle.assert_same_bits(stats.total_norm, torch.tensor(0.0))
        assert stats.to_dict()["grad/absmax"] == 0.0


def test_only_empty_gradients(backend: Target) -> None:
    for norm_type in (2.0, INF, -INF, 0.0):
        stats = backend.get_grad_stats(backend.parameters((0,), (3, 0)), norm_type)
        assert stats.norms.tolist() == [0.0, 0.0] and stats.total_norm == 0.0


def test_expanded_and_shared_gradients_are_read(backend: Target) -> None:
    base = backend.random(6)
    params = [parameter(base), parameter(base[:3]), parameter(backend.random(1, 3).expand(2, 3))]
    assert_stats(backend.get_grad_stats(params), grads_of(params), 2.0)


# ---------------------------------------------------------------- to_dict


def test_to_dict(backend: Target) -> None:
    params = [parameter(torch.tensor(v, device=backend.device)) for v in ([3.0, 0.0], [-4.0], [0.0, INF])]
    named = list(zip(("a", "b", "c"), params))
    assert backend.get_grad_stats(named[:2]).to_dict("g") == {
        "g/norm": 5.0,
        "g/absmax": 4.0,
        "g/zeros": 1,
        "g/nonfinite": 0,
        "g/norm/a": 3.0,
        "g/norm/b": 4.0,
    }
    found = backend.get_grad_stats(named).to_dict()
    assert found["grad/norm"] == found["grad/absmax"] == found["grad/norm/c"] == INF
    assert found["grad/zeros"] == 2 and found["grad/nonfinite"] == 1
    params[1].grad[0] = NAN
    assert math.isnan(backend.get_grad_stats(named).to_dict()["grad/absmax"])


# ---------------------------------------------------------------- refusals


def test_bad_arguments(backend: Target) -> None:
    good = backend.parameters((3,))
    sparse = torch.nn.Parameter(torch.ones(3, device=backend.device))
    sparse.grad = torch.ones(3).to_sparse().to(backend.device)
    for params, error, words in (
        ([*good, sparse], TypeError, ("sparse", "gradient 1")),
        ([*good, 3.0], TypeError, ("position 1", "float")),
        ([("a", good[0]), good[0]], TypeError, ("element 1", "pairs")),
        ([("a", good[0]), ("b", None)], TypeError, ("position 1", "None")),
        ([good[0], ("a", good[0])], TypeError, ("position 1", "tuple")),
        (5, TypeError, ("parameters", "5")),
    ):
        raises_untouched(error, words, good, lambda p=params: backend.get_grad_stats(p))
    raises_untouched(ValueError, ("norm_type", "much"), good, lambda: backend.get_grad_stats(good, "much"))
    with pytest.raises(ValueError, match="does not exist"):
        gradclip_ext.get_grad_stats(good, backend="fast")
