"""Gradients of divergences where they are small rests: near agreement, far from it, and between.

At ``p = q`` a gradient is 0, and what it is made of is not. The rule asks for the digits that the
inputs' own last bits leave to it: a gradient of nothing fails, and one of half the size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sad_kernels.objective import Divergence
from support.cases import APART, MIXED_AND_PURE
from support.oracle import IMPLS, SLOW, bound, judge
from support.problems import plain

FEW = ("randn5+1e-1", "randn20+1e-3", "randn5")
"""What interpreted kernels are held to by default."""


@pytest.mark.few(24)
@pytest.mark.parametrize(
    ("impl", "distribution"),
    [
        pytest.param(
            impl,
            distribution,
            marks=pytest.mark.slow if impl in SLOW and distribution not in FEW else (),
        )
        for impl in IMPLS
        for distribution in APART
    ],
)
@pytest.mark.parametrize(("divergence", "beta"), MIXED_AND_PURE)
def test_of_logits(divergence: Divergence, beta: float, distribution: str, impl: str) -> None:
    problem = plain(
        "kl_div",
        torch.float32,
        N=4 if impl in SLOW else 64,
        V=1500,  # a single tile of the interpreter's
        distribution=distribution,
        divergence=divergence,
        beta=beta,
        temperature=1.0,
        reduction="none",
    )
    judge(problem, bound(impl))


@pytest.mark.few(10)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher", ["bucket", "hidden", "share"])
@pytest.mark.parametrize(("divergence", "beta"), MIXED_AND_PURE)
def test_of_other_teachers(divergence: Divergence, beta: float, teacher: str, impl: str) -> None:
    """K + 1 outcomes; logits that are computed; a target a tenth of the way to the teacher."""
    options: dict[str, Any] = {"teacher": teacher}
    if teacher == "share":
        options = {"teacher": "logits", "teacher_share": 0.1}
    for op in ("distill_loss", "linear_distill_loss"):
        problem = plain(
            op,
            torch.float32,
            N=3 if impl in SLOW else 8,
            distribution="randn5+1e-1",
            divergence=divergence,
            beta=beta,
            temperature=1.0,
            ce_weight=0.0,
            **options,
        )
        judge(problem, bound(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_that_is_sure_of_a_token_leaves_the_others_their_digits(impl: str) -> None:
    """Their gradients are a student's small probabilities, and every one of them is exact."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(1, 3001, generator=generator).mul_(0.1), torch.zeros(1, 3001)
    t[0, 0] = 15.0
    exact = s.double().softmax(1) - t.double().softmax(1)
    ours, eager = s.clone().requires_grad_(), s.clone().requires_grad_()
    ours_loss = bound(impl).kl_div(ours, t)
    eager_loss = F.kl_div(eager.log_softmax(1), t.softmax(1), reduction="batchmean")
    gradients = *torch.autograd.grad(ours_loss, ours), *torch.autograd.grad(eager_loss, eager)
    errors = [(g.double() / exact - 1).abs().amax() for g in gradients]
    assert errors[0] <= 4 * errors[1]
