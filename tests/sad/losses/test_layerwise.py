"""Which layers are paired, how pairs are weighed, and their sum."""

from __future__ import annotations

import math

import pytest
import torch
from support.layouts import (
    LENGTH,
    ROWS,
    assert_close,
    assert_ignores,
    assert_waits_for_nothing,
    counting,
    make_layout,
    value_and_gradients,
)
from torch import Tensor

from sad.losses.layerwise import (
    PairWeights,
    adaptive_pair_weights,
    check_layer_map,
    layer_pairs,
    layerwise_loss,
)
from sad.losses.layout import Layout

LAYOUT = make_layout()
WEIGHTS = pytest.mark.parametrize("pair_weights", ["uniform", "adaptive"])

# Pairs


@pytest.mark.parametrize(
    ("student", "teacher", "n", "expected"),
    [
        (12, 28, 4, ((2, 6), (5, 13), (8, 20), (11, 27))),
        (2, 2, 4, ((0, 0), (1, 1))),
        (1, 30, 4, ((0, 29),)),
        (6, 12, 1, ((5, 11),)),
        (5, 7, 3, ((1, 1), (2, 4), (4, 6))),
    ],
)
def test_pairs(student: int, teacher: int, n: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert layer_pairs(student, teacher, n) == expected


def test_every_proposal_passes_the_check() -> None:
    for student in (*range(1, 20), 61, 128):
        for teacher in (*range(1, 20), 61, 128):
            for n in (1, 2, 3, 4, 7, 128):
                pairs = layer_pairs(student, teacher, n)
                assert len(pairs) == min(student, teacher, n)
                check_layer_map(pairs, student, teacher)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(5, 11), (2, 6)],
        [(2, 6), (2, 11)],
        [(3, 6), (2, 8), (5, 11)],
        [(2, 8), (3, 6), (5, 11)],
        [(2, 8), (3, 8), (5, 11)],
        [(-1, 3), (5, 11)],
        [(2, -3), (5, 11)],
        [(2, 6)],
        [(2, 6), (5, 10)],
        [(2, 6), (4, 11)],
        [(2, 6), (6, 12)],
    ],
)
def test_other_maps_are_refused_with_a_proposal(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="a layer map must hold pairs") as error:
        check_layer_map(pairs, 6, 12)
    message = str(error.value)
    assert "(5, 11)" in message.partition("take for example")[2]
    assert f"got {' '.join(str(pair) for pair in pairs) or 'none'};" in message


# The loss


def states(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    shape = (3, len(ROWS), LENGTH, 5)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
    teacher[0] = 4 * student[0] + teacher[0]  # an easy pair
    return list(student), list(teacher)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, column in counting():
        y, h = student[row, column], teacher[row, column]
        total = total + 1 - y @ h / ((y @ y).sqrt() * (h @ h).sqrt())
    return total


def loss(*six: Tensor, pair_weights: PairWeights = "uniform", layout: Layout = LAYOUT) -> Tensor:
    return layerwise_loss(six[:3], six[3:], layout, "cosine", pair_weights).sum


def test_value_and_gradients_are_those_of_the_definition() -> None:
    def definition(*six: Tensor) -> Tensor:
        pairs = zip(six[:3], six[3:], strict=True)
        return torch.stack([cosine(student, teacher) for student, teacher in pairs]).sum() / 3

    students, teachers = states()
    expected = value_and_gradients(definition, students, teachers)
    assert_close(value_and_gradients(loss, students, teachers), expected, 1e-14)


def test_adaptive_weights_are_constants_of_the_gradient() -> None:
    students, teachers = states()
    sums = torch.stack([cosine(s, t) for s, t in zip(students, teachers, strict=True)])
    weights = adaptive_pair_weights(sums / 12)
    assert weights[0] > weights[1:].max()

    def definition(*six: Tensor) -> Tensor:
        pairs = zip(weights, six[:3], six[3:], strict=True)
        return torch.stack([w * cosine(student, teacher) for w, student, teacher in pairs]).sum()

    expected = value_and_gradients(definition, students, teachers)
    found = value_and_gradients(
        lambda *six: loss(*six, pair_weights="adaptive"), students, teachers
    )
    assert_close(found, expected, 1e-13)


def test_relative_squares_reach_the_pairs() -> None:
    students, teachers = states()
    term = layerwise_loss(students[:1], teachers[:1], LAYOUT, "relative_mse")
    expected = sum(
        ((students[0][at] - teachers[0][at]) ** 2).mean() / (teachers[0][at] ** 2).mean()
        for at in counting()
    )
    assert term.sum.item() == pytest.approx(float(expected))


@WEIGHTS
def test_all_but_tokens_is_ignored(pair_weights: PairWeights) -> None:
    students, teachers = states(torch.float32)
    assert_ignores(
        lambda *six: loss(*six, pair_weights=pair_weights),
        students,
        teachers,
        LAYOUT.tokens,
        axis=1,
    )


def test_rows_of_a_batch_add_up() -> None:
    students, teachers = states()
    whole = layerwise_loss(students, teachers, LAYOUT)
    parts = [
        layerwise_loss(
            [x[b : b + 1] for x in students], [x[b : b + 1] for x in teachers], make_layout([sizes])
        )
        for b, sizes in enumerate(ROWS)
    ]
    assert whole.count == sum(part.count for part in parts) == 12
    assert_close([torch.stack([part.sum for part in parts]).sum()], [whole.sum], 1e-14)


@WEIGHTS
def test_no_token_gives_a_zero_with_a_graph(pair_weights: PairWeights) -> None:
    layout = make_layout([(1, 1), (1,), ()])
    tensors = value_and_gradients(
        lambda *six: loss(*six, pair_weights=pair_weights, layout=layout), *states()
    )
    assert not any(tensor.any() for tensor in tensors)


@WEIGHTS
def test_nothing_waits_for_the_device(pair_weights: PairWeights) -> None:
    students, teachers = states(torch.float32)
    assert_waits_for_nothing(
        lambda *all: loss(*all[:6], pair_weights=pair_weights, layout=all[6]),
        students,
        [*teachers, LAYOUT],
    )


# Adaptive weights


def entropy(weights: Tensor) -> float:
    return float(-torch.special.xlogy(weights.double(), weights.double()).sum())


@pytest.mark.parametrize(
    "losses",
    [
        [0.1, 0.2],
        [0.5, 0.5001, 0.5002, 0.51],
        [1e-6, 1.0, 2.0, 30.0],
        [3.0, 0.2, 0.9, 0.1, 0.25, 0.2, 0.2, 7.0],
        [100.0, 100.00001, 200.0],
    ],
)
def test_adaptive_weights_are_a_softmax_of_least_entropy(losses: list[float]) -> None:
    n = len(losses)
    weights = adaptive_pair_weights(torch.tensor(losses))
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert entropy(weights) == pytest.approx(0.9 * math.log(n), rel=1e-5)
    # One temperature explains all: log-weights are a line in the losses, falling.
    L, log_w = torch.tensor(losses).double(), weights.double().log()
    slope = (log_w[L.argmax()] - log_w[L.argmin()]) / (L.max() - L.min())
    assert slope < 0
    assert_close([log_w], [log_w[L.argmin()] + slope * (L - L.min())], 1e-4)


def test_equal_losses_have_equal_weights() -> None:
    assert torch.equal(adaptive_pair_weights(torch.full((4,), 0.3)), torch.full((4,), 0.25))
    assert torch.equal(adaptive_pair_weights(torch.tensor([0.7])), torch.ones(1))
    assert torch.equal(adaptive_pair_weights(torch.zeros(3)), torch.full((3,), 1 / 3))


def test_ties_for_the_easiest_share_all_if_that_is_even_enough() -> None:
    """Nine of ten alike: without the tenth the entropy is ln 9 = 0.954 ln 10, at tau = 0."""
    weights = adaptive_pair_weights(torch.tensor([0.2] * 9 + [0.6]))
    assert_close([weights], [torch.tensor([1 / 9] * 9 + [0.0])], 1e-6)


def test_no_gradient_passes_through_the_weights() -> None:
    losses = torch.tensor([0.1, 0.4], requires_grad=True)
    assert not adaptive_pair_weights(losses).requires_grad


def test_a_loss_that_is_not_finite_shows() -> None:
    assert adaptive_pair_weights(torch.tensor([0.1, torch.nan, 0.3])).isnan().all()
    assert adaptive_pair_weights(torch.tensor([0.1, torch.inf])).isnan().any()
