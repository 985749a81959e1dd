"""Micro-batch layouts for the structural losses, and the checks that every such loss must pass.

A layout is given by the sizes of each row's segments; the rest of a row is padding. The checks take
scalar functions of tensors and compare values and gradients.
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
"""Segment sizes: a full row, a row half of padding, and a row with a segment of one position."""

LENGTH = 8

Loss = Callable[..., Tensor]


def total(counts: Iterable[LossCounts]) -> LossCounts:
    """The sum of several batches' counts; of ``max_segments`` the maximum."""
    targets, tokens, sequences, most = zip(*counts, strict=True)
    return LossCounts(sum(targets), sum(tokens), sum(sequences), max(most))


def spans(rows: Sequence[Sequence[int]] = ROWS) -> Iterator[tuple[int, int, int, int]]:
    """Every segment as (row, index in the row, start, end)."""
    for row, sizes in enumerate(rows):
        ends = itertools.accumulate(sizes)
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            yield row, number, end - size, end


def counting(rows: Sequence[Sequence[int]] = ROWS) -> Iterator[tuple[int, int]]:
    """Every position with a loss as (row, column): all but the first of each segment."""
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
    """``loss(*inputs, *constants)`` and its gradient by each input, computed on copies.

    Runs in torch's anomaly mode: no step of backward may produce a NaN, not even one that is
    masked later, because a user who hunts for a NaN in that mode would be stopped by it.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.autograd.set_detect_anomaly(True):
        value = loss(*leaves, *constants)
        return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Assert differences of at most ``tolerance * max(1, |largest expected element|)``."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.detach().double() - e.double()).abs().max().item()
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"error {error:.2e}"


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert equal dtypes and bits, and finite values."""
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
    """Assert that contents of the other positions change no bit of the value or the gradients."""
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
    """Assert that forward and backward never read a tensor's value, which would sync a GPU.

    They run on fake tensors, which have no data. ``constants`` may be nested, such as a ``Layout``.
    """
    fake = FakeTensorMode()

    def emptied(leaf: Any) -> Any:
        return fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf

    with fake:
        leaves = [emptied(tensor).detach().requires_grad_() for tensor in inputs]
        loss(*leaves, *pytree.tree_map(emptied, list(constants))).backward()
