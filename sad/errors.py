"""Errors that users can act on: one line each, with the exit code of the process.

The line reads ``<what> must <expectation>, got <value>; <remedy>``. Anything else that escapes is
a bug in this package and ends with a traceback and code 1.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Sequence


class SadError(Exception):
    """A failure with a cause outside this program; ``exit_code`` is what the process returns."""

    exit_code = 1

    spoken: bool | None = None
    """On several processes: whether this one is to say it. None: it depends on the kind of error,
    see ``speaks_for_itself``."""


class UsageError(SadError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class UnfitError(SadError):
    """Data, tokenizer or model cannot be used together, or a check before the run failed."""

    exit_code = 65


class OutOfMemoryError(SadError):
    """The device or the host ran out of memory."""

    exit_code = 71


class OutputError(SadError):
    """The output directory cannot be written."""

    exit_code = 73


class CheckpointError(SadError):
    """A checkpoint could not be saved or read; earlier ones are intact."""

    exit_code = 74


class StoppedError(SadError):
    """A signal stopped the run; what it had trained is saved and the same command resumes it."""

    exit_code = 75


class RankLostError(SadError):
    """A process of a run on several of them was lost; its checkpoints are intact."""

    exit_code = 76


class DivergedError(SadError):
    """Too many updates in a row were not finite, and none of them was applied."""

    exit_code = 90


def speaks_for_itself(error: BaseException, *, first: bool) -> bool:
    """Whether a process has to say its error; ``first``: it is the first of a run, or alone.

    Most errors come to all of them alike, for the same configuration, models and numbers: then the
    first one says it for all.
    """
    if isinstance(error, SadError) and error.spoken is not None:
        return error.spoken
    alike = (UsageError, UnfitError, OutputError, CheckpointError, StoppedError, DivergedError)
    return first or not isinstance(error, alike)


def one_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, at most 200 characters of it, to be
    quoted in one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0] if lines else type(error).__name__)[:200]


def printable(text: str) -> str:
    """A text on one line, with control characters and half surrogate pairs escaped as in
    ``repr``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters of a text, ``...`` in place of its middle."""
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 3
    return f"{text[: limit - 3 - tail]}...{text[len(text) - tail :]}"


def quoted(value: object, limit: int = 80) -> str:
    """The ``repr`` of a value for a message: one line of at most ``limit`` characters, however
    long or deeply nested the value is."""
    return shortened(printable(_REPR.repr(value)), limit)


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """The first place where two sequences differ; where one begins the other, its length."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no integer of more than 4,300 digits
            return f"an integer of {x.bit_length():,} bits"


_REPR = _Repr()


def with_type(error: BaseException) -> str:
    """``Type: message`` of an error that a library raises, on one line."""
    kind, line = type(error).__name__, one_line(error)
    return kind if line == kind else f"{kind}: {line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of the device or the host is used up."""
    torch = sys.modules.get("torch")  # importing it takes seconds; its errors need it loaded
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    # The CPU allocator raises a bare RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
