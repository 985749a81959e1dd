"""Gradient accumulation: updates are counted right; a window is worth its concatenated batch."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sad.accumulate import GradientAccumulator


def windows(num_batches: int, accumulation_steps: int) -> Iterator[list[int]]:
    """The micro-batches of one epoch, window by window."""
    for start in range(0, num_batches, accumulation_steps):
        yield list(range(start, min(start + accumulation_steps, num_batches)))


def count_updates(num_batches: int, accumulation_steps: int, asks: int = 1) -> list[int]:
    """Run one epoch, asking ``asks`` times per micro-batch; the sizes of the closed windows."""
    accumulator = GradientAccumulator(accumulation_steps)
    closed = []
    for batch in range(num_batches):
        if not accumulator.pending:
            accumulator.open_window(min(accumulation_steps, num_batches - batch), num_items=1)
        answers = {accumulator.should_step() for _ in range(asks)}
        assert len(answers) == 1
        if answers.pop():
            closed.append(accumulator.size)
        accumulator.advance()
    assert not accumulator.pending
    return closed


@pytest.mark.parametrize("accumulation_steps", [1, 2, 7, 8, 100, 1000])
@pytest.mark.parametrize("num_batches", [1, 7, 8, 9, 100])
def test_an_epoch_has_one_update_per_window(num_batches: int, accumulation_steps: int) -> None:
    closed = count_updates(num_batches, accumulation_steps)
    assert len(closed) == -(-num_batches // accumulation_steps)
    assert sum(closed) == num_batches


def test_100_batches_by_8_are_13_windows_the_last_with_4() -> None:
    """https://github.com/Lightning-AI/pytorch-lightning/issues/19987: a mis-scaled last window."""
    assert count_updates(100, 8) == [8] * 12 + [4]


@pytest.mark.parametrize("asks", [2, 3, 8])
def test_asking_again_alters_nothing(asks: int) -> None:
    """A predicate that counts its calls never fires for an even window once a log line asks too."""
    assert count_updates(100, 8, asks) == count_updates(100, 8)


@pytest.mark.parametrize("accumulation_steps", [2, 3, 8, 10])
def test_window_gradient_is_that_of_the_concatenated_rows(accumulation_steps: int) -> None:
    """Lengths are far from equal, and one micro-batch has no target at all.

    A mean of micro-batch means would be off by far more than rounding; equal lengths would hide it.
    """
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randn(10, generator=draw).mul(1.5).exp().mul(4).ceil().long().tolist()
    lengths[4] = 0
    rows = [torch.randn(n, 5, dtype=torch.float64, generator=draw) for n in lengths]

    accumulator = GradientAccumulator(accumulation_steps)
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for window in windows(len(rows), accumulation_steps):
        joined = torch.cat([rows[i] for i in window])
        expected = torch.autograd.grad(summed_loss(joined, weight) / len(joined), weight)[0]

        accumulator.open_window(len(window), num_items=len(joined))
        for i in window:
            (summed_loss(rows[i], weight) / accumulator.num_items).backward()
            if accumulator.should_step():
                assert weight.grad is not None
                error = (weight.grad - expected).norm() / expected.norm()
                assert error < 1e-12
                weight.grad = None
            accumulator.advance()
        assert weight.grad is None, "the window's last micro-batch did not step"


def summed_loss(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows @ weight).exp().sum()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_state_holds_every_position_of_a_window(size: int) -> None:
    for done in range(size):
        accumulator = GradientAccumulator(4)
        accumulator.open_window(size, num_items=17)
        for _ in range(done):
            accumulator.advance()
        state = json.loads(json.dumps(accumulator.state_dict()))
        assert state["gradient_accumulator_step_count"] == done

        resumed = GradientAccumulator(4)
        resumed.load_state_dict(state)
        assert (resumed.position, resumed.size, resumed.num_items) == (done, size, 17)
        assert resumed.pending and resumed.should_step() == (done == size - 1)
        for _ in range(size - done):
            resumed.advance()
        assert not resumed.pending


def test_between_windows_nothing_is_left() -> None:
    accumulator = GradientAccumulator(2)
    fresh = accumulator.state_dict()
    accumulator.open_window(2, num_items=9)
    accumulator.advance()
    accumulator.advance()
    assert accumulator.state_dict() == fresh
    assert not accumulator.should_step()


def test_windows_are_opened_and_finished_in_turn() -> None:
    accumulator = GradientAccumulator(4)
    with pytest.raises(RuntimeError, match="must be open"):
        accumulator.advance()
    accumulator.open_window(2, num_items=0)
    with pytest.raises(RuntimeError, match="got 0 of its 2 micro-batches"):
        accumulator.open_window(2, num_items=0)
    accumulator.advance()
    with pytest.raises(RuntimeError, match="got 1 of its 2 micro-batches"):
        accumulator.open_window(2, num_items=0)


@pytest.mark.parametrize(
    ("size", "num_items", "error"),
    [
        (0, 1, ValueError),
        (5, 1, ValueError),
        (-1, 1, ValueError),
        (1, -1, ValueError),
        (1.0, 1, TypeError),
        (1, 2.0, TypeError),
        (True, 1, TypeError),
        (1, torch.tensor(2), TypeError),
    ],
)
def test_bad_windows_are_refused(size, num_items, error: type[Exception]) -> None:
    accumulator = GradientAccumulator(4)
    with pytest.raises(error):
        accumulator.open_window(size, num_items)
    assert not accumulator.pending


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_accumulation_steps_is_a_positive_integer(steps) -> None:
    with pytest.raises((ValueError, TypeError), match="accumulation_steps must"):
        GradientAccumulator(steps)


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": 5},
        {"gradient_accumulator_step_count": 3},
        {"gradient_accumulator_step_count": -1},
        {"window_size": 0},
        {"num_items": -2},
    ],
    ids=str,
)
def test_impossible_states_are_refused(change: dict[str, int]) -> None:
    accumulator = GradientAccumulator(4)
    accumulator.open_window(3, num_items=6)
    accumulator.advance()
    state = accumulator.state_dict()
    with pytest.raises(ValueError, match="must"):
        accumulator.load_state_dict(state | change)
    assert accumulator.state_dict() == state
