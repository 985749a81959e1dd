"""The rule for every output and gradient of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sad_kernels import reference
from torch import Tensor

from support.oracle.calls import COUNTS, Outputs, Problem, measure
from support.oracle.exact import measure_oracle
from support.oracle.rounding import rounding_of_products
from support.oracle.rule import (
    as_rows,
    assert_same_kind,
    assert_within,
    assert_zero,
    band_of,
    row_errors,
)


def judge(problem: Problem, ops: Any) -> float:
    """Assert that every output and gradient of ``ops`` keeps the rule; return the largest share."""
    rounds = getattr(ops, "rounds_products", False)
    allowances = rounding_of_products(problem) if rounds else {}
    return judge_outputs(problem, measure(problem, ops), allowances)


def judge_outputs(problem: Problem, ours: Outputs, allowances: Outputs | None = None) -> float:
    """``judge`` for outputs that are already there, be it only some of them."""
    oracle, yardstick = measure_oracle(problem), measure(problem, reference)
    return max(
        judge_output(problem, name, x, oracle, yardstick, (allowances or {}).get(name))
        for name, x in ours.items()
    )


def judge_output(
    problem: Problem,
    output: str,
    x: Tensor,
    oracle: Outputs,
    yardstick: Outputs,
    allowance: Tensor | None = None,  # of the shape of x
) -> float:
    what = f"{problem.case} {output}"
    assert_same_kind(x, yardstick[output], what)
    x, o, e = (_one_row_per_unit(output, each) for each in (x, oracle[output], yardstick[output]))
    if output in problem.zeros:
        assert not x[problem.zeros[output]].any(), f"{what}: must be exactly zero"
    if output in COUNTS:
        assert torch.equal(x.double(), o), f"{what}: got {x}, expected {o}"
        return 0.0
    scale = problem.scales.get(output)
    if scale is None:
        scale = problem.magnitude * float(o.abs().max()) if o.numel() else 0.0
    if not o.any():
        assert_zero(x, scale, case=problem.case, output=output)
        return 0.0
    extra = 0.0
    if allowance is not None:
        extra = as_rows(_one_row_per_unit(output, allowance)).amax(-1)
    return assert_within(x, o, e, scale, allowance=extra, case=problem.case, output=output)


def _one_row_per_unit(output: str, x: Tensor) -> Tensor:
    """Tokens or classes in the first dimension; a bias is one row."""
    if output == "dbias":
        return x[None]
    if output == "loss":
        return x.flatten() if x.ndim else x
    return x.flatten(0, -2) if x.ndim > 2 else x


def is_measurable(problem: Problem) -> bool:
    """Whether the rule can tell two right answers to this problem from a wrong one.

    It measures the gradients of hidden states, weight and bias by the largest of their tensor. With
    few rows, or probabilities near 1, that can be a small remainder of the terms that were rounded;
    and eager PyTorch can be near it by luck. So problems are drawn at random only where eager in
    float32 keeps to a quarter of the band, here and at two neighbours whose numbers are one bit
    away. About 1 in 20 is passed over, those with a loss that is not finite among them.
    """
    generator = torch.Generator().manual_seed(0)
    for bits in (0, 1, 1):
        leaves = {
            name: x.float()
            * (1 + 2.0**-23 * torch.randint(-bits, bits + 1, x.shape, generator=generator))
            for name, x in problem.leaves.items()
        }
        near = replace(problem, leaves=leaves)
        oracle, yardstick = measure_oracle(near), measure(near, reference)
        for name in oracle.keys() - COUNTS:
            if oracle[name].any():
                x, o = (_one_row_per_unit(name, each[name]) for each in (yardstick, oracle))
                scale = problem.scales.get(name, problem.magnitude * float(o.abs().max()))
                if not (row_errors(x, o) <= band_of(o, scale, x.dtype) / 4).all():
                    return False
    return True
