"""Several processes on this machine that compute together, forked from the test's own.

``run_ranks(size, function, *args)`` gives ``function(*args)`` to each of ``size`` forked ranks of
one gloo group and returns what each returned, in the order of the ranks. ``ends_of_ranks`` is for
ranks that are meant to fail: it says how each ended.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm

from sad.errors import SadError

SECONDS = 240
"""How long ranks may take together before they are killed."""


class RankFailedError(AssertionError):
    """A rank raised; the message is its error and its traceback."""


@dataclass
class End:
    """How a rank ended: its exit code (negative: the signal), and its error in one line."""

    code: int
    message: str = ""


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = SECONDS
) -> list[Any]:
    """What ``function(*args)`` returns on each of ``size`` ranks; tensors come back as tensors.

    It sees the environment of torchrun and an initialised process group. Raises
    ``RankFailedError`` as soon as one rank raises; the others are killed.
    """
    results: dict[int, Any] = {}
    with _forked(size, partial(function, *args)) as (processes, receivers):
        while receivers:
            ready = wait(list(receivers), timeout)
            if not ready:
                raise RankFailedError(f"no rank answered within {timeout:g} s")
            for receiver in ready:
                assert isinstance(receiver, Connection)
                rank = receivers.pop(receiver)
                results[rank] = _received(receiver, rank)
        for process in processes:
            process.join(timeout)
        return [results[rank] for rank in range(size)]


def ends_of_ranks(
    size: int, function: Callable[[], object], *, timeout: float = SECONDS, answers: int = 60
) -> list[End]:
    """How each of ``size`` ranks ends that call ``function()``; one that hangs is killed.

    A rank gives up another that does not answer within ``answers`` seconds.
    """

    def ending() -> tuple[int, str]:
        try:
            function()
        except SadError as error:
            return error.exit_code, str(error)
        return 0, ""

    ends: dict[int, End] = {}
    with _forked(size, ending, leave_together=False, answers=answers) as (processes, receivers):
        for receiver, rank in receivers.items():
            try:
                if not receiver.poll(timeout):
                    raise RankFailedError(f"rank {rank} has not ended within {timeout:g} s")
                ends[rank] = End(*_received(receiver, rank))
            except RankFailedError as error:
                processes[rank].join(5)
                processes[rank].kill()
                processes[rank].join()
                ends[rank] = End(processes[rank].exitcode or 0, str(error))
    return [ends[rank] for rank in range(size)]


@contextmanager
def _forked(
    size: int, function: Callable[[], Any], *, leave_together: bool = True, answers: int = 60
) -> Iterator[tuple[list[BaseProcess], dict[Connection, int]]]:
    """The processes of the ranks, and from where their results come."""
    context = multiprocessing.get_context("fork")
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    processes: list[BaseProcess] = []
    receivers: dict[Connection, int] = {}
    try:
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(rank, size, folder / "store", sender, function, leave_together, answers),
            )
            process.start()
            sender.close()  # the child has its own: its end is seen here
            processes.append(process)
            receivers[receiver] = rank
        yield processes, receivers
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _received(receiver: Connection, rank: int) -> Any:
    try:
        failed, content = receiver.recv()
    except EOFError:
        raise RankFailedError(f"rank {rank} ended without an answer") from None
    if failed:
        error = content.rstrip().rpartition("\n")[2]  # first, where pytest shortens messages
        raise RankFailedError(f"rank {rank}: {error}\n{content}")
    return torch.load(io.BytesIO(content), weights_only=False)


def _rank(
    rank: int,
    size: int,
    store: Path,
    sender: Connection,
    function: Callable[[], Any],
    leave_together: bool,
    answers: int,
) -> None:
    """One rank, in the forked process; it ends without the clean-up of the test runner's."""
    torch.set_num_threads(1)  # a pool of torch's does not survive a fork
    tqdm.set_lock(RLock())
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=answers),
        )
        buffer = io.BytesIO()
        torch.save(function(), buffer)
        sender.send((False, buffer.getvalue()))
        if leave_together:
            dist.barrier()  # no rank leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        sender.send((True, traceback.format_exc()[-4000:]))
        os._exit(1)
    os._exit(0)
