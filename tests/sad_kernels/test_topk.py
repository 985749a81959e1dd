"""Distillation from a sparse teacher: K ids per row, and everything else as one outcome or none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sad_kernels import DistillOutput, Head, Objective, TeacherLogits, TeacherTopK, reference
from sad_kernels.objective import DIVERGENCES, Divergence, Tail
from support.oracle import (
    ALL,
    IMPLS,
    IN_FLOAT64,
    SLOW,
    assert_value,
    bound,
    dtypes_of,
    epsilon,
    judge,
)
from support.problems import plain
from torch import Tensor
from torch.autograd import gradcheck

INF = math.inf
LN2, LN3 = math.log(2), math.log(3)
BOTH_TAILS = [
    (name, tail)
    for name, info in DIVERGENCES.items()
    for tail in ("bucket", "zero")
    if not (info.needs_full_support and tail == "zero")  # infinite, and refused
]


def distilled(
    impl: str, s: Tensor, teacher: Any, divergence: Divergence = "forward_kl", T: float = 1.0
) -> DistillOutput:
    objective = Objective(divergence=divergence, beta=0.3, temperature=T)
    return bound(impl).distill_loss(s, torch.zeros(len(s), dtype=torch.int64), teacher, objective)


def top(t: Tensor, k: int, T: float = 1.0, tail: Any = "bucket") -> TeacherTopK:
    log_probs, ids = (t / T).log_softmax(-1).topk(k)
    return TeacherTopK(ids, log_probs, tail)


# --- By hand: q = [1/2, 1/4, 1/4] ----------------------------------------------------------------


def student() -> Tensor:
    return torch.tensor([[LN2, 0.0, 0.0]], requires_grad=True)


@pytest.mark.parametrize("impl", ALL)
def test_bucket_by_hand(impl: str) -> None:
    """Token 0 has p = 1/4, so the bucket 3/4 against 1/2; outside K: ``q (1 - p_r / q_r)``."""
    s = student()
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[0.25]]).log())
    out = distilled(impl, s, teacher)
    assert_value(out.loss, 0.75 * math.log(1.5) - 0.25 * LN2)
    (grad,) = torch.autograd.grad(out.loss, s)
    assert_value(grad, [[1 / 4, -1 / 8, -1 / 8]])
    assert float(out.agree) == 1.0


@pytest.mark.parametrize("impl", ALL)
def test_zero_tail_by_hand(impl: str) -> None:
    """The teacher renormalised over K = {0, 1} is [1/3, 2/3]; the student stays as it is."""
    s = student()
    teacher = TeacherTopK(torch.tensor([[0, 1]]), torch.tensor([[0.2, 0.4]]).log(), "zero")
    out = distilled(impl, s, teacher)
    assert_value(out.loss, 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(8 / 3))
    (grad,) = torch.autograd.grad(out.loss, s)
    assert_value(grad, [[1 / 2 - 1 / 3, 1 / 4 - 2 / 3, 1 / 4]])
    assert float(out.agree) == 0.0


@pytest.mark.parametrize("impl", ALL)
def test_zero_tail_is_biased_by_its_own_name(impl: str) -> None:
    """With equal distributions it is ``-log sum_K p``, not 0."""
    s = student()
    loss = distilled(impl, s, top(s.detach(), 1, tail="zero")).loss
    assert_value(loss, LN2)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_a_rest_that_underflows_beside_the_ids(impl: str, T: float) -> None:
    """``q_r = 2 e^-200``, which is 0 in fp32, and ``log q_r = ln 2 - 200``, which is not: the
    divergence is finite, and each of the two others gets half of the bucket's pull."""
    s = T * torch.tensor([[200.0, 0.0, 0.0]])
    s.requires_grad_()
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[0.75]]).log())
    out = distilled(impl, s, teacher, T=T)
    kd = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) + 200 - LN2)
    assert_value(out.kd, T**2 * kd, scale=T**2 * 200)
    (grad,) = torch.autograd.grad(out.loss, s)
    assert_value(grad, [[T / 4, -T / 8, -T / 8]], scale=T)


@pytest.mark.parametrize("impl", ALL)
def test_padding_is_no_outcome(impl: str) -> None:
    """-inf marks it, and its id may be anything, one that is in use included."""
    t = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    s = torch.randn(1, 5).requires_grad_()
    plain_teacher = top(t, 2)
    for junk in (-1, 5, 10**6, 0, 3):
        ids = torch.cat((plain_teacher.ids, torch.tensor([[junk]])), -1)
        log_probs = torch.cat((plain_teacher.log_probs, torch.tensor([[-INF]])), -1)
        for tail in ("bucket", "zero"):
            padded = distilled(impl, s, TeacherTopK(ids, log_probs, tail))
            bare = distilled(impl, s, TeacherTopK(ids[:, :2], log_probs[:, :2], tail))
            assert all(torch.equal(a, b) for a, b in zip(padded, bare, strict=True))
            (grad,), (bare_grad,) = (torch.autograd.grad(x.loss, s) for x in (padded, bare))
            assert torch.equal(grad, bare_grad)


# --- Everything else -----------------------------------------------------------------------------


@pytest.mark.few(100)
@pytest.mark.parametrize(
    ("dtype", "distribution", "impl"),
    [
        pytest.param(
            dtype,
            distribution,
            impl,
            id=f"{str(dtype).removeprefix('torch.')}-{distribution}-{impl}",
            marks=pytest.mark.slow if impl in SLOW and (i + j) % 2 else (),
        )
        for impl in IMPLS
        for i, dtype in enumerate(dtypes_of(impl))
        for j, distribution in enumerate(("randn5", "peaked", "zipf", "near"))
    ],
)
@pytest.mark.parametrize(("divergence", "tail"), BOTH_TAILS)
@pytest.mark.parametrize("op", ["distill_loss", "linear_distill_loss"])
def test_against_the_oracle(
    op: str, divergence: Divergence, tail: Tail, dtype: torch.dtype, distribution: str, impl: str
) -> None:
    problem = plain(
        op,
        dtype,
        N=3 if impl in SLOW else 8,
        teacher=tail,
        divergence=divergence,
        distribution=distribution,
        ignore="some",
        beta=0.1,
        z_loss=1e-3,
    )
    judge(problem, bound(impl))


@pytest.mark.few(14)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("divergence", "tail"), BOTH_TAILS)
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_student_that_is_sure(
    divergence: Divergence, tail: Tail, ce_weight: float, impl: str
) -> None:
    """Of the ids, of the rest, or of one id among many; the other shares underflow in fp32."""
    s, t, y = 3 * torch.randn(8, 97), 3 * torch.randn(8, 97), torch.randint(97, (8,))
    ids = t.topk(5).indices
    s[0:2].scatter_add_(1, ids[0:2], torch.full((2, 5), 150.0))
    s[2:4].scatter_add_(1, ids[2:4], torch.full((2, 5), -150.0))
    s[4:6].scatter_add_(1, ids[4:6, :1], torch.full((2, 1), 150.0))
    objective = Objective(ce_weight=ce_weight, z_loss=1e-3, divergence=divergence, beta=0.3)

    def outputs(ops: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        s = s.clone().requires_grad_()
        loss = ops.distill_loss(s, y, top(t, 5, tail=tail), objective).loss
        return loss.detach(), torch.autograd.grad(loss, s)[0]

    loss, grad = outputs(bound(impl), s)
    exact, exact_grad = outputs(reference, s.double())
    assert_value(loss, exact, scale=200.0)
    assert_value(grad, exact_grad, scale=200.0 / 8)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("T", [1.0, 2.0, 2.7])
def test_what_labels_teach_knows_nothing_of_the_ids(T: float, smoothing: float, impl: str) -> None:
    """Wherever they are: one of a program's columns or all of them; far above the rest or far
    below, where either share underflows, or near; on the label; on logits of -inf."""
    s, y = 3 * torch.randn(5, 160), torch.tensor([0, 64, 65, 66, 127])
    ids = torch.tensor([3, *range(64, 128)]).expand(5, -1)
    s[0, [3, 64]] = torch.tensor([10.0, 12.0])
    s[1, 64:128] += 150
    s[2, 64:128] -= 150
    s[3, 64] += 150
    if smoothing == 0:
        s[4, :127] = -INF
    objective = Objective(ce_weight=1, z_loss=1e-3, label_smoothing=smoothing, temperature=T)

    def outputs(ops: Any, s: Tensor, teacher: Any) -> DistillOutput:
        weights = replace(objective, kd_weight=float(teacher is not None))
        return ops.distill_loss(s, y, teacher, weights)

    teacher = TeacherTopK(ids, torch.full((5, 65), 1 / 130).log())
    ours = outputs(bound(impl), s, teacher)
    exact = outputs(reference, s.double(), None)
    for part, scale in {"ce": 5 * 150.0, "z": 5 * 150.0**2, "entropy": 5 * 10.0}.items():
        assert_value(getattr(ours, part), getattr(exact, part), scale=scale)
    assert float(ours.correct) == float(exact.correct)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_ids_are_a_dense_teacher(divergence: Divergence, impl: str) -> None:
    """With k = V there is no rest, whatever ``1 - sum p`` may round to."""
    s, t = torch.randn(6, 33).requires_grad_(), 3 * torch.randn(6, 33)
    dense = distilled("reference", s.double(), TeacherLogits(t.double()), divergence, T=2.0)
    (exact,) = torch.autograd.grad(dense.loss, s)
    tails = [tail for d, tail in BOTH_TAILS if d == divergence]
    for tail in tails:
        sparse = distilled(impl, s, top(t, 33, 2.0, tail), divergence, T=2.0)
        assert_value(sparse.loss, dense.loss.detach(), scale=4.0 * 10)
        (grad,) = torch.autograd.grad(sparse.loss, s)
        assert_value(grad, exact, scale=2.0 * 10 / 6)
        assert float(sparse.agree) == float(dense.agree)


@pytest.mark.few(8)
@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bucket_sees_at_most_the_full_divergence(divergence: Divergence, impl: str) -> None:
    """Merging outcomes loses information (data processing), and more so with fewer ids."""
    dtype = dtypes_of(impl)[0]
    s, t = torch.randn(8, 50, dtype=dtype), 2 * torch.randn(8, 50, dtype=dtype)
    full = distilled(impl, s, TeacherLogits(t), divergence).kd
    coarser = [distilled(impl, s, top(t, k), divergence).kd for k in (40, 20, 5, 1)]
    for more, less in zip([full, *coarser], coarser, strict=False):
        assert less <= more + 8 * epsilon(dtype)  # the band of the rule
    assert coarser[-1] < 0.9 * full


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bucket_is_zero_for_equal_distributions(divergence: Divergence, impl: str) -> None:
    s = 3 * torch.randn(8, 50, dtype=dtypes_of(impl)[0])
    out = distilled(impl, s, top(s, 7), divergence)
    assert_value(out.kd, 0.0, scale=8.0)


@pytest.mark.parametrize("impl", ALL)
def test_the_students_rest_does_not_cancel(impl: str) -> None:
    """q outside K is 1e-7: from ``1 - sum_K q`` in float32 it would be 0 or twice that."""
    s = torch.zeros(1, 64)
    s[0, 0] = math.log(63 * 1e7)
    s.requires_grad_()
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[0.5]]).log())
    out = distilled(impl, s, teacher)
    q = s.detach().double().softmax(-1)
    p = float(teacher.log_probs.double().exp())
    exact = p * math.log(p / q[0, 0]) + (1 - p) * math.log((1 - p) / q[0, 1:].sum())
    assert_value(out.loss, exact, scale=math.log(63e7))


@pytest.mark.parametrize("impl", ALL)
def test_the_teachers_rest_does_not_cancel(impl: str) -> None:
    """p outside K is 6e-6, which float32 knows to one part in a hundred only after ``1 - p``."""
    log_p = torch.tensor([[-6e-6]])
    dtype = torch.float64 if impl == "reference" else torch.float32
    teacher = TeacherTopK(torch.tensor([[0]]), log_p.to(dtype))
    loss = distilled(impl, torch.zeros(1, 8, dtype=dtype), teacher, "reverse_kl").loss
    rest = -math.expm1(float(log_p.double()))
    exact = 1 / 8 * math.log(1 / 8 / (1 - rest)) + 7 / 8 * math.log(7 / 8 / rest)
    # Even in float64 the reference forms 1 - p, which magnifies its rounding by 1 / rest.
    assert_value(loss, exact, scale=1 / rest if impl == "reference" else -math.log(rest))


@pytest.mark.few(6)
@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize(("divergence", "tail"), BOTH_TAILS)
def test_gradcheck(divergence: Divergence, tail: Tail, impl: str) -> None:
    s = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = top(2 * torch.randn(4, 7, dtype=torch.float64), 3, 2.0, tail)
    assert gradcheck(lambda x: distilled(impl, x, teacher, divergence, T=2.0).loss, (s,))
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    objective = Objective(ce_weight=0.5, divergence=divergence, beta=0.3, temperature=2.0)
    y = torch.tensor([0, -100, 6, 2])
    linear = bound(impl).linear_distill_loss
    assert gradcheck(lambda h, w: linear(h, Head(w), y, teacher, objective).loss, (hidden, weight))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("foreign", [-1, 50, 2**31 - 1])
@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_a_foreign_id_poisons_its_own_row(foreign: int, tail: Tail, impl: str) -> None:
    s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
    teacher = top(t, 3, tail=tail)
    clean = distilled(impl, s, teacher)
    ids = teacher.ids.clone()
    ids[2, 1] = foreign
    poisoned = distilled(impl, s, TeacherTopK(ids, teacher.log_probs, tail))
    assert poisoned.loss.isnan() and poisoned.kd.isnan()
    (grad,), (clean_grad,) = (torch.autograd.grad(x.loss, s) for x in (poisoned, clean))
    others = torch.arange(4) != 2
    assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("V", [2, 5, 33, 65])
def test_a_foreign_id_leaves_what_labels_teach_alone(V: int, impl: str) -> None:
    """It may lie in a piece that the vocabulary cuts short, and is no column to miss there."""
    s, y = torch.randn(3, V), torch.tensor([0, 1, V - 1])
    ids = torch.tensor([[0, V], [1, V + 3], [0, V]])
    teacher = TeacherTopK(ids, torch.tensor([0.5, 0.2]).log().expand(3, -1))
    objective = Objective(ce_weight=1, kd_weight=0, label_smoothing=0.1)
    ours = bound(impl).distill_loss(s, y, teacher, objective)
    exact = reference.distill_loss(s.double(), y, None, objective)
    assert_value(ours.loss, exact.loss, scale=10.0)
    assert_value(ours.ce, exact.ce, scale=30.0)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_a_log_probability_that_is_no_number_poisons_its_own_row(tail: Tail, impl: str) -> None:
    s, teacher = torch.randn(4, 50, requires_grad=True), top(torch.randn(4, 50), 3, tail=tail)
    log_probs = teacher.log_probs.clone()
    log_probs[2, 1] = math.nan
    poisoned = distilled(impl, s, TeacherTopK(teacher.ids, log_probs, tail))
    assert poisoned.loss.isnan() and poisoned.kd.isnan()
    others = torch.arange(4) != 2
    assert (
        distilled(impl, s[others], TeacherTopK(teacher.ids[others], log_probs[others], tail)).kd > 0
    )


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("tail", ["bucket", "zero"])
@pytest.mark.parametrize("places", [(0, 1), (0, 3), (2, 3)])
def test_a_repeated_id_poisons_its_own_row(places: tuple[int, int], tail: Tail, impl: str) -> None:
    """Its mass would count twice. Padding may repeat any id, and another padding's."""
    s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
    teacher = top(t, 6, tail=tail)
    log_probs, ids = teacher.log_probs.clone(), teacher.ids.clone()
    log_probs[:, 4:], ids[:, 4:] = -INF, ids[:, :1]
    clean = distilled(impl, s, TeacherTopK(ids, log_probs, tail))
    assert clean.loss.isfinite()
    repeated = ids.clone()
    repeated[2, places[0]] = ids[2, places[1]]
    poisoned = distilled(impl, s, TeacherTopK(repeated, log_probs, tail))
    assert poisoned.loss.isnan() and poisoned.kd.isnan()
    (grad,), (clean_grad,) = (torch.autograd.grad(x.loss, s) for x in (poisoned, clean))
    others = torch.arange(4) != 2
    assert torch.equal(grad[others], clean_grad[others])
    assert distilled(impl, s[others], TeacherTopK(repeated[others], log_probs[others], tail)).kd > 0


@pytest.mark.parametrize("impl", ALL)
def test_the_reverse_kl_to_a_zero_tail_is_refused(impl: str) -> None:
    s = torch.randn(2, 5)
    with pytest.raises(ValueError, match="reverse_kl"):
        distilled(impl, s, top(s, 2, tail="zero"), "reverse_kl")
