"""A quick part of the campaign against the reader of configurations, and that it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from campaign.configurations import mutated, run, verdict
from sad.config import load


def test_no_mutated_configuration_is_more_than_one_line() -> None:
    tally = run(300, seed=0)
    assert tally == (300, 300, 0, []), "\n".join(tally.examples)


def test_mutations_are_those_of_the_seed() -> None:
    some = [mutated(number, 5) for number in range(40)]
    assert some == [mutated(number, 5) for number in range(40)]
    assert some != [mutated(number, 6) for number in range(40)]
    assert len(set(some)) > 35


def test_a_reader_that_raises_is_lost(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: s\nteacher: t\nseed: 0x_\n")
    assert verdict(path) == ""

    def fail(*_: Any) -> None:
        raise ValueError("odd")

    monkeypatch.setitem(load.FILE_READERS, ".yaml", fail)
    assert verdict(path) == "exit code 1: ['ValueError: odd']"
    tally = run(50, seed=0)
    assert tally.inflicted == 50 and 0 < tally.lost == 50 - tally.survived
