"""The search for the largest batch, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.training import batches
from bench.training.task import GPU, Setup
from bench.training.trainers import NAIVE, OURS


@pytest.mark.parametrize("truth", [0, 1, 2, 7, 33, 100])
@pytest.mark.parametrize("guess", [-3, 1, 6, 33, 99])
def test_the_largest_is_found_from_any_guess(truth: int, guess: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= truth

    assert batches.largest(fits, guess) == truth
    assert min(asked) >= 1 and len(asked) == len(set(asked)) <= 2 + 2 * 7


@pytest.mark.parametrize("low", [1, 5, 32, 33])
@pytest.mark.parametrize("guess", [-3, 6, 33, 99])
def test_what_is_known_to_fit_is_not_asked(low: int, guess: int) -> None:
    asked: list[int] = []
    assert batches.largest(lambda n: asked.append(n) or n <= 33, guess, low) == 33
    assert min(asked) > low and 34 in asked
    assert len(asked) == len(set(asked)) <= 2 + 2 * 7


def test_a_good_guess_takes_two_questions() -> None:
    asked: list[int] = []
    assert batches.largest(lambda n: asked.append(n) or n <= 40, 40) == 40
    assert asked == [40, 41]


def test_limits_are_searched_by_peaks() -> None:
    """A memory model: 5 GiB and 2 GiB per row; beyond 20 rows fragmentation adds a tenth."""

    def peak_of(rows: int, limit: int | None) -> float | None:
        reserved = 5 + 2 * rows * (1.1 if rows > 20 else 1)
        return None if limit is not None and reserved > limit else 1024.0 * (5 + 2 * rows)

    found = list(batches.search(peak_of, (80, 4, 24)))
    assert [f["limit"] for f in found] == [4, 24, 80]
    assert [f["rows"] for f in found] == [0, 9, 34]
    assert found[0]["peak_mib"] is None and found[1]["peak_mib"] == 1024 * 23


@pytest.mark.parametrize("fragments", [0.0, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("each", [0.7, 2.0, 4.7, 7.0])
def test_what_is_reported_was_tried_and_so_was_one_more(fragments: float, each: float) -> None:
    tried: dict[tuple[int, int], bool] = {}

    def peak_of(rows: int, limit: int | None) -> float | None:
        peak = 11.5 + each * rows
        if limit is not None:
            assert (rows, limit) not in tried
            tried[rows, limit] = peak * (1 + fragments) <= limit
        return None if limit is not None and not tried[rows, limit] else 1024 * peak

    found = list(batches.search(peak_of, (24, 48, 80)))
    for before, at in zip([None, *found], found, strict=False):
        rows, limit = at["rows"], at["limit"]
        known = rows == 0 or (before is not None and before["rows"] == rows)
        assert known or tried[rows, limit]
        assert not tried[rows + 1, limit]


def test_fragments_of_one_limit_are_expected_of_the_next() -> None:
    asked: list[tuple[int, int | None]] = []

    def peak_of(rows: int, limit: int | None) -> float | None:
        asked.append((rows, limit))
        peak = 10 + 2 * rows
        return None if limit is not None and peak > 0.75 * limit else 1024.0 * peak

    assert [f["rows"] for f in batches.search(peak_of, (40, 80, 120))] == [10, 25, 40]
    first = [next(rows for rows, limit in asked if limit == at) for at in (40, 80, 120)]
    assert first[0] == 15  # as if there were none
    assert 25 <= first[1] <= 27 and 40 <= first[2] <= 41


def test_the_table_compares_with_the_naive_loss() -> None:
    rows = {OURS: 9, NAIVE: 3}

    def run(setup: object, name: str, limits: object) -> list[batches.Json]:
        n = rows.get(name, 0)
        return [{"limit": limit, "rows": n, "peak_mib": 1.0} for limit in (24, 48)]

    result = batches.measure(limits=(24, 48), run=run)
    lines = batches.table(result)
    assert lines[0] == "| rows of 1024 tokens in | 24 GiB | 48 GiB |"
    assert lines[2] == f"| {OURS} | 9 (3.0x) | 9 (3.0x) |"
    assert lines[-1].endswith("| none | none |")
    assert json.loads(json.dumps(result)) == result


def test_a_search_that_is_cut_off_leaves_what_it_found() -> None:
    kept: list[str] = []

    def run(setup: object, name: str, limits: Sequence[int]) -> Iterator[batches.Json]:
        yield {"limit": 24, "rows": 6, "peak_mib": 1.0}
        if name == NAIVE:
            raise KeyboardInterrupt
        yield {"limit": 48, "rows": 18, "peak_mib": 1.0}

    with pytest.raises(KeyboardInterrupt):
        batches.measure(limits=(24, 48), run=run, keep=lambda r: kept.append(json.dumps(r)))
    results = [json.loads(text) for text in kept]
    counts = [[len(row["batches"]) for row in result["rows"]] for result in results]
    assert counts == [[1], [2], [2, 1]]
    assert [line for line in batches.table(results[0]) if "x)" in line] == []
    lines = batches.table(results[-1])
    assert lines[2:5] == [f"| {OURS} | 6 (1.0x) | 18 |", f"| {NAIVE} | 6 (1.0x) | - |", ""]
    gaps = f"{NAIVE}; transformers.Trainer; trl GKDTrainer"
    assert lines[5:] == [f"Not all limits were searched for {gaps}."]


def test_a_trainer_that_fails_does_not_end_the_others() -> None:
    def run(setup: object, name: str, limits: Sequence[int]) -> list[batches.Json]:
        if name == NAIVE:
            raise RuntimeError("is not installed")
        return [{"limit": limit, "rows": 6, "peak_mib": 1.0} for limit in limits]

    result = batches.measure(limits=(48, 24), run=run, only=("ours", "naive", "gkd"))
    assert result["limits"] == [24, 48]
    assert [row["contender"] for row in result["rows"]] == [OURS, NAIVE, "trl GKDTrainer"]
    assert batches.table(result)[2:] == [
        f"| {OURS} | 6 | 6 |",
        "| trl GKDTrainer | 6 | 6 |",
        "",
        f"Not all limits were searched for {NAIVE}.",
        f"{NAIVE}: is not installed.",
    ]


def test_a_process_hands_over_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho '{\"limit\": 24}'\necho gone wrong >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    found = batches._in_subprocess(GPU, OURS, (24, 48))
    assert next(found) == {"limit": 24}
    with pytest.raises(RuntimeError, match="its process ended with 3: gone wrong"):
        next(found)


def test_only_results_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peak_of(setup: Setup, name: str, rows: int, limit: int | None) -> float | None:
        print({"loss": 2.0})
        assert (setup, name) == (GPU, OURS)
        return None if limit is not None and rows > limit // 4 else 4096.0 * rows

    monkeypatch.setattr(batches, "_peak_of", peak_of)
    batches._main(json.dumps(asdict(GPU)), OURS, "24", "48")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["limit"], f["rows"]) for f in found] == [(24, 6), (48, 12)]


def test_what_cannot_be_searched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"--only must be some of ours, .*, got 'distillation'"):
        batches.measure(only=("distillation",), run=lambda *_: [])
    with pytest.raises(SystemExit, match="--limits must be at least 1 GiB, got 0"):
        batches.measure(limits=(24, 0), run=lambda *_: [])
    card = SimpleNamespace(total_memory=79.2 * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    with pytest.raises(SystemExit, match=r"at most the card's 79\.2 GiB, got 80"):
        batches.measure()
