"""A divergence that is added works in every path, or is refused by the path that lacks it.

The tests add the squared Hellinger distance, ``sum_v (sqrt p_v - sqrt q_v)^2``, as a user of this
repository would: a row in the table, and a function in each path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK, reference
from sad_kernels._divergence import TERMS, Counted, Terms, value_and_gradient
from sad_kernels._divergence_table import DIVERGENCES, DivergenceInfo
from sad_kernels.objective import Divergence
from support.oracle import ALL, IMPLS, assert_value, bound
from torch import Tensor

N, V, D, K, T = 6, 41, 8, 5, 2.0
HELLINGER: Any = "hellinger"
ROW = DivergenceInfo(
    reads_beta=False,
    gradient_bound=lambda beta: 2.0,
    needs_full_support=True,  # it does not, but a flag has to be seen to be read
)


def definition(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """For ``reference.py``: of log-probabilities, [n]."""
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


def value(beta: float, gap: Tensor, p: Tensor, q: Tensor, normalised: bool) -> Tensor:
    """For ``_divergence.py``: the summands ``f``."""
    return (p.sqrt() - q.sqrt()).square()


def slope(beta: float, g: Tensor, counted: Counted) -> Tensor:
    """And ``phi - phi_y`` with ``phi(r) = 1 - sqrt r``."""
    return -(counted.g0 / 2).exp() * torch.expm1(g / 2)


@pytest.fixture
def row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table knows the divergence, and no path has a function for it."""
    monkeypatch.setitem(DIVERGENCES, HELLINGER, ROW)


@pytest.fixture
def hellinger(row_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and all paths but the kernels know the divergence."""
    monkeypatch.setitem(reference.DEFINITIONS, HELLINGER, definition)
    monkeypatch.setitem(TERMS, HELLINGER, Terms(value, slope))


# --- Inputs: student logits of a head, and each kind of teacher -----------------------------------


def hidden_and_weight(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)


def of_logits(dtype: torch.dtype) -> Any:
    return TeacherLogits(3 * torch.randn(N, V, dtype=dtype))


def of_hidden(dtype: torch.dtype) -> Any:
    return TeacherHidden(*(torch.randn(N, D, dtype=dtype), Head(torch.randn(V, D, dtype=dtype))))


def of_top_k(dtype: torch.dtype) -> Any:
    log_probs, ids = (torch.randn(N, V, dtype=dtype) / T).log_softmax(-1).topk(K)
    return TeacherTopK(ids, log_probs)


TEACHERS: dict[str, Callable[[torch.dtype], Any]] = {
    "logits": of_logits,
    "hidden": of_hidden,
    "top-k": of_top_k,
}
every_teacher = pytest.mark.parametrize("kind", TEACHERS)


def oracle(logits: Tensor, teacher: Any) -> Tensor:
    """``T^2 (2 - 2 sum sqrt(p q))`` of the rows, summed, from probabilities; [N, V] -> []."""
    q = (logits / T).softmax(-1)
    if isinstance(teacher, TeacherTopK):  # K outcomes, and one for everything else
        p, q = teacher.log_probs.exp(), q.gather(-1, teacher.ids)
        p, q = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (p, q))
    else:
        t = teacher.logits if isinstance(teacher, TeacherLogits) else teacher.head(teacher.hidden)
        p = (t / T).softmax(-1)
    return T**2 * 2 * (1 - (p * q).sqrt().sum(-1)).sum()


# --- With every function: value and gradient ------------------------------------------------------


@every_teacher
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_an_added_divergence_is_right(hellinger: None, impl: str, linear: bool, kind: str) -> None:
    """One row of the table and one function per path are all that it takes."""
    hidden, weight = hidden_and_weight(torch.float64)
    logits, teacher = hidden @ weight.T, TEACHERS[kind](torch.float64)
    labels = torch.zeros(N, dtype=torch.int64)
    objective, ops = Objective(divergence=HELLINGER, temperature=T), bound(impl)
    x = (hidden if linear else logits).requires_grad_()
    if linear:
        out = ops.linear_distill_loss(x, Head(weight), labels, teacher, objective, num_items=1)
    else:
        out = ops.distill_loss(x, labels, teacher, objective, num_items=1)
    (gradient,) = torch.autograd.grad(out.loss, x)

    exact = oracle(x @ weight.T if linear else x, teacher)
    (exact_gradient,) = torch.autograd.grad(exact, x)
    assert exact > 1
    scale = T**2 * N * 50  # T^2 times the log-ratios that are summed up, over all rows
    assert_value(out.loss, exact.detach(), scale)
    assert_value(out.kd, exact.detach(), scale)
    assert_value(gradient, exact_gradient, scale)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_an_added_divergence_has_a_value_per_row(hellinger: None, impl: str) -> None:
    s, teacher = 3 * torch.randn(N, V, dtype=torch.float64), of_logits(torch.float64)
    options = {"divergence": HELLINGER, "temperature": T, "reduction": "none"}
    rows = bound(impl).kl_div(s, teacher.logits, **options)
    exact = [oracle(s[i], TeacherLogits(teacher.logits[i])) for i in range(N)]
    assert_value(rows, torch.stack(exact), T**2 * 50)


@pytest.mark.parametrize("impl", ALL)
def test_a_flag_of_the_table_refuses_a_teacher_without_a_tail(hellinger: None, impl: str) -> None:
    s, y = torch.randn(N, V), torch.zeros(N, dtype=torch.int64)
    known = of_top_k(torch.float32)
    teacher = TeacherTopK(known.ids, known.log_probs, "zero")
    with pytest.raises(ValueError, match=r"hellinger.*'zero'.*infinite"):
        bound(impl).distill_loss(s, y, teacher, Objective(divergence=HELLINGER))


# --- With a function missing: an error, never a sum that leaves it out ----------------------------


def assert_refused(impl: str, kind: str, rows: int = N) -> None:
    """Every loss of this divergence raises, with and without a gradient and a weight."""
    hidden, weight = (x.float() for x in hidden_and_weight(torch.float32))
    hidden = hidden[:rows].requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64)
    teacher: Any = TEACHERS[kind](torch.float32)
    match teacher:
        case TeacherHidden():
            teacher = TeacherHidden(teacher.hidden[:rows], teacher.head)
        case TeacherLogits():
            teacher = TeacherLogits(teacher.logits[:rows])
        case _:
            teacher = TeacherTopK(teacher.ids[:rows], teacher.log_probs[:rows])
    ops = bound(impl)
    for kd_weight in (1.0, 0.0):  # the divergence is reported at weight 0 as well
        objective = Objective(ce_weight=1.0, kd_weight=kd_weight, divergence=HELLINGER)
        with pytest.raises(NotImplementedError, match=r"got 'hellinger'.*add its function"):
            ops.linear_distill_loss(hidden, Head(weight), labels, teacher, objective)
        logits = hidden.detach() @ weight.T
        with pytest.raises(NotImplementedError, match=r"got 'hellinger'.*add its function"):
            ops.distill_loss(logits, labels, teacher, objective)


@every_teacher
@pytest.mark.parametrize("impl", ALL)
def test_a_row_without_functions_is_refused(row_alone: None, impl: str, kind: str) -> None:
    """It was a divergence of 0.0 and a gradient without it, where torch knew no sum for a name."""
    assert_refused(impl, kind)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_rows_are_no_excuse(row_alone: None, impl: str) -> None:
    assert_refused(impl, "logits", rows=0)


@every_teacher
def test_a_sum_of_kls_needs_no_function_in_torch(
    row_alone: None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its running sums are there: the row says by what the two are weighted."""
    monkeypatch.setitem(DIVERGENCES, HELLINGER, ROW._replace(kl_weights=lambda beta: (2.0, 3.0)))
    logits, teacher = 3 * torch.randn(N, V, dtype=torch.float64), TEACHERS[kind](torch.float64)
    labels = torch.zeros(N, dtype=torch.int64)

    def loss_and_gradient(divergence: Any) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        objective = Objective(divergence=divergence, temperature=T)
        loss = bound("torch").distill_loss(leaf, labels, teacher, objective).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    forward, reverse = map(loss_and_gradient, ("forward_kl", "reverse_kl"))
    for both, a, b in zip(loss_and_gradient(HELLINGER), forward, reverse, strict=True):
        torch.testing.assert_close(both, 2 * a + 3 * b)


# --- The divergences that there are ---------------------------------------------------------------


def test_no_name_of_the_table_lacks_a_function() -> None:
    names = list(DIVERGENCES)
    assert list(get_args(Divergence)) == names
    assert list(reference.DEFINITIONS) == names
    assert list(TERMS) == [n for n in names if DIVERGENCES[n].kl_weights is None]


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_no_name_of_the_table_lacks_a_code_in_the_kernels() -> None:
    from sad_kernels._triton import tile

    assert tile.DIVERGENCE_CODES.keys() == DIVERGENCES.keys()
    assert len(set(tile.DIVERGENCE_CODES.values())) == len(DIVERGENCES)


@pytest.mark.parametrize("divergence", [["forward_kl"], None, "kl", "JSD"])
def test_a_name_that_is_not_in_the_table_is_refused(divergence: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of forward_kl, .*, got"):
        Objective(divergence=divergence)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_beta_is_checked_where_it_is_read(name: Any) -> None:
    if DIVERGENCES[name].reads_beta:
        with pytest.raises(ValueError, match="beta must lie strictly between 0 and 1"):
            Objective(divergence=name, beta=1.0)
    else:
        assert Objective(divergence=name, beta=1.0).beta == 1.0


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradients_stay_within_their_bound(name: str, beta: float) -> None:
    """fp16 gradients are scaled by it: one that is too small makes them infinite."""
    logits = torch.linspace(-60, 60, 241, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0])
    log_p, log_q = logits[:, None].log_softmax(-1), logits[None].log_softmax(-1)
    weights = DIVERGENCES[name].kl_weights
    if weights is not None and weights(beta)[1] > 0:
        # The reverse KL is unbounded: its row of the table promises 32 up to 128 nats.
        near = (logits[:, None, 0] - logits[None, :, 0]).abs() <= 128
    else:
        near = torch.ones(241, 241, dtype=torch.bool)
    log_p, log_q = (x.expand(241, 241, 2)[near] for x in (log_p, log_q))
    _, gradient = value_and_gradient(name, beta, log_p, log_q)
    assert gradient.abs().max() <= DIVERGENCES[name].gradient_bound(beta)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_flags_of_the_table_are_true(name: Any) -> None:
    """By the definitions, which read no flag but these of values that are refused."""
    student, teacher = torch.randn(2, 5, dtype=torch.float64).split(1)

    def value(beta: float, t: Tensor = teacher) -> float:
        log_q, log_p = student.log_softmax(-1), t.log_softmax(-1)
        return float(reference.DEFINITIONS[name](log_p, log_q, beta).sum())

    assert (value(0.2) != value(0.8)) == DIVERGENCES[name].reads_beta
    hole = teacher.clone()
    hole[0, 0] = -torch.inf
    assert (value(0.5, hole) == torch.inf) == DIVERGENCES[name].needs_full_support
