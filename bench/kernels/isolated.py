"""Kernel benchmarks in one subprocess per loss, whose records are merged.

A peer that breaks its CUDA context spoils the results of its own loss only. The processes run
one at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def measure_isolated(
    names: Sequence[str], options: Sequence[str], deadline: float
) -> Iterator[dict[str, Any]]:
    """Run ``python -m bench NAME`` for each name; yield the merged record after each.

    The time until ``deadline`` is divided equally among the remaining names.
    """
    merged: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(names):
            path = Path(folder) / f"{i}.json"
            seconds = (deadline - time.monotonic()) / (len(names) - i)
            words = [sys.executable, "-m", "bench", name, "--part", "--out", str(path)]
            words += ["--seconds", f"{max(seconds, 1.0):.0f}", *options]
            status = subprocess.run(words, check=False).returncode
            part = json.loads(path.read_text()) if path.exists() else None
            merged = _merged(merged, part, name, status)
            if "rows" in merged:
                yield merged


def _merged(
    whole: dict[str, Any], part: dict[str, Any] | None, name: str, status: int
) -> dict[str, Any]:
    if part is None:
        whole.setdefault("notes", []).append(f"{name}: nothing was written, exit status {status}")
        return whole
    if "rows" not in whole:
        return part | {"notes": whole.get("notes", []) + part["notes"]}
    for field in ("floors", "rows", "notes"):
        whole[field] += part[field]
    for field, values in part["machine"].items():
        if isinstance(values, list):  # [start, end]
            whole["machine"][field][1:] = values[1:]
    return whole
