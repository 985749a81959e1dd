"""Pooling, the queue and InfoNCE, each against lists of single sequences."""

from __future__ import annotations

import math
from collections import deque

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

from sad.losses.contrastive import (
    ContrastiveResult,
    TeacherQueue,
    contrastive_loss,
    mean_pool,
)
from sad.losses.layout import Layout

LAYOUT = make_layout()
WIDTH = 6
VALID = torch.tensor([True, False, True, True, False, True])
COUNT = 4


def embeddings(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, len(VALID), WIDTH, dtype=torch.float64) * 5
    return student.to(dtype), teacher.to(dtype)


def full_queue(size: int, filled: int) -> tuple[TeacherQueue, list[Tensor]]:
    """A queue of ``size`` with ``filled`` embeddings, and these as unit vectors in float64."""
    queue = TeacherQueue(size, WIDTH)
    z = torch.randn(filled, WIDTH)
    queue.enqueue(z, torch.ones(filled, dtype=torch.bool))
    return queue, [row / row.norm() for row in z.double()]


def definition(
    student: Tensor, teacher: Tensor, valid: Tensor, negatives: list[Tensor], temperature: float
) -> Tensor:
    students = [row / row.norm() for row in student[valid]]
    teachers = [row / row.norm() for row in teacher[valid]]
    total = torch.zeros((), dtype=torch.float64)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        ahead = torch.stack([s @ other / temperature for other in teachers + negatives])
        back = torch.stack([t @ other / temperature for other in students])
        total = total + (ahead.exp().sum().log() - ahead[i] + back.exp().sum().log() - back[i]) / 2
    return total


def loss(student: Tensor, teacher: Tensor, queue: TeacherQueue | None = None) -> Tensor:
    return contrastive_loss(student, teacher, VALID, queue, count=COUNT).term.sum


# InfoNCE


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("filled", [None, 0, 3, 5])
@pytest.mark.parametrize("extra", [0, 2])
def test_value_and_gradient_are_those_of_the_definition(
    filled: int | None, extra: int, temperature: float
) -> None:
    student, teacher = embeddings()
    queue, negatives = (None, []) if filled is None else full_queue(5, filled)
    others = torch.randn(extra, WIDTH, dtype=torch.float64)
    negatives = negatives + [row / row.norm() for row in others]
    padded = torch.cat([others, torch.zeros(3, WIDTH)]) if extra else None

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return contrastive_loss(
            student, teacher, VALID, queue, count=COUNT, temperature=temperature, others=padded
        ).term.sum

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        return definition(student, teacher, VALID, negatives, temperature)

    expected = value_and_gradients(theirs, [student], [teacher])
    assert expected[0] > 1
    tolerance = 1e-6 if filled else 1e-13  # the queue is in fp32
    assert_close(value_and_gradients(ours, [student], [teacher]), expected, tolerance)
    narrow = value_and_gradients(ours, [student.float()], [teacher.float()])
    assert_close(narrow, expected, 5e-6)


def test_hand_values() -> None:
    """Two sequences told apart perfectly, by vectors at right angles, at temperature 1."""
    z = torch.eye(2)
    found = contrastive_loss(z, 3 * z, torch.ones(2).bool(), None, count=2, temperature=1.0)
    assert found.term.sum.item() == pytest.approx(2 * math.log(1 + math.exp(-1)))
    assert found.term.count == 2
    assert found.accuracy == 1 and found.chance.item() == pytest.approx(math.log(2))
    crossed = contrastive_loss(z, z.flip(0), torch.ones(2).bool(), None, count=2, temperature=1.0)
    assert crossed.term.sum.item() == pytest.approx(2 * math.log(1 + math.exp(1)))
    assert crossed.accuracy == 0


def test_embeddings_all_alike_cost_what_chance_says() -> None:
    z = torch.ones(6, WIDTH)
    queue = TeacherQueue(8, WIDTH)
    queue.enqueue(torch.ones(3, WIDTH), torch.ones(3).bool())
    found = contrastive_loss(z, z, VALID, queue, count=COUNT, others=torch.ones(2, WIDTH))
    assert found.chance.item() == pytest.approx((math.log(4 + 3 + 2) + math.log(4)) / 2)
    assert found.term.sum.item() / COUNT == pytest.approx(found.chance.item())


def test_accuracy_counts_sequences_nearest_to_their_own_teacher() -> None:
    student, teacher = embeddings(torch.float32)
    student[0], student[2] = teacher[0], teacher[2]
    student[3], student[5] = teacher[5], teacher[3]
    student[1], student[4] = teacher[1], teacher[4]  # no sequences
    found = contrastive_loss(student, teacher, VALID, None, count=COUNT)
    assert found.accuracy == 2 / 4
    queue = TeacherQueue(2, WIDTH)
    queue.enqueue(teacher[[0]] * 2, torch.ones(1).bool())
    with_rival = contrastive_loss(student + 0.1, teacher, VALID, queue, count=COUNT)
    assert with_rival.accuracy <= 2 / 4
    assert not (with_rival.accuracy.requires_grad or with_rival.chance.requires_grad)


def test_one_sequence_alone_costs_nothing() -> None:
    student, teacher = embeddings(torch.float32)
    valid = torch.tensor([False, True, False, False, False, False])
    value, gradient = value_and_gradients(
        lambda s, t: contrastive_loss(s, t, valid, None, count=1).term.sum, [student], [teacher]
    )
    assert value == 0 and not gradient.any()


def test_no_sequence_gives_a_zero_with_a_graph() -> None:
    student, teacher = embeddings(torch.float32)
    found: list[ContrastiveResult] = []

    def nothing(student: Tensor, teacher: Tensor) -> Tensor:
        found.append(contrastive_loss(student, teacher, VALID & False, None, count=0))
        return found[0].term.sum

    assert not any(tensor.any() for tensor in value_and_gradients(nothing, [student], [teacher]))
    assert found[0].accuracy == 0 and found[0].chance == 0


def test_rows_that_are_no_sequence_are_ignored() -> None:
    queue, _ = full_queue(5, 3)
    student, teacher = embeddings(torch.float32)
    assert_ignores(
        lambda s, t: loss(s[:, 0], t[:, 0], queue),
        [student[:, None]],
        [teacher[:, None]],
        VALID[:, None],
        axis=1,
    )


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_embeddings_too_large_or_small_to_be_squared(size: float) -> None:
    student, teacher = embeddings(torch.float32)
    expected = value_and_gradients(loss, [student], [teacher])
    value, gradient = value_and_gradients(loss, [student * size], [teacher * size])
    assert_close([value, gradient.double() * size], expected, 1e-5)


def test_16_bits_are_computed_in_32_even_under_autocast() -> None:
    queue, _ = full_queue(5, 3)
    student, teacher = embeddings(torch.bfloat16)
    expected = loss(student.float(), teacher.float(), queue)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([loss(student, teacher, queue)], [expected])


def test_the_queue_may_move_on_before_backward() -> None:
    queue, _ = full_queue(5, 3)
    student, teacher = embeddings(torch.float32)

    def moving(student: Tensor, teacher: Tensor) -> Tensor:
        value = loss(student, teacher, queue)
        queue.enqueue(teacher, VALID)
        return value

    still = value_and_gradients(lambda s, t: loss(s, t, queue), [student], [teacher])
    assert_same_bits(value_and_gradients(moving, [student], [teacher]), still)


def test_a_teacher_that_could_be_trained_is_refused() -> None:
    student, teacher = embeddings()
    trained = teacher.clone().requires_grad_()
    with pytest.raises(ValueError, match="must not require a gradient"):
        loss(student, trained)
    with pytest.raises(ValueError, match="must not require a gradient"):
        contrastive_loss(student, teacher, VALID, None, count=COUNT, others=trained)


# The queue


def test_first_in_first_out() -> None:
    queue, model = TeacherQueue(5, WIDTH), deque[Tensor](maxlen=5)
    generator = torch.Generator().manual_seed(1)
    for rows in (2, 0, 1, 4, 3, 9, 0, 2):
        z = torch.randn(rows, WIDTH, generator=generator)
        valid = torch.rand(rows, generator=generator) < 0.7
        z[~valid] = torch.nan
        queue.enqueue(z.to(torch.bfloat16), valid)
        model.extend(row / row.norm() for row in z[valid].bfloat16().float())
        held, filled = queue.negatives()
        assert filled.sum() == len(model) == queue.filled
        oldest = int(queue.position) if len(model) == 5 else 0
        in_order = held.roll(-oldest, 0)[: len(model)]
        assert_close([in_order], [torch.stack(list(model))], 1e-6)
    assert len(model) == 5 and held.dtype == torch.float32


def test_the_queue_is_state_and_gets_no_gradient() -> None:
    queue, _ = full_queue(5, 7)
    state = queue.state_dict()
    assert set(state) == {"embeddings", "position", "filled"} and not list(queue.parameters())
    resumed = TeacherQueue(5, WIDTH)
    resumed.load_state_dict(state)
    z = torch.randn(2, WIDTH, requires_grad=True)
    for each in (queue, resumed):
        each.enqueue(z, torch.ones(2).bool())
    assert_same_bits(list(resumed.state_dict().values()), list(queue.state_dict().values()))
    assert not queue.embeddings.requires_grad


# Pooling


def test_pooling_is_a_mean_over_tokens_of_a_segment() -> None:
    hidden = torch.randn(len(ROWS), LENGTH, WIDTH, dtype=torch.float64)
    pooled, valid = mean_pool(hidden, LAYOUT)
    expected, exists = torch.zeros(3, 3, WIDTH, dtype=torch.float64), torch.zeros(3, 3).bool()
    for row, number, start, end in spans():
        if end - start > 1:
            expected[row, number] = torch.stack(list(hidden[row, start + 1 : end])).mean(0)
            exists[row, number] = True
    assert torch.equal(valid, exists) and valid.sum() == LAYOUT.units.sequences == 5
    assert_close([pooled], [expected], 1e-15)
    narrow, _ = mean_pool(hidden.bfloat16(), LAYOUT)
    assert narrow.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([mean_pool(hidden.bfloat16(), LAYOUT)[0]], [narrow])


def test_pooling_ignores_all_but_tokens() -> None:
    weight = torch.randn(len(ROWS), 3, WIDTH)

    def loss(hidden: Tensor) -> Tensor:
        return (mean_pool(hidden, LAYOUT)[0] * weight).sum()

    hidden = torch.randn(len(ROWS), LENGTH, WIDTH)
    assert_ignores(loss, [hidden], [], LAYOUT.tokens, axis=1)


def test_nothing_waits_for_the_device() -> None:
    def step(hidden: Tensor, teacher: Tensor, queue: Tensor, layout: Layout) -> Tensor:
        fifo = TeacherQueue(5, WIDTH)
        z_s, valid = mean_pool(hidden, layout)
        z_t, _ = mean_pool(teacher, layout)
        z_s, z_t, valid = z_s.flatten(0, 1), z_t.flatten(0, 1), valid.flatten()
        result = contrastive_loss(z_s, z_t, valid, fifo, count=layout.units.sequences, others=queue)
        fifo.enqueue(z_t, valid)
        return result.term.sum

    hidden, teacher = torch.randn(2, len(ROWS), LENGTH, WIDTH)
    assert_waits_for_nothing(step, [hidden], [teacher, torch.randn(4, WIDTH), LAYOUT])
