"""TAID's schedule against its formula in exact fractions, adaptive KL against plain loops."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.layouts import (
    assert_close,
    assert_same_bits,
    assert_waits_for_nothing,
    value_and_gradients,
)
from torch import Tensor

from sad.losses.taid import TAIDSchedule, adaptive_kl

LOSSES = [2.0, 1.5, 1.8, 1.2, 1.2, 0.9, 3.0, 0.5]

# TAID


def run(schedule: TAIDSchedule, losses: list[float], progress: list[float]) -> list[float]:
    values = []
    for loss, x in zip(losses, progress, strict=True):
        schedule.update(loss, x)
        values.append(schedule.value)
    return values


def test_the_schedule_is_the_formula() -> None:
    alpha, beta = 0.2, 0.9
    u, m, previous, expected = 0.4, 0.0, None, []
    for step, loss in enumerate(LOSSES):
        if previous is not None:
            m = beta * m + (1 - beta) * (previous - loss) / previous
        previous = loss
        u = min(1.0, max(0.4 + 0.6 * step / 100, u + alpha / (1 + math.exp(-m)) * (1 - u)))
        expected.append(u)
    schedule = TAIDSchedule(alpha=alpha, beta=beta)
    assert schedule.value == 0.4
    found = run(schedule, LOSSES, [step / 100 for step in range(len(LOSSES))])
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == pytest.approx(0.4 + 0.2 * 0.5 * 0.6)  # by hand: nothing to compare with


def test_falling_losses_move_it_faster_than_rising_ones() -> None:
    falling, rising = (
        run(TAIDSchedule(alpha=0.1, beta=0.5), losses, [0.0] * 5)[-1]
        for losses in ([5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    )
    assert falling > rising > 0.4


def test_the_defaults_are_a_line_in_a_short_run() -> None:
    progress = [step / 1000 for step in range(1, 1001)]
    found = run(TAIDSchedule(), [2 - x for x in progress], progress)
    assert found == pytest.approx([0.4 + 0.6 * x for x in progress], abs=5e-4)
    assert found[-1] == 1.0


def test_it_never_falls_and_never_passes_its_end() -> None:
    schedule = TAIDSchedule(start=0.2, end=0.8, alpha=0.5)
    found = run(schedule, LOSSES, [0.0, 0.9, 0.1, 0.0, 1.0, 1.0, 0.0, 2.0])
    assert found == sorted(found) and found[-1] == 0.8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_changes_no_momentum(bad: float) -> None:
    schedule, other = TAIDSchedule(alpha=0.1), TAIDSchedule(alpha=0.1)
    run(schedule, [2.0, 1.0, bad, 0.5], [0.0, 0.0, 0.0, 0.0])
    run(other, [2.0, 1.0, 0.5], [0.0, 0.0, 0.0])
    assert schedule.state_dict() == other.state_dict()
    schedule.update(bad, 0.9)
    assert schedule.value == pytest.approx(0.4 + 0.6 * 0.9)


def test_losses_of_zero_and_leaps_do_no_harm() -> None:
    found = run(TAIDSchedule(alpha=0.1), [0.0, 1.0, 1e-6, 1e6, 1e-6, 1.0], [0.0] * 6)
    assert all(math.isfinite(u) for u in found) and found == sorted(found)


def test_state_goes_through_json() -> None:
    schedule = TAIDSchedule(alpha=0.1, beta=0.7)
    fresh = json.loads(json.dumps(schedule.state_dict()))
    run(schedule, LOSSES[:3], [0.0, 0.1, 0.2])
    state = json.loads(json.dumps(schedule.state_dict()))
    resumed = TAIDSchedule(alpha=0.1, beta=0.7)
    resumed.load_state_dict(state)
    assert resumed.value == schedule.value
    rest = (LOSSES[3:], [0.2] * 5)
    assert run(resumed, *rest) == run(schedule, *rest)
    assert resumed.state_dict() == schedule.state_dict()
    resumed.load_state_dict(fresh)
    assert resumed.state_dict() == TAIDSchedule().state_dict()


# Adaptive KL


def definition(student: Tensor, teacher: Tensor, head_mass: float = 0.5) -> Tensor:
    rows = []
    for s, t in zip(student, teacher, strict=True):
        q, p = s.exp() / s.exp().sum(), t.exp() / t.exp().sum()
        ids = sorted(range(len(p)), key=lambda v, p=p: -p[v].item())
        head, mass = {ids[0]}, p[ids[0]].item()
        for v in ids[1:]:
            mass += p[v].item()
            if mass > head_mass:
                break
            head.add(v)
        gap = [abs(p[v].item() - q[v].item()) for v in range(len(p))]
        in_head, whole = sum(gap[v] for v in head), sum(gap)
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        rows.append((in_head * forward + (whole - in_head) * reverse) / whole)
    return torch.stack(rows)


WEIGHTS = torch.tensor([0.3, -1.0, 2.0, 0.7])


def logits(dtype: torch.dtype = torch.float64, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64) * scale
    return student.to(dtype), teacher.to(dtype)


def weighted(student: Tensor, teacher: Tensor) -> Tensor:
    return (adaptive_kl(student, teacher) * WEIGHTS).sum()


@pytest.mark.parametrize("head_mass", [0.01, 0.5, 0.9])
def test_value_and_gradient_are_those_of_the_definition(head_mass: float) -> None:
    student, teacher = logits()

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        return (definition(student, teacher, head_mass) * WEIGHTS).sum()

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return (adaptive_kl(student, teacher, head_mass) * WEIGHTS).sum()

    expected = value_and_gradients(theirs, [student], [teacher])
    assert_close(value_and_gradients(ours, [student], [teacher]), expected, 1e-14)
    narrow = value_and_gradients(ours, [student.float()], [teacher.float()])
    assert_close(narrow, expected, 2e-6)


def test_hand_value() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): the head is the first token, gaps 1/4 and 1/4."""
    p, q = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 1.0]]).log()
    assert adaptive_kl(q, p).item() == pytest.approx(0.25 * math.log(2))
    third = torch.tensor([[1.0, 1.0, 2.0]]).log()  # both KLs are alike whatever the weights
    assert adaptive_kl(third, p).item() == pytest.approx(0.25 * math.log(2))


def test_equal_rows_cost_nothing() -> None:
    student, _ = logits(torch.float32)
    value, gradient = value_and_gradients(weighted, [student], [student])
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_confident_rows_stay_finite(scale: float) -> None:
    student, teacher = logits(torch.float32, scale)
    for s, t in ((student, teacher), (student, teacher / scale), (student / scale, teacher)):
        assert all(torch.isfinite(x).all() for x in value_and_gradients(weighted, [s], [t]))


def test_16_bits_are_computed_in_32_even_under_autocast() -> None:
    student, teacher = logits(torch.bfloat16)
    expected = adaptive_kl(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([adaptive_kl(student, teacher)], [expected])


def test_nothing_waits_for_the_device() -> None:
    student, teacher = logits(torch.float32)
    assert_waits_for_nothing(lambda s, t: adaptive_kl(s, t).sum(), [student], [teacher])


def test_a_teacher_that_could_be_trained_is_refused() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match="must not require a gradient"):
        adaptive_kl(student, teacher.requires_grad_())
