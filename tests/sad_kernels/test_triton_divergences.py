"""Divergences in the kernels: digits near agreement, edges of a mixture, codes that are unknown.

Everything else about them is judged in ``test_kd.py``, ``test_topk.py`` and ``test_linear.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    _divergence_table,
    distill_loss,
    kl_div,
    linear_distill_loss,
    reference,
)
from sad_kernels._triton import tile
from sad_kernels.objective import Divergence
from support.oracle import assert_value, assert_within, bound
from torch import Tensor

BETA = 0.9
EVERY = tuple(_divergence_table.DIVERGENCES)
MIXTURES = tuple(
    name
    for name, info in _divergence_table.DIVERGENCES.items()
    if info.reads_beta and info.forward_passes == 2
)


# --- Near agreement ------------------------------------------------------------------------------


def term(divergence: Divergence, q: float, p: float) -> float:
    """``q F(p/q)``, in float64; both are far from rounding."""
    a = 1 - BETA if divergence == "skew_reverse_kl" else BETA
    m = a * p + (1 - a) * q
    return {
        "forward_kl": p * math.log(p / q),
        "reverse_kl": q * math.log(q / p),
        "jsd": BETA * p * math.log(p / m) + (1 - BETA) * q * math.log(q / m),
        "skew_forward_kl": p * math.log(p / m),
        "skew_reverse_kl": q * math.log(q / m),
        "jeffreys": BETA * p * math.log(p / q) + (1 - BETA) * q * math.log(q / p),
        "tvd": abs(p - q) / 2,
    }[divergence]


def slope(divergence: Divergence, q: float, p: float) -> float:
    """The term's derivative by q, less the constants that cancel."""
    a = 1 - BETA if divergence == "skew_reverse_kl" else BETA
    m = a * p + (1 - a) * q
    return {
        "forward_kl": -p / q,
        "reverse_kl": math.log(q / p),
        "jsd": (1 - BETA) * math.log(q / m),
        "skew_forward_kl": -(1 - BETA) * p / m,
        "skew_reverse_kl": math.log(q / m) - BETA * q / m,
        "jeffreys": -BETA * p / q + (1 - BETA) * math.log(q / p),
        "tvd": math.copysign(0.5, q - p),
    }[divergence]


@pytest.mark.parametrize("teacher", ["dense", "top-k"])
@pytest.mark.parametrize("divergence", EVERY)
def test_a_sure_student_learns_from_what_is_left(divergence: Divergence, teacher: str) -> None:
    """Of two tokens the student gives one e^-9, its teacher e^-8: divergence and gradient are as
    small as this, and have as many digits. Of differences of numbers near 1 few would be left.
    """
    s, t = (torch.tensor([[0.0, x]]) for x in (-9.0, -8.0))
    q, p = (1 / (1 + math.exp(x)) for x in (9.0, 8.0))
    given: Any = TeacherLogits(t)
    if teacher == "top-k":  # the other token is everything else
        given = TeacherTopK(torch.tensor([[1]]), torch.tensor([[p]], dtype=torch.float64).log())
    objective = Objective(divergence=divergence, beta=BETA)
    s.requires_grad_()
    out = distill_loss(s, torch.tensor([0]), given, objective, impl="triton")
    (grad,) = torch.autograd.grad(out.loss, s)
    left = q * (1 - q) * (slope(divergence, q, p) - slope(divergence, 1 - q, 1 - p))
    assert_value(grad, [[-left, left]], scale=p)
    if teacher == "dense":
        exact = term(divergence, 1 - q, 1 - p) + term(divergence, q, p)
        assert_value(out.loss, exact, scale=p)


@pytest.mark.few(4)
@pytest.mark.parametrize("T", [1.0, 2.7])
@pytest.mark.parametrize("divergence", EVERY)
def test_a_student_that_agrees_learns_nothing(divergence: Divergence, T: float) -> None:
    """Exactly: not a bit of a rounded normaliser is left."""
    for dtype in (torch.float32, torch.bfloat16):
        s = (5 * torch.randn(3, 150)).to(dtype)
        s[:, 7] = -math.inf
        x = s.clone().requires_grad_()
        kd = kl_div(x, s, divergence=divergence, beta=BETA, temperature=T, impl="triton")
        (grad,) = torch.autograd.grad(kd, x)
        assert not kd.detach().any() and not grad.any()


# --- Edges of a mixture --------------------------------------------------------------------------


def judge_rows(s: Tensor, teacher: Any, divergence: Divergence, beta: float, scale: float) -> None:
    """Hold loss and gradient of each row to those of the reference, both by the tests' one rule."""
    results = []
    for ops, dtype in ((bound("triton"), None), (reference, torch.float64), (reference, None)):
        x = s.to(dtype or s.dtype).requires_grad_()
        given = [z.to(dtype or z.dtype) if z.is_floating_point() else z for z in teacher]
        kind: Any = TeacherLogits if len(given) == 1 else TeacherTopK
        objective = Objective(divergence=divergence, beta=beta)
        y = torch.zeros(len(s), dtype=torch.int64)
        out = ops.distill_loss(x, y, kind(*given), objective, num_items=1)
        results.append((out.loss.detach()[None], torch.autograd.grad(out.loss, x)[0]))
    for ours, oracle, yardstick in zip(*results, strict=True):
        assert_within(ours, oracle, yardstick, scale)


@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("divergence", MIXTURES)
def test_a_teacher_that_rules_out_the_students_choice(divergence: Divergence, kind: str) -> None:
    """Ratios cannot count from 0, nor from one that underflows, nor from one past fp32's digits."""
    s = torch.tensor([[9.0, 0.0, -1.0, 0.5], [9.0, 0.0, -1.0, 0.5], [0.1, 0.0, -0.1, -60.0]])
    t = torch.tensor([[-math.inf, 0.0, 0.3, -0.1], [-250.0, 0.0, 0.3, -0.1], [9.0, 0.0, 0.3, -0.1]])
    teacher = (t,)
    if kind == "top-k":
        log_probs = t.log_softmax(-1)
        teacher = (torch.tensor([[0, 2, 3]] * 3), log_probs[:, [0, 2, 3]])
    for beta in (0.1, 0.9):
        judge_rows(s, teacher, divergence, beta, scale=9.0)


@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("beta", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("divergence", MIXTURES)
def test_a_mixture_with_nearly_nothing_of_one_side(
    divergence: Divergence, beta: float, kind: str
) -> None:
    """fp32 rounds ``1 - 1e-9`` to 1, where a share of 0 would be divided by."""
    s = torch.tensor([[3.0, 0.0, -1.0, 0.5]])
    t = torch.tensor([[-2.0, 0.0, 4.0, -60.0]])
    teacher = (t,)
    if kind == "top-k":
        teacher = (torch.tensor([[0, 1, 2]]), t.log_softmax(-1)[:, :3])
    judge_rows(s, teacher, divergence, beta, scale=9.0)


@pytest.mark.parametrize("tail", ["bucket", "zero"])
@pytest.mark.parametrize("divergence", EVERY)
def test_a_row_of_padding_teaches_nothing(divergence: Divergence, tail: Any) -> None:
    """A tail "zero" leaves it no outcome, a bucket the one that holds all tokens. Its CE counts."""
    if tail == "zero" and _divergence_table.DIVERGENCES[divergence].needs_full_support:
        pytest.skip("refused: it is infinite")
    log_probs, ids = logits().log_softmax(-1).topk(K)
    log_probs[1] = -math.inf
    s, keep = logits().requires_grad_(), torch.tensor([0, 2])
    results = []
    for rows in (torch.arange(N), keep):
        teacher = TeacherTopK(ids[rows], log_probs[rows], tail)
        out = distill_loss(
            s[rows],
            labels()[rows],
            teacher,
            Objective(divergence=divergence),
            num_items=N,
            impl="triton",
        )
        results.append((out.kd, torch.autograd.grad(out.loss, s)[0]))
    (kd, grad), (kd_without, grad_without) = results
    assert torch.equal(kd, kd_without)
    assert torch.equal(grad, grad_without) and not grad[1].any()


# --- Codes of divergences ------------------------------------------------------------------------

N, V, D, K = 3, 40, 8, 4


def logits() -> Tensor:
    return torch.randn(N, V)


def top_k() -> TeacherTopK:
    log_probs, ids = logits().log_softmax(-1).topk(K)
    return TeacherTopK(ids, log_probs)


def hidden() -> TeacherHidden:
    return TeacherHidden(torch.randn(N, D), Head(torch.randn(V, D)))


def kl(divergence: Any) -> Tensor:
    return kl_div(logits(), logits(), divergence=divergence, impl="triton")


def distill(teacher: Any) -> Callable[[Any], Tensor]:
    def call(divergence: Any) -> Tensor:
        wanted = Objective(divergence=divergence)
        return distill_loss(logits(), labels(), teacher(), wanted, impl="triton").loss

    return call


def linear(teacher: Any) -> Callable[[Any], Tensor]:
    def call(divergence: Any) -> Tensor:
        h, head = torch.randn(N, D, requires_grad=True), Head(torch.randn(V, D))
        wanted = Objective(divergence=divergence)
        return linear_distill_loss(h, head, labels(), teacher(), wanted, impl="triton").loss

    return call


def labels() -> Tensor:
    return torch.arange(N)


PATHS: dict[str, Callable[[Any], Tensor]] = {
    "kl_div": kl,
    "distill_loss, dense": distill(lambda: TeacherLogits(logits())),
    "distill_loss, hidden": distill(hidden),
    "distill_loss, top-k": distill(top_k),
    "linear_distill_loss, dense": linear(lambda: TeacherLogits(logits())),
    "linear_distill_loss, hidden": linear(hidden),
    "linear_distill_loss, top-k": linear(top_k),
}


@pytest.fixture(params=[1, 2])
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A divergence of one or two readings that stands in the table and nowhere else."""
    info = _divergence_table.DivergenceInfo(
        reads_beta=False,
        gradient_bound=lambda beta: 1.0,
        kl_weights=None if request.param == 2 else lambda beta: (1.0, 0.0),
    )
    monkeypatch.setitem(_divergence_table.DIVERGENCES, "toy", info)
    return "toy"


@pytest.mark.parametrize("path", PATHS)
def test_a_divergence_without_code_is_refused_by_name(path: str, toy: str) -> None:
    assert PATHS[path]("jsd").isfinite()
    with pytest.raises(NotImplementedError, match=r"impl='triton'.*got 'toy'"):
        PATHS[path](toy)


@pytest.mark.parametrize("path", PATHS)
def test_a_code_without_a_branch_stops_the_kernel(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it does not compile either is shown in ``test_compile.py``."""
    monkeypatch.setitem(tile.DIVERGENCE_CODES, "skew_reverse_kl", 99)
    with pytest.raises(Exception, match="divergence must have a branch in every kernel"):
        PATHS[path]("skew_reverse_kl")


def test_every_divergence_of_the_table_has_a_code_of_its_own() -> None:
    assert tile.DIVERGENCE_CODES.keys() == _divergence_table.DIVERGENCES.keys()
    assert len(set(tile.DIVERGENCE_CODES.values())) == len(tile.DIVERGENCE_CODES)
