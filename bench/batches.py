"""The largest batch that a trainer of ``bench.end_to_end`` fits into a memory limit.

The limit is torch's own, ``torch.cuda.set_per_process_memory_fraction``: what its allocator may
reserve, fragments included; what CUDA itself takes comes on top. A batch fits if two steps finish,
the second with the optimizer's state in place. Sizes are looked for around the one that two
measured peaks predict. Each trainer has a process of its own; nothing is timed.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.end_to_end.task import GPU, Setup
from bench.end_to_end.trainers import CONTENDERS, NAIVE, OURS, attempt
from bench.timing import MIB

Json = dict[str, Any]

LIMITS = (24, 48, 80)  # GiB
TRAINERS = (OURS, NAIVE, "transformers.Trainer", "trl GKDTrainer")
GIB = 1 << 30


def measure(
    setup: Setup = GPU,
    limits: Sequence[int] = LIMITS,
    run: Callable[[Setup, str, Sequence[int]], list[Json]] | None = None,
) -> Json:
    """Rows of ``setup.length`` tokens per trainer and limit; ``run`` searches for one trainer."""
    if run is None and not torch.cuda.is_available():
        raise SystemExit("error: the case batches must find a GPU, got none; run it where one is")
    run = run or _apart
    rows = [{"contender": name, "batches": run(setup, name, limits)} for name in TRAINERS]
    return {"case": "batches", "setup": asdict(setup), "limits": list(limits), "rows": rows}


def table(result: Json) -> list[str]:
    """Markdown: rows that fit, and how many times those of the naive loss."""
    naive = next(row for row in result["rows"] if row["contender"] == NAIVE)["batches"]
    head = "".join(f" {limit} GiB |" for limit in result["limits"])
    lines = [f"| rows of {result['setup']['length']} tokens in |{head}"]
    lines.append("|---|" + "---:|" * len(result["limits"]))
    for row in result["rows"]:
        cells = []
        for batch, of_naive in zip(row["batches"], naive, strict=True):
            n, base = batch["rows"], of_naive["rows"]
            cells.append(f"{n} ({n / base:.1f}x)" if n and base else str(n) if n else "none")
        lines.append(f"| {row['contender']} | " + " | ".join(cells) + " |")
    return lines


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The most for which ``fits`` holds, if it holds up to there; asked near ``guess`` first."""
    low, high, step = 0, None, 1  # low fits, high does not
    at = max(guess, 1)
    while high is None or high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = low + step
        elif low == 0 and high - step > 0:
            at = high - step
        else:
            at = (low + high) // 2
        step *= 2
    return low


def search(peak_of: Callable[[int, int | None], float | None], limits: Sequence[int]) -> list[Json]:
    """``peak_of(rows, limit)`` is the peak in MiB of two steps, or None if they do not fit."""
    one, three = peak_of(1, None), peak_of(3, None)
    assert one is not None and three is not None, "three rows must fit the whole card"
    each = (three - one) / 2
    found = []
    for limit in limits:
        peaks: dict[int, float] = {}

        def fits(rows: int, limit: int = limit, peaks: dict[int, float] = peaks) -> bool:
            peak = peak_of(rows, limit)
            if peak is not None:
                peaks[rows] = peak
            return peak is not None

        rows = largest(fits, 1 + int((limit * GIB / MIB - one) / each))
        found.append({"limit": limit, "rows": rows, "peak_mib": peaks.get(rows)})
    return found


def _apart(setup: Setup, name: str, limits: Sequence[int]) -> list[Json]:
    words = [sys.executable, "-m", "bench.batches", json.dumps(asdict(setup)), name]
    done = subprocess.run([*words, *map(str, limits)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the search must finish, got {done.stderr[-800:]} of {name}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_of(setup: Setup, name: str, rows: int, limit: int | None) -> float | None:
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
    assert name in CONTENDERS, name
    of = Setup(**json.loads(setup))
    found = search(lambda rows, limit: _peak_of(of, name, rows, limit), [int(x) for x in limits])
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
