"""What the documents say about speed and memory is what the committed JSON says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench.record import RESULTS
from bench.report import readme, targets
from bench.training.trainers import OURS


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: str(path.parent.name))
def test_the_tables_are_what_the_results_say(path: Path) -> None:
    text = path.read_text()
    assert readme.BLOCK.search(text)
    assert readme.rendered(text) == text, "run python -m bench --readme"


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: str(path.parent.name))
def test_every_edited_number_is_noticed(path: Path) -> None:
    """Whichever number of whichever block is edited by hand: a block is written anew as a whole,
    so that all of its numbers may be edited at once."""
    text, edits = path.read_text(), 0
    for block in readme.BLOCK.finditer(text):
        before_point = re.compile(r"\d(?=\.\d)")
        wrong, count = before_point.subn(lambda digit: str((int(digit[0]) + 1) % 10), block[0])
        edited = text[: block.start()] + wrong + text[block.end() :]
        assert readme.rendered(edited) == text and (edited != text) == bool(count)
        edits += count
    assert edits


def test_a_result_that_moves_moves_the_table(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    result = json.loads((results / "loss.json").read_text())
    result["rows"][0]["time_ratio"] = 0.97
    (results / "loss.json").write_text(json.dumps(result))
    text = (readme.ROOT / "kernels" / "README.md").read_text()
    changed = readme.rendered(text, results)
    assert "| 0.97 (" in changed and "| 0.97 (" not in text


def test_a_table_of_batches_takes_an_entry_and_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"utc": "2026-11-26T19:07:34+00:00", "commit": "cb757926"}
    run |= {"command": "python -m bench batches --limits 24"}
    about = {"run": run, "machine": {"gpu": "A GPU"}, "versions": {"torch": "2", "triton": "3"}}
    rows = [{"contender": OURS, "reason": None, "batches": [{"limit": 24, "rows": 6}]}]
    setup = {"setup": {"length": 1024}, "limits": [24], "contenders": [OURS], "rows": rows}
    (tmp_path / "some.json").write_text(json.dumps(about | setup))
    monkeypatch.setitem(readme.SECTIONS, "batches", readme.text_of("batches", "some.json"))
    text = readme.rendered("<!-- batches:begin -->\n<!-- batches:end -->\n", tmp_path)
    assert "`python -m bench batches --limits 24` (`bench/results/some.json`)" in text
    assert f"| {OURS} | 6 |\n" in text
    assert readme.rendered(text, tmp_path) == text


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(KeyError, match="speed"):
        readme.rendered("<!-- speed:begin -->\n1.0x\n<!-- speed:end -->\n")


def test_a_missed_target_says_why() -> None:
    found = list(targets.targets(RESULTS))
    assert any(t.met for t in found)
    for target in found:
        assert target.met or target.why, target.what
        assert (RESULTS / target.source).exists()


def test_averages_on_a_cpu_have_a_limit_for_few_tensors_and_one_for_many() -> None:
    """Records from before the comparison have no ratio."""
    rows = [
        {"case": case, "peer": peer, "shape": {"tensors": tensors}, "ratio_eager": ratio}
        for case in ("ema/update", "ema/swap", "kd/jsd")
        for tensors in (12, 600)
        for peer, ratio in (("ours", 1.2), ("foreach", 1.0), ("ours", None))
    ]
    found = list(targets._averages_on_cpu({"rows": rows}))
    assert [(t.limit, t.met) for t in found] == [
        (1.4, True),
        (1.0, False),
        (6.0, True),
        (4.5, True),
    ]
    assert found[1].why and "600 tensors" in found[1].what


def test_a_wrong_time_is_struck_out() -> None:
    row = {"peer": "other", "ms": {"full": [1.0, 2.0, 3.0]}, "ratio_copy": 1.5, "status": "wrong"}
    ours = {"peer": "ours", "ms": {"full": [3.0, 4.0, 5.0]}, "ratio_copy": 2.5, "status": "ok"}
    absent = {"peer": "gone", "status": "skipped", "reason": "is not installed"}
    lines = readme.kernel_table([row, ours, absent])
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| **ours**", "| other"]
    assert "~~2~~ wrong" in lines[3]
    assert lines[-1] == "Not here: gone (is not installed)"
