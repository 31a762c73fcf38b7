"""Clipping by limits that follow earlier norms, what they refuse, and CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import published
import pytest
import torch
from cases import Target, clones, grads_of, random
from norm_sequences import INF, NAN, RULES, assert_same_results, assert_same_states, norms_for, run, sequence
from oracle import parameter

import gradclip_ext
from gradclip_ext.thresholds import AdaGC, AutoClip, SpikeDetector, ZClip

# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("name", ["ZClip", "AutoClip"])
def test_clipping_by_the_joint_norm(backend: Target, name: str) -> None:
    rule, twin = RULES[name](), RULES[name]()
    for factor in sequence(30, nonfinite=False):
        params = backend.parameters((30,), (4, 5), ())
        for grad in grads_of(params):
            grad.mul_(factor * 0.1)
        before = clones(grads_of(params))
        norm = backend.clip_grad_norm_(params, rule)
        oracle.assert_norm(norm, before, 2.0)
        oracle.assert_scaled(grads_of(params), before, norm, twin(norm.cpu()).to(norm.dtype).item())
    assert rule.steps == 30 and rule.steps.device.type == torch.device(backend.device).type


def test_clipping_each_gradient(backend: Target) -> None:
    """Some parameters never have a gradient, one is listed twice, the norm of one is as small as 1e-7."""
    frozen = torch.nn.Parameter(torch.ones(2))
    like = [torch.nn.Parameter(torch.zeros(s)) for s in ((30,), (4, 5), ())]
    rule = AdaGC([frozen, *like, like[0]], warmup_steps=4)
    plain = published.AdaGC(3, warmup_steps=4)
    for factor in sequence(30, nonfinite=False):
        params = backend.parameters((30,), (4, 5), ())
        for grad, scale in zip(grads_of(params), (1.0, 1e-2, 1e-7)):
            grad.mul_(factor * scale)
        norms = backend.clip_grad_norm_([frozen, *params, params[0]], rule, per_tensor=True)
        assert norms.shape == (4,) and norms[0] == 0.0
        for param, expected in zip(params, plain(norms[1:].tolist())):
            assert param.grad.double().norm().item() == pytest.approx(expected, rel=4e-6)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_clipping_what_is_not_finite(backend: Target, bad: float) -> None:
    for name, per_tensor in (("ZClip", False), ("AutoClip", False), ("AdaGC", True)):
        rule = RULES[name]()
        for step in range(12):
            params = backend.parameters((3,), (2, 2), (4,))
            if step % 4 == 1:
                params[0].grad[1] = bad
            before, state = clones(grads_of(params)), copy.deepcopy(rule)
            backend.clip_grad_norm_(params, rule, per_tensor=per_tensor, zero_if_nonfinite=True)
            if step % 4 != 1:
                continue
            assert not params[0].grad.any()
            if not per_tensor:
                assert not any(grad.any() for grad in grads_of(params))
                assert_same_states(rule, state)
            else:
                assert rule.averages[0] == state.averages[0]
                assert (rule.steps - state.steps).tolist() == [0, 1, 1]
                assert all(grad.any() for grad in grads_of(params)[1:]), before


def test_detector_beside_a_rule(backend: Target) -> None:
    """One norm for both; without an accelerator's values on the host."""
    detector, rule = SpikeDetector(window=8), AutoClip()
    spikes = []
    for step in range(12):
        params = [parameter(torch.full((4,), 1.0 + step % 3 + 100.0 * (step == 9), device=backend.device))]
        norm = backend.clip_grad_norm_(params, rule)
        spikes.append(detector(norm).item())
    assert spikes == [step == 9 for step in range(12)]


# ---------------------------------------------------------------- what is refused

BAD: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "max_norm": (lambda: ZClip(max_norm=-1.0), ValueError, ("max_norm", "0 or more", "-1")),
    "max_norm of None": (lambda: ZClip(max_norm=None), TypeError, ("max_norm", "number", "None")),
    "alpha": (lambda: ZClip(alpha=1.5), ValueError, ("alpha", "from 0 to 1", "1.5")),
    "alpha of NaN": (lambda: ZClip(alpha=NAN), ValueError, ("alpha", "from 0 to 1", "nan")),
    "z_thresh": (lambda: ZClip(z_thresh=-2), ValueError, ("z_thresh", "0 or more", "-2")),
    "warmup_steps": (lambda: ZClip(warmup_steps=0), ValueError, ("warmup_steps", "1 or more", "got 0")),
    "half a step": (lambda: ZClip(warmup_steps=2.5), TypeError, ("warmup_steps", "int", "2.5", "whole")),
    "clip_factor": (lambda: ZClip(clip_factor=INF), ValueError, ("clip_factor", "finite", "inf")),
    "eps": (lambda: ZClip(eps="small"), ValueError, ("eps", "number", "small")),
    "percentile": (lambda: AutoClip(101), ValueError, ("percentile", "from 0 to 100", "101")),
    "window": (lambda: AutoClip(window=0), ValueError, ("window", "1 or more", "got 0")),
    "window of inf": (lambda: AutoClip(window=INF), TypeError, ("window", "int", "inf")),
    "sigma_factor": (lambda: SpikeDetector(-1), ValueError, ("sigma_factor", "0 or more", "-1")),
    "window of one": (lambda: SpikeDetector(window=1), ValueError, ("window", "2 or more", "got 1")),
    "ratio": (lambda: AdaGC([torch.ones(1)], ratio=-1), ValueError, ("ratio", "0 or more", "-1")),
    "beta": (lambda: AdaGC([torch.ones(1)], beta=2), ValueError, ("beta", "from 0 to 1", "2")),
    "no parameters": (lambda: AdaGC([]), ValueError, ("parameters is empty", "pass")),
    "a module": (lambda: AdaGC(torch.nn.Linear(1, 1)), TypeError, ("Linear", "parameters()")),
    "names": (lambda: AdaGC(torch.nn.Linear(1, 1).named_parameters()), TypeError, ("tuple", "position 0")),
    "a number": (lambda: ZClip()(3.0), TypeError, ("ZClip", "norm", "float", "max_norm")),
    "complex": (lambda: ZClip()(torch.tensor(1j)), TypeError, ("ZClip", "real", "complex64")),
    "norms": (lambda: ZClip()(torch.ones(3)), ValueError, ("ZClip", "one norm", "per_tensor", "(3,)")),
    "one norm": (lambda: AdaGC([torch.ones(1)] * 2)(torch.tensor(1.0)), ValueError, ("AdaGC", "(1,)", "()")),
    "another number": (
        lambda: AdaGC([torch.ones(1), torch.ones(1)])(torch.ones(3)),
        ValueError,
        ("2 parameters", "(2,)", "per_tensor=True", "(3,)"),
    ),
    "another window": (
        lambda: AutoClip(window=3).load_state_dict(AutoClip(window=4).state_dict()),
        RuntimeError,
        ("norms", "size mismatch"),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    call, error, words = BAD[what]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"no {word!r} in {caught.value}"


def test_gradients_stay_when_a_rule_refuses(backend: Target) -> None:
    params = backend.parameters((3,), (2, 2))
    for rule, per_tensor in ((ZClip(), True), (AdaGC(params), False), (AdaGC(params[:1]), True)):
        state = copy.deepcopy(rule)
        with oracle.unchanged(grads_of(params)), pytest.raises(ValueError, match="per_tensor=True"):
            backend.clip_grad_norm_(params, rule, per_tensor=per_tensor)
        assert_same_states(rule, state)


# ---------------------------------------------------------------- on a GPU

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in RULES])
def test_captured_graph_goes_on_with_the_state(name: str) -> None:
    rule, twin = RULES[name]().to("cuda"), RULES[name]().to("cuda")
    norms = norms_for(name, 40).cuda()
    run(rule, norms[:3])
    run(twin, norms[:3])
    norm = norms[0].clone()
    copy.deepcopy(rule)(norm)  # the first call of an operation may allocate
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = rule(norm)
    assert_same_states(rule, twin)
    for index, value in enumerate(norms[3:]):
        norm.copy_(value)
        graph.replay()
        assert_same_results([result], [twin(value)], f"replay {index}")
    assert_same_states(rule, twin)


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in ("ZClip", "AutoClip", "AdaGC")])
def test_captured_clipping(name: str) -> None:
    rule, per_tensor = RULES[name]().to("cuda"), name == "AdaGC"
    params = [parameter(random(n, device="cuda")) for n in (70_000, 33, 5)]
    gradclip_ext.clip_grad_norm_(params, copy.deepcopy(rule), per_tensor=per_tensor)
    twin = copy.deepcopy(rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = gradclip_ext.clip_grad_norm_(params, rule, per_tensor=per_tensor)
    for scale in sequence(30, nonfinite=False).tolist():
        grads = [torch.randn_like(p.grad) * scale for p in params]
        for param, grad in zip(params, grads):
            param.grad.copy_(grad)
        graph.replay()
        others = [parameter(grad) for grad in grads]
        expected = gradclip_ext.clip_grad_norm_(others, twin, per_tensor=per_tensor)
        assert_same_results([norm, *grads_of(params)], [expected, *grads_of(others)])
    assert_same_states(rule, twin)


@pytest.mark.parametrize("name", [pytest.param(n, marks=gpu) for n in RULES])
def test_a_capture_does_not_move_the_state(name: str) -> None:
    rule, norm = RULES[name](), norms_for(name, 1)[0].cuda()
    with (
        pytest.raises(RuntimeError, match=r"captured: call \.to\('cuda:0'\)"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        rule(norm)
