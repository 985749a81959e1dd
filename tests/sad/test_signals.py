"""The first signal is a request, the second an order, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from sad.environment import STOP_SIGNALS, StopSignals

BY_NAME = pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@BY_NAME
def test_the_first_signal_is_noted_and_the_block_goes_on(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        assert signals.requested == number.name


@BY_NAME
def test_old_handlers_come_back(number: signal.Signals) -> None:
    received = []
    previous = signal.signal(number, lambda number, frame: received.append(number))
    try:
        before = handlers()
        with StopSignals():
            assert handlers() != before
            os.kill(os.getpid(), number)
        assert handlers() == before
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        signal.signal(number, previous)


def test_old_handlers_come_back_after_an_error() -> None:
    before = handlers()
    with pytest.raises(RuntimeError, match="inside"), StopSignals():
        raise RuntimeError("inside")
    assert handlers() == before


def test_one_object_serves_several_blocks() -> None:
    before = handlers()
    signals = StopSignals()
    for _ in range(2):
        with signals:
            assert handlers() != before
        assert handlers() == before


def test_outside_the_main_thread_nothing_happens() -> None:
    before = handlers()
    seen = []

    def work() -> None:
        with StopSignals() as signals:
            seen.append((signals.requested, handlers()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
    assert handlers() == before


PROGRAM = """
import atexit, time
from sad.environment import StopSignals

atexit.register(print, "cleaned up", flush=True)
with StopSignals() as signals:
    print("ready", flush=True)
    while signals.requested is None:
        time.sleep(0.01)
    print(signals.requested, flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("first", "second"), [("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGUSR1")]
)
def test_the_second_signal_exits_at_once(first: str, second: str) -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[first])
        assert process.stdout.readline() == first + "\n"
        process.send_signal(signal.Signals[second])
        assert process.wait() == 128 + signal.Signals[second]
        assert process.stdout.read() == "", "the process took its time to clean up"
