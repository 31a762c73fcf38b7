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

A second call gets a NaN in the very last element: it must reach the norm and every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.cases import Operation, Workload, chunks, grads
from benchmarks.contenders import Implementation
from gradclip_ext import reference

NORM_BUDGET = 1e-6
PEER_NORM_BUDGET = 2e-2
_COEF_ROUNDINGS = 4


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
        grad_error = _worst_error(gradients, workload, lambda x: x.clamp(-bound, bound), rounded=False)
        return _verdict(0.0, 0.0, grad_error, 0.0)
    norm = float(result)
    norm_error = abs(norm - workload.norm) / workload.norm
    norm_budget = NORM_BUDGET if implementation.is_ours else PEER_NORM_BUDGET
    coef = 1.0 if threshold is None else reference.clip_coef(threshold, norm)
    if coef == 1.0:
        grad_error = _worst_error(gradients, workload, lambda x: x, rounded=False)
        return _verdict(norm_error, norm_budget, grad_error, 0.0)
    narrowest = max(_unit_roundoff(grad.dtype) for grad in gradients)
    coef_unit = _unit_roundoff(torch.float32) if implementation.is_ours else narrowest
    grad_error = _worst_error(gradients, workload, lambda x: x * coef, rounded=True)
    return _verdict(norm_error, norm_budget, grad_error, _COEF_ROUNDINGS * coef_unit)


def _verdict(norm_error: float, norm_budget: float, grad_error: float, grad_budget: float) -> Verdict:
    worst = math.nan if math.isnan(norm_error) else max(grad_error, norm_error)  # NaN first: max keeps it
    if not norm_error <= norm_budget:  # written so that NaN fails
        return Verdict(worst, f"the norm is off by {norm_error:.1e} (budget {norm_budget:.0e})")
    if not grad_error <= grad_budget:
        return Verdict(worst, f"gradients are off by {grad_error:.1e} (budget {grad_budget:.1e})")
    return Verdict(worst, None)


def _worst_error(
    gradients: Sequence[Tensor], workload: Workload, expected: Callable[[Tensor], Tensor], *, rounded: bool
) -> float:
    """Return the largest relative error, beyond one rounding if it had to be ``rounded``.

    NaN where only one of the two is NaN.
    """
    excess = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for grad, values in zip(gradients, workload.original):
        unit = _unit_roundoff(grad.dtype) if rounded else 0.0
        # Below the smallest normal number, the distance between neighbours is constant.
        smallest = torch.finfo(grad.dtype).smallest_normal
        for found, before in zip(chunks(grad), chunks(values)):
            # Without rounding, the result is exact in its dtype: comparing there takes a tenth of the time.
            if not rounded and torch.equal(found, expected(before)):
                continue
            want = expected(before.double())
            error = found.double().sub_(want).abs_()
            size = want.abs_().clamp_(min=smallest)
            excess = torch.maximum(excess, error.div_(size).amax() - unit)
    return excess.item()


def _drops_nan(
    implementation: Implementation, operation: Operation, workload: Workload, parameters: Sequence[Parameter]
) -> str | None:
    """Return how a NaN in the last element was handled wrongly, or None."""
    gradients = grads(parameters)
    gradients[-1].view(-1)[-1] = math.nan
    result = operation.bind(implementation.functions[operation.function], parameters, workload.norm)()
    if not gradients[-1].view(-1)[-1].isnan():
        return "a NaN in the last gradient was overwritten"
    if operation.function != "clip_grad_value_" and not math.isnan(float(result)):
        return f"a NaN in the last gradient gave the norm {float(result):.4g}"
    if operation.function == "clip_grad_norm_":
        for index, grad in enumerate(gradients):
            if not all(chunk.isnan().all() for chunk in chunks(grad)):
                return f"a NaN in the last gradient did not reach gradient {index}"
    return None


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
