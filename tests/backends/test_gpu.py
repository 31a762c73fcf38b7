"""Tests of the cuda and triton backends that need a GPU: streams, threads, sizes, synchronisation.

What every backend must do is in the shared suite, whose targets there end in "-cuda".
"""

from __future__ import annotations

import math
import threading

import oracle
import pytest
import torch
from cases import clones, gpu_waits_are_errors, grads_of
from gpu import GPU, WHY_NOT, as_of, gpu_parameters
from oracle import assert_same_bits, parameter
from torch import Tensor

import gradclip_ext
from gradclip_ext import backends
from gradclip_ext.backends.base import TensorList
from gradclip_ext.norms import REPORT

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible", allow_module_level=True)


def norm_of(name: str, tensors: list[Tensor], p: float = 2.0) -> Tensor:
    """Return the norm in float64, before it is rounded to what users get."""
    return backends.ALL[name].norm(TensorList(tensors), p, REPORT, torch.float64)[0]


# ---------------------------------------------------------------- nothing waits


def test_nothing_synchronizes(name: str) -> None:
    for warm in (True, False):  # lists of their own, so that tables are uploaded under scrutiny, too
        params = gpu_parameters()
        if warm:
            gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
            gradclip_ext.clip_grad_value_(params, 0.1, backend=name)
        with gpu_waits_are_errors():
            for p in (1.0, 2.0, 3.0, math.inf) if warm else (2.0,):
                gradclip_ext.clip_grad_norm_(params, 1.0, p, backend=name)
            gradclip_ext.clip_grad_value_(params, 0.1, backend=name)
            norm = gradclip_ext.get_total_norm(grads_of(params), backend=name)
            gradclip_ext.clip_grads_with_norm_(params, 1.0, norm, backend=name)


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_bits_do_not_depend_on_run_stream_or_address(name: str, p: float) -> None:
    grads = [g.clone() for g in grads_of(gpu_parameters())] * 5
    expected = norm_of(name, clones(grads), p)
    for shift in (0, 1, 3):
        moved = [torch.cat([g.new_zeros(shift), g.reshape(-1)])[shift:] for g in grads]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            assert_same_bits(norm_of(name, moved, p), expected, f"shifted by {shift}")
        torch.cuda.synchronize()


def test_streams_and_threads_have_memory_of_their_own(name: str) -> None:
    """Two threads on two streams, each many norms behind one another."""
    lists = [[torch.randn(n, device=GPU) for n in (100_000, 3, size)] for size in (40_000, 2_000_000)]
    expected = [norm_of(name, grads) for grads in lists]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            norms = [norm_of(name, lists[which]) for _ in range(50)]
            wrong.extend(which for norm in norms if not torch.equal(norm, expected[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stream_that_is_not_torchs(name: str) -> None:
    stream = torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)
    params, twins = (parameter(torch.full((100_000,), 2.0, device=GPU)) for _ in range(2))
    expected = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        assert torch.equal(gradclip_ext.clip_grad_norm_(twins, 1.0, backend=name), expected)
        assert_same_bits(twins.grad, params.grad)
    torch.cuda.synchronize()


def test_memory_that_torch_fills(name: str) -> None:
    """Deterministic torch fills new memory with NaN and, where it is bytes, with 255."""
    params = gpu_parameters()
    twins = as_of(params)
    expected = gradclip_ext.clip_grad_norm_(twins, 1.0, backend=name)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for stream in (torch.cuda.Stream(), torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)):
            torch.cuda.synchronize()
            again = as_of(params)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                assert torch.equal(gradclip_ext.clip_grad_norm_(again, 1.0, backend=name), expected)
            torch.cuda.synchronize()
            for ours, wanted in zip(again, twins):
                assert_same_bits(ours.grad, wanted.grad)
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_stream_that_is_not_the_default_is_respected(name: str) -> None:
    """Clipping runs after the earlier work of its stream, whatever the default stream does."""
    params = gpu_parameters()
    gradclip_ext.clip_grad_norm_(as_of(params), 1.0, backend=name)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for param in params:
            param.grad.fill_(2.0)
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
    stream.synchronize()
    count = sum(p.grad.numel() for p in params)
    assert norm.item() == pytest.approx(2.0 * math.sqrt(count), rel=1e-6)


@pytest.mark.triton
def test_agrees_with_the_other_backend() -> None:
    """The gradients bit for bit, given one coefficient; the norm within 1e-7."""
    if any(WHY_NOT.values()):
        pytest.skip(f"nothing to compare: {WHY_NOT}")
    grads = [grad for grad in grads_of(gpu_parameters()) if grad.numel() > 0]
    for p in (1.0, 2.0, 3.0, math.inf):
        cuda, triton = (norm_of(name, grads, p).item() for name in WHY_NOT)
        assert triton == pytest.approx(cuda, rel=1e-7), p
    coef = torch.tensor(0.3, device=GPU)
    for change in (lambda b, g: b.scale_(g, coef), lambda b, g: b.clamp_(g, -0.2, 0.1)):
        ours, theirs = clones(grads), clones(grads)
        change(backends.ALL["triton"], TensorList(ours))
        change(backends.ALL["cuda"], TensorList(theirs))
        for a, b in zip(ours, theirs):
            assert_same_bits(a, b)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("count", [280, 281, 282, 610, 611, 2329, 2330, 10_000])
def test_lists_around_what_a_launch_holds(name: str, count: int) -> None:
    params = [parameter(torch.randn(1 + i % 37, device=GPU)) for i in range(count)]
    before = clones(grads_of(params))
    norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of(params), before, norm, 1.0)
    before = clones(grads_of(params))
    gradclip_ext.clip_grad_value_(params, 0.01, backend=name)
    for grad, old in zip(grads_of(params), before):
        assert_same_bits(grad, old.clamp(-0.01, 0.01))


@pytest.mark.skipif(WHY_NOT["cuda"] is not None, reason=f"of the cuda backend: {WHY_NOT['cuda']}")
def test_the_bits_do_not_depend_on_the_table() -> None:
    """The zeros are added last, so they change nothing but the table that the list takes."""
    for dtypes in ([torch.float32], [torch.bfloat16, torch.float32]):
        grads = [torch.randn(1 + 97 * i, device=GPU).to(dtypes[i % len(dtypes)]) for i in range(200)]
        zeros = [torch.zeros(1, device=GPU)] * 2200
        norms = [norm_of("cuda", grads + zeros[:more]) for more in (0, 82, 410, 411, 2200)]
        for other in norms[1:]:
            assert_same_bits(other, norms[0])


@pytest.mark.parametrize("count", [6, 700, 2900])
def test_float64_among_others(name: str, count: int) -> None:
    """One or several launches of each class of dtypes; a norm follows another without anything between."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    grads = [torch.randn(1 + i % 97, device=GPU).to(dtypes[i % 3]) for i in range(count)]
    for p in (1.0, 2.0, 3.0, math.inf):
        norms = [norm_of(name, grads, p) for _ in range(3)]
        oracle.assert_norm(norms[0], grads, p)
        assert_same_bits(norms[1], norms[0])
        assert_same_bits(norms[2], norms[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_than_two_to_the_31_elements(name: str, dtype: torch.dtype) -> None:
    numel = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * numel * dtype.itemsize:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, {3 * numel * dtype.itemsize >> 30} are needed")
    grad = torch.full((numel,), 2.0**-8, dtype=dtype, device=GPU)
    grad[-1] = 64.0
    param = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=GPU).expand(numel))
    param.grad = grad
    norm = gradclip_ext.clip_grad_norm_(param, 1.0, backend=name)
    assert norm.item() == pytest.approx(math.sqrt((numel - 1) * 2.0**-16 + 4096.0), rel=1e-6)
    coef = 1.0 / (norm.item() + 1e-6)
    for at in (0, 2**31 - 1, 2**31, numel - 2):
        assert grad[at].item() == pytest.approx(2.0**-8 * coef, rel=2.0**-8)
    assert grad[-1].item() == pytest.approx(64.0 * coef, rel=2.0**-8)
    gradclip_ext.clip_grad_value_(param, 1e-5, backend=name)
    assert grad.max().item() == pytest.approx(1e-5, rel=2.0**-7)


# ---------------------------------------------------------------- several devices


def test_a_list_on_several_devices(name: str) -> None:
    others = ["cpu"] + (["cuda:1"] if torch.cuda.device_count() > 1 else [])
    for other in others:
        named = name if other != "cpu" else None
        grads = [torch.randn(1000, device=d) for d in ("cuda:0", other, "cuda:0")]
        before = clones(grads)
        params = [parameter(g) for g in grads]
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=named)
        assert norm.device == grads[0].device
        oracle.assert_norm(norm.cpu(), [b.cpu() for b in before], 2.0)
        oracle.assert_scaled([g.cpu() for g in grads], [b.cpu() for b in before], norm.cpu(), 1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_current_device_stays_what_it_is(name: str) -> None:
    param = parameter(torch.full((1000,), 2.0, device="cuda:1"))
    found: list[object] = []

    def call() -> None:
        # First what allocates nothing: torch's allocator gives a thread a context.
        gradclip_ext.clip_grad_value_(param, 0.001, backend=name)
        found.append(torch.cuda.current_device())
        gradclip_ext.clip_grad_norm_(param, 1.0, backend=name)
        found.extend((torch.cuda.current_device(), torch.empty(0, device="cuda").device.index))

    call()
    thread = threading.Thread(target=call)  # which has no context of its own yet
    thread.start()
    thread.join()
    assert found == [0] * 6
    assert param.grad.max().item() == pytest.approx(0.001)


def test_automatic_choice_is_the_first_that_is_usable() -> None:
    first = next((n for n in ("cuda", "triton") if WHY_NOT[n] is None), "foreach")
    assert backends.Selection(None, None, False).backend_for(GPU).name == first
