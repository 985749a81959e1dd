"""MiniLMv2 relations against their definition: one projection, one head, one token at a time."""

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
    make_layout,
    spans,
    value_and_gradients,
)
from torch import Tensor

from sad.losses.base import Projections
from sad.losses.layout import Layout
from sad.losses.relations import relation_heads, relation_loss

LAYOUT = make_layout()
STUDENT, TEACHER, HEADS = (96, 64, 64), (128, 32, 32), (4, 2, 2)


def projections(
    widths: tuple[int, int, int], dtype: torch.dtype = torch.float64, rows: int = len(ROWS)
) -> list[Tensor]:
    return [torch.randn(rows, LENGTH, w, dtype=torch.float64).to(dtype) for w in widths]


def loss(*six: Tensor, block: int = 3, layout: Layout = LAYOUT) -> Tensor:
    return relation_loss(Projections(*six[:3]), Projections(*six[3:]), layout, block).sum


def definition(*six: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for student, teacher, heads in zip(six[:3], six[3:], HEADS, strict=True):
        for row, _, start, end in spans():
            for i in range(start + 1, end):
                for head in range(heads):
                    p, q = (relation(x[row], head, heads, start, i) for x in (teacher, student))
                    total = total + (p * (p / q).log()).sum() / heads
    return total


def relation(x: Tensor, head: int, heads: int, start: int, i: int) -> Tensor:
    """How alike position i is to each from ``start`` to itself: a distribution."""
    width = x.shape[1] // heads
    own = x[:, head * width : (head + 1) * width]
    scores = torch.stack([own[i] @ own[j] / math.sqrt(width) for j in range(start, i + 1)])
    return (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()


def test_value_and_gradients_are_those_of_the_definition() -> None:
    student, teacher = projections(STUDENT), projections(TEACHER)
    expected = value_and_gradients(definition, student, teacher)
    assert expected[0] > 1
    assert_close(value_and_gradients(loss, student, teacher), expected, 1e-13)
    student, teacher = ([x.float() for x in side] for side in (student, teacher))
    assert_close(value_and_gradients(loss, student, teacher), expected, 5e-6)
    whole = value_and_gradients(lambda *six: loss(*six, block=256), student, teacher)
    assert_close(whole, expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32_even_under_autocast(dtype: torch.dtype) -> None:
    student, teacher = projections(STUDENT, dtype), projections(TEACHER, dtype)
    upcast = [[x.float() for x in side] for side in (student, teacher)]
    expected = value_and_gradients(loss, *upcast)
    narrow = value_and_gradients(loss, student, teacher)
    assert_same_bits(narrow, [expected[0], *(x.to(dtype) for x in expected[1:])])

    def under_autocast(*six: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*six)

    assert_same_bits(value_and_gradients(under_autocast, *upcast), expected)


def test_equal_projections_cost_nothing() -> None:
    student = projections(STUDENT, torch.float32)
    value, *gradients = value_and_gradients(loss, student, student)
    assert value == 0
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_padding_is_ignored() -> None:
    student, teacher = projections(STUDENT, torch.float32), projections(TEACHER, torch.float32)
    assert_ignores(loss, student, teacher, LAYOUT.real, axis=1)


def test_large_projections_stay_finite() -> None:
    """Norms of 1e3 make scores of 1e5: every row attends to one key."""
    student, teacher = projections(STUDENT, torch.float32), projections(TEACHER, torch.float32)
    tensors = value_and_gradients(loss, [x * 100 for x in student], [x * 100 for x in teacher])
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_rows_of_a_batch_add_up() -> None:
    student, teacher = projections(STUDENT), projections(TEACHER)
    whole = relation_loss(Projections(*student), Projections(*teacher), LAYOUT)
    parts = [
        relation_loss(
            Projections(*(x[b : b + 1] for x in student)),
            Projections(*(x[b : b + 1] for x in teacher)),
            make_layout([sizes]),
        )
        for b, sizes in enumerate(ROWS)
    ]
    assert whole.count == sum(part.count for part in parts) == 12
    assert_close([torch.stack([part.sum for part in parts]).sum()], [whole.sum], 1e-14)


def test_no_token_gives_a_zero_with_a_graph() -> None:
    student, teacher = projections(STUDENT), projections(TEACHER)
    layout = make_layout([(1, 1), (1,), ()])
    tensors = value_and_gradients(lambda *six: loss(*six, layout=layout), student, teacher)
    assert not any(tensor.any() for tensor in tensors)


def test_nothing_waits_for_the_device() -> None:
    def on(layout: Layout, *six: Tensor) -> Tensor:
        return loss(*six, layout=layout)

    student, teacher = projections(STUDENT, torch.float32), projections(TEACHER, torch.float32)
    assert_waits_for_nothing(lambda *all: on(all[6], *all[:6]), student, [*teacher, LAYOUT])


@pytest.mark.parametrize(
    ("student", "teacher", "heads"),
    [
        (576, 2048, 32),  # 64 divides both, but leaves 9 and 32
        (192, 512, 8),
        (64, 64, 4),
        (96, 128, 4),
        (48, 80, 2),  # 16 divides both, but leaves 3 and 5
        (16, 4096, 1),
        (17, 19, 1),
        (1024, 4096, 64),
    ],
)
def test_relation_heads(student: int, teacher: int, heads: int) -> None:
    assert relation_heads(student, teacher) == heads == relation_heads(teacher, student)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 wide to be compared by relations, got 8"):
        relation_heads(8, 64)
    student, teacher = projections(STUDENT), projections(TEACHER)
    for x in teacher:
        x.requires_grad_()
        with pytest.raises(ValueError, match="must not require a gradient"):
            loss(*student, *teacher)
        x.requires_grad_(False)
