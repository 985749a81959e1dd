"""The teacher's answer to the next micro-batch, prepared in a thread while the student trains.

Meant for a teacher whose layers are on the CPU or on another device than the student, which would
otherwise wait for each other. One thread runs one forward pass at a time, and the student's thread
begins, takes and awaits them: so it is known when the teacher works, and that it does not when it
is evaluated or anything is saved. Nothing of it is in a checkpoint: the answer follows from the
position alone, and a run that is resumed computes it again.

The bits are those of the student's thread. What torch keeps per thread is set in the worker: its
number of threads; gradients are off inside ``FrozenTeacher.forward``. What it keeps per process is
the student's matter: see ``begin``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch

from sad.teachers.frozen import TeacherOutput

WORKER = "teacher-prefetch"
"""The beginning of the worker's name."""


def _with_threads(count: int, forward: Callable[[], TeacherOutput]) -> TeacherOutput:
    if torch.get_num_threads() != count:  # a new thread begins with a number of its own
        torch.set_num_threads(count)
    return forward()


class _Ahead(NamedTuple):
    key: Any
    output: Future[TeacherOutput]


class Prefetch:
    """At most one answer that is prepared ahead. As a context manager it ends its thread."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: _Ahead | None = None

    def begin(self, key: Any, forward: Callable[[], TeacherOutput]) -> None:
        """Begin ``forward()`` in the worker, for ``take(key)``; what was ahead is forgotten.

        Until ``wait`` or ``take`` nobody else may run the teacher, or change settings of the
        process on which its numbers depend.
        """
        self.wait()
        work = partial(_with_threads, torch.get_num_threads(), forward)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, WORKER)
        try:
            self._ahead = _Ahead(key, self._worker.submit(work))
        except RuntimeError:  # the system has no thread left: ``take`` finds nothing
            self.forget()
            self._worker = None

    def take(self, key: Any) -> TeacherOutput | None:
        """The answer that was begun for ``key``, once it is there; None if there is none.

        Raises what its forward pass raised.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        wait([ahead.output])
        return ahead.output.result() if ahead.key == key else None

    def wait(self) -> None:
        """Return when the worker is idle. What it raised is raised by ``take``."""
        if self._ahead is not None:
            wait([self._ahead.output])

    def forget(self) -> None:
        """Wait, and drop what is ahead."""
        self.wait()
        self._ahead = None

    def close(self) -> None:
        """Wait, drop what is ahead, and end the thread; another begins with the next ``begin``."""
        self.forget()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
