"""``kl_div`` and ``distill_loss`` with dense teachers: by hand, and every option on every input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    reference,
)
from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels.objective import Divergence
from support.cases import DISTILL_LOSS, KL_DIV, Options, crossed
from support.oracle import ALL, IMPLS, IN_FLOAT64, assert_value, bound, judge
from support.problems import distill_loss_problem, kl_div_problem, plain
from torch.autograd import gradcheck

INF = math.inf
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)

S = [0.0, LN3]  # q = [1/4, 3/4]
T = [0.0, 0.0]  # p = [1/2, 1/2]


# --- By hand -------------------------------------------------------------------------------------

JSD = 0.1 * (0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725)) + 0.9 * (
    0.25 * math.log(0.25 / 0.275) + 0.75 * math.log(0.75 / 0.725)
)
SKEW_FORWARD = 0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725)
SKEW_REVERSE = 0.25 * math.log(0.25 / 0.475) + 0.75 * math.log(0.75 / 0.525)

BY_HAND = {  # divergence: value, gradient by the second logit, at T = 1 and beta = 0.1
    "forward_kl": (0.5 * math.log(4 / 3), 1 / 4),
    "reverse_kl": (0.75 * LN3 - LN2, 3 / 16 * LN3),
    "jsd": (JSD, 0.9 * 3 / 16 * math.log((0.75 / 0.725) / (0.25 / 0.275))),
    # 0.9 (q w1 - w2 (1 - q)) with w = q p / m
    "skew_forward_kl": (
        SKEW_FORWARD,
        0.9 * (0.75 * 0.125 / 0.275 - 0.25 * 0.375 / 0.725),
    ),
    # q1 q2 (u2 - u1) with u = ln(q / m) - 0.1 q / m
    "skew_reverse_kl": (
        SKEW_REVERSE,
        3 / 16 * (math.log(0.75 / 0.525 * 0.475 / 0.25) - 0.1 * (0.75 / 0.525 - 0.25 / 0.475)),
    ),
    "jeffreys": (
        0.1 * 0.5 * math.log(4 / 3) + 0.9 * (0.75 * LN3 - LN2),
        0.1 * 1 / 4 + 0.9 * 3 / 16 * LN3,
    ),
    "tvd": (1 / 4, 3 / 16),  # q2 (1/2 - E), E = (q2 - q1) / 2
}  # fmt: skip


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale_t2", [True, False])
def test_by_hand(divergence: Divergence, temperature: float, scale_t2: bool, impl: str) -> None:
    """Logits times T at temperature T are the same distributions: T^2 in the value, T in dKD/ds."""
    value, slope = BY_HAND[divergence]
    value *= temperature**2 if scale_t2 else 1
    slope *= temperature if scale_t2 else 1 / temperature
    s = (temperature * torch.tensor([S])).requires_grad_()
    kd = bound(impl).kl_div(
        s,
        temperature * torch.tensor([T]),
        temperature=temperature,
        divergence=divergence,
        beta=0.1,
        scale_t2=scale_t2,
    )
    assert_value(kd, value, scale=temperature**2)
    (grad,) = torch.autograd.grad(kd, s)
    assert_value(grad, [[-slope, slope]], scale=temperature * LN3)


@pytest.mark.parametrize("impl", ALL)
def test_distill_loss_by_hand(impl: str) -> None:
    """Three rows of which one is ignored, every field of the result."""
    s = torch.tensor([S, [9.0, 9.0], S], requires_grad=True)
    teacher = TeacherLogits(torch.tensor([T, [9.0, 9.0], [0.0, -1.0]]))
    objective = Objective(ce_weight=0.5, kd_weight=2.0, label_smoothing=0.2, z_loss=0.25)
    y = torch.tensor([1, -100, 0])
    out = bound(impl).distill_loss(s, y, teacher, objective, num_items=4)

    ce = 2 * LN4 - 0.9 * LN3 - 0.1 * LN3
    p = torch.tensor([0.0, -1.0], dtype=torch.float64).softmax(0)
    second = p[0] * (p[0] * 4).log() + p[1] * (p[1] * 4 / 3).log()
    kd = 0.5 * math.log(4 / 3) + float(second)
    z = 2 * LN4**2
    assert_value(out.ce, ce, scale=2.0)
    assert_value(out.kd, kd, scale=2.0)
    assert_value(out.z, z, scale=4.0)
    assert_value(out.entropy, 2 * (LN4 - 0.75 * LN3), scale=2.0)
    assert_value(out.loss, (0.5 * ce + 2 * kd + 0.25 * z) / 4, scale=2.0)
    # Of equal logits the first is chosen: the teacher's first row does not agree.
    assert [float(x) for x in (out.num_tokens, out.correct, out.agree)] == [2, 1, 0]

    (grad,) = torch.autograd.grad(out.loss, s)
    rows = [
        0.5 * (0.75 - 0.9) + 2 * (0.75 - 0.5) + 0.25 * 2 * LN4 * 0.75,
        0.0,
        0.5 * (0.75 - 0.1) + 2 * (0.75 - float(p[1])) + 0.25 * 2 * LN4 * 0.75,
    ]
    assert_value(grad[:, 1], [x / 4 for x in rows], scale=torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("impl", ALL)
def test_teacher_hidden_by_hand(impl: str) -> None:
    """``2 tanh(0.5 (h w + b) / 2)``: the order is bias, scale, cap, and temperature last."""
    head = Head(
        torch.tensor([[0.0], [2 * LN3], [7.0]]), torch.tensor([0.0, 2 * LN3, 7.0]), 0.5, 4.0, 2
    )
    s = torch.tensor([[0.0, 0.0]], requires_grad=True)  # the teacher: 4 tanh(2 ln 3 / 4) = 2
    out = bound(impl).distill_loss(
        s,
        torch.tensor([1]),
        TeacherHidden(torch.tensor([[1.0]]), head),
        Objective(temperature=2.0),
    )
    p = math.e / (1 + math.e)
    kd = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p))
    assert_value(out.loss, kd, scale=4.0)
    assert float(out.agree) == 0.0


# --- Everything else against the oracle ----------------------------------------------------------


@pytest.mark.few(140)
@pytest.mark.parametrize(("options", "dtype", "impl"), crossed(KL_DIV))
def test_every_option_of_kl_div(options: Options, dtype: torch.dtype, impl: str) -> None:
    judge(kl_div_problem(options, dtype), bound(impl))


@pytest.mark.few(130)
@pytest.mark.parametrize(("options", "dtype", "impl"), crossed(DISTILL_LOSS))
def test_every_option_of_distill_loss(options: Options, dtype: torch.dtype, impl: str) -> None:
    judge(distill_loss_problem(options, dtype), bound(impl))


@pytest.mark.few(3)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_wide_vocabularies(divergence: Divergence, dtype: torch.dtype, impl: str) -> None:
    for V, valid, distribution in ((50257, False, "randn5"), (151936, 151665, "near")):
        problem = plain(
            "distill_loss",
            dtype,
            N=2,
            V=V,
            cut=valid,
            distribution=distribution,
            divergence=divergence,
        )
        judge(problem, bound(impl))


@pytest.mark.few(5)
@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(divergence: Divergence, reduction: str, impl: str) -> None:
    s, t = (2 * torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, -100, 5, 3])
    s.requires_grad_()
    ops = bound(impl)
    options = {"temperature": 2.0, "divergence": divergence, "beta": 0.3}
    assert gradcheck(lambda x: ops.kl_div(x, t, labels=y, reduction=reduction, **options), (s,))
    objective = Objective(ce_weight=0.5, label_smoothing=0.1, z_loss=0.01, **options)
    teacher = TeacherLogits(t)
    assert gradcheck(lambda x: ops.distill_loss(x, y, teacher, objective).loss, (s,))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_impossible_tokens(divergence: Divergence, impl: str) -> None:
    """A column of -inf on both sides is no column at all; on one side it may be infinite."""
    s, t = torch.randn(3, 40), torch.randn(3, 40)
    hole = torch.zeros(40, dtype=torch.bool)
    hole[[0, 5, 39]] = True
    options: Any = {"divergence": divergence, "temperature": 2.0, "beta": 0.3}
    results = []
    for ops, x, y in [
        (bound(impl), s.masked_fill(hole, -INF), t.masked_fill(hole, -INF)),
        (reference, s[:, ~hole].double(), t[:, ~hole].double()),
    ]:
        x.requires_grad_()
        loss = ops.kl_div(x, y, reduction="none", **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    (loss, grad), (exact, exact_grad) = results
    assert_value(loss, exact, scale=4.0 * 5)
    assert_value(grad[:, ~hole], exact_grad, scale=2.0 * 5)
    assert not grad[:, hole].any()

    student_only = bound(impl).kl_div(s.masked_fill(hole, -INF), t, **options)
    teacher_only = bound(impl).kl_div(s, t.masked_fill(hole, -INF), **options)
    assert student_only.isinf() == (divergence in ("forward_kl", "jeffreys"))
    assert teacher_only.isinf() == DIVERGENCES[divergence].needs_full_support


@pytest.mark.parametrize("impl", IMPLS)
def test_refusals(impl: str) -> None:
    s, t, y = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([0, 1, 2])
    ops, objective = bound(impl), Objective()
    wide = torch.randn(3, 9)
    trained = t.clone().requires_grad_()
    with pytest.raises(ValueError, match=r", got .*; "):
        ops.kl_div(s, trained)
    with pytest.raises(ValueError, match=r", got .*; "):
        TeacherLogits(trained)
    for call in [
        lambda: ops.kl_div(s, wide),
        lambda: ops.kl_div(s, t[:2]),
        lambda: ops.kl_div(s, t, labels=y[:2]),
        lambda: ops.kl_div(s, t, temperature=0.0),
        lambda: ops.kl_div(s, t, divergence="kl"),
        lambda: ops.distill_loss(s, y, TeacherLogits(wide), objective),
        lambda: ops.distill_loss(s, y, None, objective),
        lambda: ops.distill_loss(s, y[:2], TeacherLogits(t), objective),
    ]:
        with pytest.raises(ValueError, match=r", got .*; "):
            call()
    for divergence in (name for name, info in DIVERGENCES.items() if info.reads_beta):
        for beta in (0.0, 1.0):
            with pytest.raises(ValueError, match="by name"):
                ops.kl_div(s, t, divergence=divergence, beta=beta)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("side", ["student", "teacher", "student beside ids"])
def test_a_row_of_nothing_but_nan_poisons_itself_alone(side: str, impl: str) -> None:
    """It has no maximum, so no tile that holds it: one was read at an address of nobody's."""
    s, t, y = torch.randn(3, 97), torch.randn(3, 97), torch.tensor([1, 2, 3])
    (t if side == "teacher" else s)[1] = math.nan
    s.requires_grad_()
    teacher: Any = TeacherLogits(t)
    if side == "student beside ids":
        teacher = TeacherTopK(torch.arange(4).expand(3, 4), torch.full((3, 4), -3.0))
    out = bound(impl).distill_loss(s, y, teacher, Objective(ce_weight=0.5, label_smoothing=0.1))
    assert out.loss.isnan() and out.kd.isnan()
    (grad,) = torch.autograd.grad(out.loss, s)
    assert grad[[0, 2]].isfinite().all()


# --- What a result is made of --------------------------------------------------------------------


@pytest.mark.parametrize("impl", ALL)
def test_a_running_number_of_items_may_change_until_backward(impl: str) -> None:
    """Of a window whose micro-batches are differentiated together."""
    s, t, y = torch.randn(4, 40, requires_grad=True), torch.randn(4, 40), torch.arange(4)
    running, gradients = torch.tensor(4), []
    for change in (False, True):
        out = bound(impl).distill_loss(s, y, TeacherLogits(t), Objective(), num_items=running)
        if change:
            running += 3
        gradients.append(torch.autograd.grad(out.loss, s)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("impl", ALL)
def test_the_fields_of_a_result_are_tensors_of_their_own(impl: str) -> None:
    """One may be added to in place, by numbers with a gradient too, without the others' notice."""
    s, t, y = torch.randn(4, 40, requires_grad=True), torch.randn(4, 40), torch.arange(4)
    out = bound(impl).distill_loss(s, y, TeacherLogits(t), Objective(ce_weight=0.5))
    before, weight = [x.detach().clone() for x in out], torch.ones((), requires_grad=True)
    weighted = weight * out.ce
    total, other = out.kd, out.num_tokens
    total += out.loss
    other += 1
    (total + weighted).backward()
    assert weight.grad == before[1] and s.grad is not None
    assert [not torch.equal(a, b) for a, b in zip(out, before, strict=True)] == [
        name in ("kd", "num_tokens") for name in out._fields
    ]
