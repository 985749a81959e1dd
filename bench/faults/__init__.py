"""Faults of others, run here and now: what each returns, what float64 does, and what ours does.

Every row is measured, none is quoted. Who is right stays in the table beside who is wrong, and who
is absent with the reason. Without a GPU the Triton kernels are interpreted, on fewer rows; that has
to be decided before triton is imported, and so the rows come from a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from bench.faults.cases import FAULTS, Effort
from bench.faults.core import Row, broken, rows_of
from bench.faults.text import table

__all__ = ["measure", "rows", "table"]


def measure() -> dict[str, Any]:
    """All rows: three minutes on two cores, less on a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    environment.setdefault("LIGER_KERNEL_BACKEND", "nvidia-triton")  # see bench/__main__.py
    words = [sys.executable, "-m", "bench.faults"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"faults ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"case": "faults", "rows": json.loads(done.stdout.splitlines()[-1])}


def rows(effort: Effort | None = None) -> list[Row]:
    found: list[Row] = []
    for cases in FAULTS:
        try:
            for fault in cases(effort or Effort()):
                found += rows_of(fault)
        except Exception as error:  # drawing a problem, or float64 on it
            found.append(broken(cases.__name__, error))
    return found
