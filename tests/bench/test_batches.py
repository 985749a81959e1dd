"""The search for the largest batch, without a GPU."""

from __future__ import annotations

import pytest

from bench import batches
from bench.end_to_end.trainers import NAIVE, OURS


@pytest.mark.parametrize("truth", [0, 1, 2, 7, 33, 100])
@pytest.mark.parametrize("guess", [-3, 1, 6, 33, 99])
def test_the_largest_is_found_from_any_guess(truth: int, guess: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= truth

    assert batches.largest(fits, guess) == truth
    assert min(asked) >= 1 and len(asked) == len(set(asked)) <= 2 + 2 * 7


def test_a_good_guess_takes_two_questions() -> None:
    asked: list[int] = []
    assert batches.largest(lambda n: asked.append(n) or n <= 40, 40) == 40
    assert asked == [40, 41]


def test_limits_are_searched_by_peaks() -> None:
    """5 GiB, and 2 GiB for each row; beyond 20 rows fragments take a tenth on top."""

    def peak_of(rows: int, limit: int | None) -> float | None:
        reserved = 5 + 2 * rows * (1.1 if rows > 20 else 1)
        return None if limit is not None and reserved > limit else 1024.0 * (5 + 2 * rows)

    found = batches.search(peak_of, (4, 24, 80))
    assert [f["rows"] for f in found] == [0, 9, 34]
    assert found[0]["peak_mib"] is None and found[1]["peak_mib"] == 1024 * 23


def test_the_table_compares_with_the_naive_loss() -> None:
    rows = {OURS: 9, NAIVE: 3}

    def run(setup: object, name: str, limits: object) -> list[batches.Json]:
        n = rows.get(name, 0)
        return [{"limit": limit, "rows": n, "peak_mib": 1.0} for limit in (24, 48)]

    lines = batches.table(batches.measure(limits=(24, 48), run=run))
    assert lines[0] == "| rows of 1024 tokens in | 24 GiB | 48 GiB |"
    assert lines[2] == f"| {OURS} | 9 (3.0x) | 9 (3.0x) |"
    assert lines[-1].endswith("| none | none |")
