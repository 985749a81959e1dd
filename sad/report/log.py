"""The log of a run: JSON lines in a file for programs, a progress bar or a table for people.

``RUN_DIR/log.jsonl`` is append-only. Each record is one ``write``, so a killed process loses no
earlier record and tears at most its last line, which readers skip. Any numbers may be logged; how
they are shown is said by ``sad.metrics``. Every record holds

* ``attempt``: 1 for the first process that worked on the run, 2 for the one that resumed it, ...
* ``kind``: ``start``, ``train``, ``eval``, ``save``, ``warning`` or ``end``;
* ``time``: UTC, ISO 8601;
* and what the caller passed; ``micro_step`` (micro-batches consumed) is the record's position.

JSON has no NaN and no infinities, and a diverging run is where a log is needed most. They are
written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float()`` understands;
``read_log`` makes them floats again.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from sad.checkpoint.atomic_files import is_file
from sad.errors import OutputError, with_type
from sad.report.terminal import (
    AlignedLines,
    aligned_pairs,
    bar_postfix,
    evaluation_lines,
    progress_bar,
)
from sad.report.trackers import Tracker, open_tracker, require_installed

Record = dict[str, Any]

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_POSITIONS = ("micro_step", "resumed_from")
"""Keys of a record that count micro-batches."""

TEXT_KINDS = frozenset({"start", "warning"})
"""Records that hold text for people: there a string ``"NaN"`` stays a string."""


class RunLog:
    """Writer of a run's log: appends records to the file, shows them, and feeds trackers.

    The directory is made if it is missing. ``total_batches`` are the micro-batches of the whole
    run, ``initial`` those already done before this process. On a terminal there is one progress bar
    over micro-batches; elsewhere every ``train`` record is one aligned line. Everything shown goes
    to ``stream``, by default standard output.

    A record that cannot be written (no space left) is announced once and lost, and the run goes on:
    whether its work can still be saved is for checkpoints to find out.

    A tracker that fails is announced once and dropped, and the run goes on without it.

    Raises ``OutputError`` if the file cannot be opened, ``UsageError`` if a tracker named in
    ``report_to`` is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_batches: int,
        initial: int = 0,
        report_to: Sequence[str] = (),
        name: str = "student",
        stream: TextIO | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        out = sys.stdout if stream is None else stream
        self._initial = initial
        self._stream = out
        # Before anything is appended: this process is the next attempt after those in the file.
        earlier = (record["attempt"] for record in _records(run_dir / "log.jsonl"))
        self.attempt = 1 + max(earlier, default=0)
        require_installed(report_to)  # before the file is there
        self._file = _AppendOnly(run_dir / "log.jsonl")
        self._lines = AlignedLines(total_batches, initial)
        self._bar: tqdm | None = None
        self._trackers: dict[str, Tracker] = {}
        for package in report_to:
            with self._dropped_if_failing(package):
                self._trackers[package] = open_tracker(
                    package, run_dir, attempt=self.attempt, initial=initial
                )
        # A bar where somebody watches; elsewhere lines, which a file or a pipe can hold.
        self._make_bar: Callable[[], tqdm] | None = None
        if out.isatty():
            self._make_bar = lambda: progress_bar(name, total_batches, initial, out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def header(self, lines: Sequence[tuple[str, str]], rows: tuple[int, int] | None = None) -> None:
        """Record and show the header of the run: aligned pairs of label and text.

        ``rows`` are those per micro-batch where the run goes on from, and now: readers then find
        all positions in one size.
        """
        facts: Record = {"resumed_from": self._initial, "header": [list(line) for line in lines]}
        if rows is not None:
            facts["rows_per_micro_batch"] = list(rows)
        self._record("start", facts)
        self.message(aligned_pairs(lines))
        self._start_bar()

    def train(self, record: Mapping[str, Any]) -> None:
        """Record and show the numbers of training since the last such record."""
        self._record("train", record)
        self._track(record["micro_step"], _train_scalars(record))
        self._start_bar()
        if self._bar is not None:
            self._bar.set_postfix_str(bar_postfix(record), refresh=False)
        else:
            self.message("\n".join(self._lines.lines(record)))

    def advance(self, n: int = 1) -> None:
        """Move the progress bar by ``n`` micro-batches. Nothing is recorded."""
        self._start_bar()
        if self._bar is not None:
            self._bar.update(n)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Record and show an evaluation: counters, and metrics such as ``eval_ema/nll``, flat."""
        self._record("eval", record)
        metrics = {name: value for name, value in record.items() if "/" in name}
        self._track(record["micro_step"], metrics)
        self.message(evaluation_lines(record))

    def saved(self, record: Mapping[str, Any]) -> None:
        """Record that a checkpoint was written."""
        self._record("save", record)

    def warning(self, text: str) -> None:
        """Record a warning and show it."""
        self._record("warning", {"message": text})
        self.message(f"warning: {text}")

    def message(self, text: str) -> None:
        """Show a text above the progress bar, if there is one. Nothing is recorded."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def end(self, record: Mapping[str, Any]) -> None:
        """Record how this process ended, and leave the progress bar where it is."""
        self._record("end", record)
        self._close_bar()

    def close(self) -> None:
        """Release bar, file and trackers. May be called twice."""
        self._close_bar()
        for package, tracker in list(self._trackers.items()):
            with self._dropped_if_failing(package):
                tracker.close()
        self._trackers.clear()
        self._file.close()

    def _record(self, kind: str, record: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = to_json({"attempt": self.attempt, "kind": kind, "time": now} | dict(record))
        failure = self._file.append(line)
        if failure is not None:
            self.message(
                f"warning: {self._file.path} cannot be written ({failure}); "
                "the run goes on without its log"
            )

    def _track(self, micro_step: int, scalars: Mapping[str, float]) -> None:
        for package, tracker in list(self._trackers.items()):
            with self._dropped_if_failing(package):
                tracker.log(scalars, micro_step)

    @contextmanager
    def _dropped_if_failing(self, package: str) -> Iterator[None]:
        """Within, whatever a tracker raises is a warning, and its last one."""
        try:
            yield
        except (Exception, SystemExit) as error:  # a tracker may end a process that has no login
            self._trackers.pop(package, None)
            self.warning(
                f"{package} fails, got {with_type(error)}; the run goes on "
                "without it, and log.jsonl has every number"
            )

    def _start_bar(self) -> None:
        """Make the bar when work begins: its clock must not count the loading of models."""
        if self._make_bar is not None:
            self._bar, self._make_bar = self._make_bar(), None

    def _close_bar(self) -> None:
        self._make_bar = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SilentLog(RunLog):
    """The log of a process beside the one that writes: nothing is recorded or shown."""

    def __init__(self) -> None:
        pass

    def header(self, lines: Sequence[tuple[str, str]], rows: tuple[int, int] | None = None) -> None:
        pass

    def train(self, record: Mapping[str, Any]) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass

    def evaluation(self, record: Mapping[str, Any]) -> None:
        pass

    def saved(self, record: Mapping[str, Any]) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def end(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def read_log(run_dir: str | Path) -> list[Record]:
    """The records of a run in the order they were written; a log that does not exist is empty.

    A resumed run repeats the steps since its checkpoint: of records of the same kind at the same
    ``micro_step``, only those of the highest attempt are kept. Records without a position are all
    kept. Lines that a killed process left torn are skipped. Positions are those of the newest
    attempt's micro-batches, if their size has changed.
    """
    records = _in_newest_size(list(_records(Path(run_dir) / "log.jsonl")))
    # The highest attempt at each position; the second pass then keeps the file's order.
    newest: dict[tuple[str, int | None], int] = {}
    for record in records:
        newest[_position(record)] = max(record["attempt"], newest.get(_position(record), 0))
    return [
        record
        for record in records
        if "micro_step" not in record or record["attempt"] == newest[_position(record)]
    ]


def to_json(value: Any) -> str:
    """One line of strict JSON, in which NaN and the infinities are the strings of ``NONFINITE``."""
    return json.dumps(_nonfinite_to_text(value), allow_nan=False, ensure_ascii=False)


def from_json(text: str) -> Any:
    """The value that ``to_json`` wrote; a text that is a key of ``NONFINITE`` turns float."""
    return _text_to_nonfinite(json.loads(text))


class _AppendOnly:
    """Append-only file of lines, each handed to the operating system in one unbuffered write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A pipe in its place would wait for a reader, a link would lead elsewhere.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.fdopen(os.open(path, flags, 0o666), "a+b", buffering=0)
        except OSError as error:
            raise OutputError(
                f"{path} must be writable, got {error.strerror}; choose another --output_dir"
            ) from error
        self._torn = not _ends_with_newline(self._file)
        self._failed = False

    def append(self, line: str) -> OSError | None:
        """Write a line; return the error if this is the first write that fails, else None."""
        # A line that a kill or a full disk left torn is ended first, so that it spoils no other.
        data = ("\n" * self._torn + line + "\n").encode()
        try:
            self._torn = self._file.write(data) < len(data)
        except OSError as error:
            first_failure = None if self._failed else error
            self._failed = True
            return first_failure
        return None

    def close(self) -> None:
        self._file.close()


def _ends_with_newline(file: Any) -> bool:
    if file.seek(0, 2) == 0:
        return True
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def _records(path: Path) -> Iterator[Record]:
    """Every whole record of the file, in order."""
    if not is_file(path):
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # torn by a killed process
            if _is_record(record):
                yield record if record["kind"] in TEXT_KINDS else _text_to_nonfinite(record)


def _is_record(record: Any) -> bool:
    """Whether a line is one of ours: what readers count with must be numbers."""
    if not isinstance(record, dict):
        return False
    numbers = [record.get("attempt"), *(record[key] for key in _POSITIONS if key in record)]
    rows = record.get("rows_per_micro_batch", [1, 1])
    return (
        isinstance(record.get("kind"), str)
        and all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(rows, list)
        and len(rows) == 2
        and all(type(number) is int and number > 0 for number in rows)
    )


def _in_newest_size(records: list[Record]) -> list[Record]:
    """The records with positions in micro-batches of the size that the newest attempt has."""
    starts = [r for r in records if r["kind"] == "start" and "rows_per_micro_batch" in r]
    rows = {}  # attempt -> rows per micro-batch
    before = 0
    for attempt in sorted({record["attempt"] for record in records}, reverse=True):
        # A log of an earlier version does not say: it is what the next attempt found.
        found = next((r for r in starts if r["attempt"] == attempt), None)
        before, now = found["rows_per_micro_batch"] if found else (before, before)
        rows[attempt] = now
    newest = rows[max(rows)] if rows else 0
    return [
        record
        | {
            key: round(record[key] * rows[record["attempt"]] / newest)
            for key in _POSITIONS
            if key in record and rows[record["attempt"]] != newest
        }
        for record in records
    ]


def _position(record: Record) -> tuple[str, int | None]:
    return record["kind"], record.get("micro_step")


def _nonfinite_to_text(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            return {key: _nonfinite_to_text(item) for key, item in value.items()}
        case list() | tuple():
            return [_nonfinite_to_text(item) for item in value]
    return value


def _text_to_nonfinite(value: Any) -> Any:
    match value:
        case str():
            return NONFINITE.get(value, value)
        case dict():
            return {key: _text_to_nonfinite(item) for key, item in value.items()}
        case list():
            return [_text_to_nonfinite(item) for item in value]
    return value


def _train_scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    scalars = {f"train/{key}": v for key, v in record.items() if isinstance(v, int | float)}
    return scalars | {f"weights/{key}": v for key, v in record.get("weights", {}).items()}
