# Long because it holds the specification against mathematics, from gradients to bit patterns.
"""The specification itself: its gradients, its formulas, its limits, and its treatment of nonsense.

Values computed by hand are with the tests of each function, where the reference has to meet them
like any implementation. Here the reference alone is held against mathematics. What all of these
tests notice of faults in it is shown by ``tests/mutations/reference.py``.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any, get_args

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
from sad_kernels.objective import DIVERGENCES, Divergence, Tail
from sad_kernels.reference import Reduction
from support.oracle import assert_value, assert_within
from support.problems import PLAIN, plain
from torch import Tensor
from torch.autograd import gradcheck

NAN, INF = math.nan, math.inf


def rows(N: int = 4, V: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits in float64 and labels, one of them ignored."""
    g = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(N, V, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.arange(N) % V
    y[1:2] = -100
    return s.requires_grad_(), t, y


# --- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_cross_entropy(reduction: Reduction) -> None:
    s, _, y = rows()
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "valid_vocab": 6}
    assert gradcheck(lambda x: reference.cross_entropy(x, y, reduction=reduction, **options), (s,))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale_t2", [True, False])
def test_gradcheck_kl_div(divergence: Divergence, scale_t2: bool) -> None:
    s, t, y = rows()
    options = {"temperature": 2.0, "divergence": divergence, "beta": 0.3, "scale_t2": scale_t2}
    assert gradcheck(lambda x: reference.kl_div(x, t, labels=y, **options), (s,))


@pytest.mark.parametrize(
    ("divergence", "tail"),
    [(d, "bucket") for d in DIVERGENCES]
    + [(d, "zero") for d, info in DIVERGENCES.items() if not info.needs_full_support],
)
def test_gradcheck_top_k(divergence: Divergence, tail: Tail) -> None:
    s, t, y = rows()
    log_probs, ids = (t / 2).log_softmax(-1).topk(3)
    log_probs[0, -1] = -INF
    objective = Objective(
        ce_weight=0.3, kd_weight=0.7, z_loss=0.01, temperature=2.0, divergence=divergence
    )
    teacher = TeacherTopK(ids, log_probs, tail)
    assert gradcheck(lambda x: reference.distill_loss(x, y, teacher, objective).loss, (s,))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_linear(divergence: Divergence) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias, th, tw = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in [(4, 3), (6, 3), (6,), (4, 2), (6, 2)]
    )
    y = torch.tensor([0, -100, 4, 2])
    objective = Objective(
        ce_weight=0.3, label_smoothing=0.1, z_loss=0.01, temperature=0.5, divergence=divergence
    )
    teacher = TeacherHidden(th, Head(tw, valid_vocab=5))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, logit_scale=0.7, softcap=3.0, valid_vocab=5)
        return reference.linear_distill_loss(hidden, head, y, teacher, objective).loss

    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert gradcheck(loss, leaves)
    assert gradcheck(
        lambda h, w, b: reference.linear_cross_entropy(
            h, w, y, bias=b, logit_scale=0.7, softcap=3.0, z_loss=0.01, valid_vocab=5
        ),
        leaves,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale_t2", [True, False])
def test_divergence_gradients_are_the_closed_forms(divergence: Divergence, scale_t2: bool) -> None:
    """``dKD/ds_v`` as the kernels compute it, from the literature's formulas."""
    T, beta = 2.5, 0.3
    s, t, _ = rows()
    loss = reference.kl_div(
        s,
        t,
        temperature=T,
        divergence=divergence,
        beta=beta,
        scale_t2=scale_t2,
        reduction="sum",
    )
    (grad,) = torch.autograd.grad(loss, s)
    q, p = (s.detach() / T).softmax(-1), (t / T).softmax(-1)

    def total(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    match divergence:
        case "forward_kl":
            expected = q - p
        case "reverse_kl":
            expected = q * ((q / p).log() - total(q * (q / p).log()))
        case "jsd":
            m = beta * p + (1 - beta) * q
            expected = (1 - beta) * q * ((q / m).log() - total(q * (q / m).log()))
        case "skew_forward_kl":
            m = beta * p + (1 - beta) * q
            w = (1 - beta) * q * p / m
            expected = q * total(w) - w
        case "skew_reverse_kl":
            m = beta * q + (1 - beta) * p
            u = (q / m).log() - beta * q / m
            expected = q * (u - total(q * u))
        case "jeffreys":
            reverse = q * ((q / p).log() - total(q * (q / p).log()))
            expected = beta * (q - p) + (1 - beta) * reverse
        case "tvd":
            u = (q - p).sign() / 2
            expected = q * (u - total(q * u))
        case _:
            raise ValueError(divergence)
    expected = T * expected if scale_t2 else expected / T
    assert_within(grad, expected, expected, scale=T)


def test_cross_entropy_gradient_is_the_closed_form() -> None:
    s, _, _ = rows()
    y, eps, z, V = torch.tensor([0, 1, 2, 3]), 0.1, 0.01, 7
    loss = reference.cross_entropy(s, y, label_smoothing=eps, z_loss=z, reduction="sum")
    (grad,) = torch.autograd.grad(loss, s)
    q, lse = s.detach().softmax(-1), s.detach().logsumexp(-1, keepdim=True)
    hard = torch.nn.functional.one_hot(y, V).double()
    expected = (1 + 2 * z * lse) * q - eps / V - (1 - eps) * hard
    assert_within(grad, expected, expected, scale=1.0)


# --- Agreement with torch and among the definitions ----------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(reduction: Reduction, label_smoothing: float) -> None:
    s, _, y = rows(8, 33)
    ours = reference.cross_entropy(s, y, label_smoothing=label_smoothing, reduction=reduction)
    theirs = torch.nn.functional.cross_entropy(
        s, y, label_smoothing=label_smoothing, reduction=reduction
    )
    assert_value(ours, theirs.detach(), scale=8.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_weighted_cross_entropy_is_torchs(
    reduction: Reduction, label_smoothing: float, kind: str
) -> None:
    """Class weights, one of them 0, with ignored labels or labels that are probabilities."""
    s, t, y = rows(8, 33)
    weight = torch.linspace(0, 2, 33, dtype=torch.float64)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
    options |= {"reduction": reduction}
    labels = y if kind == "classes" else t.softmax(-1)
    ours = reference.cross_entropy(s, labels, **options)
    theirs = torch.nn.functional.cross_entropy(s, labels, **options)
    assert_value(ours, theirs.detach(), scale=16.0)
    ones = torch.ones_like(theirs)
    (grad,), (their_grad,) = (torch.autograd.grad(x, s, ones) for x in (ours, theirs))
    assert_value(grad, their_grad, scale=8.0)


def test_forward_kl_is_torchs() -> None:
    s, t, _ = rows(8, 33)
    theirs = torch.nn.functional.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert_value(reference.kl_div(s, t), theirs.detach(), scale=10.0)


def test_divergences_approach_the_kls_at_the_ends() -> None:
    """First order in beta: halving it halves the distance to the limit."""
    s, t, _ = rows()

    def value(divergence: Divergence, beta: float = 0.5) -> Tensor:
        return reference.kl_div(s, t, divergence=divergence, beta=beta, reduction="sum").detach()

    forward, reverse = value("forward_kl"), value("reverse_kl")
    for limit, approach in {
        "jsd to forward": (forward, lambda b: value("jsd", b) / b),
        "jsd to reverse": (reverse, lambda b: value("jsd", 1 - b) / b),
        "skew to forward": (forward, lambda b: value("skew_forward_kl", b)),
        "skew to reverse": (reverse, lambda b: value("skew_reverse_kl", b)),
    }.values():
        distances = [float((approach(b) - limit).abs()) for b in (2e-6, 1e-6)]
        assert distances[1] < 0.6 * distances[0] < 0.01


def test_jsd_is_made_of_both_skews() -> None:
    """``jsd(b) = b * skew_forward(b) + (1 - b) * skew_reverse(1 - b)``."""
    s, t, _ = rows()

    def value(divergence: Divergence, beta: float) -> Tensor:
        return reference.kl_div(s, t, divergence=divergence, beta=beta, reduction="none").detach()

    for b in (0.1, 0.5, 0.9):
        parts = b * value("skew_forward_kl", b) + (1 - b) * value("skew_reverse_kl", 1 - b)
        assert_value(value("jsd", b), parts, scale=10.0)


def test_high_temperature_compares_centred_logits() -> None:
    """``T^2 KL -> sum_v (d - mean d)^2 / (2 V)`` with ``d = s - t``."""
    s, t, _ = rows()
    d = (s - t).detach()
    limit = (d - d.mean(-1, keepdim=True)).square().mean(-1) / 2
    at = [
        reference.kl_div(s, t, temperature=T, reduction="none").detach() - limit for T in (1e3, 2e3)
    ]
    assert (at[1].abs() < 0.6 * at[0].abs()).all() and (at[0].abs() < 0.01 * limit).all()


def test_linear_functions_are_compositions() -> None:
    o = PLAIN | {"softcap": 20.0, "logit_scale": 0.25}
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 24, generator=g, dtype=torch.float64)
    head = Head(
        torch.randn(97, 24, generator=g, dtype=torch.float64),
        torch.randn(97, generator=g, dtype=torch.float64),
        o["logit_scale"],
        o["softcap"],
        valid_vocab=90,
    )
    y, teacher = torch.arange(8), TeacherLogits(torch.randn(8, 90, generator=g))
    logits = head(hidden)
    objective = Objective(ce_weight=0.5, kd_weight=0.5, temperature=2.0)
    composed = reference.distill_loss(logits, y, teacher, objective)
    direct = reference.linear_distill_loss(hidden, head, y, teacher, objective)
    for a, b in zip(direct, composed, strict=True):
        assert_value(a, b, scale=100.0)
    ce = reference.linear_cross_entropy(
        hidden,
        head.weight,
        y,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=90,
    )
    assert_value(ce, reference.cross_entropy(logits, y), scale=10.0)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    s, t, y = rows()
    objective = Objective(ce_weight=0.4, kd_weight=0.6, label_smoothing=0.1, z_loss=0.02)
    for num_items in (None, 5, torch.tensor(5)):
        out = reference.distill_loss(s, y, TeacherLogits(t), objective, num_items=num_items)
        count = out.num_tokens if num_items is None else num_items
        assert_value(out.loss * count, 0.4 * out.ce + 0.6 * out.kd + 0.02 * out.z, scale=10.0)
    assert float(out.num_tokens) == 3


def test_token_weights_multiply_each_row() -> None:
    """``reduction="none"`` is the row's own loss times its weights, and ``sum`` their sum."""
    s, t, y = rows()
    objective = Objective(ce_weight=0.4, kd_weight=0.6, z_loss=0.02, temperature=2.0)
    teacher = TeacherLogits(t)
    on_ce = torch.tensor([0.5, 3.0, 0.0, 2.0], dtype=torch.float64)
    on_kd = torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    weights: dict[str, Any] = {"token_weights": on_ce, "kd_token_weights": on_kd}
    out = reference.distill_loss(s, y, teacher, objective, reduction="none", **weights)
    for row in range(4):
        only = slice(row, row + 1)
        one = reference.distill_loss(s[only], y[only], TeacherLogits(t[only]), objective)
        expected = on_ce[row] * (0.4 * one.ce + 0.02 * one.z) + on_kd[row] * 0.6 * one.kd
        assert_value(out.loss[row], expected, scale=10.0)
    summed = reference.distill_loss(s, y, teacher, objective, reduction="sum", **weights)
    assert_value(summed.loss, out.loss.sum().detach(), scale=10.0)
    assert_value(summed.loss, 0.4 * out.ce + 0.6 * out.kd + 0.02 * out.z, scale=10.0)
    mean = reference.distill_loss(s, y, teacher, objective, **weights)
    assert_value(mean.loss * 3, summed.loss.detach(), scale=10.0)  # weights do not change a count
    both = reference.distill_loss(s, y, teacher, objective, token_weights=on_kd)
    same = reference.distill_loss(
        s, y, teacher, objective, token_weights=on_kd, kd_token_weights=on_kd
    )
    assert torch.equal(both.loss, same.loss)


def test_a_kd_weight_of_zero_reads_nothing_of_the_teachers_row() -> None:
    s, t, y = rows()
    objective = Objective(ce_weight=1.0, temperature=2.0)
    weights: dict[str, Any] = {"kd_token_weights": torch.tensor([1.0, 1.0, 0.0, 1.0])}
    kept = reference.distill_loss(
        s[[0, 3]], y[[0, 3]], TeacherLogits(t[[0, 3]]), Objective(temperature=2.0)
    )
    for unread in (torch.full((7,), NAN, dtype=torch.float64), s.detach()[2]):  # or agreement
        t[2] = unread
        out = reference.distill_loss(s, y, TeacherLogits(t), objective, **weights)
        assert torch.equal(out.kd, kept.kd) and torch.equal(out.agree, kept.agree)
        assert out.loss.isfinite() and torch.autograd.grad(out.loss, s)[0].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_row_has_one_of_two_divergences(divergence: Divergence) -> None:
    s, t, y = rows()
    mask = torch.tensor([True, False, False, True])
    both = Objective(divergence="jsd", beta=0.2, other_divergence=divergence, other_beta=0.7)
    alone = [Objective(divergence="jsd", beta=0.2), Objective(divergence=divergence, beta=0.7)]

    def losses(objective: Objective, **options: Any) -> Tensor:
        teacher = TeacherLogits(t)
        return reference.distill_loss(s, y, teacher, objective, reduction="none", **options).loss

    expected = torch.where(mask, losses(alone[1]), losses(alone[0]))
    ours = losses(both, other_rows=mask)
    assert torch.equal(ours, expected)
    ones = torch.ones_like(ours)
    grads = (torch.autograd.grad(x, s, ones)[0] for x in (ours, expected))
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match="together with"):
        losses(both)
    with pytest.raises(ValueError, match="together with"):
        losses(alone[0], other_rows=mask)


def test_without_labels_every_row_counts() -> None:
    s, t, _ = rows()
    objective = Objective(temperature=2.0, z_loss=0.1, label_smoothing=0.1)
    out = reference.distill_loss(s, None, TeacherLogits(t), objective)
    labelled = reference.distill_loss(s, torch.arange(4), TeacherLogits(t), objective)
    assert torch.equal(out.loss, labelled.loss) and torch.equal(out.entropy, labelled.entropy)
    assert float(out.ce) == float(out.correct) == 0 and float(out.num_tokens) == 4
    assert torch.equal(out.lse, s.detach().logsumexp(-1))
    with pytest.raises(ValueError, match="ce_weight must be 0 without labels"):
        reference.distill_loss(s, None, TeacherLogits(t), Objective(ce_weight=0.1))


def test_both_sides_have_a_scale_and_a_softcap() -> None:
    s, t, _ = rows()
    options: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.5}
    capped_s, capped_t = 3 * torch.tanh(s / 6), 4 * torch.tanh(2 * t / 4)
    ours = reference.kl_div(s, t, teacher_softcap=4.0, teacher_logit_scale=2.0, **options)
    assert_value(ours, reference.kl_div(capped_s, capped_t).detach(), scale=10.0)
    teacher = TeacherLogits(t, logit_scale=2.0, softcap=4.0)
    distilled = reference.distill_loss(s, None, teacher, Objective(), **options)
    assert torch.equal(distilled.loss, ours)
    y = torch.arange(4)
    ce = reference.cross_entropy(s, y, **options)
    assert_value(ce, reference.cross_entropy(capped_s, y).detach(), scale=10.0)


def test_num_items_divide_a_mean_and_nothing_else() -> None:
    s, t, y = rows()
    for of in (
        lambda **how: reference.cross_entropy(s, y, **how),
        lambda **how: reference.kl_div(s, t, labels=y, **how),
        lambda **how: reference.distill_loss(s, y, TeacherLogits(t), Objective(), **how).loss,
    ):
        assert_value(of(num_items=7) * 7, of(reduction="sum").detach(), scale=10.0)
        for reduction in ("sum", "none"):
            with pytest.raises(ValueError, match="num_items must be None"):
                of(num_items=7, reduction=reduction)


def test_a_teachers_parameters_get_no_gradient() -> None:
    s, _, y = rows()
    weight = torch.nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    teacher = TeacherHidden(torch.randn(4, 3, dtype=torch.float64), Head(weight))
    reference.distill_loss(s, y, teacher, Objective(divergence="jsd")).loss.backward()
    assert weight.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_top_k_row_without_any_token_is_zero(divergence: Divergence) -> None:
    if DIVERGENCES[divergence].needs_full_support:
        pytest.skip("refused for a teacher without a tail")
    s, t, y = rows()
    log_probs, ids = t.log_softmax(-1).topk(3)
    log_probs[2] = -INF
    ids[2] = torch.tensor([5, 5, -3])
    loss = reference.distill_loss(
        s,
        y,
        TeacherTopK(ids, log_probs, "zero"),
        Objective(divergence=divergence),
        reduction="none",
    ).loss
    (grad,) = torch.autograd.grad(loss, s, torch.ones_like(loss))
    assert float(loss.detach()[2]) == 0 and not grad[2].any()
    assert (loss[[0, 3]] > 0).all() and grad.isfinite().all()


def test_the_sampled_teacher_is_unbiased() -> None:
    """Counts of n draws, merged, as ``log(count / n)`` with ``tail="zero"``: mean gradient q - p.

    All 8 samples of n = 3 draws from two outcomes are enumerated, so nothing is random here.
    """
    s = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64)
    expected_gradient = torch.zeros(1, 3, dtype=torch.float64)
    for draws in ((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)):
        counts = torch.tensor([[draws.count(0), draws.count(1)]], dtype=torch.float64)
        teacher = TeacherTopK(torch.tensor([[0, 1]]), (counts / 3).log(), "zero")
        loss = reference.distill_loss(s, torch.tensor([0]), teacher, Objective()).loss
        probability = p[list(draws)].prod()
        expected_gradient += probability * torch.autograd.grad(loss, s)[0]
    assert_value(expected_gradient, s.detach().softmax(-1) - p, scale=1.0)


# --- What is not a number, and what is not there -------------------------------------------------


@pytest.mark.parametrize("nonsense", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(nonsense: float) -> None:
    s, t, y = rows()
    keep = y != -100
    objective = Objective(ce_weight=1.0, label_smoothing=0.1, z_loss=0.1, temperature=2.0)
    dirty_s = s.detach().clone()
    dirty_s[1] = nonsense
    dirty_t = t.clone()
    dirty_t[1] = nonsense
    dirty_s.requires_grad_()
    out = reference.distill_loss(dirty_s, y, TeacherLogits(dirty_t), objective)
    clean = reference.distill_loss(s[keep], y[keep], TeacherLogits(t[keep]), objective)
    assert all(torch.equal(a, b) for a, b in zip(out[:-1], clean[:-1], strict=True))
    assert torch.equal(out.lse[keep], clean.lse) and float(out.lse[1]) == 0
    (grad,) = torch.autograd.grad(out.loss, dirty_s)
    (clean_grad,) = torch.autograd.grad(clean.loss, s)
    assert torch.equal(grad, clean_grad)
    assert not grad[1].any()


def test_no_rows_give_zero_and_zero_gradients() -> None:
    s, t, _ = rows()
    y = torch.full((4,), -100)
    for loss in (
        reference.cross_entropy(s, y),
        reference.kl_div(s, t, labels=y),
        reference.distill_loss(s, y, TeacherLogits(t), Objective(ce_weight=1.0)).loss,
        reference.distill_loss(s, y, TeacherLogits(t), Objective(), num_items=0).loss,
    ):
        assert torch.equal(loss, torch.zeros_like(loss))
        (grad,) = torch.autograd.grad(loss, s)
        assert torch.equal(grad, torch.zeros_like(grad))


def test_weights_of_zero_switch_everything_off() -> None:
    s, t, y = rows()
    s = s.detach().index_fill(1, torch.tensor([0]), -INF).requires_grad_()  # CE of label 0: inf
    off = Objective(ce_weight=0.0, kd_weight=0.0)
    out = reference.distill_loss(s, y, TeacherLogits(t), off)
    assert out.loss == 0.0 and out.ce == INF and out.kd == INF
    (grad,) = torch.autograd.grad(out.loss, s)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_impossible_tokens_on_both_sides_change_nothing(divergence: Divergence) -> None:
    """A column of -inf on both sides is no column: 0 * log 0 = 0, in value and gradient."""
    s, t, _ = rows()
    wide_s, wide_t = (
        torch.cat((x.detach(), torch.full((4, 2), -INF, dtype=x.dtype)), -1) for x in (s, t)
    )
    wide_s.requires_grad_()
    options = {"divergence": divergence, "temperature": 2.0, "beta": 0.3}
    wide, narrow = reference.kl_div(wide_s, wide_t, **options), reference.kl_div(s, t, **options)
    assert_value(wide, narrow.detach(), scale=10.0)
    (wide_grad,), (grad,) = torch.autograd.grad(wide, wide_s), torch.autograd.grad(narrow, s)
    assert_value(wide_grad[:, :7], grad, scale=10.0)
    assert not wide_grad[:, 7:].any()


def test_one_sided_impossible_tokens() -> None:
    """Infinite where the left distribution has mass and the right none, finite otherwise."""
    s, t, _ = rows(1)
    hole = torch.tensor([[True] + 6 * [False]])
    s_hole, t_hole = s.detach().masked_fill(hole, -INF), t.masked_fill(hole, -INF)
    infinite = {
        (name, side): bool(reference.kl_div(*pair, divergence=name) == INF)
        for name in get_args(Divergence)
        for side, pair in {"student": (s_hole, t), "teacher": (s.detach(), t_hole)}.items()
    }
    assert {key for key, value in infinite.items() if value} == {
        ("forward_kl", "student"),
        ("reverse_kl", "teacher"),
        ("jeffreys", "student"),
        ("jeffreys", "teacher"),
    }


@pytest.mark.parametrize("label", [7, -1, 2**40, 6])
def test_a_foreign_label_poisons_its_own_row(label: int) -> None:
    s, t, y = rows()
    y[2] = label
    valid = 6
    losses = [
        reference.cross_entropy(s, y, valid_vocab=valid, reduction="none"),
        reference.kl_div(s, t, labels=y, valid_vocab=valid, reduction="none"),
    ]
    for loss in losses:
        assert loss.isnan().tolist() == [False, False, True, False]
    out = reference.distill_loss(s, y, TeacherLogits(t, valid), Objective())
    assert out.loss.isnan()


@pytest.mark.parametrize("nonsense", [NAN, INF, -INF])
def test_nonsense_logits_poison_their_own_row(nonsense: float) -> None:
    s, t, _ = rows()
    y = torch.arange(4)
    bad = s.detach().clone()
    bad[2] = nonsense
    assert reference.cross_entropy(bad, y, reduction="none").isnan().tolist() == [
        row == 2 for row in range(4)
    ]
    for pair in ((bad, t), (t, bad)):
        assert reference.kl_div(*pair, reduction="none").isnan().tolist() == [
            row == 2 for row in range(4)
        ]


@pytest.mark.parametrize("valid", [(None, None), (5, 6), (None, 9), (9, None)])
def test_different_vocabularies_are_refused(valid: tuple[int | None, int | None]) -> None:
    hidden, weight = torch.randn(2, 3), torch.randn(8, 3)
    teacher_logits = torch.randn(2, 10)
    if valid == (9, None):
        weight, teacher_logits = torch.randn(10, 3), torch.randn(2, 8)
    head, teacher = Head(weight, valid_vocab=valid[0]), TeacherLogits(teacher_logits, valid[1])
    with pytest.raises(ValueError, match="one vocabulary"):
        reference.linear_distill_loss(hidden, head, torch.tensor([0, 1]), teacher, Objective())


def test_one_valid_vocab_cuts_both_sides() -> None:
    s, t, y = rows(V=10)
    both = reference.distill_loss(s[:, :7], y, TeacherLogits(t[:, :7]), Objective())
    cut = reference.distill_loss(s, y, TeacherLogits(t[:, :8], valid_vocab=7), Objective())
    assert all(torch.equal(a, b) for a, b in zip(both, cut, strict=True))


def test_no_teacher_is_for_no_kd() -> None:
    s, t, y = rows()
    objective = Objective(ce_weight=1.0, kd_weight=0.0)
    out = reference.distill_loss(s, y, None, objective)
    full = reference.distill_loss(s, y, TeacherLogits(t), objective)
    assert torch.equal(out.loss, full.loss) and float(out.kd) == float(out.agree) == 0
    with pytest.raises(ValueError, match="kd_weight must be 0"):
        reference.distill_loss(s, y, None, Objective())


# --- Exponential moving average ------------------------------------------------------------------


def test_ema_update_by_hand() -> None:
    shadow, param = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    for decay in (0.75, torch.tensor(0.75, dtype=torch.float64)):
        s = shadow.clone()
        reference.ema_update_([s], [param], decay)
        assert s.tolist() == [1.5, -1.0]


def test_ema_update_at_its_ends() -> None:
    """A decay of 1 keeps every bit, of 0 copies, whatever the other side holds."""
    odd = torch.tensor([-0.0, NAN, INF, 1e-40])
    kept, copied = torch.tensor([-0.0, 1.0, 2.0, 3.0]), torch.full((4,), NAN)
    before = kept.view(torch.int32).clone()
    reference.ema_update_([kept], [odd], 1.0)
    reference.ema_update_([copied], [odd], 0.0)
    assert torch.equal(kept.view(torch.int32), before)
    assert torch.equal(copied.view(torch.int32), odd.view(torch.int32))


def test_ema_swap_by_hand() -> None:
    """Shadows between two bfloat16 numbers, at the tie, and beyond the largest one."""
    up, tie = 1 + 3 * 2**-9, 1 + 2**-8  # 3/4 and 1/2 of the way from 1 to its successor
    shadow = torch.tensor([1.25, up, -up, tie, -tie, 3.4e38, INF, -0.0])
    param = torch.arange(2, 10).bfloat16()
    before = shadow.clone(), param.clone()
    reference.ema_swap_([shadow], [param])
    next_to_1 = 1 + 2**-7
    expected = [1.25, next_to_1, -next_to_1, next_to_1, -next_to_1, INF, INF, -0.0]
    assert param.tolist() == expected and str(float(param[-1])) == "-0.0"
    assert torch.equal(shadow.bfloat16()[[0, 6, 7]], before[1][[0, 6, 7]])  # no rounding, exact
    assert ((shadow - before[1]).abs() <= before[1] * 2**-7).all()
    reference.ema_swap_([shadow], [param])
    assert torch.equal(shadow, before[0]) and torch.equal(param, before[1])


def test_ema_swap_is_its_own_inverse_for_all_bits() -> None:
    """Every upper half of a shadow against every kind of lower half and of parameter, NaN too."""
    upper = torch.arange(-(2**15), 2**15)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        shadow = (upper * 2**16 + low).to(torch.int32).view(torch.float32).clone()
        param = upper[torch.randperm(2**16)].to(torch.int16).view(torch.bfloat16).clone()
        before = shadow.view(torch.int32).clone(), param.view(torch.int16).clone()
        reference.ema_swap_([shadow], [param])
        nans = torch.isnan(before[0].view(torch.float32)) & (before[0] & 0x7FFFFF > 0x10000)
        assert param[nans].isnan().all()  # a diverged average never passes for a number
        reference.ema_swap_([shadow], [param])
        assert torch.equal(shadow.view(torch.int32), before[0])
        assert torch.equal(param.view(torch.int16), before[1])


def test_ema_swap_refuses_what_it_could_not_undo() -> None:
    with pytest.raises(TypeError, match=r"float16 over .*; "):
        reference.ema_swap_([torch.zeros(2, dtype=torch.float16)], [torch.zeros(2)])
    same = torch.tensor([1.0]), torch.tensor([2.0])
    reference.ema_swap_([same[0]], [same[1]])
    assert [float(x) for x in same] == [2.0, 1.0]


# --- The oracle's independence -------------------------------------------------------------------


def test_the_reference_shares_no_code_with_what_it_judges() -> None:
    """Only declarations are common ground: ``objective``, ``Outcomes``, and the names of the
    divergences.

    A reference that shares a kernel's rounding agrees with it for months:
    https://github.com/linkedin/Liger-Kernel/issues/1432
    """
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if str(name).startswith("sad")} == {
        "sad_kernels._divergence_table",
        "sad_kernels.objective",
        "sad_kernels.outcomes",
    }


def test_low_precision_inputs_are_computed_in_float32() -> None:
    problem = plain("cross_entropy", torch.bfloat16, reduction="none")
    logits = problem.leaves["logits"]
    y = torch.arange(8)
    narrow = reference.cross_entropy(logits, y, reduction="none")
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, reference.cross_entropy(logits.float(), y, reduction="none"))
