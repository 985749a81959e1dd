"""The benchmark of imports and help texts: every command is run and counted, a failure is seen."""

from __future__ import annotations

import subprocess

import pytest

from bench.training import startup


def test_every_command_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = (("-c", "pass"), ("-m", "sad", "--help"))
    monkeypatch.setattr(startup, "COMMANDS", commands)
    result = startup.measure(rounds=2)
    assert [row["command"] for row in result["rows"]] == ["pass", "sad --help"]
    for row in result["rows"]:
        assert len(row["rounds"]) == 2 and row["cpu_seconds"] == min(row["rounds"]) > 0


def test_a_command_that_fails_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMANDS", (("-c", "raise SystemExit(3)"),))
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure(rounds=1)
