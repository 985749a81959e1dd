"""The result table of ``quickstart-instruct`` over several seeds: the same, on completions."""

from __future__ import annotations

from typing import Any

from bench.training import quickstart


def measure() -> dict[str, Any]:
    """Mean and per-seed values of every metric of the table."""
    return quickstart.measure(recipe="quickstart-instruct")
