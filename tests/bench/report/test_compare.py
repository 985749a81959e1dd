"""What counts as slower between two results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.report import compare


def result(path: Path, *rows: tuple[str, float | None, str], **fields: Any) -> Path:
    """A file with one case; a row is a peer, its ratio and its status."""
    about = {"case": "ce", "shape": {"N": 8, "V": 16}, "dtype": "bfloat16", "options": {"kl": 0.1}}
    found = [
        about | {"peer": peer, "ratio_copy": ratio, "status": status, "reason": "why"} | fields
        for peer, ratio, status in rows
    ]
    path.write_text(json.dumps({"schema": 1, "machine": {"gpu": None}, "rows": found}))
    return path


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (("ours", 1.09, "ok"), 0),
        (("ours", 0.5, "ok"), 0),
        (("ours", 1.11, "ok"), 1),
        (("ours", None, "failed"), 1),
        (("ours", 0.9, "wrong"), 1),
        (("other", 1.0, "ok"), 1),  # ours is gone
    ],
)
def test_worse_by_a_tenth_or_lost(
    new: tuple[str, float | None, str],
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = result(tmp_path / "old.json", ("ours", 1.0, "ok"), ("eager", None, "skipped"))
    assert compare.report(before, result(tmp_path / "new.json", new)) == status
    assert f"worse by more than 10%: {status} of 1" in capsys.readouterr().out


def test_results_of_different_cases_say_nothing(tmp_path: Path) -> None:
    before = result(tmp_path / "old.json", ("ours", 1.0, "ok"))
    after = result(tmp_path / "new.json", ("ours", 1.0, "ok"), dtype="float16")
    assert compare.report(before, after) == 1


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loss.json").write_text(json.dumps({"schema": 1, "rows": [{"dtype": "float32"}]}))
    with pytest.raises(ValueError, match="must be a result of the kernel benchmark"):
        compare.load(tmp_path / "loss.json")
