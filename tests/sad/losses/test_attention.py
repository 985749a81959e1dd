"""Attention transfer against its definition: one query, one head, one key at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.allocations import peak_bytes
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

from sad.losses.attention import (
    LearnedHeadMap,
    attention_loss,
    attention_maps,
    head_map,
    project_heads,
)
from sad.losses.base import AttentionInputs
from sad.losses.layout import Layout

LAYOUT = make_layout()


@dataclass(frozen=True)
class Case:
    """Heads (query, key) of both sides, and what their layers may do to scores."""

    student: tuple[int, int] = (2, 2)
    teacher: tuple[int, int] = (4, 4)
    window: int | None = None
    softcap: float | None = None
    block: int = 3

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """The student's query and key and the head map; the teacher's query and key."""
        shapes = [(h, d) for heads, d in ((self.student, 4), (self.teacher, 6)) for h in heads]
        qs, ks, qt, kt = (
            torch.randn(len(ROWS), h, LENGTH, d, dtype=torch.float64).to(dtype) for h, d in shapes
        )
        P = torch.randn(self.student[0], self.teacher[0], dtype=torch.float64).softmax(-1)
        return [qs, ks, P.to(dtype)], [qt, kt]

    def inputs(self, query: Tensor, key: Tensor) -> AttentionInputs:
        return AttentionInputs(query, key, query.shape[-1] ** -0.5, self.window, self.softcap)

    def loss(self, qs: Tensor, ks: Tensor, P: Tensor, qt: Tensor, kt: Tensor) -> Tensor:
        return self.loss_on(LAYOUT, qs, ks, P, qt, kt)

    def loss_on(
        self, layout: Layout, qs: Tensor, ks: Tensor, P: Tensor, qt: Tensor, kt: Tensor
    ) -> Tensor:
        student, teacher = self.inputs(qs, ks), self.inputs(qt, kt)
        return attention_loss(student, teacher, layout, P, self.block).sum

    def definition(self, qs: Tensor, ks: Tensor, P: Tensor, qt: Tensor, kt: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, _, start, end in spans():
            for i in range(start + 1, end):
                first = max(start, i - self.window + 1) if self.window else start
                student, teacher = (
                    self.rows(q[row], k[row], first, i) for q, k in ((qs, ks), (qt, kt))
                )
                for s, a in enumerate(student):
                    mixed = torch.stack([P[s, t] * row for t, row in enumerate(teacher)]).sum(0)
                    total = total + (mixed * (mixed / a).log()).sum() / len(student)
        return total

    def rows(self, query: Tensor, key: Tensor, first: int, i: int) -> list[Tensor]:
        """What query i pays to the keys from ``first`` on, a distribution for each head."""
        found = []
        for head in range(len(query)):
            keys = key[head // (len(query) // len(key))]
            scores = torch.stack([query[head, i] @ keys[j] for j in range(first, i + 1)])
            scores = scores / math.sqrt(query.shape[-1])
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            found.append(scores.exp() / scores.exp().sum())
        return found


CASES = [
    Case(),
    Case(student=(4, 2), teacher=(6, 2)),  # grouped queries: two and three heads to a key head
    Case(student=(4, 1), teacher=(2, 1)),  # fewer teacher heads, one key head
    Case(window=2),
    Case(softcap=0.8),
    Case(block=256, window=3, softcap=2.0),
]


# Maps


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_maps_are_distributions_over_visible_keys(case: Case) -> None:
    (qs, ks, _), _ = case.tensors()
    maps = attention_maps(case.inputs(qs, ks), LAYOUT, slice(0, LENGTH)).exp()
    expected = torch.zeros_like(maps)
    for row, _, start, end in spans():
        for i in range(start, end):
            first = max(start, i - case.window + 1) if case.window else start
            rows = case.rows(qs[row], ks[row], first, i)
            expected[row, :, i, first : i + 1] = torch.stack(rows)
    real = LAYOUT.real[:, None, :, None]
    assert_close([maps.masked_fill(~real, 0.0)], [expected], 1e-14)
    assert_close([maps.sum(-1)], [torch.ones_like(maps[..., 0])], 1e-14)  # padding too
    some = attention_maps(case.inputs(qs, ks), LAYOUT, slice(2, 5)).exp()
    assert_close([some], [maps[:, :, 2:5]], 1e-14)


# Heads


def test_heads_are_mixed_and_nothing_else() -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    P = torch.randn(2, 3, dtype=torch.float64)
    expected = torch.zeros(2, 2, 4, 5, dtype=torch.float64)
    for s in range(2):
        for t in range(3):
            expected[:, s] += P[s, t] * maps[:, t]
    assert_close([project_heads(maps, P)], [expected], 1e-14)


def test_permuting_queries_or_keys_commutes_with_the_projection() -> None:
    maps = torch.randn(2, 6, 5, 7).softmax(-1)
    P = torch.randn(4, 6).softmax(-1)
    queries, keys = torch.randperm(5), torch.randperm(7)
    mixed = project_heads(maps, P)
    assert torch.equal(project_heads(maps[:, :, queries], P), mixed[:, :, queries])
    assert torch.equal(project_heads(maps[..., keys], P), mixed[..., keys])
    assert_close([mixed.sum(-1)], [torch.ones(2, 4, 5)], 1e-6)
    assert (mixed >= 0).all()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (2, 4, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (4, 2, [[1, 0], [1, 0], [0, 1], [0, 1]]),
        (2, 3, [[0.5, 0.5, 0], [0, 0, 1]]),
        (3, 2, [[1, 0], [1, 0], [0, 1]]),
        (2, 2, [[1, 0], [0, 1]]),
        (1, 3, [[1 / 3, 1 / 3, 1 / 3]]),
    ],
)
def test_block_maps(student: int, teacher: int, expected: list[list[float]]) -> None:
    assert torch.equal(head_map(student, teacher), torch.tensor(expected, dtype=torch.float32))


def test_a_learned_map_starts_near_the_block_map_and_pays_for_unread_heads() -> None:
    learned = LearnedHeadMap(2, 4)
    inside = math.exp(4) / (2 * math.exp(4) + 2)
    expected = torch.tensor([[inside] * 2 + [0.5 - inside] * 2, [0.5 - inside] * 2 + [inside] * 2])
    assert_close([learned()], [expected], 1e-6)
    assert learned.regularizer().abs() < 1e-6  # every column has the same mean

    with torch.no_grad():
        learned.logits.zero_()
        learned.logits[:, 1] = 100.0  # all read one head: c = (0, 1, 0, 0)
    assert learned.regularizer().item() == pytest.approx(0.1 * (4 - 1))
    with torch.no_grad():
        learned.logits[1, 2] = 200.0  # c = (0, 1/2, 1/2, 0)
    assert learned.regularizer().item() == pytest.approx(0.1 * (4 / 2 - 1))


def test_a_learned_map_gets_gradients_from_loss_and_regularizer() -> None:
    case = Case()
    (qs, ks, _), teacher = case.tensors(torch.float32)
    learned = LearnedHeadMap(2, 4)
    with torch.no_grad():
        learned.logits[0, 3] = -200.0  # a head of weight 0
    for value in (case.loss(qs, ks, learned(), *teacher), learned.regularizer()):
        (gradient,) = torch.autograd.grad(value, learned.logits)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-4


# The loss


@pytest.mark.few(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_definition(case: Case) -> None:
    inputs, teacher = case.tensors()
    expected = value_and_gradients(case.definition, inputs, teacher)
    assert expected[0] > 1
    assert_close(value_and_gradients(case.loss, inputs, teacher), expected, 1e-13)
    inputs, teacher = ([tensor.float() for tensor in side] for side in (inputs, teacher))
    assert_close(value_and_gradients(case.loss, inputs, teacher), expected, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32_even_under_autocast(dtype: torch.dtype) -> None:
    case = Case(student=(4, 2))
    inputs, teacher = case.tensors(dtype)
    upcast = [[tensor.float() for tensor in side] for side in (inputs, teacher)]
    expected = value_and_gradients(case.loss, *upcast)
    narrow = value_and_gradients(case.loss, inputs, teacher)
    assert_same_bits(narrow, [expected[0], *(tensor.to(dtype) for tensor in expected[1:])])

    def under_autocast(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(*tensors)

    assert_same_bits(value_and_gradients(under_autocast, *upcast), expected)


def test_equal_maps_cost_nothing() -> None:
    case = Case(student=(4, 2), teacher=(4, 2))
    (qs, ks, _), _ = case.tensors(torch.float32)
    for tensor in value_and_gradients(case.loss, [qs, ks], [head_map(4, 4), qs, ks]):
        assert tensor.abs().max() < 1e-6


def test_padding_is_ignored() -> None:
    case = Case(student=(4, 2))
    (qs, ks, P), teacher = case.tensors(torch.float32)

    def loss(qs: Tensor, ks: Tensor, qt: Tensor, kt: Tensor) -> Tensor:
        return case.loss(qs, ks, P, qt, kt)

    assert_ignores(loss, [qs, ks], teacher, LAYOUT.real, axis=2)


def test_first_positions_are_keys_but_no_queries() -> None:
    case = Case()
    inputs, teacher = case.tensors()
    _, query, key, _ = value_and_gradients(case.loss, inputs, teacher)
    for row, _, start, end in spans():
        assert not query[row, :, start].any()
        assert key[row, :, start].any() == (end - start > 1)


def test_confident_heads_stay_finite() -> None:
    case = Case()
    inputs, teacher = case.tensors(torch.float32)
    for size in (1e2, 1e4):
        big = [inputs[0] * size, *inputs[1:]]
        for constants in (teacher, [teacher[0] * size, teacher[1]]):
            tensors = value_and_gradients(case.loss, big, constants)
            assert all(torch.isfinite(tensor).all() for tensor in tensors)
            assert tensors[0] > 1


def test_rows_of_a_batch_add_up() -> None:
    case = Case()
    (qs, ks, P), (qt, kt) = case.tensors()
    whole = attention_loss(case.inputs(qs, ks), case.inputs(qt, kt), LAYOUT, P)
    parts = [
        attention_loss(
            case.inputs(qs[b : b + 1], ks[b : b + 1]),
            case.inputs(qt[b : b + 1], kt[b : b + 1]),
            make_layout([sizes]),
            P,
        )
        for b, sizes in enumerate(ROWS)
    ]
    assert whole.count == sum(part.count for part in parts) == 12
    assert_close([torch.stack([part.sum for part in parts]).sum()], [whole.sum], 1e-14)


def test_no_token_gives_a_zero_with_a_graph() -> None:
    case = Case()
    (qs, ks, P), (qt, kt) = case.tensors()
    layout = make_layout([(1, 1), (1,), ()])
    tensors = value_and_gradients(lambda qs, ks: case.loss_on(layout, qs, ks, P, qt, kt), [qs, ks])
    assert not any(tensor.any() for tensor in tensors)


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    heads, block = 4, 32

    def peak(length: int) -> int:
        layout = make_layout([(length,)], length)
        qs, ks, qt, kt = (torch.randn(1, heads, length, 8) for _ in range(4))
        qs.requires_grad_()
        student, teacher = (AttentionInputs(q, k, 0.3, None, None) for q, k in ((qs, ks), (qt, kt)))

        def step() -> None:
            attention_loss(student, teacher, layout, head_map(heads, heads), block).sum.backward()

        step()  # .grad is there from now on
        return peak_bytes(step)

    short, long = peak(128), peak(512)
    assert long < 5 * short
    assert long < 8 * (heads * block * 512 * 4) < heads * 512 * 512 * 4


def test_nothing_waits_for_the_device() -> None:
    for case in CASES[-2:]:
        inputs, (qt, kt) = case.tensors(torch.float32)

        def loss(qs: Tensor, ks: Tensor, P: Tensor, *rest: Any, case: Case = case) -> Tensor:
            qt, kt, layout = rest
            return case.loss_on(layout, qs, ks, P, qt, kt)

        assert_waits_for_nothing(loss, inputs, [qt, kt, LAYOUT])


def test_what_cannot_be_compared_is_refused() -> None:
    case = Case()
    (qs, ks, P), (qt, kt) = case.tensors()
    student, teacher = case.inputs(qs, ks), case.inputs(qt, kt)

    def refused(match: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            attention_loss(*arguments)

    refused("same window, got 2 in the student", student._replace(window=2), teacher, LAYOUT, P)
    refused(r"\[2, 4\], got \[1, 4\]", student, teacher, LAYOUT, P[:1])
    for field in ("query", "key"):
        trained = teacher._replace(**{field: getattr(teacher, field).clone().requires_grad_()})
        refused("must not require a gradient", student, trained, LAYOUT, P)
