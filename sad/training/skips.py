"""Updates skipped in a row, known to the host without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A mark in a device's queue of work."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class SkipWatch:
    """How many updates in a row were skipped, as far as the host has heard.

    On a CPU the number is there at once. On a CUDA device it is copied to pinned memory, a window
    at a time, and read once its copy is done: with the next window or, while the host is ahead of
    the device, with a later one. Nothing waits but ``last``.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        make_event: Callable[[], Event] | None = None,
        make_buffer: Callable[[], Tensor] | None = None,
    ) -> None:
        self.in_a_row = 0
        """The newest number that has arrived, or the largest of those that arrived with it."""
        self._deferred = device.type == "cuda" or make_event is not None
        self._make_event: Callable[[], Event] = make_event or partial(_CudaEvent, device)
        self._make_buffer = make_buffer or _pinned
        self._sent: deque[tuple[Event, Tensor]] = deque()
        self._free: list[Tensor] = []

    def add(self, in_a_row: Tensor) -> None:
        """Hear of a closed window: how many updates, this one last, were skipped in a row."""
        if not self._deferred:
            self.in_a_row = int(in_a_row)
            return
        self._receive()
        buffer = self._free.pop() if self._free else self._make_buffer()
        buffer.copy_(in_a_row, non_blocking=True)
        event = self._make_event()
        event.record()
        self._sent.append((event, buffer))

    def last(self) -> int:
        """The number after the last window. Waits for the device."""
        if self._sent:
            self._sent[-1][0].synchronize()
            self._receive()
        return self.in_a_row

    def _receive(self) -> None:
        arrived = []
        while self._sent and self._sent[0][0].query():
            _, buffer = self._sent.popleft()
            arrived.append(int(buffer))
            self._free.append(buffer)
        if arrived:
            self.in_a_row = max(arrived)


class _CudaEvent:
    """An event on the stream that a device works on now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()


def _pinned() -> Tensor:
    return torch.zeros((), dtype=torch.int64, pin_memory=True)
