"""Gates and their losses against definitions of one token and one expert at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

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

from sad.losses.layout import Layout
from sad.losses.router import balance_loss, gate_variation, gates, router_loss, router_z_loss
from sad.models.experts import GateKind

LAYOUT = make_layout()
EXPERTS, LAYERS = 5, 2
TOKENS = [row * LENGTH + column for row, column in counting()]
KINDS = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


def logits(dtype: torch.dtype = torch.float64, scale: float = 2.0) -> list[Tensor]:
    shape = (LAYERS, len(ROWS) * LENGTH, EXPERTS)
    return list((torch.randn(shape, dtype=torch.float64) * scale).to(dtype))


def gate_of(row: Tensor, kind: GateKind) -> Tensor:
    scores = row.exp() if kind == "softmax" else 1 / (1 + (-row).exp())
    return scores / sum(scores)


def matching(student: GateKind, teacher: GateKind) -> Callable[..., Tensor]:
    def loss(*layers: Tensor, layout: Layout = LAYOUT) -> Tensor:
        s, t = layers[:LAYERS], layers[LAYERS:]
        return router_loss(s, t, layout, student, teacher).sum

    return loss


def balance(*layers: Tensor, kind: GateKind = "softmax", layout: Layout = LAYOUT) -> Tensor:
    return balance_loss(layers, layout, top_k=2, kind=kind).sum


def z_loss(*layers: Tensor, layout: Layout = LAYOUT) -> Tensor:
    return router_z_loss(layers, layout).sum


def variation(*layers: Tensor, layout: Layout = LAYOUT) -> Tensor:
    return gate_variation([gates(x, "softmax") for x in layers], layout.tokens.flatten())


ALONE = [balance, z_loss, variation]  # losses of the student's router alone


# Gates


@KINDS
def test_gates_are_distributions(kind: GateKind) -> None:
    (layer, _) = logits()
    found = gates(layer, kind)
    assert_close([found], [torch.stack([gate_of(row, kind) for row in layer])], 1e-15)
    extreme = gates(torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]), kind)
    assert_close([extreme.sum(-1)], [torch.ones(2)], 1e-6)
    assert_close([extreme[1]], [torch.full((3,), 1 / 3)], 1e-6)  # sigmoids that underflow
    assert gates(layer.bfloat16(), kind).dtype == torch.float32


# Definitions


@pytest.mark.parametrize("student_kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("teacher_kind", ["softmax", "sigmoid"])
def test_matching_is_the_kl_of_the_definition(
    student_kind: GateKind, teacher_kind: GateKind
) -> None:
    def definition(*layers: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for student, teacher in zip(layers[:LAYERS], layers[LAYERS:], strict=True):
            for token in TOKENS:
                p, q = gate_of(teacher[token], teacher_kind), gate_of(student[token], student_kind)
                total = total + (p * (p / q).log()).sum() / LAYERS
        return total

    loss = matching(student_kind, teacher_kind)
    student, teacher = logits(), logits()
    expected = value_and_gradients(definition, student, teacher)
    assert expected[0] > 1
    assert_close(value_and_gradients(loss, student, teacher), expected, 1e-14)
    narrow = ([x.float() for x in side] for side in (student, teacher))
    assert_close(value_and_gradients(loss, *narrow), expected, 2e-6)
    assert router_loss(student, teacher, LAYOUT, student_kind, teacher_kind).count == 12


@KINDS
def test_balance_is_that_of_the_definition(kind: GateKind) -> None:
    def definition(*layers: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for layer in layers:
            for expert in range(EXPERTS):
                sent, mean = 0, torch.zeros((), dtype=torch.float64)
                for token in TOKENS:
                    larger = (layer[token] > layer[token, expert]).sum()
                    sent += int(larger < 2)
                    mean = mean + gate_of(layer[token], kind)[expert] / len(TOKENS)
                total = total + EXPERTS * (sent / len(TOKENS)) * mean / LAYERS
        return total * len(TOKENS)

    layers = logits()
    expected = value_and_gradients(definition, layers)
    found = value_and_gradients(lambda *layers: balance(*layers, kind=kind), layers)
    assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_balance_is_top_k_where_gates_are_alike(top_k: int) -> None:
    even = [torch.zeros(len(ROWS) * LENGTH, EXPERTS) for _ in range(LAYERS)]
    term = balance_loss(even, LAYOUT, top_k)
    assert term.sum.item() / term.count == pytest.approx(top_k)
    one = [torch.eye(EXPERTS)[0].expand(len(ROWS) * LENGTH, EXPERTS) * 50]
    term = balance_loss(one, LAYOUT, top_k)
    assert term.sum.item() / term.count == pytest.approx(EXPERTS)


def test_with_all_experts_balance_has_no_gradient() -> None:
    value, *gradients = value_and_gradients(
        lambda *layers: balance_loss(layers, LAYOUT, EXPERTS).sum, logits()
    )
    assert value.item() == pytest.approx(EXPERTS * 12)
    assert all(gradient.abs().max() < 1e-14 for gradient in gradients)


def test_z_loss_is_that_of_the_definition() -> None:
    def definition(*layers: Tensor) -> Tensor:
        rows = [layer[token].exp().sum().log() ** 2 for layer in layers for token in TOKENS]
        return torch.stack(rows).sum() / LAYERS

    layers = logits()
    expected = value_and_gradients(definition, layers)
    assert_close(value_and_gradients(z_loss, layers), expected, 1e-14)


def test_variation_is_that_of_the_definition() -> None:
    def definition(*layers: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for layer in layers:
            load = torch.stack([gate_of(layer[token], "softmax") for token in TOKENS]).sum(0)
            mean = load.sum() / EXPERTS
            total = total + sum((x - mean) ** 2 for x in load) / EXPERTS / mean**2 / LAYERS
        return total

    layers = logits()
    expected = value_and_gradients(definition, layers)
    assert_close(value_and_gradients(variation, layers), expected, 1e-14)
    one = torch.eye(EXPERTS)[:1].expand(3, EXPERTS)
    assert gate_variation([one], torch.ones(3).bool()).item() == pytest.approx(EXPERTS - 1)
    assert gate_variation([torch.full((3, 4), 0.25)], torch.ones(3).bool()) == 0


# Properties


@KINDS
def test_equal_gates_cost_nothing(kind: GateKind) -> None:
    student = logits(torch.float32)
    value, *gradients = value_and_gradients(matching(kind, kind), student, student)
    assert value == 0
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def variation_of_gates(*layers: Tensor) -> Tensor:
    return gate_variation(layers, LAYOUT.tokens.flatten())


@pytest.mark.parametrize(
    "loss", [matching("softmax", "sigmoid"), balance, z_loss, variation_of_gates]
)
def test_all_but_tokens_is_ignored(loss: Callable[..., Tensor]) -> None:
    student = [x.unflatten(0, (len(ROWS), LENGTH)) for x in logits(torch.float32)]
    teacher = [x.unflatten(0, (len(ROWS), LENGTH)) for x in logits(torch.float32)]
    constants = [] if loss in (*ALONE, variation_of_gates) else teacher

    def on_rows(*layers: Tensor) -> Tensor:
        return loss(*(x.flatten(0, 1) for x in layers))

    assert_ignores(on_rows, student, constants, LAYOUT.tokens, axis=1)


@pytest.mark.parametrize("loss", [matching("softmax", "softmax"), z_loss])
def test_rows_of_a_batch_add_up(loss: Callable[..., Tensor]) -> None:
    layers = logits() if loss is z_loss else logits() + logits()
    whole = loss(*layers)
    parts = []
    for b, sizes in enumerate(ROWS):
        rows = [x[b * LENGTH : (b + 1) * LENGTH] for x in layers]
        parts.append(loss(*rows, layout=make_layout([sizes])))
    assert_close([torch.stack(parts).sum()], [whole], 1e-14)


@pytest.mark.parametrize("loss", [matching("softmax", "softmax"), *ALONE])
def test_no_token_gives_a_zero_with_a_graph(loss: Callable[..., Tensor]) -> None:
    layout = make_layout([(1, 1), (1,), ()])
    constants = [] if loss in ALONE else logits()
    tensors = value_and_gradients(lambda *layers: loss(*layers, layout=layout), logits(), constants)
    assert not any(tensor.any() for tensor in tensors)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_confident_routers_stay_finite(kind: GateKind) -> None:
    student, teacher = logits(torch.float32, scale=1e4), logits(torch.float32, scale=1e4)
    tensors = [
        *value_and_gradients(matching(kind, kind), student, teacher),
        *(x for loss in ALONE for x in value_and_gradients(loss, student)),
    ]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize("loss", [matching("softmax", "sigmoid"), *ALONE])
def test_16_bits_are_computed_in_32_even_under_autocast(loss: Callable[..., Tensor]) -> None:
    layers = logits(torch.bfloat16) if loss in ALONE else logits(torch.bfloat16) * 2
    expected = loss(*(x.float() for x in layers))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([loss(*layers)], [expected])


@pytest.mark.parametrize("loss", [matching("sigmoid", "softmax"), *ALONE])
def test_nothing_waits_for_the_device(loss: Callable[..., Tensor]) -> None:
    constants = [] if loss in ALONE else logits(torch.float32)
    assert_waits_for_nothing(
        lambda *all: loss(*all[:-1], layout=all[-1]), logits(torch.float32), [*constants, LAYOUT]
    )


def test_what_cannot_be_compared_is_refused() -> None:
    student, teacher = logits(), logits()
    with pytest.raises(ValueError, match="as many experts as the teacher's, got 5 and 4"):
        router_loss(student, [x[:, :4] for x in teacher], LAYOUT, "softmax", "softmax")
    teacher[1].requires_grad_()
    with pytest.raises(ValueError, match="must not require a gradient"):
        router_loss(student, teacher, LAYOUT, "softmax", "softmax")


def test_hand_values() -> None:
    """Two experts, one token: p = (3/4, 1/4), q = (1/2, 1/2)."""
    layout = make_layout([(2,)], 2)
    student, teacher = torch.zeros(2, 2), torch.tensor([[9.0, 9.0], [math.log(3), 0.0]])
    kl = router_loss([student], [teacher], layout, "softmax", "softmax")
    assert kl.count == 1
    assert kl.sum.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert router_z_loss([teacher], layout).sum.item() == pytest.approx(math.log(4) ** 2)
    assert balance_loss([teacher], layout, 1).sum.item() == pytest.approx(2 * 0.75)
