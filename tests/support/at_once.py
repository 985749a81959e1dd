"""A pytest plugin (``-p support.at_once``): failures are told when they occur, not in the end.

A run that is cut off then says why its tests failed, not only which.
"""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With several processes this runs in the one that prints."""
    if report.failed:
        print(f"\n== {report.nodeid} failed in {report.when}\n{report.longreprtext[-3000:]}")
