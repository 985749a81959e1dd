"""The cost benchmark of the structural losses at toy sizes: every arm runs and is in the table."""

from __future__ import annotations

import pytest

from bench.training import structural_cost as structural


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_arm_is_measured() -> None:
    setup = structural.Setup(layers=2, hidden=128, tokens=64, vocab=200, experts=4, rounds=2)
    result = structural.measure(setup)
    names = [row["arm"] for row in result["rows"]]
    assert names == [*structural.DENSE, *structural.MIXTURE]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        low, high = row["time_ratio_range"]
        assert low <= row["time_ratio"] <= high
        assert row["arm"] != "KD alone" or (row["time_ratio"], row["extra_mib"]) == (1, 0)
    lines = structural.table(result)
    assert len(lines) == 2 + len(names) and lines[2].startswith("| **dense**, KD alone |")
