"""Targets between student and teacher: ``teacher_share``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK
from sad_kernels.objective import DIVERGENCES, Divergence
from support.oracle import ALL, IMPLS, SLOW, assert_value, bound, dtypes_of, judge
from support.problems import plain

OPS = ("distill_loss", "linear_distill_loss")


@pytest.mark.parametrize("impl", ALL)
def test_by_hand(impl: str) -> None:
    """q = [1, 9] / 10 and a teacher of equal logits: halfway lies r = [1, 3] / 4."""
    s = torch.tensor([[0.0, math.log(9)]], requires_grad=True)
    objective = Objective(teacher_share=0.5)
    out = bound(impl).distill_loss(
        s, torch.tensor([0]), TeacherLogits(torch.zeros(1, 2)), objective
    )
    kl = 1 / 4 * math.log(10 / 4) + 3 / 4 * math.log(3 / 4 * 10 / 9)
    assert_value(out.loss, kl)
    (ds,) = torch.autograd.grad(out.loss, s)
    assert_value(ds, [[3 / 4 - 9 / 10, 9 / 10 - 3 / 4]])
    assert float(out.agree) == 1, "the argmax of the mixture, not of the teacher alone"


@pytest.mark.few(18)
@pytest.mark.parametrize(
    ("op", "divergence", "dtype", "impl"),
    [
        pytest.param(
            op,
            divergence,
            dtype,
            impl,
            id=f"{op}-{divergence}-{str(dtype).removeprefix('torch.')}-{impl}",
            marks=pytest.mark.slow if impl in SLOW and (i + j) % 3 else (),
        )
        for impl in IMPLS
        for op in OPS
        for i, dtype in enumerate(dtypes_of(impl))
        for j, divergence in enumerate(DIVERGENCES)
    ],
)
def test_every_divergence(op: str, divergence: str, dtype: torch.dtype, impl: str) -> None:
    options: dict[str, Any] = {"N": 40, "ignore": "some", "cut": True, "teacher_share": 0.4}
    options |= {"divergence": divergence, "temperature": 2.0}
    if op == "linear_distill_loss":
        options |= {"teacher": "hidden", "softcap": 20.0}
    judge(plain(op, dtype, **options), bound(impl, 8_000))


@pytest.mark.few(3)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("distribution", ["offset1e4", "spread300", "inf_student", "inf_teacher"])
def test_extreme_logits(distribution: str, impl: str) -> None:
    """A token that either side rules out has no share of the target."""
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = {"distribution": distribution, "teacher_share": 0.3}
        judge(plain("distill_loss", dtype, ce_weight=0.0, **options), bound(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_whole_share_is_the_teacher_itself(impl: str) -> None:
    s, t = torch.randn(2, 5, 70)
    y = torch.randint(70, (5,))
    objective = Objective(ce_weight=0.5, temperature=2.0)
    plain_out = bound(impl).distill_loss(s, y, TeacherLogits(t), objective)
    out = bound(impl).distill_loss(s, y, TeacherLogits(t), replace(objective, teacher_share=1))
    assert all(torch.equal(a, b) for a, b in zip(plain_out, out, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_gradient_flows_through_the_target(divergence: Divergence, impl: str) -> None:
    """The gradient is that of a teacher who has the mixture's logits."""
    hidden, h_t = torch.randn(6, 8), torch.randn(6, 4)
    head, head_t = Head(torch.randn(70, 8)), Head(torch.randn(70, 4))
    y, u = torch.arange(6), 0.25
    objective = Objective(divergence=divergence, teacher_share=u)
    mixture = TeacherLogits((1 - u) * head(hidden) + u * head_t(h_t))
    gradients = []
    for teacher, wanted in (
        (TeacherHidden(h_t, head_t), objective),
        (mixture, replace(objective, teacher_share=1.0)),
    ):
        x = hidden.clone().requires_grad_()
        out = bound(impl).linear_distill_loss(x, head, y, teacher, wanted)
        gradients.append(torch.autograd.grad(out.loss, x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_bad_shares() -> None:
    for share in (0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"teacher_share must lie in \(0, 1\], got"):
            Objective(teacher_share=share)
    with pytest.raises(TypeError, match="teacher_share must lie in"):
        Objective(teacher_share=True)


@pytest.mark.parametrize("impl", ALL)
def test_sparse_teachers_have_no_logits_to_mix(impl: str) -> None:
    teacher = TeacherTopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log())
    with pytest.raises(ValueError, match="teacher_share must be 1 for a"):
        bound(impl).distill_loss(
            torch.zeros(1, 4), torch.tensor([0]), teacher, Objective(teacher_share=0.5)
        )
