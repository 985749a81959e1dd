"""The feature loss against its formulas, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.layouts import (
    LENGTH,
    ROWS,
    assert_close,
    assert_ignores,
    assert_same_bits,
    assert_waits_for_nothing,
    counting,
    make_layout,
    value_and_gradients,
)
from torch import Tensor

from sad.losses.feature import Distance, distances, feature_loss
from sad.losses.layout import Layout

LAYOUT = make_layout()
KINDS = pytest.mark.parametrize("kind", ["cosine", "relative_mse"])


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, len(ROWS), LENGTH, 6, dtype=torch.float64) * 3
    return student.to(dtype), teacher.to(dtype)


def definition(kind: Distance, student: Tensor, teacher: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, column in counting():
        y, h = student[row, column], teacher[row, column]
        if kind == "cosine":
            total = total + 1 - y @ h / ((y @ y).sqrt() * (h @ h).sqrt())
        else:
            total = total + ((y - h) ** 2).mean() / (h**2).mean()
    return total


@KINDS
def test_value_and_gradient_are_those_of_the_definition(kind: Distance) -> None:
    student, teacher = states()

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return feature_loss(student, teacher, LAYOUT, kind).sum

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        return definition(kind, student, teacher)

    expected = value_and_gradients(theirs, [student], [teacher])
    assert expected[0] > 5
    assert_close(value_and_gradients(ours, [student], [teacher]), expected, 1e-14)
    narrow = value_and_gradients(ours, [student.float()], [teacher.float()])
    assert_close(narrow, expected, 1e-6)


def test_hand_values() -> None:
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 0.0], [1.0, 1.0]])
    assert_close([distances(student, teacher, "cosine")], [torch.tensor([0.4, 0, 2, 0.5])], 1e-7)
    assert_close(
        [distances(student, teacher, "relative_mse")], [torch.tensor([20, 9 / 25, 9 / 4, 1])], 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KINDS
def test_16_bits_are_computed_in_32_even_under_autocast(kind: Distance, dtype: torch.dtype) -> None:
    student, teacher = states(dtype)
    expected = feature_loss(student.float(), teacher.float(), LAYOUT, kind).sum
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([feature_loss(student, teacher, LAYOUT, kind).sum], [expected])


@KINDS
def test_the_cosine_ignores_scale_and_the_square_does_not(kind: Distance) -> None:
    student, teacher = states()
    once, twice = (distances(student * s, teacher, kind) for s in (1, 2))
    assert torch.allclose(once, twice) == (kind == "cosine")
    assert torch.allclose(once, distances(student * 8, teacher * 8, kind))


@KINDS
def test_equal_states_cost_nothing(kind: Distance) -> None:
    student, _ = states(torch.float32)
    value, gradient = value_and_gradients(
        lambda s, t: feature_loss(s, t, LAYOUT, kind).sum, [student], [student]
    )
    assert value == 0 and gradient.abs().max() < 1e-7


def test_small_angles_keep_their_digits() -> None:
    """At an angle of 1e-3, ``1 - cos`` in fp32 has three digits left."""
    angle = 1e-3
    student = torch.tensor([math.cos(angle), math.sin(angle)])
    found = distances(student, torch.tensor([1.0, 0.0]), "cosine").item()
    assert found == pytest.approx(1 - math.cos(angle), rel=1e-5)


@KINDS
def test_all_but_tokens_is_ignored(kind: Distance) -> None:
    student, teacher = states(torch.float32)
    assert_ignores(
        lambda s, t: feature_loss(s, t, LAYOUT, kind).sum,
        [student],
        [teacher],
        LAYOUT.tokens,
        axis=1,
    )


@pytest.mark.parametrize("size", [1e30, 1e-30])
@KINDS
def test_states_too_large_or_small_to_be_squared(kind: Distance, size: float) -> None:
    student, teacher = states()
    expected = value_and_gradients(
        lambda s, t: feature_loss(s, t, LAYOUT, kind).sum, [student], [teacher]
    )
    found = value_and_gradients(
        lambda s, t: feature_loss(s, t, LAYOUT, kind).sum,
        [(student * size).float()],
        [(teacher * size).float()],
    )
    assert_close([found[0], found[1].double() * size], expected, 1e-5)


@KINDS
def test_zeros_stay_finite(kind: Distance) -> None:
    student, teacher = states(torch.float32)
    zeros = torch.zeros_like(student)
    for s, t in ((zeros, teacher), (student, zeros), (zeros, zeros)):
        tensors = value_and_gradients(lambda s, t: feature_loss(s, t, LAYOUT, kind).sum, [s], [t])
        assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert distances(zeros, zeros, kind).abs().max() == 0


@KINDS
def test_rows_of_a_batch_add_up(kind: Distance) -> None:
    student, teacher = states()
    whole = feature_loss(student, teacher, LAYOUT, kind)
    parts = [
        feature_loss(student[b : b + 1], teacher[b : b + 1], make_layout([sizes]), kind)
        for b, sizes in enumerate(ROWS)
    ]
    assert whole.count == sum(part.count for part in parts) == 12
    assert_close([torch.stack([part.sum for part in parts]).sum()], [whole.sum], 1e-14)


@KINDS
def test_no_token_gives_a_zero_with_a_graph(kind: Distance) -> None:
    student, teacher = states()
    layout = make_layout([(1, 1), (1,), ()])
    tensors = value_and_gradients(
        lambda s, t: feature_loss(s, t, layout, kind).sum, [student], [teacher]
    )
    assert not any(tensor.any() for tensor in tensors)


@KINDS
def test_nothing_waits_for_the_device(kind: Distance) -> None:
    def loss(student: Tensor, teacher: Tensor, layout: Layout) -> Tensor:
        return feature_loss(student, teacher, layout, kind).sum

    student, teacher = states(torch.float32)
    assert_waits_for_nothing(loss, [student], [teacher, LAYOUT])


@KINDS
def test_a_teacher_that_could_be_trained_is_refused(kind: Distance) -> None:
    student, teacher = states()
    with pytest.raises(ValueError, match="must not require a gradient"):
        feature_loss(student, teacher.requires_grad_(), LAYOUT, kind)
