"""Numerical faults of other libraries, reproduced: their result, float64's, and ours.

Every row is measured, none is quoted. Peers that are right stay in the table, and absent ones with
the reason. Without a GPU the Triton kernels are interpreted, on fewer rows; that must be chosen
before triton is imported, so the rows are measured in a subprocess.
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
    """Measure all rows in a subprocess: three minutes on two cores, less on a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    environment.setdefault("LIGER_KERNEL_BACKEND", "nvidia-triton")  # see bench/__main__.py
    words = [sys.executable, "-m", "bench.faults"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"faults ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"case": "faults", "rows": json.loads(done.stdout.splitlines()[-1])}


def rows(effort: Effort | None = None) -> list[Row]:
    """Measure all rows in this process."""
    found: list[Row] = []
    for cases in FAULTS:
        try:
            for fault in cases(effort or Effort()):
                found += rows_of(fault)
        except Exception as error:  # of our own: drawing inputs, or float64
            found.append(broken(cases.__name__, error))
    return found
