"""Several processes: the same results in the same order, and errors in one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sad.data import parallel
from sad.data.parallel import PARALLELISM, map_in_order
from sad.errors import OutOfMemoryError, UnfitError


def batches(count: int) -> Iterator[int]:
    yield from range(count)


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3, None])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_results_come_in_order_by_so_many_processes(
    processes: int | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    results = list(map_in_order(square, batches(count), processes))
    assert [value for value, _ in results] == [number**2 for number in range(count)]
    workers = {worker for _, worker in results}
    if count == 50 and processes != 1:
        assert len(workers - {os.getpid()}) in range(1, (processes or 2) + 1)
        assert (os.getpid() in workers) == (processes is None), "few batches start none"
    elif processes in (1, None):
        assert workers <= {os.getpid()}


def test_little_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_pool", lambda *_: pytest.fail("started"))
    assert len(list(map_in_order(square, batches(parallel.FEW)))) == parallel.FEW
    with pytest.raises(pytest.fail.Exception):
        list(map_in_order(square, batches(parallel.FEW + 1), 2))


def test_threads_of_tokenizers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARALLELISM, raising=False)
    seen = list(map_in_order(lambda _: os.environ[PARALLELISM], batches(4), 2))
    assert seen == ["false"] * 4 and PARALLELISM not in os.environ


def refuse(number: int) -> int:
    if number == 3:
        raise UnfitError("number must not be 3, got 3; take another")
    return number


def test_an_error_of_a_process_is_raised_here() -> None:
    results = map_in_order(refuse, batches(9), 2)
    assert [next(results), next(results), next(results)] == [0, 1, 2]
    with pytest.raises(UnfitError, match="must not be 3"):
        next(results)


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(OutOfMemoryError, match=r"2 processes that tokenize.* lower data\.num_proc"):
        list(map_in_order(die, batches(9), 2))


def stop_all(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


def test_a_stop_is_the_parents_to_handle() -> None:
    assert list(map_in_order(stop_all, batches(5), 2)) == [*range(5)]
