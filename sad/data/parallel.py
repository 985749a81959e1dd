"""A function applied to batches by several processes, its results in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

from sad.errors import OutOfMemoryError

A = TypeVar("A")
B = TypeVar("B")

FEW = 32
"""So many batches are not worth the start of other processes."""

PARALLELISM = "TOKENIZERS_PARALLELISM"
"""Environment variable of tokenizers: threads of its own, which do not survive a fork."""


def usable_cores() -> int:
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def map_in_order(
    function: Callable[[A], B], batches: Iterable[A], processes: int | None = None
) -> Iterator[B]:
    """``function(batch)`` of each batch, in order, whatever the number of ``processes``.

    Without one the first ``FEW`` batches are done here, and the rest by one process per core. The
    processes are forked: they have ``function`` without a copy, and where the system cannot fork,
    all is done here. Raises ``OutOfMemoryError`` if one of them is killed.
    """
    batches = iter(batches)
    if processes is None:
        yield from map(function, islice(batches, FEW))
        processes = usable_cores()
    first = list(islice(batches, 1))  # none left: no process is started
    if not first or processes == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, chain(first, batches))
        return
    with _pool(function, processes) as pool:
        pending: deque[Any] = deque()
        for batch in chain(first, batches):
            pending.append(pool.submit(_call, batch))
            if len(pending) > 2 * processes:  # bounds what waits in memory
                yield _result(pending.popleft(), processes)
        while pending:
            yield _result(pending.popleft(), processes)


_function: Callable[[Any], Any] | None = None
"""What forked processes call: they inherit it, where it would else have to be sent."""


@contextmanager
def _pool(function: Callable[[Any], Any], processes: int) -> Iterator[ProcessPoolExecutor]:
    global _function
    before = _function, os.environ.get(PARALLELISM)
    _function, os.environ[PARALLELISM] = function, "false"
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _ignore_signals)
    try:
        with warnings.catch_warnings():  # Python 3.12 warns of every fork beside threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(os.getpid)  # starts all processes
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        _function, threads = before
        if threads is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = threads


def _call(batch: Any) -> Any:
    assert _function is not None
    return _function(batch)


def _ignore_signals() -> None:
    """A stop is the parent's to handle: a terminal sends it to every process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _result(future: Any, processes: int) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise OutOfMemoryError(
            f"memory must hold {processes} processes that tokenize, got one that was killed; lower "
            "data.num_proc"
        ) from error
