"""How the foreach backend groups tensors, and converts those of half types."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from cases import clones, random
from dispatch import RecordDispatch
from oracle import parameter

import gradclip_ext
from gradclip_ext import reference
from gradclip_ext.backends import base, foreach, foreach_adaptive, foreach_cpu


@pytest.mark.parametrize(
    "ranges, shared",
    [
        ([(0, 4), (4, 8)], False),
        ([(0, 5), (4, 8)], True),
        ([(4, 8), (0, 5)], True),
        ([(0, 9), (1, 2), (5, 6)], True),
        ([(0, 0), (0, 4), (4, 4)], False),
        ([(0, 3)], False),
    ],
)
def test_shared_memory_is_found(ranges: list, shared: bool) -> None:
    memory = random(9)
    assert base.share_memory([memory[a:b] for a, b in ranges]) is shared


def test_interleaved_slices_share_a_range() -> None:
    memory = random(8)
    assert base.share_memory([memory[::2], memory[1::2]])  # cautious: ranges, not elements


def test_one_tensor_at_a_time_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """foreach=False where the host sees nothing: the loop and the strategy for accelerators together."""
    monkeypatch.setattr(foreach_cpu, "host_sees", lambda tensor: False)
    for norm_type in (0.0, 0.5, 1.0, 2.0, 3.0, math.inf, -math.inf):
        grads = [random(6, 4)[::2], random(7), random(5, dtype=torch.complex64), random(), random(0, 2)]
        before = clones(grads)
        norm = gradclip_ext.clip_grad_norm_([parameter(g) for g in grads], 0.5, norm_type, foreach=False)
        oracle.assert_norm(norm, before, norm_type)
        oracle.assert_scaled(grads, before, norm, 0.5)


def test_groups_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype and no gaps per launch; irregular tensors go alone and do not slow down the others."""
    monkeypatch.setattr(foreach_cpu, "host_sees", lambda tensor: False)
    a, b = random(3), random(4)
    half = random(5, dtype=torch.bfloat16)
    gaps, z = random(6, 2)[:, 0], random(2, dtype=torch.complex64)
    groups = foreach._batches([a, gaps, half, z, b], True)
    assert [[id(t) for t in g] for g in groups] == [[id(a), id(b)], [id(half)], [id(gaps)], [id(z)]]
    assert [len(g) for g in foreach._batches([a, b, half], False)] == [1, 1, 1]
    overlapping = [a[:2], a[1:], b]
    assert [len(g) for g in foreach._batches(overlapping, True)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes, parts, alone",
    [
        ([(7,)] * 1_000, 1, 0),
        ([(3,), (), (70, 3), (0,), (5_000,)], 1, 0),
        ([(4_000,)] * 30, 3, 0),
        ([(3,), (5_001,), (80, 80), (4,)], 1, 2),
        ([(5_001,), (6_000,)], 0, 2),
    ],
)
def test_halves_are_scaled_together_on_an_accelerator(
    dtype: torch.dtype, sizes: list, parts: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, rounded once, in parts of 40,000 elements, and those of more than 5,000 each alone."""
    monkeypatch.setattr(foreach, "_SMALL_HALF", 5_000)
    monkeypatch.setattr(foreach, "_CONVERTED_HALVES", 40_000)
    coef = torch.rand(())
    grads = [random(*shape, dtype=dtype) for shape in sizes]
    grads[0] = random(5, 4, dtype=dtype).t() if parts else grads[0]
    expected = [(g.float() * coef).to(dtype) for g in grads]
    with RecordDispatch() as recorded:
        foreach._scale_halves_(grads, coef)
    for grad, wanted in zip(grads, expected):
        oracle.assert_same_bits(grad, wanted)
    changes = [name.split(".")[1] for name in recorded.names if "_." in name]
    together = ["_foreach_copy_", "mul_", "_foreach_copy_"]
    assert changes == parts * together + (["_foreach_mul_"] if alone else [])


def halves() -> list[torch.Tensor]:
    """Return tensors of half types: joined or converted together, in several pieces, and strided ones."""
    joined = foreach_cpu.SMALL * foreach_cpu._JOINED_IF_CONVERTED
    sizes = (foreach_cpu.SMALL + 1, joined + 1, foreach_cpu._PIECE - 5, 40_000, joined, 7)
    sizes += (2 * foreach_cpu._CONVERTED + 3,)
    sizes += (joined - 3,) * (foreach_cpu._PIECE // joined)
    grads = [random(size, dtype=dtype) for size in sizes for dtype in (torch.bfloat16, torch.float16)]
    strided = [random(*shape, dtype=torch.bfloat16).transpose(0, 1) for shape in ((250, 200), (500, 400))]
    rows = random(500, 400, dtype=torch.bfloat16)
    return [*grads, *strided, strided[0][:, ::2], rows, rows[:300, :200:2]]


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_tensors_of_any_dimension(norm_type: float, dtype: torch.dtype) -> None:
    """With as many elements as fill rows or not, dense in either order, and more than one piece takes."""
    grads = [random(*shape, dtype=dtype) for shape in ((512, 40), (3, 7, 1001), (9, 2048), (5000, 300))]
    grads += [grads[0].t(), grads[1].permute(2, 0, 1), grads[2][:, ::2]]
    norm = gradclip_ext.get_total_norm(grads, norm_type, backend="foreach")
    oracle.assert_norm(norm, grads, norm_type)


@pytest.mark.parametrize("threads", [1, 3, 40])
def test_norms_of_more_rows_than_are_kept(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of more than 16 Mi elements, or for hundreds of threads: they are added up in between."""
    monkeypatch.setattr(foreach_cpu, "_SPAN", foreach_cpu._PIECE)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for grads in (halves(), [random(size) for size in (1 << 20, 300_000, 1 << 20, 40_001, 999_999)]):
        oracle.assert_norm(gradclip_ext.get_total_norm(grads, backend="foreach"), grads, 2.0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("threads", [1, 2, 3, 40, 200])
def test_halves_are_converted_together(
    norm_type: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part of the memory for each thread, of which there may be more than a tensor has rows."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    grads = halves()
    norm = gradclip_ext.get_total_norm(grads, norm_type, backend="foreach")
    oracle.assert_norm(norm, grads, norm_type)


def test_memory_for_halves_outlives_inference_mode() -> None:
    """What is made in that mode can be written to only there, and the memory is kept for later calls."""
    grads = halves()

    def norm() -> float:
        return gradclip_ext.get_total_norm(grads, backend="foreach").item()

    def first_in_inference_mode() -> list[float]:
        with torch.inference_mode():
            first = norm()
        return [first, norm()]

    with ThreadPoolExecutor(2) as pool:  # threads that have no such memory yet
        found = [future.result() for future in [pool.submit(first_in_inference_mode) for _ in range(2)]]
    assert found == [[norm()] * 2] * 2


def adaptive_params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(random(*shape, dtype=dtype) * 10) for shape in shapes]
    for param in params:
        param.grad = random(*param.shape, dtype=dtype) * torch.rand((), dtype=torch.float32).to(dtype)
    return params


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_adaptive_clipping_of_many_pieces(
    norm_type: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of several pieces, with units of less and of more than one; small ones joined by shape."""
    monkeypatch.setattr(foreach_adaptive, "_CONVERTED", 60)
    monkeypatch.setattr(foreach, "SMALL", 30)
    params = adaptive_params([(), (), (7,), (3, 5), (61,), (200,), (41, 3), (3, 2, 50), (2, 20)] * 7, dtype)
    params += [torch.nn.Parameter(random(30, 6, dtype=dtype).t()), torch.nn.Parameter(random(0, dtype=dtype))]
    params[-2].grad, params[-1].grad = random(30, 6, dtype=dtype).t(), random(0, dtype=dtype)
    grads = [p.grad for p in params if p.grad is not None]
    weights = [p.detach() for p in params]
    expected = reference.adaptive_clip(grads, weights, 0.05, 1e-3, norm_type)
    gradclip_ext.adaptive_clip_grad_(params, 0.05, norm_type=norm_type, backend="foreach")
    # float32: half an eps for the coefficient and for the product; float64: the norm's powers as well.
    rtol = 1e-13 if dtype is torch.float64 else 1.2e-7 + torch.finfo(dtype).eps
    for grad, wanted in zip(grads, expected, strict=True):
        tiny = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(grad, wanted.to(dtype), rtol=rtol, atol=tiny)


def test_small_tensors_of_one_shape_are_clipped_together() -> None:
    """By as many operations as a few would take, besides the copies there and back."""

    def operations(count: int) -> int:
        params = adaptive_params([(5, 3), (8,)] * count, torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            gradclip_ext.adaptive_clip_grad_(params, 0.0, backend="foreach")
        names = [event.name for event in recorded.events()]
        assert names.count("aten::_foreach_copy_") == 2
        return names.count("aten::linalg_vector_norm") + names.count("aten::mul_")

    assert operations(2) == operations(100) == 6
