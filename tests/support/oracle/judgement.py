"""The rule for every output and gradient of a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sad_kernels import reference
from torch import Tensor

from support.oracle.calls import COUNTS, Outputs, Problem, measure
from support.oracle.exact import measure_oracle, measure_without_divergence
from support.oracle.rounding import rounding_of_logits, rounding_of_products
from support.oracle.rule import as_rows, assert_same_kind, assert_within, assert_zero, epsilon


class Measure(NamedTuple):
    """What the outputs of a call are judged by."""

    oracle: Outputs
    yardstick: Outputs
    undistilled: Outputs  # the oracle of what is not the divergence
    moved: Outputs  # by rounded logits of the divergence
    allowances: Outputs  # for rounded factors of products


def measure_of(
    problem: Problem, *, rounds_products: bool = False, plain_forms: bool = False
) -> Measure:
    oracle, yardstick = measure_oracle(problem), measure(problem, reference)
    eps = epsilon(yardstick["loss"].dtype)
    return Measure(
        oracle,
        yardstick,
        measure_without_divergence(problem),
        rounding_of_logits(problem, oracle, eps, plain_forms),
        rounding_of_products(problem) if rounds_products else {},
    )


def judge(problem: Problem, ops: Any) -> float:
    """Assert that every output and gradient of ``ops`` keeps the rule; return the largest share."""
    how = {name: getattr(ops, name, False) for name in ("rounds_products", "plain_forms")}
    return judge_outputs(problem, measure(problem, ops), measure_of(problem, **how))


def judge_outputs(problem: Problem, ours: Outputs, by: Measure | None = None) -> float:
    """``judge`` for outputs that are already there, be it only some of them."""
    by = by or measure_of(problem)
    return max(judge_output(problem, name, x, by) for name, x in ours.items())


def broken(problem: Problem, ours: Outputs, by: Measure) -> set[str]:
    """The outputs that break the rule."""
    found = set()
    for name, x in ours.items():
        try:
            judge_output(problem, name, x, by)
        except AssertionError:
            found.add(name)
    return found


def judge_output(problem: Problem, output: str, x: Tensor, by: Measure) -> float:
    what = f"{problem.case} {output}"
    assert_same_kind(x, by.yardstick[output], what)

    def rows(outputs: Outputs) -> Tensor:
        return _one_row_per_unit(output, outputs[output])

    x, o, e = _one_row_per_unit(output, x), rows(by.oracle), rows(by.yardstick)
    if output in problem.zeros:
        assert not x[problem.zeros[output]].any(), f"{what}: must be exactly zero"
    if output in COUNTS:
        assert torch.equal(x.double(), o), f"{what}: got {x}, expected {o}"
        return 0.0
    scale = problem.scales.get(output)
    if scale is None:
        undistilled = rows(by.undistilled).abs()
        scale = problem.magnitude * float(undistilled.max()) if o.numel() else 0.0
    limits: dict[str, Any] = {"case": problem.case, "output": output}
    if output in by.moved:
        limits["moved"] = as_rows(rows(by.moved)).amax(-1)
    if not o.any():
        assert_zero(x, scale, **limits)
        return 0.0
    if output in by.allowances:
        limits["allowance"] = as_rows(rows(by.allowances)).amax(-1)
    return assert_within(x, o, e, scale, **limits)


def _one_row_per_unit(output: str, x: Tensor) -> Tensor:
    """Tokens or classes in the first dimension; a bias is one row."""
    if output == "dbias":
        return x[None]
    if output == "loss":
        return x.flatten() if x.ndim else x
    return x.flatten(0, -2) if x.ndim > 2 else x
