"""The correctness gate: an implementation is compared with float64 before it is timed.

The result is one number, ``max_rel_error``: the larger one of the relative error of the returned
norm and the largest relative error of a gradient element. A gradient element is compared with the
float64 product (or clamp) of its original value. The half unit in the last place that a single
rounding may cost is subtracted, so that the number is comparable between dtypes.

Budgets, for a norm:
  ours  1e-6 at any size and dtype: what the package promises.
  peers 2e-2. torch adds float32 squares in running sums (off by 0.3 % at 39M and 1.1 % at 100M
        elements in one tensor on CPU) and rounds the norm of half types to them (2^-9 = 0.2 % in
        bfloat16). That is accepted in practice, so it stays the baseline; its error is shown.

For gradients, against min(1, max_norm / (returned norm + 1e-6)) in float64: the coefficient takes
four roundings (norm + 1e-6, the reciprocal, max_norm, their product), so 4 u to first order, with u
the unit roundoff of the type it is computed in. Ours computes it in float32, 4 * 2^-24; peers in the
type of the gradients (the narrowest one of a mixed list), 4 * 2^-9 in bfloat16. Where nothing may
change, and for clamps, the budget is 0.

Norms of single tensors have the same budgets, counts have none. Adaptive clipping divides the norm of
a weight by that of a gradient: it has twice the budget of a norm, and that of the coefficient.

A second call gets a NaN in the very last element: it must reach the norm and every gradient, or the norm of
its own tensor and that tensor alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.cases import Workload, chunks, grads
from benchmarks.contenders import Implementation
from benchmarks.operations import ADAPTIVE, ADAPTIVE_EPS, PER_TENSOR, STATS, Operation
from gradclip_ext import reference

NORM_BUDGET = 1e-6
PEER_NORM_BUDGET = 2e-2
_COEF_ROUNDINGS = 4
# Rows of a matrix that are converted to float64 at a time.
_UNITS = 1024


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        max_rel_error: see the module's docstring; None if there was no result.
        problem: what is wrong, as a sentence for people, or None.
    """

    max_rel_error: float | None
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


def judge(implementation: Implementation, operation: Operation, workload: Workload) -> Verdict:
    """Run the operation on random gradients and on ones with a NaN, and compare with float64."""
    if operation.function not in implementation.functions:
        return Verdict(None, f"{implementation.name} has no {operation.function}")
    parameters = workload.next()
    try:
        verdict = _compare(implementation, operation, workload, parameters)
        workload.restore(parameters)
        if verdict.ok:
            problem = _drops_nan(implementation, operation, workload, parameters)
            verdict = Verdict(verdict.max_rel_error, problem)
    except Exception as error:  # an exception of a peer is its result and does not end the run
        verdict = Verdict(None, f"raised {type(error).__name__}: {error}".partition("\n")[0])
    workload.restore(parameters)
    return verdict


def _compare(
    implementation: Implementation, operation: Operation, workload: Workload, parameters: Sequence[Parameter]
) -> Verdict:
    result = operation.bind(implementation.functions[operation.function], parameters, workload.norm)()
    gradients = grads(parameters)
    threshold = operation.threshold(workload.norm)
    if operation.function == "clip_grad_value_":
        assert threshold is not None
        bound = threshold
        grad_error = _worst_error(gradients, workload, lambda x, *_: x.clamp(-bound, bound), rounded=False)
        return _verdict(0.0, 0.0, grad_error, 0.0)
    norm_budget = NORM_BUDGET if implementation.is_ours else PEER_NORM_BUDGET
    narrowest = max(_unit_roundoff(grad.dtype) for grad in gradients)
    coef_budget = _COEF_ROUNDINGS * (_unit_roundoff(torch.float32) if implementation.is_ours else narrowest)
    if operation.function == ADAPTIVE:
        assert threshold is not None
        expected = _adaptively_clipped(workload, threshold)
        grad_error = _worst_error(gradients, workload, expected, rounded=threshold < 1.0)
        return _verdict(0.0, 0.0, grad_error, 2 * norm_budget + coef_budget if threshold < 1.0 else 0.0)
    if operation.function == STATS:
        problem = _wrong_counts(result, workload)
        if problem is not None:
            return Verdict(None, problem)
        found, exact = [float(result.total_norm), *result.norms.tolist()], [workload.norm, *workload.norms]
    elif operation.function == PER_TENSOR:
        found, exact = result.tolist(), workload.norms
    else:
        found, exact = [float(result)], [workload.norm]
    norm_error = max(map(_relative_error, found, exact), key=lambda error: (math.isnan(error), error))
    each = found if operation.function == PER_TENSOR else found[:1] * len(gradients)
    coefs = [1.0 if threshold is None else reference.clip_coef(threshold, norm) for norm in each]
    clips = any(coef != 1.0 for coef in coefs)
    grad_error = _worst_error(gradients, workload, lambda x, i, _: x * coefs[i], rounded=clips)
    return _verdict(norm_error, norm_budget, grad_error, coef_budget if clips else 0.0)


def _relative_error(found: float, exact: float) -> float:
    return abs(found - exact) / exact


def _verdict(norm_error: float, norm_budget: float, grad_error: float, grad_budget: float) -> Verdict:
    worst = math.nan if math.isnan(norm_error) else max(grad_error, norm_error)  # NaN first: max keeps it
    if not norm_error <= norm_budget:  # written so that NaN fails
        return Verdict(worst, f"the norm is off by {norm_error:.1e} (tolerance {norm_budget:.0e})")
    if not grad_error <= grad_budget:
        return Verdict(worst, f"gradients are off by {grad_error:.1e} (tolerance {grad_budget:.1e})")
    return Verdict(worst, None)


# What becomes of a chunk, with the index of its tensor and of its first element.
Expected = Callable[[Tensor, int, int], Tensor]


def _worst_error(
    gradients: Sequence[Tensor], workload: Workload, expected: Expected, *, rounded: bool
) -> float:
    """Return the largest relative error, beyond one rounding if it had to be ``rounded``.

    NaN where only one of the two is NaN.
    """
    excess = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for index, (grad, values) in enumerate(zip(gradients, workload.original)):
        unit = _unit_roundoff(grad.dtype) if rounded else 0.0
        # Below the smallest normal number, the distance between neighbours is constant.
        smallest = torch.finfo(grad.dtype).smallest_normal
        first = 0
        for found, before in zip(chunks(grad), chunks(values)):
            start, first = first, first + before.numel()
            # Without rounding, the result is exact in its dtype: comparing there takes a tenth of the time.
            if not rounded and torch.equal(found, expected(before, index, start)):
                continue
            want = expected(before.double(), index, start)
            error = found.double().sub_(want).abs_()
            size = want.abs_().clamp_(min=smallest)
            excess = torch.maximum(excess, error.div_(size).amax() - unit)
    return excess.item()


def _adaptively_clipped(workload: Workload, clip_factor: float) -> Expected:
    """Return the result of adaptive clipping beside a workload's weights."""
    coefs = []
    for values in workload.original:
        units = values.shape[0] if values.dim() > 1 else 1
        norms = torch.cat([_unit_norms(rows) for rows in values.view(units, -1).split(_UNITS)])
        limits = norms.flip(0).clamp(min=ADAPTIVE_EPS) * clip_factor
        coefs.append(torch.where(norms < limits, 1.0, limits / norms.clamp(min=1e-6)))

    def expected(chunk: Tensor, index: int, first: int) -> Tensor:
        length = workload.original[index].numel() // len(coefs[index])
        elements = torch.arange(first, first + chunk.numel(), device=chunk.device)
        return chunk * coefs[index][elements // length].to(chunk.dtype)

    return expected


def _unit_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.double(), dim=1)
    return norms


def _wrong_counts(stats: Any, workload: Workload) -> str | None:
    """Return what is wrong among the statistics that have to be exact, or None."""
    for index, values in enumerate(workload.original):
        exact: dict[str, Tensor | int] = {
            "absmax": values.abs().amax(),
            "zeros": (values == 0).sum(),
            "nonfinite": 0,
        }
        for name, number in exact.items():
            found = float(getattr(stats, name)[index])
            if found != float(number):
                return f"{name}[{index}] is {found:.9g}, not {float(number):.9g}"
    return None


def _drops_nan(
    implementation: Implementation, operation: Operation, workload: Workload, parameters: Sequence[Parameter]
) -> str | None:
    """Return how a NaN in the last element was handled wrongly, or None."""
    gradients = grads(parameters)
    gradients[-1].view(-1)[-1] = math.nan
    result = operation.bind(implementation.functions[operation.function], parameters, workload.norm)()
    if not gradients[-1].view(-1)[-1].isnan():
        return "a NaN in the last gradient was overwritten"
    function = operation.function
    if function == STATS:
        norms = [result.total_norm, result.norms[-1], result.absmax[-1]]
        if int(result.nonfinite[-1]) != 1:
            return f"a NaN in the last gradient was counted {int(result.nonfinite[-1])} times"
    elif function == PER_TENSOR:
        norms = [result[-1]]
    else:
        norms = [] if result is None else [result]
    for norm in norms:
        if not math.isnan(float(norm)):
            return f"a NaN in the last gradient gave the norm {float(norm):.4g}"
    first_reached = {"clip_grad_norm_": 0, PER_TENSOR: len(gradients) - 1}.get(function, len(gradients))
    for index in range(first_reached, len(gradients)):
        if not all(chunk.isnan().all() for chunk in chunks(gradients[index])):
            return f"a NaN in the last gradient did not reach gradient {index}"
    is_local = function in (PER_TENSOR, ADAPTIVE) and len(gradients) > 1
    if is_local and any(chunk.isnan().any() for chunk in chunks(gradients[0])):
        return "a NaN in the last gradient reached the first one"
    return None


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
