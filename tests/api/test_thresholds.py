"""Limits that follow earlier norms: the published rules, and their state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import published
import pytest
import torch
from norm_sequences import (
    INF,
    NAN,
    RULES,
    assert_same_results,
    assert_same_states,
    norms_for,
    over_rules,
    run,
    sequence,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip_ext import thresholds
from gradclip_ext.thresholds import AdaGC, AutoClip, SpikeDetector, ZClip

# ---------------------------------------------------------------- the published rules

# The oracle's sums are exact and ours are running ones: a few roundings in float64 for each of the last
# 1 / (1 - alpha) or window norms.
EXACT = 1e-12

SETTINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "ZClip": (ZClip, published.ZClip, {}),
    "ZClip, no largest limit": (ZClip, published.ZClip, {"max_norm": INF}),
    "ZClip, other numbers": (
        ZClip,
        published.ZClip,
        {
            "max_norm": 3.0,
            "alpha": 0.8,
            "z_thresh": 1.0,
            "warmup_steps": 3,
            "clip_factor": 0.7,
            "eps": 1e-3,
        },
    ),
    "ZClip, from the first norm": (ZClip, published.ZClip, {"max_norm": 5.0, "warmup_steps": 1}),
    "ZClip, no threshold": (ZClip, published.ZClip, {"max_norm": 2.0, "z_thresh": INF}),
    "AutoClip": (AutoClip, published.AutoClip, {}),
    "AutoClip, a short window": (AutoClip, published.AutoClip, {"percentile": 37.5, "window": 10}),
    "AutoClip, the smallest": (AutoClip, published.AutoClip, {"percentile": 0, "window": 5}),
    "AutoClip, the largest": (AutoClip, published.AutoClip, {"percentile": 100, "window": 5}),
    "AutoClip, no window": (AutoClip, published.AutoClip, {"window": 1}),
    "SpikeDetector": (SpikeDetector, published.SpikeDetector, {}),
    "SpikeDetector, a short window": (
        SpikeDetector,
        published.SpikeDetector,
        {"sigma_factor": 2, "window": 9},
    ),
}


def compare(ours: Any, plain: Any, norms: Tensor, tolerance: float) -> list[float]:
    """Assert that both make the same of the norms, of which the plain one gets those that are finite; return
    what they make of them."""
    found = []
    for index, norm in enumerate(norms):
        result = ours(norm)
        assert result.shape == () and not result.requires_grad
        if not norm.isfinite():
            continue
        expected = plain(norm.item())
        found.append(expected)
        assert result.item() == pytest.approx(expected, rel=tolerance, abs=0.0), f"call {index}, norm {norm}"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_as_published(setting: str, dtype: torch.dtype) -> None:
    ours, plain, options = SETTINGS[setting]
    is_exact = ours in (AutoClip, SpikeDetector)
    for nonfinite in (False, True):
        rule, expected = ours(**options), plain(**options)
        norms = sequence(
            800, nonfinite=nonfinite, spikes=0.02 if ours is SpikeDetector else 0.125, dtype=dtype
        )
        found = compare(rule, expected, norms, 0.0 if is_exact else EXACT)
        assert rule.steps.item() == norms.isfinite().sum()
        if ours is ZClip:
            assert rule.mean.item() == pytest.approx(expected.mean, rel=EXACT)
            assert rule.var.item() == pytest.approx(expected.var, rel=EXACT)
        if ours is SpikeDetector:
            assert 0 < sum(found) < len(found) / 4, "the sequence shows nothing"


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.9701}, {"warmup_steps": 26}, {"max_norm": 0.5}, {"eps": 0.01}], ids=str
)
def test_another_rule_is_noticed(wrong: dict[str, Any]) -> None:
    # Without a largest limit, which may hide what the rule says.
    with pytest.raises(AssertionError):
        compare(ZClip(max_norm=INF), published.ZClip(**{"max_norm": INF, **wrong}), sequence(400), EXACT)


def test_an_order_of_updates_is_noticed() -> None:
    """The variance is that about the new mean."""

    class About(published.ZClip):
        def __call__(self, norm: float) -> float:
            old = self.mean
            limit = super().__call__(norm)
            if len(self.collected) >= self.warmup_steps:
                self.var += (1 - self.alpha) * ((norm - old) ** 2 - (norm - self.mean) ** 2)
            return limit

    with pytest.raises(AssertionError):
        compare(ZClip(max_norm=INF), About(max_norm=INF), sequence(400), EXACT)


def test_autoclip_is_the_percentile_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    for percentile in (0.0, 10.0, 33.3, 50.0, 90.0, 100.0):
        rule, norms = AutoClip(percentile, window=50), sequence(120, nonfinite=False)
        for count, norm in enumerate(norms, 1):
            last = norms[max(0, count - 50) : count].double().numpy()
            assert rule(norm).item() == numpy.percentile(last, percentile)


@pytest.mark.parametrize(
    "options", [{}, {"warmup_steps": 5, "max_norm": 0.3, "ratio": 1.5, "beta": 0.5}], ids=str
)
def test_adagc_as_published(options: dict[str, Any]) -> None:
    """The norm that is left counts: the limit makes up for the 1e-6 of the coefficient."""
    for scale in (1.0, 1e-3):
        rule = AdaGC([torch.zeros(1) for _ in range(4)], **options)
        plain = published.AdaGC(4, **options)
        norms = sequence(300, 4, nonfinite=False, dtype=torch.float64) * torch.tensor([1.0, 1e-2, 1e-5, 1e-8])
        for norm in norms * scale:
            limits, expected = rule(norm), plain(norm.tolist())
            left = norm * (limits / (norm + 1e-6)).clamp(max=1.0)
            torch.testing.assert_close(left, torch.tensor(expected).double(), rtol=1e-6, atol=0.0)
        torch.testing.assert_close(rule.averages, torch.tensor(plain.averages).double(), rtol=1e-6, atol=0.0)


def test_adagc_leaves_out_what_it_cannot_know() -> None:
    """A gradient that is missing, NaN or infinite for some steps does not notice: its average and its warm-up
    go on from where they were, and the others see a list without it."""
    rule = AdaGC([torch.zeros(1) for _ in range(2)], max_norm=INF, warmup_steps=5)
    twin = AdaGC([torch.zeros(1)], max_norm=INF, warmup_steps=5)
    for index, norm in enumerate(sequence(60, nonfinite=False)):
        if index % 3 == 0:
            rule(torch.stack([norm, torch.tensor([0.0, NAN, INF, -0.0][index % 4])]))
        rule(torch.stack([torch.tensor(0.0), norm]))
        twin(norm.reshape(1))
    assert torch.equal(rule.steps, torch.tensor([20, 60]))
    assert torch.equal(rule.averages[1:], twin.averages)


# ---------------------------------------------------------------- what must not enter the state


@over_rules
def test_nonfinite_norms_never_enter(name: str) -> None:
    """A rule that met NaN and inf has, bit for bit, the state of one that did not."""
    rule, twin = RULES[name](), RULES[name]()
    for norm in norms_for(name, 40, nonfinite=False):
        for bad in (NAN, INF, -INF):
            result = rule(torch.full_like(norm, bad))
            assert result.isfinite().all(), "a limit that is inf would not clip at all"
            assert result.dtype == torch.bool or name != "SpikeDetector"
            if name == "SpikeDetector":
                assert result.item() is True
            assert_same_states(rule, twin, f"{bad}")
        assert_same_results([rule(norm)], [twin(norm)])
    assert all(buffer.isfinite().all() for buffer in rule.buffers())


@over_rules
@pytest.mark.parametrize("at", [0, 3, 20])
def test_extreme_norms_leave_a_finite_state(name: str, at: int) -> None:
    rule = RULES[name]()
    norms = norms_for(name, 40, dtype=torch.float64, nonfinite=False)
    for index, extreme in enumerate((1e200, 1e308, 5e-324, 0.0)):
        norms[at + index] = extreme
    for norm in norms:
        assert rule(norm).isfinite().all()
        assert all(buffer.isfinite().all() for buffer in rule.buffers())


def test_constant_norms() -> None:
    """No spread at all: neither a division by zero nor a spike."""
    for norm in (torch.tensor(0.3), torch.tensor(0.0)):
        rule, detector = ZClip(warmup_steps=3, eps=0.0), SpikeDetector(window=6)
        for _ in range(30):
            assert rule(norm) == 1.0
            assert not detector(norm)
        assert rule(norm * 2 + 1.0).item() == pytest.approx(norm.item(), rel=1e-6)
        assert detector(norm * 2 + 1.0)


# ---------------------------------------------------------------- state


@over_rules
@pytest.mark.parametrize("at", [0, 1, 4, 7, 25])
def test_continues_from_a_checkpoint(name: str, at: int) -> None:
    norms = norms_for(name, 50)
    rule = RULES[name]()
    run(rule, norms[:at])
    file = io.BytesIO()
    torch.save({"rule": rule.state_dict()}, file)
    file.seek(0)
    loaded = RULES[name]()
    run(loaded, norms_for(name, 9))  # whatever it has seen is replaced
    loaded.load_state_dict(torch.load(file, weights_only=True)["rule"])
    assert_same_states(loaded, rule)
    assert_same_results(run(loaded, norms[at:]), run(rule, norms[at:]), f"after {at}")
    assert_same_states(loaded, rule)


@over_rules
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(name: str, copied: Callable[[Any], Any]) -> None:
    rule, norms = RULES[name](), norms_for(name, 50)
    run(rule, norms[:5])
    twin, before = copied(rule), copied(rule)
    results = run(rule, norms[5:])
    assert_same_states(twin, before)
    assert_same_results(run(twin, norms[5:]), results)
    assert repr(twin) == repr(rule) and "=" in repr(rule)


@over_rules
def test_no_dtype_narrows_the_state(name: str) -> None:
    rule, twin = RULES[name](), RULES[name]()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), rule)
    for norm, narrow in zip(
        norms_for(name, 12),
        [
            lambda m: m.half(),
            lambda m: m.to(torch.bfloat16),
            lambda m: m.float(),
            lambda m: m.to("cpu", torch.float16),
            lambda m: m.type(torch.float32),
            lambda m: m.share_memory(),
        ]
        * 2,
    ):
        narrow(model)
        assert_same_states(rule, twin)
        assert_same_results([rule(norm)], [twin(norm)])
    assert next(rule.buffers()).is_shared()
    assert {b.dtype for b in rule.buffers()} == {torch.int64, torch.float64}


@over_rules
def test_default_dtype_and_device_do_not_matter(name: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rule = RULES[name]()
        norms = norms_for(name, 20, dtype=torch.float32)
        results = run(rule, norms)
    finally:
        torch.set_default_dtype(torch.float32)
    twin = RULES[name]()
    assert_same_results(results, run(twin, norms))
    assert_same_states(rule, twin)


@over_rules
def test_float32_where_a_device_has_no_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[name]()
    norms = norms_for(name, 40)
    run(rule, norms[:3])
    monkeypatch.setattr(thresholds, "widest_dtype", lambda device: torch.float32)
    moved = copy.deepcopy(rule).to("meta")
    assert {b.dtype for b in moved.buffers()} == {torch.int64, torch.float32}
    twin = RULES[name]()
    for key, value in rule.state_dict().items():  # as if they had come from another device
        twin._buffers[key] = value.float() if value.is_floating_point() else value.clone()
    results = run(twin, norms[3:])
    assert all(r.dtype in (torch.float32, torch.bool) for r in results)
    monkeypatch.undo()
    for one, other in zip(results, run(rule, norms[3:])):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=0.0)


class OneDevice(TorchDispatchMode):
    """Collects the devices on which tensors are read."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.devices |= {a.device.type for a in args if isinstance(a, Tensor)}
        return func(*args, **(kwargs or {}))


@over_rules
def test_state_follows_the_norm_and_no_value_is_read(name: str) -> None:
    """A meta tensor has no value, so an operation that needs one raises; nor is one copied from the CPU,
    which a CUDA graph could not repeat."""
    rule = RULES[name]()
    norm = norms_for(name, 1)[0].to("meta")
    assert rule(norm).is_meta
    assert all(buffer.is_meta for buffer in rule.buffers())
    before = {key: id(buffer) for key, buffer in rule.named_buffers()}
    with OneDevice() as mode:
        rule(norm)
    assert mode.devices == {"meta"}
    assert before == {key: id(buffer) for key, buffer in rule.named_buffers()}, "the state changes in place"


@over_rules
def test_the_norm_is_only_read(name: str) -> None:
    rule = RULES[name]()
    for norm in norms_for(name, 20):
        given = norm.clone().requires_grad_()
        result = rule(given)
        assert not result.requires_grad and not any(b.requires_grad for b in rule.buffers())
        result.zero_()
        oracle.assert_same_bits(given.detach(), norm)
    twin = RULES[name]()
    with torch.inference_mode():
        run(twin, norms_for(name, 5))
    run(twin, norms_for(name, 5))


@over_rules
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    rule, twin, norms = RULES[name](), RULES[name](), norms_for(name, 30)
    compiled = torch.compile(rule, backend=compiler, fullgraph=True)
    for one, other in zip([*run(compiled, norms), *rule.buffers()], [*run(twin, norms), *twin.buffers()]):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0)  # the compiler may reorder roundings
    torch._dynamo.reset()
