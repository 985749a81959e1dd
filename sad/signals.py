"""Signals that ask a run to stop: the first is a request, the second an order.

Whoever runs jobs on borrowed machines gets SIGTERM or SIGUSR1 some seconds before the machine goes
away; whoever sits at a terminal presses Ctrl-C. The trainer looks at ``requested`` after each
micro-batch, saves its state and leaves. A second signal does not wait for that.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGUSR1 while its block runs.

    >>> with StopSignals() as signals:
    ...     signals.requested is None
    True

    The second signal, whichever it is, ends the process at once with ``128 + n``: nothing is
    flushed and no ``finally`` runs. Handlers that were there before come back at the end of the
    block. Only the main thread may set handlers, so in any other this does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal, such as ``SIGTERM``; None as long as nobody asked."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be named.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
