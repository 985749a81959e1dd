"""The rule where the gradient of a divergence is a small rest: what must pass, and what must not.

The form of ``test_oracle.py``: correct algorithms keep the rule, and faults break it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import (
    APART,
    CROSS_ENTROPY,
    DISTILL_LOSS,
    KL_DIV,
    LINEAR_CROSS_ENTROPY,
    LINEAR_DISTILL_LOSS,
    MIXED_AND_PURE,
)
from support.oracle import (
    DTYPES,
    Problem,
    broken,
    divergences,
    epsilon,
    measure_exact,
    measure_of,
)
from support.oracle.rule import NEGLIGIBLE
from support.problems import (
    cross_entropy_problem,
    distill_loss_problem,
    kl_div_problem,
    linear_cross_entropy_problem,
    linear_distill_loss_problem,
    plain,
)
from torch import Tensor


def apart(distribution: str, divergence: Any, beta: float) -> Problem:
    return plain(
        "kl_div",
        torch.float32,
        N=32,
        V=512,
        distribution=distribution,
        divergence=divergence,
        beta=beta,
        temperature=1.0,
        reduction="none",
    )


@pytest.mark.few(49)
@pytest.mark.parametrize("distribution", APART)
@pytest.mark.parametrize(("divergence", "beta"), MIXED_AND_PURE)
def test_exact_differences_pass_where_gradients_are_small(
    divergence: str, beta: float, distribution: str
) -> None:
    """The oracle's own formulas in float32 keep the rule; a gradient of nothing, or of half the
    size, was within the band that was measured by the range of the logits."""
    problem = apart(distribution, divergence, beta)
    by, ours = measure_of(problem), measure_exact(problem, dict(problem.leaves))
    assert not broken(problem, ours, by)
    for part in (0.0, 0.5):
        assert broken(problem, {"dlogits": (part * by.oracle["dlogits"]).float()}, by)


@pytest.mark.few(32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", ["logits", "hidden", "bucket", "share"])
@pytest.mark.parametrize(("divergence", "beta"), MIXED_AND_PURE)
def test_exact_differences_pass_beside_other_teachers(
    divergence: str, beta: float, teacher: str, dtype: torch.dtype
) -> None:
    """The same of hidden states, of K + 1 outcomes, of mixed targets; with computed logits."""
    options: dict[str, Any] = {"teacher": teacher}
    if teacher == "share":
        options = {"teacher": "logits", "teacher_share": 0.1}
    for op in ("distill_loss", "linear_distill_loss"):
        options |= {"distribution": "randn5+1e-1", "temperature": 1.0, "ce_weight": 0.0}
        problem = plain(op, dtype, N=40, divergence=divergence, beta=beta, **options)
        by, ours = measure_of(problem), measure_exact(problem, dict(problem.leaves))
        assert not broken(problem, ours, by)
        for output in (f"d{name}" for name in problem.wrt):
            for part in (0.0, 0.5):
                wrong = (part * by.oracle[output]).to(dtype)
                assert broken(problem, {output: wrong}, by)


@pytest.mark.parametrize(("distribution", "softcap"), [("randn5+1e-1", 20.0), ("offset1e4", None)])
@pytest.mark.parametrize(("divergence", "beta"), MIXED_AND_PURE)
def test_exact_differences_pass_of_scaled_and_capped_logits(
    divergence: str, beta: float, distribution: str, softcap: float | None
) -> None:
    """What is scaled is rounded by its size, not by its distance from the largest."""
    given = apart(distribution, divergence, beta)
    other: dict[str, Any] = {"logit_scale": 1.3, "softcap": softcap}
    other |= {f"teacher_{name}": value for name, value in other.items()}

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        capped = SimpleNamespace(kl_div=partial(ops.kl_div, **other))
        return given.call(capped, x)

    problem = replace(given, call=call)
    by, ours = measure_of(problem), measure_exact(problem, dict(problem.leaves))
    assert not broken(problem, {"dlogits": ours["dlogits"]}, by)
    for part in (0.0, 0.5):
        assert broken(problem, {"dlogits": (part * by.oracle["dlogits"]).float()}, by)


@pytest.mark.parametrize("distribution", ["randn1+1e-3", "randn5+1e-1", "randn5"])
def test_plain_logarithms_are_a_licence_of_their_own(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``log2(1 + z)`` knows a small z to 2^-24 of 1: a kernel may do so, what has ``log1p`` not."""

    def log_growth(m: divergences.Mixture) -> Tensor:
        return torch.log(m.student + m.teacher * m.g.exp())

    def relative_rise(m: divergences.Mixture) -> Tensor:
        return (m.g.exp() - 1) / (m.student + m.teacher * m.g.exp())

    problem = apart(distribution, "skew_reverse_kl", 0.9)
    strict, lenient = measure_of(problem), measure_of(problem, plain_forms=True)
    with monkeypatch.context() as patch:
        patch.setattr(divergences, "_log_growth", log_growth)
        patch.setattr(divergences, "_relative_rise", relative_rise)
        ours = measure_exact(problem, dict(problem.leaves))
    assert broken(problem, ours, strict) == {"dlogits"}
    assert not broken(problem, ours, lenient)
    half = {"dlogits": ours["dlogits"] / 2}
    assert broken(problem, half, lenient)


def test_a_mean_from_one_reading_is_a_licence_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel reads once, and cannot count the reverse KL's phi from a maximum that is yet to
    come. In rows that are sure of a token its mean is then off by more than is left of them."""

    def phi(k: divergences.Ratios, beta: float) -> Tensor:
        return -k.log_ratio

    problem = apart("randn20", "reverse_kl", 0.5)
    strict, lenient = measure_of(problem), measure_of(problem, plain_forms=True)
    with monkeypatch.context() as patch:
        patch.setitem(divergences.PHI, "reverse_kl", phi)
        ours = measure_exact(problem, dict(problem.leaves))
    assert broken(problem, ours, strict) == {"dlogits"}
    assert not broken(problem, ours, lenient)
    for part in (0.0, 0.5):
        assert broken(problem, {"dlogits": part * ours["dlogits"]}, lenient)


UNKNOWN = ("same", "equal_logits")
"""Where the teacher is the student but for rounding, so is the gradient of their divergence."""

GRIDS = {
    "cross_entropy": (CROSS_ENTROPY, cross_entropy_problem),
    "kl_div": (KL_DIV, kl_div_problem),
    "distill_loss": (DISTILL_LOSS, distill_loss_problem),
    "linear_cross_entropy": (LINEAR_CROSS_ENTROPY, linear_cross_entropy_problem),
    "linear_distill_loss": (LINEAR_DISTILL_LOSS, linear_distill_loss_problem),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, marks=() if dtype == torch.float32 else pytest.mark.slow)
        for op in GRIDS
        for dtype in DTYPES
    ],
)
def test_no_gradient_and_half_of_it_are_rejected(op: str, dtype: torch.dtype) -> None:
    """In every case that the losses are tested on, but where the dtype cannot tell."""
    cases, build = GRIDS[op]
    passed, judged = [], 0
    for options in cases:
        problem = build(options, dtype)
        by = measure_of(problem, rounds_products=True, plain_forms=True)
        for name in problem.wrt:
            output = f"d{name}"
            exact = by.oracle[output]
            divergence_alone = not by.undistilled[output].any()
            if divergence_alone and options["distribution"] in UNKNOWN:
                continue
            if exact.abs().amax() < limit_of_size(problem.leaves[name].dtype):
                continue
            judged += 1
            for part in (0.0, 0.5):
                rounded = (part * exact).to(problem.leaves[name].dtype)
                if not broken(problem, {output: rounded}, by):
                    passed.append(f"{part} {problem.case} {output}")
    assert not passed and judged > len(cases) / 3, "\n".join(passed)


def limit_of_size(dtype: torch.dtype) -> float:
    """Gradients below it have no digits left (float16), or are what nobody will miss."""
    return max(float(torch.finfo(dtype).smallest_normal), NEGLIGIBLE * epsilon(dtype))
