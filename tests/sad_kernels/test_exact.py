"""The oracle's divergences against arithmetic with 80 digits, and against numbers by hand.

``mpmath`` knows the definitions alone: gradients are differences of values, so no formula of a
gradient is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mpf
from sad_kernels import Objective, TeacherLogits, TeacherTopK, reference
from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels.objective import Tail
from support.oracle import (
    Problem,
    assert_value,
    assert_zero,
    epsilon,
    measure,
    measure_oracle,
    rounding_of_logits,
)
from support.oracle.divergences import (
    NAMES,
    dense_sides,
    gradient_of,
    ratios_of,
    top_k_sides,
    value_of,
)
from support.problems import plain
from torch import Tensor

LN2, LN3, INF = math.log(2), math.log(3), math.inf
V = 12
STEP = mpf(10) ** -25  # of differences: their error is its square, and 55 digits are left

Row = list[Any]  # of mpf


@pytest.fixture(autouse=True)
def eighty_digits() -> Any:
    with mpmath.workdps(80):
        yield


# --- Definitions with 80 digits -------------------------------------------------------------------


def kl(a: Row, b: Row) -> Any:
    return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x)


def mixed(w: Any, a: Row, b: Row) -> Row:
    return [w * x + (1 - w) * y for x, y in zip(a, b, strict=True)]


def definition(name: str, beta: float, p: Row, q: Row) -> Any:
    b = mpf(beta)
    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = mixed(b, p, q)
            return b * kl(p, m) + (1 - b) * kl(q, m)
        case "skew_forward_kl":
            return kl(p, mixed(b, p, q))
        case "skew_reverse_kl":
            return kl(q, mixed(b, q, p))
        case "tvd":
            return mpmath.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
        case "jeffreys":
            return b * kl(p, q) + (1 - b) * kl(q, p)
        case _:
            raise ValueError(name)


def softmax(z: Row, T: float) -> Row:
    hot = [mpmath.exp(x / mpf(T)) for x in z]
    total = mpmath.fsum(hot)
    return [x / total for x in hot]


def exactly(x: Tensor) -> Row:
    return [mpf(value) for value in x.tolist()]


def assert_exact(
    value: Tensor, gradient: Tensor, of: Callable[[Row], Any], s: Tensor, lost: float = 1.0
) -> None:
    """The value, and the row of its gradient by its largest number, to a part in 1e13, which is
    what the rule leaves to the oracle where results are float64 as well; or ``lost`` times it."""
    limit = 8 * epsilon(torch.float64) * lost
    row, exact = exactly(s), of(exactly(s))
    assert abs(mpf(value.item()) - exact) <= limit * abs(exact)

    def slope(v: int) -> Any:
        up, down = ([x + sign * STEP * (i == v) for i, x in enumerate(row)] for sign in (1, -1))
        return (of(up) - of(down)) / (2 * STEP)

    slopes = [slope(v) for v in range(len(row))]
    largest = max(abs(x) for x in slopes)
    errors = [abs(x - y) for x, y in zip(slopes, exactly(gradient), strict=True)]
    assert max(errors) <= limit * largest, f"{float(max(errors) / largest):.1e} of the largest"


# --- Dense teachers -------------------------------------------------------------------------------


def rows_of(kind: str) -> tuple[Tensor, Tensor]:
    """Student and teacher, [1, V] float32 numbers in float64."""
    s, t = torch.randn(2, 1, V)
    match kind:
        case "far":
            pass
        case "far20":
            s, t = 20 * s, 20 * t
        case "near1e-1" | "near1e-3" | "near1e-5":
            s, t = 5 * s, 5 * s + float(kind[4:]) * t
        case "sure of the same":
            s[0, 3], t[0, 3] = 25.0, 30.0
        case "sure and near":
            s[0, 3] = 25.0
            t = s + 1e-3 * t
        case "sure of different tokens":
            s[0, 3], t[0, 5] = 25.0, 30.0
    return s.double(), t.double()


def of_logits(
    name: str, beta: float, s: Tensor, t: Tensor, T: float = 1.0, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the one row of [1, V] logits."""
    k = ratios_of(dense_sides(s, t, T, share))
    return value_of(name, beta, k)[0], gradient_of(name, beta, k)[0] / T


@pytest.mark.few(35)
@pytest.mark.parametrize(
    "kind",
    [
        "far",
        "far20",
        "near1e-1",
        "near1e-3",
        "near1e-5",
        "sure of the same",
        "sure and near",
        "sure of different tokens",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_dense_teachers(name: str, kind: str) -> None:
    for beta, T, share in ((0.1, 1.0, 1.0), (0.9, 1.0, 1.0), (0.5, 2.0, 0.3)):
        s, t = rows_of(kind)
        target = [
            x + mpf(share) * (y - x) for x, y in zip(exactly(s[0]), exactly(t[0]), strict=True)
        ]
        p = softmax(target, T)

        def of(row: Row, beta: float = beta, T: float = T, p: Row = p) -> Any:
            return definition(name, beta, p, softmax(row, T))

        assert_exact(*of_logits(name, beta, s, t, T, share), of, s[0])


def test_autograd_of_the_plain_definition_is_no_oracle() -> None:
    """In float64, of a row as a sharp student and another sharp teacher give it."""
    s, t = (40 * torch.randn(64, 256).double() for _ in range(2))
    _, exact = value_and_gradient("jsd", 0.5, s, t)
    s.requires_grad_()
    value = reference.kl_div(s, t, divergence="jsd", reduction="sum")
    (autograd,) = torch.autograd.grad(value, s)
    error = (autograd - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert error.max() > 1e-3


def value_and_gradient(name: str, beta: float, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    k = ratios_of(dense_sides(s, t, 1.0))
    return value_of(name, beta, k), gradient_of(name, beta, k)


# --- Top-k teachers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["far", "near1e-3", "sure of the same", "no rest but rounding"])
@pytest.mark.parametrize(
    ("name", "tail"),
    [
        (name, tail)
        for name in NAMES
        for tail in ("bucket", "zero")
        if not (tail == "zero" and name in ("reverse_kl", "jeffreys"))  # infinite
    ],
)
def test_top_k_teachers(name: str, tail: Tail, kind: str) -> None:
    whole = kind == "no rest but rounding"
    K, T = V if whole else 4, 2.0
    # 1 - sum p is off by a part in 1e16 of 1, and so is the gap of the rest, beside gaps of 1e-3.
    lost = 1000.0 if kind == "near1e-3" and tail == "bucket" else 1.0
    for beta in (0.1, 0.9):
        s, t = rows_of("far" if whole else kind)
        log_probs, ids = (t / T).log_softmax(-1).float().double().topk(K)
        sides, outcome, share = top_k_sides(s, ids, log_probs, tail, T)
        k = ratios_of(sides)
        gradient = (share * gradient_of(name, beta, k).gather(-1, outcome))[0] / T

        p = [mpmath.exp(x) for x in exactly(log_probs[0])]
        total = mpmath.fsum(p)
        p = [x / total for x in p] if tail == "zero" else p
        p.append(1 - total if tail == "bucket" and not whole else mpf(0))
        listed = ids[0].tolist()

        def of(row: Row, beta: float = beta, p: Row = p, listed: Sequence[int] = listed) -> Any:
            q = softmax(row, T)
            others = mpmath.fsum(x for v, x in enumerate(q) if v not in listed)
            return definition(name, beta, p, [*(q[v] for v in listed), others])

        assert_exact(value_of(name, beta, k)[0], gradient, of, s[0], lost)


def test_a_teacher_without_ids_asks_for_nothing() -> None:
    s, ids = torch.randn(2, V).double(), torch.tensor([[0, 1], [2, 3]])
    log_probs = torch.tensor([[-INF, -INF], [-0.5, -1.0]]).double()
    sides, outcome, share = top_k_sides(s, ids, log_probs, "zero", 1.0)
    k = ratios_of(sides)
    gradient = share * gradient_of("forward_kl", 0.5, k).gather(-1, outcome)
    assert value_of("forward_kl", 0.5, k)[0] == 0 and not gradient[0].any()
    assert value_of("forward_kl", 0.5, k)[1] > 0 and gradient[1].all()


@pytest.mark.parametrize("ids", [[0, V], [0, -1], [5, 5]])
def test_a_row_with_a_wrong_id_is_nan(ids: Sequence[int]) -> None:
    s, log_probs = torch.randn(1, V).double(), torch.tensor([[-1.0, -2.0]]).double()
    sides, _, _ = top_k_sides(s, torch.tensor([ids]), log_probs, "bucket", 1.0)
    k = ratios_of(sides)
    assert value_of("jsd", 0.5, k).isnan().all() and gradient_of("jsd", 0.5, k).isnan().any()


# --- By hand: q = [1/4, 3/4], p = [1/2, 1/2] ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("tvd", 1 / 4, 3 / 16),  # phi = -1/2, 1/2: q_2 (1/2 - 1/4)
        (
            "jeffreys",
            0.3 * 0.5 * math.log(4 / 3) + 0.7 * (0.75 * LN3 - LN2),
            0.3 / 4 + 0.7 * 3 / 16 * LN3,
        ),
    ],
)
def test_by_hand(name: str, value: float, slope: float) -> None:
    s, t = torch.tensor([[0.0, LN3]]).double(), torch.zeros(1, 2).double()
    ours, gradient = value_and_gradient(name, 0.3, s, t)
    assert_value(ours.float(), [value])
    assert_value(gradient.float(), [[-slope, slope]])


@pytest.mark.parametrize("name", NAMES)
def test_equal_sides_have_neither_value_nor_gradient(name: str) -> None:
    """Exactly: the subgradient of a TVD is 0 where p and q are equal."""
    s = 5 * torch.randn(4, V).double()
    for shift in (0.0, 2.0**20):
        value, gradient = value_and_gradient(name, 0.3, s, s.float().double() + shift)
        assert_zero(value.float(), scale=1.0)
        value, gradient = value_and_gradient(name, 0.3, s, s)
        assert not value.any() and not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_impossible_tokens(name: str) -> None:
    """A column of -inf on both sides is no column; on one side it may be infinite, never NaN."""
    s, t = torch.randn(2, 3, V).double()
    hole = torch.arange(V) % 5 == 0
    value, gradient = value_and_gradient(name, 0.3, *(x.masked_fill(hole, -INF) for x in (s, t)))
    exact, exact_gradient = value_and_gradient(name, 0.3, s[:, ~hole], t[:, ~hole])
    assert_value(value, exact)
    assert_value(gradient[:, ~hole], exact_gradient)
    assert not gradient[:, hole].any()
    for student, teacher, infinite in (
        (s.masked_fill(hole, -INF), t, ("forward_kl", "jeffreys")),
        (s, t.masked_fill(hole, -INF), ("reverse_kl", "jeffreys")),
    ):
        value, gradient = value_and_gradient(name, 0.3, student, teacher)
        assert not value.isnan().any() and value.isinf().all() == (name in infinite)
        assert gradient.isfinite().all() or name in infinite


# --- What is judged by it -------------------------------------------------------------------------


def test_every_divergence_of_the_table_is_known() -> None:
    assert set(DIVERGENCES) <= set(NAMES)


@pytest.mark.parametrize("teacher", ["logits", "hidden", "bucket", "zero"])
@pytest.mark.parametrize("op", ["distill_loss", "linear_distill_loss"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_oracle_is_the_reference_with_more_digits(
    divergence: Any, op: str, teacher: str
) -> None:
    """Every output, where the plain definition has all the digits that are asked for here."""
    options: dict[str, Any] = {"ignore": "some", "z_loss": 1e-3, "beta": 0.3, "teacher": teacher}
    options["teacher_share"] = 0.4 if teacher in ("logits", "hidden") else 1.0
    problem = plain(op, torch.float64, divergence=divergence, **options)
    oracle, by_definition = measure_oracle(problem), measure(problem, reference)
    assert oracle.keys() == by_definition.keys()
    for name, exact in oracle.items():
        assert_value(by_definition[name], exact, scale=problem.magnitude * 2.0**10)


def test_the_oracle_takes_what_the_reference_takes() -> None:
    """Scales and caps of both sides, weights of rows, a row without ids, and two divergences."""
    s, t, y = 4 * torch.randn(6, V), 4 * torch.randn(6, V), torch.tensor([1, 2, 3, 4, -100, 5])
    other = torch.tensor([True, False, True, False, True, False])
    sparse_log_probs, ids = t.log_softmax(-1).topk(3)
    sparse_log_probs[2] = -INF
    dense = TeacherLogits(t.double(), logit_scale=0.7, softcap=5.0)
    sparse = TeacherTopK(ids, sparse_log_probs.double(), "zero")
    for teacher in (dense, sparse):
        objective = Objective(
            divergence="jsd", beta=0.3, other_divergence="skew_forward_kl", other_beta=0.8
        )

        def call(
            ops: Any, x: dict[str, Tensor], teacher: Any = teacher, objective: Any = objective
        ) -> Any:
            return ops.distill_loss(
                x["logits"],
                y,
                teacher,
                objective,
                other_rows=other,
                kd_token_weights=torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0]),
                softcap=3.0,
                logit_scale=1.3,
            )

        problem = Problem("all", call, {"logits": s}, ("logits",), torch.ones(()), {})
        by_definition = measure(problem, reference, {"logits": s.double()})
        for name, exact in measure_oracle(problem).items():
            assert_value(by_definition[name], exact, scale=2.0**10)


def test_a_row_of_the_other_divergence_is_judged_by_it_alone() -> None:
    """The first is infinite there."""
    s, t = torch.randn(2, V), torch.randn(2, V)
    t[1, 3] = -INF
    objective = Objective(divergence="reverse_kl", other_divergence="jsd", other_beta=0.3)
    other = torch.tensor([False, True])

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        teacher = TeacherLogits(t.to(x["logits"].dtype))
        return ops.distill_loss(x["logits"], None, teacher, objective, other_rows=other)

    problem = Problem("two", call, {"logits": s}, ("logits",), torch.ones(()), {})
    oracle = measure_oracle(problem)
    assert all(x.isfinite().all() for x in oracle.values())
    moved = rounding_of_logits(problem, oracle, 2.0**-23)["dlogits"]
    assert moved.isfinite().all() and moved.any(-1).all()


def test_the_oracle_has_digits_that_the_reference_lacks() -> None:
    """A gradient that autograd through the plain definition does not know, in a loss of ours."""
    s, t = (40 * torch.randn(64, 256) for _ in range(2))
    objective = Objective(divergence="jsd")
    y = torch.zeros(64, dtype=torch.int64)

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        return ops.distill_loss(x["logits"], y, TeacherLogits(x["teacher"]), objective, num_items=1)

    problem = Problem("far", call, {"logits": s, "teacher": t}, ("logits",), torch.ones(()), {})
    _, exact = value_and_gradient("jsd", 0.5, s.double(), t.double())
    assert torch.equal(measure_oracle(problem)["dlogits"], exact)
