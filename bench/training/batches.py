"""The largest batch of each trainer of ``bench.training.trainers`` within a memory limit.

The limit is set by ``torch.cuda.set_per_process_memory_fraction``: it bounds what torch's allocator
may reserve, fragmentation included; CUDA's own memory comes on top. A batch fits if two steps
finish, the second with the optimizer's state allocated; one row more was tried and failed. The
search starts at the size that the peaks measured so far predict. Each trainer runs in a subprocess;
nothing is timed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from bench.kernels.timing import MIB
from bench.training.task import GPU, Setup
from bench.training.trainers import NAIVE, OURS, attempt, named

Json = dict[str, Any]

LIMITS = (24, 48, 80)  # GiB
TRAINERS = (OURS, NAIVE, "transformers.Trainer", "trl GKDTrainer")
GIB = 1 << 30


def measure(
    setup: Setup = GPU,
    limits: Sequence[int] = LIMITS,
    run: Callable[[Setup, str, Sequence[int]], Iterable[Json]] | None = None,
    *,
    only: Sequence[str] = (),
    keep: Callable[[Json], None] = lambda _: None,
) -> Json:
    """The most rows of ``setup.length`` tokens, per trainer and limit, smallest limit first.

    ``only`` selects trainers by their command-line words. ``run`` searches for one trainer, limit
    by limit; ``keep`` receives the record so far after each.
    """
    names, limits = named(only, TRAINERS), sorted(set(limits))
    if limits[0] < 1:
        raise SystemExit(f"error: --limits must be at least 1 GiB, got {limits[0]}; ask for more")
    if run is None:
        _check_card(limits[-1])
    rows: list[Json] = []
    result = {"case": "batches", "setup": asdict(setup), "limits": limits}
    result |= {"contenders": names, "rows": rows}
    for name in names:
        row: Json = {"contender": name, "reason": None, "batches": []}
        rows.append(row)
        try:
            for found in (run or _in_subprocess)(setup, name, limits):
                row["batches"].append(found)
                keep(result)
        except RuntimeError as error:
            row["reason"] = str(error)
            keep(result)
    return result


def _check_card(limit: int) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: the case batches must find a GPU, got none; run it where one is")
    there = torch.cuda.get_device_properties(0).total_memory / GIB
    if limit > there:
        raise SystemExit(
            f"error: --limits must be at most the card's {there:.1f} GiB, got {limit}; "
            "choose smaller ones"
        )


def table(result: Json) -> list[str]:
    """Markdown table: rows that fit, their ratio to the naive loss's, and reasons for gaps."""
    found = {
        row["contender"]: {batch["limit"]: batch["rows"] for batch in row["batches"]}
        for row in result["rows"]
    }
    limits, naive = result["limits"], found.get(NAIVE, {})
    head = "".join(f" {limit} GiB |" for limit in limits)
    lines = [f"| rows of {result['setup']['length']} tokens in |{head}"]
    lines.append("|---|" + "---:|" * len(limits))
    for name, rows in found.items():
        if rows:
            cells = [_cell(rows.get(limit), naive.get(limit)) for limit in limits]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    why = [f"{row['contender']}: {row['reason']}." for row in result["rows"] if row["reason"]]
    gaps = [name for name in result["contenders"] if len(found.get(name, ())) < len(limits)]
    notes = [f"Not all limits were searched for {'; '.join(gaps)}."] if gaps else []
    return [*lines, "", *notes, *why] if notes or why else lines


def _cell(rows: int | None, naive: int | None) -> str:
    if rows is None:
        return "-"
    return f"{rows} ({rows / naive:.1f}x)" if rows and naive else str(rows or "none")


def largest(fits: Callable[[int], bool], guess: int, low: int = 0) -> int:
    """The largest n with ``fits(n)``, by galloping from ``guess`` and bisection.

    ``fits`` must be monotonic: true up to the result. It is known to hold for ``low``, where it is
    not called.
    """
    high, step = None, 1  # low fits, high does not
    known, at = low, max(guess, low + 1)
    while high is None or high - low > 1:
        # Double the step away from the guess until it is bracketed, then bisect.
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = low + step
        elif low == known and high - step > low:
            at = high - step
        else:
            at = (low + high) // 2
        step *= 2
    return low


def search(
    peak_of: Callable[[int, int | None], float | None], limits: Sequence[int]
) -> Iterator[Json]:
    """Yield the largest batch of each limit, from the smallest limit up.

    ``peak_of(rows, limit)`` is the peak in MiB of two steps, or None if they do not fit. Because of
    fragmentation the peak reaches only a share of the limit; the share found for one limit predicts
    the batch of the next.
    """
    peaks: dict[int, float] = {}

    def fits(rows: int, limit: int | None) -> bool:
        peak = peak_of(rows, limit)
        if peak is not None:
            peaks[rows] = peak
        return peak is not None

    assert fits(1, None) and fits(3, None), "three rows must fit the whole card"
    rows, share = 0, 1.0  # of a limit, that the peak reaches
    for limit in sorted(limits):
        whole = limit * GIB / MIB
        none, each = _line(peaks)
        guess = int((share * whole - none) / each)
        rows = largest(partial(fits, limit=limit), guess, rows)
        none, each = _line(peaks)
        if rows:
            share = min(
                max(share, (none + each * rows) / whole), (none + each * (rows + 1)) / whole
            )
        yield {"limit": limit, "rows": rows, "peak_mib": peaks[rows] if rows else None}


def _line(peaks: dict[int, float]) -> tuple[float, float]:
    """Intercept and slope in MiB of the peak by rows, from the smallest and largest batch."""
    few, many = min(peaks), max(peaks)
    each = (peaks[many] - peaks[few]) / (many - few)
    return peaks[few] - each * few, each


def _in_subprocess(setup: Setup, name: str, limits: Sequence[int]) -> Iterator[Json]:
    """Run ``search`` in a subprocess; ``RuntimeError`` with its last line of stderr if it fails."""
    words = [sys.executable, "-m", "bench.training.batches", json.dumps(asdict(setup)), name]
    words += map(str, limits)
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode:
            errors.seek(0)
            last = "".join(errors.read().splitlines()[-1:])
            raise RuntimeError(f"its process ended with {process.returncode}: {last[:200]}")


def _peak_of(setup: Setup, name: str, rows: int, limit: int | None) -> float | None:
    """Peak MiB of two steps with so many rows under the limit in GiB; None if out of memory."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit * GIB / total)
    run = attempt(replace(setup, rows=rows, warmup=1, steps=1, eval_rows=0), name, seed=0)
    if run["status"] == "ok":
        return run["peak_mib"]
    if "OutOfMemory" in run["reason"]:
        return None
    raise RuntimeError(run["reason"])


def _main(setup: str, name: str, *limits: str) -> None:
    """Print one line of JSON per limit; the trainers' own output goes to stderr."""
    of, lines = Setup(**json.loads(setup)), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for found in search(partial(_peak_of, of, name), [int(limit) for limit in limits]):
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
