"""torch.compile(fullgraph=True) for every function gives what eager gives."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from cases import clones, grads_of, random
from oracle import parameter
from torch import Tensor

import gradclip_ext

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))

over_compilers = pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                not HAS_COMPILER, reason="inductor needs a C++ compiler: no g++, clang++, c++"
            ),
        ),
    ],
)


def half(norm: Tensor) -> Tensor:  # torch 2.6 does not trace a function that is defined in what it compiles
    return norm / 2


def clip_beside_weights(params: list[Tensor], norm_type: float = 2.0) -> None:
    with torch.no_grad():
        for param in params:
            param.fill_(0.5)
    gradclip_ext.adaptive_clip_grad_([FROZEN, *params, params[0]], 0.5, norm_type=norm_type)


FROZEN = torch.nn.Parameter(torch.ones(2))
FUNCTIONS: dict[str, Callable[[list[Tensor]], Any]] = {
    "clip_grad_norm_": lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0),
    "clip_grad_norm_, max_norm=inf": lambda ps: gradclip_ext.clip_grad_norm_(ps, math.inf),
    "foreach=False": lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, foreach=False),
    "max_norm is a tensor": lambda ps: gradclip_ext.clip_grad_norm_(ps, torch.full((1,), 1.0)),
    "max_norm is a function": lambda ps: gradclip_ext.clip_grad_norm_(ps, half),
    "zero_if_nonfinite": lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, zero_if_nonfinite=True),
    "a norm for each": lambda ps: gradclip_ext.clip_grads_with_norm_(
        [*ps, ps[0], FROZEN],
        1.0,
        torch.stack([*(p.grad.abs().sum() for p in ps), ps[0].grad.norm()]),
    ),
    "per_tensor": lambda ps: gradclip_ext.clip_grad_norm_([*ps, ps[0]], 1.0, per_tensor=True),
    "per_tensor with a function": lambda ps: gradclip_ext.clip_grad_norm_(
        [FROZEN, *ps], half, per_tensor=True
    ),
    "get_grad_stats": lambda ps: gradclip_ext.get_grad_stats([FROZEN, *ps]).norms,
    "adaptive_clip_grad_": clip_beside_weights,
    "clip_grad_value_": lambda ps: gradclip_ext.clip_grad_value_(ps, 0.1),
    "clamp_grad_": lambda ps: gradclip_ext.clamp_grad_(ps, -0.1, 0.3),
    "get_total_norm": lambda ps: gradclip_ext.get_total_norm([p.grad for p in ps]),
    "clip_grads_with_norm_": lambda ps: gradclip_ext.clip_grads_with_norm_(ps, 1.0, ps[0].grad.abs().sum()),
}
NORM_TYPES = (0.0, 0.5, 1.0, 3.0, math.inf, -math.inf)
THRESHOLDS: dict[str, Callable[[list[Tensor], float], Any]] = {
    "clip_grad_norm_": gradclip_ext.clip_grad_norm_,
    "clip_grad_value_": gradclip_ext.clip_grad_value_,
    "clamp_grad_": lambda ps, most: gradclip_ext.clamp_grad_(ps, -2 * most, most),
    "clip_grads_with_norm_": lambda ps, most: gradclip_ext.clip_grads_with_norm_(ps, most, ps[0].grad.norm()),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_like_eager(
    compiled: Callable[[list[Tensor]], Any],
    eager: Callable[[list[Tensor]], Any],
    grads: list[Tensor],
    what: str,
) -> None:
    """Compare results and gradients: the compiler may reorder sums, so the norm has its 1e-6 and each
    gradient that and one rounding."""
    ours, theirs = ([parameter(g) for g in clones(grads)] for _ in range(2))
    results = compiled(ours), eager(theirs)
    assert (results[0] is None) == (results[1] is None), what
    if results[0] is not None:
        assert results[0].dtype == results[1].dtype and results[0].shape == results[1].shape, what
        oracle.assert_same_specials(*results, what=what)
        torch.testing.assert_close(*results, rtol=1e-6, atol=0.0, equal_nan=True)
    for one, other in zip(grads_of(ours), grads_of(theirs)):
        oracle.assert_same_specials(one, other, what)
        rtol = 2e-6 + torch.finfo(one.dtype).eps
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=0.0, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def compiled_with(compiler: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=compiler, fullgraph=True)


@over_compilers
@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_that_changes(name: str, compiler: str) -> None:
    """From its second value on, a float is an input of the compiled code and no constant."""
    compiled = compiled_with(compiler, THRESHOLDS[name])
    grads = [random(5, 3), random(7)]
    for most in (0.5, 0.25, 0.125, math.inf, 2, 3):
        assert_like_eager(
            lambda ps, most=most: compiled(ps, most),
            lambda ps, most=most: THRESHOLDS[name](ps, most),
            grads,
            f"{name}, {most}",
        )
    with oracle.unchanged(grads), pytest.raises(Exception, match="exception"):  # that of as_threshold
        compiled([parameter(g) for g in grads], -1.0)


@over_compilers
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(compiler: str, name: str) -> None:
    """One compiled function meets gradients that are clipped, that are not, and that are not finite: no
    branch of the trace may depend on a value."""
    compiled = compiled_with(compiler, FUNCTIONS[name])
    for factor in (1.0, 1e-3, math.inf, math.nan):
        grads = [random(8, 4), random(5), random()]
        grads[1][2] *= factor
        grads[0] *= min(factor, 1.0)
        assert_like_eager(compiled, FUNCTIONS[name], grads, f"{name}, factor {factor}")


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_orders(norm_type: float) -> None:
    def function(ps: list[Tensor]) -> Tensor:
        return gradclip_ext.clip_grad_norm_(ps, 1.0, norm_type)

    assert_like_eager(
        compiled_with("aot_eager", function), function, [random(8, 4), random(5)], f"{norm_type}"
    )


ORDERS: dict[str, Callable[[list[Tensor], float], Any]] = {
    "clip_grad_norm_": lambda ps, p: gradclip_ext.clip_grad_norm_(ps, 0.5, p),
    "per_tensor": lambda ps, p: gradclip_ext.clip_grad_norm_(ps, 0.5, p, per_tensor=True),
    "get_grad_stats": lambda ps, p: gradclip_ext.get_grad_stats(ps, p).total_norm,
    "adaptive_clip_grad_": clip_beside_weights,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_changes(name: str, dtype: torch.dtype) -> None:
    compiled = compiled_with("eager", ORDERS[name])
    grads = [random(5, 3, dtype=dtype), random(7, dtype=dtype)]
    for norm_type in (2.0, 3.0, 1.5, math.inf, 1.0):
        assert_like_eager(
            lambda ps, p=norm_type: compiled(ps, p),
            lambda ps, p=norm_type: ORDERS[name](ps, p),
            grads,
            f"{name}, {norm_type}",
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_that_are_views(name: str) -> None:
    """Of which torch.compile tells strides that are no plain numbers."""
    params = [parameter(random(4, 5).t()), parameter(random(3))]
    twins = [parameter(params[0].grad.clone().t().contiguous().t()), parameter(params[1].grad.clone())]
    results = compiled_with("eager", FUNCTIONS[name])(params), FUNCTIONS[name](twins)
    if results[0] is not None:
        torch.testing.assert_close(*results, rtol=1e-6, atol=0.0)
    for one, other in zip(grads_of(params), grads_of(twins)):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=0.0)
    expanded = [parameter(random(4, 1).expand(4, 5).t())]
    if name in ("clip_grad_norm_", "clip_grad_value_", "clamp_grad_"):
        # Not fullgraph, in which torch 2.6 traces no exception that leaves a with block.
        with pytest.raises(Exception, match="expanded"):
            torch.compile(FUNCTIONS[name], backend="eager")(expanded)


@over_compilers
def test_mixed_dtypes_layouts_and_duplicates(compiler: str) -> None:
    def function(ps: list[Tensor]) -> Tensor:
        return gradclip_ext.clip_grad_norm_([*ps, ps[0]], 1.0)

    grads = [
        random(4, 3, dtype=torch.bfloat16),
        random(6),
        random(3, 4).t(),
        random(0, 2),
        random(6, dtype=torch.float16),
    ]
    assert_like_eager(compiled_with(compiler, function), function, grads, "")


def test_float64_and_complex_beside_float32() -> None:
    function = FUNCTIONS["clip_grad_norm_"]
    for dtypes in (
        (torch.float32, torch.float64),
        (torch.float32, torch.complex64),
        (torch.complex64, torch.float32),
    ):
        grads = [random(4, 3, dtype=d) for d in dtypes]
        assert_like_eager(compiled_with("aot_eager", function), function, grads, f"{dtypes}")


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_argument(foreach: bool | None) -> None:
    def function(ps: list[Tensor]) -> Tensor:
        gradclip_ext.clip_grad_value_(ps, 0.5, foreach=foreach)
        return gradclip_ext.clip_grad_norm_(ps, 1.0, foreach=foreach)

    assert_like_eager(compiled_with("aot_eager", function), function, [random(8, 4), random(5)], f"{foreach}")


def test_nothing_to_clip() -> None:
    def function(ps: list[Tensor]) -> Tensor:
        gradclip_ext.clip_grad_value_(ps, 0.5)
        return gradclip_ext.clip_grad_norm_(ps, 1.0)

    frozen = [torch.nn.Parameter(random(3))]
    assert compiled_with("aot_eager", function)(frozen).item() == 0.0


def test_range_beyond_squares() -> None:
    for name in ("clip_grad_norm_", "per_tensor", "get_grad_stats", "get_total_norm"):
        function = FUNCTIONS[name]
        for dtype, scale in ((torch.float32, 1e-30), (torch.float32, 1e25), (torch.float64, 1e200)):
            grads = [random(n, dtype=dtype) * scale for n in (8, 5)]
            assert_like_eager(compiled_with("aot_eager", function), function, grads, f"{name}, {scale}")


# ---------------------------------------------------------------- norms as operations


def graph_of(function: Callable[[list[Tensor]], Any], params: list[Tensor]) -> list[str]:
    """Return what torch.compile makes of a function: the operations in its graph."""
    found: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.extend(str(node.target) for node in module.graph.nodes if node.op != "placeholder")
        return module.forward

    torch.compile(function, backend=record, fullgraph=True)(params)
    return found


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("clip_grad_norm_", "norm"),
        ("foreach=False", "norm"),
        ("max_norm is a function", "norm"),
        ("get_total_norm", "norm"),
        ("per_tensor", "norms"),
        ("get_grad_stats", "statistics"),
    ],
)
def test_the_compiler_does_not_look_into_norms(name: str, operation: str) -> None:
    """Traced, they would take many times as long as the kernels."""
    found = graph_of(FUNCTIONS[name], [parameter(random(4)), parameter(random(3, 2))])
    assert found.count(f"gradclip_ext.{operation}") == 1, found
    assert not [each for each in found if "norm" in each and "gradclip_ext" not in each], found


@pytest.mark.parametrize("name", ["norm", "norms", "statistics"])
def test_torch_knows_what_the_operations_return(name: str) -> None:
    operation = getattr(torch.ops.gradclip_ext, name).default
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float64, torch.float16), (torch.complex64,)):
        tensors = [random(3, 4, dtype=d).t() for d in dtypes]
        dtype = [oracle.result_dtype(tensors)] if name == "norm" else []
        torch.library.opcheck(operation, (tensors, 2.0, None, None, *dtype))


def test_the_backend_that_was_named_computes_them() -> None:
    def function(ps: list[Tensor], name: str) -> Tensor:
        return gradclip_ext.clip_grad_norm_(ps, 1.0, backend=name)

    grads = [random(8, 4), random(5)]
    compiled = compiled_with("aot_eager", function)
    assert_like_eager(
        lambda ps: compiled(ps, "foreach"), lambda ps: function(ps, "foreach"), grads, "foreach"
    )
    with oracle.unchanged(grads), pytest.raises(RuntimeError, match="'cuda' cannot handle cpu tensors"):
        compiled([parameter(g) for g in grads], "cuda")


@over_compilers
def test_sizes_that_change(compiler: str) -> None:
    compiled = torch.compile(FUNCTIONS["clip_grad_norm_"], backend=compiler, fullgraph=True, dynamic=True)
    for size in (3, 5, 8):
        assert_like_eager(compiled, FUNCTIONS["clip_grad_norm_"], [random(size, 4), random(size)], f"{size}")


TRANSFORMED: dict[str, Callable[[Tensor], Any]] = {
    "vmap": torch.func.vmap(lambda grad: gradclip_ext.get_total_norm([grad])),
    "grad": torch.func.grad(lambda x: (x * gradclip_ext.get_total_norm([x])).sum()),
    "jvp": lambda x: torch.func.jvp(lambda y: y * gradclip_ext.get_total_norm([y]), (x,), (x.cos(),)),
}


@over_compilers
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_inside_of_a_compiled_function(name: str, compiler: str) -> None:
    """They have to see torch's operations, of which they know the rules."""
    x = random(4, 3)
    compiled = compiled_with(compiler, TRANSFORMED[name])
    torch.testing.assert_close(compiled(x), TRANSFORMED[name](x), rtol=2e-6, atol=0.0)


# ---------------------------------------------------------------- around it


def test_while_torch_is_patched() -> None:
    def function(ps: list[Tensor]) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(ps, 1.0)

    with gradclip_ext.patch_torch():
        grads = [random(8, 4, dtype=torch.bfloat16), random(5, dtype=torch.bfloat16)]
        assert_like_eager(compiled_with("aot_eager", function), function, grads, "patched")
        assert compiled_with("aot_eager", function)([parameter(g) for g in grads]).dtype == torch.float32


def test_training_step() -> None:
    """Optimizer step and clipping in one graph, as a training loop compiles them."""
    x, results = random(16, 4), []
    for wrap in (lambda f: f, lambda f: compiled_with("aot_eager", f)):
        torch.manual_seed(7)
        model = torch.nn.Linear(4, 3)
        params = list(model.parameters())

        def step(params: list[Tensor] = params) -> Tensor:
            norm = gradclip_ext.clip_grad_norm_(params, 0.1)
            with torch.no_grad():
                for p in params:
                    p.sub_(p.grad, alpha=0.5)
            return norm

        run = wrap(step)
        norms = []
        for _ in range(4):
            model.zero_grad()
            model(x).pow(2).mean().backward()
            norms.append(run())
        results.append((torch.stack(norms), model.weight.detach()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_model_with_clamp_hooks() -> None:
    """Hooks are registered outside; the compiled forward's backward still passes through them."""
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), random(16, 4) * 10
    grads = []
    with gradclip_ext.register_clamp_hook(model, -0.2, 0.1):
        for run in (model, compiled_with("aot_eager", model)):
            model.zero_grad()
            run(x).sum().mul(50).backward()
            grads.append(clones(grads_of(list(model.parameters()))))
    for one, other in zip(*grads):
        assert one.max() <= torch.tensor(0.1) and one.min() >= torch.tensor(-0.2)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_error_if_nonfinite_breaks_the_graph_but_works() -> None:
    """As in torch, error_if_nonfinite needs the value, so that fullgraph=True does not support it."""
    compiled = torch.compile(
        lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True), backend="eager"
    )
    params = [parameter(random(3)), parameter(random(4))]
    before = clones(grads_of(params))
    oracle.assert_scaled(grads_of(params), before, compiled(params), 1.0)
    params[1].grad[2] = math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        compiled(params)
    assert params[0].grad.isfinite().all()
