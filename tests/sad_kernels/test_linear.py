"""``linear_cross_entropy`` and ``linear_distill_loss``: by hand, all options, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits
from sad_kernels.objective import DIVERGENCES, Divergence
from support.cases import LINEAR_CROSS_ENTROPY, LINEAR_DISTILL_LOSS, Options, crossed
from support.oracle import ALL, IMPLS, IN_FLOAT64, SLOW, assert_value, bound, judge
from support.problems import linear_cross_entropy_problem, linear_distill_loss_problem, plain
from torch.autograd import gradcheck

LN3, LN4 = math.log(3), math.log(4)
HALVES = (torch.float16, torch.bfloat16)


# --- By hand: h = [1, 1], logits [0, ln 3] -------------------------------------------------------


@pytest.mark.parametrize("impl", ALL)
def test_cross_entropy_by_hand(impl: str) -> None:
    hidden = torch.tensor([[1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [LN3, 0.5 * LN3]], requires_grad=True)
    bias = torch.tensor([0.0, 0.5 * LN3], requires_grad=True)
    loss = bound(impl).linear_cross_entropy(
        hidden, weight, torch.tensor([1]), bias=bias, logit_scale=0.5
    )
    assert_value(loss, LN4 - LN3)
    dh, dw, db = torch.autograd.grad(loss, (hidden, weight, bias))
    assert_value(dh, [[-LN3 / 8, -LN3 / 16]])
    assert_value(dw, [[1 / 8, 1 / 8], [-1 / 8, -1 / 8]])
    assert_value(db, [1 / 8, -1 / 8])


@pytest.mark.parametrize("impl", ALL)
def test_distillation_by_hand(impl: str) -> None:
    """Bias, then scale, then cap, then T: the teacher's 2 tanh(0.5 * 2 ln 3 / 2) = 1."""
    hidden = torch.tensor([[1.0], [math.nan]], requires_grad=True)
    head = Head(torch.tensor([[0.0], [2 * LN3], [math.nan]], requires_grad=True), valid_vocab=2)
    teacher_head = Head(
        torch.tensor([[0.0, 0.0], [LN3, 0.0]]),
        torch.tensor([0.0, LN3]),
        logit_scale=0.5,
        softcap=2.0,
    )
    teacher = TeacherHidden(torch.tensor([[1.0, 5.0], [math.nan, 0.0]]), teacher_head)
    objective = Objective(ce_weight=1.0, kd_weight=0.5, temperature=2.0)
    out = bound(impl).linear_distill_loss(hidden, head, torch.tensor([0, -100]), teacher, objective)
    p = torch.tensor([0.0, 0.5], dtype=torch.float64).softmax(0)
    kd = 4 * (p[0] * (4 * p[0]).log() + p[1] * (4 / 3 * p[1]).log())
    ce = math.log(10)  # logits [0, 2 ln 3]: q1 = [1/10, 9/10]
    assert_value(out.ce, ce, scale=3.0)
    assert_value(out.kd, float(kd), scale=12.0)
    assert_value(out.loss, ce + 0.5 * float(kd), scale=9.0)
    assert [float(x) for x in (out.num_tokens, out.correct, out.agree)] == [1, 0, 1]
    g = 9 / 10 + 0.5 * 2 * (3 / 4 - float(p[1]))
    dh, dw = torch.autograd.grad(out.loss, (hidden, head.weight))
    assert_value(dh, [[2 * LN3 * g], [0.0]], scale=torch.tensor([5.0, 0.0]))
    assert_value(dw, [[-g], [g], [0.0]], scale=torch.tensor([3.0, 3.0, 0.0]))


# --- Everything else against the oracle ----------------------------------------------------------


@pytest.mark.few(74)
@pytest.mark.parametrize(("options", "dtype", "impl"), crossed(LINEAR_CROSS_ENTROPY))
def test_every_option_of_cross_entropy(options: Options, dtype: torch.dtype, impl: str) -> None:
    judge(linear_cross_entropy_problem(options, dtype), bound(impl, options["chunk_bytes"]))


@pytest.mark.few(90)
@pytest.mark.parametrize(("options", "dtype", "impl"), crossed(LINEAR_DISTILL_LOSS))
def test_every_option_of_distillation(options: Options, dtype: torch.dtype, impl: str) -> None:
    judge(linear_distill_loss_problem(options, dtype), bound(impl, options["chunk_bytes"]))


@pytest.mark.few(5)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_distill_loss"])
def test_larger_products(op: str, dtype: torch.dtype, impl: str) -> None:
    """Where libraries choose other algorithms than for toy sizes; near the minimum of the KL."""
    N, V = (24, 1100) if impl in SLOW else (96, 700)  # wide enough for a single tile
    for weight_dtype in (None, torch.float32):
        problem = plain(
            op,
            dtype,
            N=N,
            V=V,
            D=160,
            cut=V - 50,
            distribution="near",
            teacher="hidden",
            weight_dtype=weight_dtype,
            ce_weight=0.0,
            ignore="some",
        )
        judge(problem, bound(impl, 1 << 20))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_wider_weight_is_rounded_to_the_hidden_states(dtype: torch.dtype, impl: str) -> None:
    """float32 master weights beside 16-bit states: one rounding, and a float32 gradient."""
    hidden, weight = torch.randn(8, 24).to(dtype), torch.randn(40, 24, requires_grad=True)
    y = torch.arange(8)
    linear = bound(impl).linear_cross_entropy
    loss = linear(hidden, weight, y)
    assert torch.equal(loss, linear(hidden, weight.to(dtype), y))
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32
    assert (grad != grad.to(dtype)).any()


@pytest.mark.few(2)
@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_gradcheck(divergence: Divergence, chunk_bytes: int | None, impl: str) -> None:
    ops = bound(impl, chunk_bytes)
    hidden, weight, bias, th, tw = (
        torch.randn(shape, dtype=torch.float64) for shape in [(4, 3), (6, 3), (6,), (4, 2), (6, 2)]
    )
    y = torch.tensor([0, -100, 4, 2])
    objective = Objective(
        ce_weight=0.3, label_smoothing=0.1, z_loss=0.01, temperature=0.5, divergence=divergence
    )
    teacher = TeacherHidden(th, Head(tw, valid_vocab=5))

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        head = Head(weight, bias, logit_scale=0.7, softcap=3.0, valid_vocab=5)
        return ops.linear_distill_loss(hidden, head, y, teacher, objective).loss

    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert gradcheck(loss, leaves)
    options: Any = {"logit_scale": 0.7, "softcap": 3.0, "z_loss": 0.01, "valid_vocab": 5}
    for reduction in ("mean", "none"):
        assert gradcheck(
            lambda h, w, b, r=reduction: ops.linear_cross_entropy(
                h, w, y, bias=b, reduction=r, label_smoothing=0.1, **options
            ),
            leaves,
        )


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows(shape: tuple[int, ...], impl: str) -> None:
    hidden = torch.randn(shape, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    ops, teacher = bound(impl), TeacherLogits(torch.randn(*shape[:-1], 6))
    for loss in (
        ops.linear_cross_entropy(hidden, weight, y),
        ops.linear_distill_loss(hidden, Head(weight), y, teacher, Objective()).loss,
    ):
        assert torch.equal(loss, torch.tensor(0.0))
        dh, dw = torch.autograd.grad(loss, (hidden, weight))
        assert dh.shape == shape
        assert torch.equal(dw, torch.zeros(6, 4))


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_dimensions_are_only_a_shape(impl: str) -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(9, 4)
    y = torch.arange(6).view(2, 3)
    linear = bound(impl).linear_cross_entropy
    flat = linear(hidden.view(6, 4), weight, y.flatten(), reduction="none")
    assert torch.equal(linear(hidden, weight, y, reduction="none"), flat.view(2, 3))


@pytest.mark.parametrize("impl", IMPLS)
def test_refusals(impl: str) -> None:
    ops, objective = bound(impl), Objective()
    hidden, weight, y = torch.randn(3, 4), torch.randn(8, 4), torch.tensor([0, 1, 2])
    head, teacher = Head(weight), TeacherLogits(torch.randn(3, 8))
    trained = Head(2 * weight.clone().requires_grad_())  # no leaf
    for error, call in [
        (ValueError, lambda: ops.linear_cross_entropy(hidden, torch.randn(8, 5), y)),
        (ValueError, lambda: ops.linear_cross_entropy(hidden, weight, y[:2])),
        (ValueError, lambda: ops.linear_cross_entropy(hidden, weight, y, bias=torch.randn(7))),
        (ValueError, lambda: ops.linear_cross_entropy(hidden, weight, y, valid_vocab=9)),
        (ValueError, lambda: ops.linear_cross_entropy(hidden, weight, y, logit_scale=0.0)),
        (TypeError, lambda: ops.linear_cross_entropy(hidden, weight.bfloat16(), y)),
        (ValueError, lambda: TeacherHidden(hidden, trained)),
        (ValueError, lambda: ops.linear_distill_loss(hidden, head, y, None, objective)),
        (
            ValueError,
            lambda: ops.linear_distill_loss(
                hidden, head, y, TeacherLogits(torch.randn(2, 8)), objective
            ),
        ),
        (
            ValueError,
            lambda: ops.linear_distill_loss(
                hidden, head, y, TeacherLogits(torch.randn(3, 9)), objective
            ),
        ),
        (
            ValueError,
            lambda: bound(impl, 0).linear_distill_loss(hidden, head, y, teacher, objective),
        ),
    ]:
        with pytest.raises(error, match=r", got .*; "):
            call()
