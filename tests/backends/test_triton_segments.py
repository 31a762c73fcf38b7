"""What the triton backend launches for results and coefficients of each tensor. Tested without Triton."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracle import parameter
from torch import Tensor
from triton_fakes import launches

import gradclip_ext
from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.triton import TritonBackend, memory, units
from gradclip_ext.norms import Rule

Install = Callable[..., TritonBackend]


def parameters_of(grads: list[Tensor]) -> list[Tensor]:
    return [parameter(g) for g in grads]


def test_clipping_each_is_one_launch_more_than_by_joint_norm_for_any_rule(
    log: list, install: Install
) -> None:
    """Norm, what follows from it, and scaling; nothing of torch's between them."""
    install()
    params = parameters_of([torch.ones(3), torch.ones(4).half(), torch.ones(5)])
    norm_, scaled = ["norm_kernel"] * 2, ["scale_each_kernel"] * 2
    device = lambda value: torch.tensor(value, dtype=torch.float64).requires_grad_()
    for max_norm, zero in ((1.0, False), (device(1.0), True), (device([1.0, 2.0, 3.0]), False)):
        log.clear()
        gradclip_ext.clip_grad_norm_(
            params, max_norm, per_tensor=True, zero_if_nonfinite=zero, backend="triton"
        )
        assert launches(log) == [*norm_, "finalize_each_kernel", *scaled]
        (norms, coefs, _, _, stride, *_), (passed, of_scale, *_) = [e[2] for e in log if e[0] == "launch"][
            2:4
        ]
        assert passed is coefs and norms.shape == coefs.shape == (3,) and of_scale == 1
        assert stride == int(isinstance(max_norm, Tensor) and max_norm.dim() == 1)
    log.clear()
    gradclip_ext.clip_grad_norm_(params, math.inf, per_tensor=True, backend="triton")
    assert launches(log) == [*norm_, "finalize_each_kernel"], "only reports"


def test_a_joint_norm_takes_three_launches_for_any_rule(log: list, install: Install) -> None:
    backend = install()
    tensors = [torch.ones(3)]
    for max_norm in (1.0, math.inf, torch.tensor(2.0), torch.tensor(2.0).bfloat16()):
        log.clear()
        rule = Rule(max_norm, zero_if_nonfinite=True)
        norm_, coef = backend.norm(TensorList(tensors), 2.0, rule, torch.float32)
        backend.scale_(TensorList(tensors), coef, may_zero=True)
        assert launches(log) == ["norm_kernel", "finalize_kernel", "scale_each_kernel"]
        (_, _, finished), (_, _, scaled) = [e for e in log if e[0] == "launch"][1:]
        assert finished[0] is norm_ and finished[1] is coef is scaled[0] and scaled[1] == 0
        assert (finished[2] is None) == isinstance(max_norm, float)


def test_statistics_are_three_launches(log: list, install: Install) -> None:
    install()
    params = parameters_of([torch.ones(3), torch.empty(0), torch.ones(4)])
    stats = gradclip_ext.get_grad_stats(params, backend="triton")
    assert launches(log) == ["statistics_kernel", "finalize_statistics_kernel", "finalize_kernel"]
    assert stats.norms.shape == (3,) and stats.norms[1] == 0.0
    log.clear()
    assert gradclip_ext.get_grad_stats(params[1:2], backend="triton").norms.tolist() == [0.0]
    assert launches(log) == []


def test_vectors_for_lists_with_empty_tensors(log: list, install: Install) -> None:
    """The kernels' tables leave empty tensors out, a vector has an entry for each."""
    backend = install()
    tensors = TensorList([torch.ones(3), torch.empty(0), torch.ones(4).half(), torch.ones(5)])
    backend.scale_(tensors, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    _, _, (coefs, stride, rows, positions, *_) = log[-1]
    assert torch.equal(coefs, torch.tensor([0.1, 0.3, 0.4])) and stride == 1
    assert positions.tolist() == [0, 2, 1] and positions.data_ptr() == rows[12:].data_ptr()


def test_units_of_similar_length_share_a_launch(
    log: list, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 3), (9,), (8, 100), (4, 5000), (0, 3))]
    for p in params:
        p.grad = torch.ones_like(p)
    gradclip_ext.adaptive_clip_grad_(params, backend="triton")
    assert launches(log) == ["adaptive_kernel"] * 3
    log.clear()
    monkeypatch.setattr(units, "_MAX_UNIT_BYTES", 4000)
    memory._workspaces.clear()
    gradclip_ext.adaptive_clip_grad_(params, backend="triton")
    norms = ["norm_kernel", "finalize_each_kernel"]
    assert launches(log) == [*norms * 2, "scale_each_kernel", *["adaptive_kernel"] * 2]


def test_the_rows_of_a_table_of_units() -> None:
    grads = [torch.ones(8, 3), torch.ones(3, 2, 150), torch.ones(90_000)]
    weights = [t.double() for t in grads]
    columns = [TensorList(ts).columns() for ts in (grads, weights)]
    table = units.UnitTable(*columns, units.units_as_bytes(TensorList(grads)))
    (a, b, c), (u, v, w) = ([t.data_ptr() for t in ts] for ts in (grads, weights))
    narrow, wide = 32768 // 12 // 32 * 32, 32768 // 1200 // 4 * 4
    assert table.rows.tolist() == [a, 8, 0, b, 3, 1, 0, 0, 2, u, 3, narrow, v, 300, wide]
    assert [(g.dtype, g.weight_dtype, g.width, g.runs) for g in table.groups] == [
        (torch.float32, torch.float64, width, 1) for width in (16, 1024)
    ]
    large = [memory.read_columns(columns) for columns in table.large or ()]
    assert [(x.tolist(), n.tolist(), list(d)) for x, n, d in large] == [
        ([c], [90_000], [0]),
        ([w], [90_000], [1]),
    ]
