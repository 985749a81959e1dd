"""Pytest plugin (``-p support.at_once``) that prints each failure when it occurs.

A run that hits its time limit then still shows why tests failed.
"""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failed report; with xdist this runs in the controller, whose output is shown."""
    if report.failed:
        print(f"\n== {report.nodeid} failed in {report.when}\n{report.longreprtext[-3000:]}")
