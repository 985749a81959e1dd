"""``python -m bench --shape``: a table and a record of one's own sizes, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import record
from bench.__main__ import main
from bench.problems import cases

SMALL = ("--shape", "6,8,12,97")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_shape_of_ones_own_is_measured_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.__main__._choose_environment", lambda caches: None)
    path = tmp_path / "r.json"
    words = ["linear_kd/joint", "ce", *SMALL, "--dtype", "float32", "--quick", "--device", "cpu"]
    assert main([*words, "--peers", "ours", "eager", "--out", str(path)]) == 0
    written = json.loads(path.read_text())
    asked = " ".join([*words, "--peers ours eager"])
    assert written["run"]["command"] == f"python -m bench {asked}" and written["schema"] == 1
    rows = [row for row in written["rows"] if row["status"] != "skipped"]
    assert [(row["case"], row["shape"], row["dtype"], row["status"]) for row in rows] == [
        (case, shape, "float32", "ok")
        for case, shape in (
            ("linear_kd/joint", {"N": 6, "V": 97, "D_s": 8, "D_t": 12}),
            ("ce", {"N": 6, "V": 97}),
        )
        for _ in ("ours", "eager")
    ]
    printed = capsys.readouterr().out
    assert "linear_kd/joint: N=6 V=97 D_s=8 D_t=12, float32" in printed
    assert "ours" in printed and "errors" in printed and f"-> {path}" in printed


def test_without_a_case_every_loss_is_measured() -> None:
    chosen = cases.of_shape((6, 8, 12, 97), "float16")
    assert sorted(case.name for case in chosen) == sorted(cases.LINEAR + cases.ROWS)
    assert {case.dtype for case in chosen} == {"float16"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "6,8,97"], "--shape: must be four whole numbers from 1 on, got '6,8,97'"),
        (["--shape", "6,8,12,x"], "--shape: must be four whole numbers from 1 on, got '6,8,12,x'"),
        (["--shape", "6,0,12,97"], "--shape: must be four whole numbers from 1 on"),
        (["--shape", "6,-8,12,97"], "--shape: must be four whole numbers from 1 on"),
        (["--shape", "6,12,8,97"], "--shape: D_t must be at least D_s, got 8 and 12"),
        ([*SMALL, "--dtype", "bf16"], "--dtype: invalid choice: 'bf16'"),
        (["--dtype", "float32"], "--dtype must come with --shape, got float32 alone"),
        (["ema", *SMALL], "--shape must come with losses, or with no case, got ema"),
        (["tiles", *SMALL], "--shape must come with losses, or with no case, got tiles"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("words", ["--shape 6,8,12,97 --dtype float32", "--shape=6,8,12,97"])
def test_the_default_file_of_a_shape_is_its_own(words: str) -> None:
    about = {"utc": "2026-12-01T00:00:00", "commit": "0123456789", "command": f"x {words}"}
    path = record.path_for({"run": about, "machine": {"gpu": "some gpu"}})
    assert path.name.startswith("2026-12-01-some-gpu-01234567-6-8-12-97")


def test_a_run_goes_on_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.__main__._choose_environment", lambda caches: None)
    path = tmp_path / "r.json"
    words = ["ce", "kd/jsd", *SMALL, "--dtype", "float32", "--quick", "--device", "cpu"]
    words += ["--peers", "ours", "--out", str(path)]
    assert main(words) == 0
    first = json.loads(path.read_text())
    for row in first["rows"]:
        if row["case"] == "kd/jsd" and row["peer"] == "ours":
            row |= {"status": "skipped", "reason": "no time was left"}
        elif row["peer"] == "ours":
            row["host_us"] = 12345.0
    path.write_text(json.dumps(first))
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert "ce: N=6 V=97, float32: kept" in capsys.readouterr().out
    second = json.loads(path.read_text())
    assert second["run"]["command"] == first["run"]["command"]
    assert second["run"]["resumed"] == [first["run"]["utc"]]
    ours = [
        {row["case"]: row for row in result["rows"] if row["peer"] == "ours"}
        for result in (first, second)
    ]
    assert ours[1]["ce"] == ours[0]["ce"]
    assert ours[1]["kd/jsd"]["status"] == "ok" and ours[1]["kd/jsd"]["host_us"] > 0
    assert len(second["rows"]) == len(first["rows"])
    assert main([*words[:-4], "--peers", "eager", "--out", str(path), "--resume"]) == 0
    assert "resumed" not in json.loads(path.read_text())["run"]  # another command


def test_a_run_that_goes_on_must_name_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["ce", "--resume"])
    assert stopped.value.code == 2 and "--resume must come with --out" in capsys.readouterr().err
