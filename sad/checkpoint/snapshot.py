"""Checkpoints that are written while training goes on: a copy on the host, then the writer.

``snapshot`` copies what a checkpoint holds to host memory, in one pass; from then on training may
change it. ``write`` gives the copy to the writer of ``sad.checkpoint.store``: the files have the
same bytes as without a copy. ``in_thread`` lets that happen in the background. Hashes and the disk
do not hold Python's interpreter lock, and each group of tensors is hashed and written as one piece,
so that the thread hardly ever makes training wait.

Of a tensor that is split over processes (``DTensor``) each copies its own part; the writer of such
snapshots is in ``sad.distributed.shards``.

The copy lies in ``HostBuffers``, which are used again by the next snapshot: whoever takes one has
to wait for the writer of the last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sad.checkpoint.placement import with_local_part
from sad.checkpoint.store import (
    Report,
    Tensors,
    require_saveable,
    save_checkpoint,
)
from sad.checkpoint.tensor_files import file_order
from sad.distributed.tensors import local_part

T = TypeVar("T")

WRITER = "checkpoint-writer"
"""Name of the thread that writes in the background."""


class HostBuffers:
    """Host memory for one snapshot at a time: a buffer per group of tensors, kept for the next.

    ``pinned`` locks its pages, so that a GPU copies to them at full speed.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, group: str, size: int) -> Tensor:
        """A buffer of ``size`` bytes: the group's own if it is large enough."""
        if group not in self._buffers or len(self._buffers[group]) < size:
            self._buffers.pop(group, None)  # before the larger one is there
            self._buffers[group] = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        return self._buffers[group][:size]

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Reserve the buffers of groups of these bytes, and touch them: to get memory from the
        system takes longer than to copy to it."""
        for group, size in sizes.items():
            self.reserve(group, size).zero_()

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


class Snapshot(NamedTuple):
    """What a checkpoint holds: of ``snapshot`` a copy, which training does not change."""

    micro_step: int
    state: dict[str, Any]
    tensors: Tensors


def snapshot(
    micro_step: int, state: dict[str, Any], tensors: Tensors, buffers: HostBuffers
) -> Snapshot:
    """Copy plain values and tensors, into ``buffers``. Waits for the devices.

    Every tensor is copied, those on the CPU too: training changes them in place. Raises
    ``TypeError`` or ``ValueError`` for what a checkpoint cannot hold.
    """
    require_saveable(micro_step, state, tensors)  # in the copy, no two tensors share memory
    copies = {group: _copy(group, named, buffers) for group, named in tensors.items()}
    devices = {t.device for named in tensors.values() for t in named.values()}
    for device in devices:
        if device.type != "cpu":  # copies to pinned memory are only queued so far
            torch.accelerator.synchronize(device)
    return Snapshot(micro_step, copy.deepcopy(state), copies)


def group_bytes(tensors: Tensors) -> dict[str, int]:
    """The bytes of each group of tensors in this process."""
    return {
        group: sum(local_part(t).nbytes for t in named.values()) for group, named in tensors.items()
    }


@torch.no_grad()
def _copy(group: str, named: Mapping[str, Tensor], buffers: HostBuffers) -> dict[str, Tensor]:
    order = file_order(named)
    parts = {name: local_part(named[name]) for name in order}
    ends = list(accumulate(part.nbytes for part in parts.values()))
    content = buffers.reserve(group, ends[-1] if ends else 0)
    copies = {}
    for (name, part), end in zip(parts.items(), ends, strict=True):
        place = content[end - part.nbytes : end].view(part.dtype).view(part.shape)
        copy_of_part = place.copy_(part, non_blocking=buffers.pinned)
        copies[name] = with_local_part(named[name], copy_of_part)
    return copies


def write(
    run_dir: str | Path, taken: Snapshot, *, save_total_limit: int, report: Report = print
) -> Path:
    """Write a snapshot as the checkpoint of its ``micro_step``: see ``save_checkpoint``."""
    return save_checkpoint(run_dir, *taken, save_total_limit=save_total_limit, report=report)


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Begin ``function()`` in a thread; the future has its result, or raises what it raised.

    Where no thread can be started it is done here.
    """
    future: Future[T] = Future()
    work = partial(_settle, future, function)
    try:
        # Not a daemon: a process that ends waits for what is being written.
        Thread(target=work, name=WRITER).start()
    except RuntimeError:  # the system has no thread left
        work()
    return future


def at_once(function: Callable[[], T]) -> Future[T]:
    """As ``in_thread``, but ``function()`` is done when this returns."""
    future: Future[T] = Future()
    _settle(future, function)
    return future


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
