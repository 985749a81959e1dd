"""The tolerance rule is itself on trial: correct algorithms pass it, planted faults do not.

Each fault below was found in a released kernel. The rule must reject it on the inputs named with
it; where ordinary inputs hide a fault, a test says so, which is why those inputs are not alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sad_kernels import Head, TeacherLogits, reference
from support.oracle import (
    Outputs,
    Problem,
    assert_ema_within,
    assert_value,
    assert_within,
    assert_zero,
    broken,
    judge,
    judge_outputs,
    measure,
    measure_of,
    measure_oracle,
    ulp,
)
from support.oracle.rule import NEGLIGIBLE
from support.problems import plain
from torch import Tensor

DISTRIBUTIONS = ("randn1", "randn30", "peaked", "offset1e4", "zipf", "spread300")
HALVES = (torch.float16, torch.bfloat16)


def rejected(problem: Problem, ours: Outputs, *, rounds_products: bool = False) -> set[str]:
    """The outputs that break the rule, with allowances or without."""
    return broken(problem, ours, measure_of(problem, rounds_products=rounds_products))


# --- Losses from logits: one careful algorithm, and the ways to spoil it -------------------------


def cross_entropy(problem: Problem, fault: str = "") -> Outputs:
    """Per-row cross-entropy and its gradient, by hand in float32; all labels are 0, 1, 2, ..."""
    x = problem.leaves["logits"]
    z, y = x.float(), _labels(problem)[:, None]
    m = z.amax(-1, keepdim=True)
    d = (z - m).exp().sum(-1, keepdim=True)
    p, loss = (z - m).exp() / d, d.log() - (z.gather(-1, y) - m)
    if fault == "lse as one number":
        lse = m + d.log()
        p, loss = (z - lse).exp(), lse - z.gather(-1, y)
    if fault == "p rounded before -1":
        p = p.to(x.dtype).float()
    if fault == "loss in 16 bits":
        loss = loss.half().float()
    upstream = problem.upstream[:, None]
    if fault == "upstream of row 0":
        upstream = upstream[:1]
    grad = p.scatter_add(-1, y, -torch.ones_like(p[:, :1]))
    if fault == "rounded, then scaled":
        grad = grad.to(x.dtype).float()
    return {"loss": loss[:, 0], "dlogits": (grad * upstream).to(x.dtype)}


def _labels(problem: Problem) -> Tensor:
    """The labels, read off the gradient: the only negative entry of p - y."""
    ones = torch.ones_like(problem.upstream)
    grad = measure(
        Problem(problem.case, problem.call, problem.leaves, problem.wrt, ones, problem.scales),
        reference,
    )
    return grad["dlogits"].argmin(-1)


def rows(distribution: str, dtype: torch.dtype) -> Problem:
    return plain(
        "cross_entropy",
        dtype,
        distribution=distribution,
        N=40,
        reduction="none",
        upstream="random",
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_correct_cross_entropy_passes(distribution: str, dtype: torch.dtype) -> None:
    problem = rows(distribution, dtype)
    assert judge_outputs(problem, cross_entropy(problem)) <= 1.0


@pytest.mark.parametrize(
    ("fault", "distribution", "dtype", "outputs"),
    [
        ("p rounded before -1", "peaked", torch.float16, {"dlogits"}),
        ("p rounded before -1", "peaked", torch.bfloat16, {"dlogits"}),
        ("lse as one number", "offset1e4", torch.float32, {"loss", "dlogits"}),
        ("lse as one number", "randn30", torch.float32, {"dlogits"}),
        *[("loss in 16 bits", d, torch.bfloat16, {"loss"}) for d in DISTRIBUTIONS],
        *[("upstream of row 0", d, torch.float32, {"dlogits"}) for d in DISTRIBUTIONS],
    ],
)
def test_a_faulty_cross_entropy_is_rejected(
    fault: str, distribution: str, dtype: torch.dtype, outputs: set[str]
) -> None:
    problem = rows(distribution, dtype)
    assert rejected(problem, cross_entropy(problem, fault)) == outputs


def test_random_logits_and_whole_norms_hide_a_rounded_p() -> None:
    """Why peaked inputs and rows: a kernel shipped this fault with a green suite.

    https://github.com/linkedin/Liger-Kernel/pull/1329
    """
    noise = rows("randn1", torch.bfloat16)
    assert not rejected(noise, cross_entropy(noise, "p rounded before -1"))
    peaked = rows("peaked", torch.bfloat16)
    oracle = measure_oracle(peaked)["dlogits"]
    error = cross_entropy(peaked, "p rounded before -1")["dlogits"].double() - oracle
    assert error.norm() < 0.01 * oracle.norm()
    by_row = error.norm(dim=-1) / oracle.norm(dim=-1)
    assert by_row.max() > 0.5


def test_a_second_rounding_stays_within_the_rule() -> None:
    """Half an ulp more is not an error of an algorithm; bitwise tests look for it elsewhere."""
    problem = rows("randn5", torch.bfloat16)
    correct = cross_entropy(problem)["dlogits"]
    twice = cross_entropy(problem, "rounded, then scaled")["dlogits"]
    assert not torch.equal(correct, twice)
    assert not rejected(problem, {"dlogits": twice})


@pytest.mark.parametrize("subtract_first", [True, False])
def test_temperature_goes_after_the_maximum(subtract_first: bool) -> None:
    """``z / T`` rounds away what an offset hides, unless T is a power of 2; eager does it too."""
    problem = plain(
        "kl_div",
        torch.float32,
        distribution="offset1e4",
        temperature=2.7,
        reduction="none",
        N=40,
    )
    T = 2.7

    def log_softmax(z: Tensor) -> Tensor:
        if subtract_first:
            return ((z - z.amax(-1, keepdim=True)) / T).log_softmax(-1)
        return (z / T).log_softmax(-1)

    log_q = log_softmax(problem.leaves["logits"])
    log_p = log_softmax(problem.leaves["teacher"])
    ours = {
        "loss": T**2 * (log_p.exp() * (log_p - log_q)).sum(-1),
        "dlogits": T * (log_q.exp() - log_p.exp()) * problem.upstream[:, None],
    }
    assert ("loss" in rejected(problem, ours)) is not subtract_first
    assert subtract_first <= (not rejected(problem, ours))


# --- Linear ops ----------------------------------------------------------------------------------


def linear_with_logits_in(dtype: torch.dtype) -> Any:
    """The composition, with the logits of both sides rounded on the way."""

    def logits(hidden: Tensor, head: Head) -> Tensor:
        z = hidden.float() @ head.weight.float().T
        assert head.bias is not None
        return (z + head.bias.float()).to(dtype)

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, **options: Any
    ) -> Tensor:
        del options["logit_scale"]
        return reference.cross_entropy(logits(hidden, Head(weight, bias)), labels, **options)

    def linear_distill_loss(
        hidden: Tensor, head: Head, labels: Tensor, teacher: Any, objective: Any, **options: Any
    ) -> Any:
        t = (teacher.hidden.float() @ teacher.head.weight.float().T).to(dtype)
        return reference.distill_loss(
            logits(hidden, head), labels, TeacherLogits(t), objective, **options
        )

    return SimpleNamespace(
        linear_cross_entropy=linear_cross_entropy, linear_distill_loss=linear_distill_loss
    )


@pytest.mark.parametrize("distribution", ["randn1", "randn5", "peaked", "zipf"])
def test_rounded_logits_are_rejected_in_linear_cross_entropy(distribution: str) -> None:
    problem = plain("linear_cross_entropy", torch.bfloat16, distribution=distribution, N=40)
    judge(problem, linear_with_logits_in(torch.float32))
    assert "loss" in rejected(problem, measure(problem, linear_with_logits_in(torch.bfloat16)))


@pytest.mark.parametrize("distribution", ["randn1", "randn5", "peaked", "zipf", "near", "same"])
def test_rounded_logits_are_rejected_in_linear_distillation(distribution: str) -> None:
    """bf16 logits cost 4 to 23 percent of a KD gradient near its minimum.

    https://github.com/linkedin/Liger-Kernel/issues/1432
    """
    problem = plain(
        "linear_distill_loss",
        torch.bfloat16,
        distribution=distribution,
        teacher="hidden",
        N=40,
        ce_weight=0.0,
    )
    judge(problem, linear_with_logits_in(torch.float32))
    wrong = rejected(problem, measure(problem, linear_with_logits_in(torch.bfloat16)))
    assert wrong >= {"ce", "z", "entropy"}
    if distribution in ("near", "same"):
        assert "dhidden" in wrong
        rounded = measure(problem, linear_with_logits_in(torch.bfloat16))
        assert "dhidden" in rejected(problem, rounded, rounds_products=True)


@pytest.mark.parametrize("chunks", [1, 16, 64])
def test_a_weight_gradient_summed_in_bf16_is_rejected(chunks: int) -> None:
    """https://github.com/linkedin/Liger-Kernel/issues/512: 16 chunks, each added in bf16."""
    problem = plain("linear_cross_entropy", torch.bfloat16, N=64, distribution="zipf")
    correct = measure(problem, reference)["dweight"]
    parts = torch.zeros_like(correct)
    for rows_of_chunk in torch.arange(64).chunk(chunks):
        only = torch.zeros(64)
        only[rows_of_chunk] = 1 / 64

        def call(ops: Any, x: dict[str, Tensor], weights: Tensor = only) -> Tensor:
            def weighted(*args: Any, **options: Any) -> Tensor:
                options["reduction"] = "none"
                return (reference.linear_cross_entropy(*args, **options) * weights).sum()

            return problem.call(SimpleNamespace(linear_cross_entropy=weighted), x)

        part = Problem("part", call, problem.leaves, problem.wrt, problem.upstream, {})
        parts += measure(part, reference)["dweight"]
    expected = {"dweight"} if chunks > 1 else set()
    assert rejected(problem, {"dweight": parts}) == expected
    # Rounding g once may do about as much as 16 chunks summed in bf16, not as much as 64.
    if chunks != 16:
        assert rejected(problem, {"dweight": parts}, rounds_products=True) == expected


# --- The rule's own arithmetic -------------------------------------------------------------------


def test_ulp() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 0.99, 0.0, 1e4], dtype=torch.float64)
    for dtype in (torch.float16, torch.float32):
        here = x.to(dtype)
        step = torch.nextafter(here, torch.full_like(here, torch.inf)) - here
        assert torch.equal(ulp(here, dtype), step.double())
    assert float(ulp(torch.tensor(1e4), torch.bfloat16)) == 64.0


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_an_oracle_without_size_is_refused(value: float) -> None:
    x = torch.full((3,), value)
    with pytest.raises(ValueError, match="oracle must be finite and not zero"):
        assert_within(x, x.double(), x, 1.0)


def test_nan_is_never_within() -> None:
    o = torch.tensor([1.0, 2.0], dtype=torch.float64)
    bad = torch.tensor([1.0, torch.nan])
    with pytest.raises(AssertionError, match="row 1, column 0"):
        assert_within(bad, o, o.float(), 1.0)
    with pytest.raises(AssertionError):
        assert_within(bad, o, bad, 1.0)  # not even where eager overflows as well
    with pytest.raises(AssertionError):
        assert_zero(bad, 1.0)
    with pytest.raises(AssertionError):
        assert_ema_within(bad, o, o.float(), o.float())


def test_the_three_lines_of_the_rule() -> None:
    """``band = 2^-23 + 8 * 2^-23`` at 1.0 with a scale of 1."""
    eps, rows = 2.0**-23, 32
    o = torch.ones(rows, dtype=torch.float64)

    def off(bands: float, count: int = 1) -> Tensor:
        return o.float() + torch.tensor([bands * 9 * eps] * count + [0.0] * (rows - count))

    def judged(ours: Tensor, eager: Tensor) -> bool:
        try:
            assert_within(ours, o, eager, 1.0)
        except AssertionError:
            return False
        return True

    assert judged(off(1), off(0)) and not judged(off(1.2), off(0))
    assert judged(off(2.9), off(1)) and not judged(off(3.1), off(1))
    assert judged(off(3.9), off(3)) and not judged(off(4.1), off(3))  # the cap
    assert not judged(off(0.9, count=20), off(0))  # the median
    assert judged(off(0.9, count=20), off(0.5, count=20))


def test_the_band_of_a_divergence() -> None:
    """``2 ulp + 8 D`` where it moves, 1e-12 at least; where it does not, as without one."""
    eps = 2.0**-23
    o = torch.tensor([1.0, 1.0, 1e-20, 0.0], dtype=torch.float64)
    D = torch.tensor([eps, 0.0, 1e-25, 0.0], dtype=torch.float64)
    bands = torch.tensor([10 * eps, eps, NEGLIGIBLE * eps, 0.0])

    def judged(share: float, row: int) -> bool:
        ours = o.clone()
        ours[row] += share * bands[row]
        try:
            assert_within(ours.float(), o, o.float(), 0.0, moved=D)
        except AssertionError:
            return False
        return True

    for row in range(3):
        assert judged(0.8, row) and not judged(1.6, row)
    ours = o.float()
    ours[3] = 1e-30
    with pytest.raises(AssertionError, match="row 3"):
        assert_within(ours, o, o.float(), 0.0, moved=D)


def test_a_failure_names_everything() -> None:
    o = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    ours = torch.tensor([[1.0, 2.0], [3.0, 4.1]])
    with pytest.raises(AssertionError) as failure:
        assert_within(ours, o, o.float(), 1.0, case="case 7", output="dlogits")
    message = str(failure.value)
    for word in ("case 7", "dlogits", "row 1", "column 1", "4.099999905", "4.0", "share used"):
        assert word in message


def test_wrong_dtypes_and_shapes_are_no_match() -> None:
    o = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        assert_within(o.bfloat16(), o, o.float(), 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(o.float()[None], o, o.float(), 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_value(o, 1.0)


def test_ema_is_judged_by_the_larger_operand() -> None:
    shadow, param = torch.tensor([1e-3, 1.0]), torch.tensor([1.0, 1e-3])
    oracle = 0.5 * shadow.double() + 0.5 * param.double()
    assert_ema_within(oracle.float() + 1e-7, oracle, shadow, param)
    with pytest.raises(AssertionError, match="EMA element 0"):
        assert_ema_within(oracle.float() + torch.tensor([4e-7, 0]), oracle, shadow, param)
