"""What a run tells its user: log, terminal, trackers, plots and the report page.

``from sad.report import write_report`` makes the page of a run directory again. Names are imported
on first use, so that the log or the colours cost nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sad.report.page import write_report
    from sad.report.results import format_results, verdict

__all__ = ["format_results", "verdict", "write_report"]

_HOME = {"write_report": "page", "format_results": "results", "verdict": "results"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"sad.report.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sad.report' has no attribute {name!r}")
