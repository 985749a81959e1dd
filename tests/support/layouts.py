"""Layouts for tests of the structural losses, and properties that each of these losses must have.

A layout is written as the sizes of each row's segments; what is left of a row is padding. The
helpers judge functions of tensors that return one number, by value and by gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from sad.data.batch import Batch, LossCounts
from sad.losses.layout import Layout, layout_of

ROWS = ((3, 5), (4,), (1, 2, 3))
"""A full row, one half padding, and one with a segment that has a first position only."""

LENGTH = 8

Loss = Callable[..., Tensor]


def total(counts: Iterable[LossCounts]) -> LossCounts:
    """The units of several batches together."""
    targets, tokens, sequences, most = zip(*counts, strict=True)
    return LossCounts(sum(targets), sum(tokens), sum(sequences), max(most))


def spans(rows: Sequence[Sequence[int]] = ROWS) -> Iterator[tuple[int, int, int, int]]:
    """Each segment as (row, number in its row, start, end)."""
    for row, sizes in enumerate(rows):
        ends = itertools.accumulate(sizes)
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            yield row, number, end - size, end


def counting(rows: Sequence[Sequence[int]] = ROWS) -> Iterator[tuple[int, int]]:
    """Each position that counts, as (row, column): all of a segment but its first."""
    for row, _, start, end in spans(rows):
        yield from ((row, column) for column in range(start + 1, end))


def make_layout(rows: Sequence[Sequence[int]] = ROWS, length: int = LENGTH) -> Layout:
    """The layout of a batch whose rows hold segments of these sizes."""
    positions = torch.arange(length).repeat(len(rows), 1)
    for row, _, start, _ in spans(rows):
        positions[row, start:] = torch.arange(length - start)
    zeros = torch.zeros(len(rows), length, dtype=torch.int64)
    counts = LossCounts(
        targets=0,
        tokens=sum(1 for _ in counting(rows)),
        sequences=sum(size > 1 for sizes in rows for size in sizes),
        max_segments=max(len(sizes) for sizes in rows),
    )
    lengths = torch.tensor([sum(sizes) for sizes in rows])
    return layout_of(Batch(zeros, zeros, positions, lengths, counts, target_bytes=0))


def value_and_gradients(
    loss: Loss, inputs: Sequence[Tensor], constants: Sequence[Tensor] = ()
) -> list[Tensor]:
    """``loss(*inputs, *constants)`` and its gradient by each input, on leaves of their own.

    No step of the backward pass may make a NaN, not even one that is dropped later: whoever looks
    for the origin of a NaN with torch's anomaly mode must not be stopped here.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.autograd.set_detect_anomaly(True):
        value = loss(*leaves, *constants)
        return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Differences of at most ``tolerance`` times the largest element of each tensor, or times 1."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.detach().double() - e.double()).abs().max().item()
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"error {error:.2e}"


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)
        assert torch.isfinite(a).all()


def assert_ignores(
    loss: Loss,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    counts: Tensor,  # bool [B, L]: the positions that may matter
    axis: int,  # where all of ``inputs`` and ``constants`` have their positions
) -> None:
    """Check that the content of other positions changes no bit of the value or of a gradient."""
    assert not counts.all()
    expected = value_and_gradients(loss, inputs, constants)
    assert all(tensor.any() for tensor in expected)
    for content in (torch.nan, torch.inf, 1e30, 0.0):
        planted = [
            [_planted(tensor, counts, axis, content) for tensor in tensors]
            for tensors in (inputs, constants)
        ]
        assert_same_bits(value_and_gradients(loss, *planted), expected)


def _planted(tensor: Tensor, counts: Tensor, axis: int, content: float) -> Tensor:
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = counts.shape
    return tensor.masked_fill(~counts.reshape(shape), content)


def assert_waits_for_nothing(loss: Loss, inputs: Sequence[Any], constants: Sequence[Any]) -> None:
    """Run forward and backward on fake tensors, which have no data: reading a value fails.

    ``constants`` may hold tensors deep inside, as a ``Layout`` does.
    """
    fake = FakeTensorMode()

    def emptied(leaf: Any) -> Any:
        return fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf

    with fake:
        leaves = [emptied(tensor).detach().requires_grad_() for tensor in inputs]
        loss(*leaves, *pytree.tree_map(emptied, list(constants))).backward()
