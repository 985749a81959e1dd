"""Skipped updates in a row: heard of at once on a CPU, a window later without waiting elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sad.training.skips import SkipWatch


class Clock:
    """A device that is done with its work when it is told so."""

    def __init__(self) -> None:
        self.events: list[SlowEvent] = []

    def event(self) -> SlowEvent:
        self.events.append(SlowEvent())
        return self.events[-1]


class SlowEvent:
    def __init__(self) -> None:
        self.done = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def buffer() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def test_on_a_cpu_it_is_known_at_once() -> None:
    watch = SkipWatch(torch.device("cpu"))
    for streak in (1, 2, 3, 0):
        watch.add(torch.tensor(streak))
        assert watch.in_a_row == watch.last() == streak


def test_elsewhere_it_is_read_with_the_next_window() -> None:
    clock = Clock()
    watch = SkipWatch(torch.device("cpu"), make_event=clock.event, make_buffer=buffer)
    watch.add(torch.tensor(3))
    clock.events[0].done = True
    assert watch.in_a_row == 0
    watch.add(torch.tensor(0))
    assert watch.in_a_row == 3


def test_what_has_not_arrived_is_not_waited_for_and_not_lost() -> None:
    clock = Clock()
    watch = SkipWatch(torch.device("cpu"), make_event=clock.event, make_buffer=buffer)
    for streak in (1, 2, 3, 0):
        watch.add(torch.tensor(streak))
    assert watch.in_a_row == 0, "the host is four windows ahead"
    for event in clock.events:
        event.done = True
    watch.add(torch.tensor(0))
    assert watch.in_a_row == 3


def test_buffers_are_used_again_once_they_were_read() -> None:
    clock, made = Clock(), []

    def counted() -> Tensor:
        made.append(buffer())
        return made[-1]

    watch = SkipWatch(torch.device("cpu"), make_event=clock.event, make_buffer=counted)
    for _ in range(20):
        watch.add(torch.tensor(0))
        clock.events[-1].done = True
    assert len(made) <= 2


def test_the_last_one_is_waited_for() -> None:
    clock = Clock()
    watch = SkipWatch(torch.device("cpu"), make_event=clock.event, make_buffer=buffer)
    for event in (1, 2):
        watch.add(torch.tensor(event))
    clock.events[0].done = True
    assert watch.last() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for() -> None:
    device = torch.device("cuda")
    watch = SkipWatch(device)
    streak = torch.tensor(3, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            watch.add(streak)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.last() == 3
