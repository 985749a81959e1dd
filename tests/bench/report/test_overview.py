"""The comparison that the READMEs open with: whom it shows, and that its picture says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.record import RESULTS
from bench.report import overview, readme, targets

WIDTH = 64


def row(case: str, peer: str, package: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "case": case,
        "peer": peer,
        "package": package,
        "shape": {"N": 8, "V": 32, "D_s": WIDTH, "D_t": 128},
        "options": {"kl": 0.1},
        "status": "ok",
        "ms": {"full": [9.0, 10.0, 11.0]},
        "peak_mib": 2048.0,
        "gradient_mib": 512.0,
        "err": {"loss": 1e-5, "dhidden": 0.001, "dweight": 0.002},
    } | changes


def record(*rows: dict[str, Any]) -> dict[str, Any]:
    ours = [row(case, "ours", None) for case in overview.LOSSES]
    versions = {"trl": "1.0", "liger-kernel": "2.0"}
    return {"rows": [*ours, *rows], "machine": {"gpu": "NVIDIA H9"}, "versions": versions}


def cells(result: dict[str, Any], name: str) -> list[str]:
    lines = [line.split(" | ") for line in overview.table(result, WIDTH)]
    [found] = [line[1:] for line in lines if line[0] == f"| {name}"]
    return [cell.removesuffix(" |") for cell in found]


def test_a_package_stands_with_its_fastest_right_setting() -> None:
    fast = {"ms": {"full": [1.0, 2.0, 3.0]}}
    result = record(
        row("linear_ce", "trl a", "trl"),
        row("linear_ce", "trl b", "trl", ms={"full": [4.0, 5.0, 6.0]}, peak_mib=1024.0),
        row("linear_ce", "trl c", "trl", **fast, status="wrong"),
        row("linear_ce", "trl d", "trl", **fast, shape={"N": 8, "V": 32, "D_s": 2 * WIDTH}),
        row("linear_ce", "trl e", "trl", ms=None, status="skipped"),
        row("linear_kd/jsd", "trl", "trl", err={"dhidden": 0.07, "dweight": "nan"}, status="wrong"),
    )
    wrong = "~~10 ms~~<br>2.0 GiB · 7.0 %"
    assert cells(result, "TRL 1.0") == ["5 ms<br>1.0 GiB · 0.20 %", "-", "-", wrong]


def test_who_is_better_than_ours_is_said() -> None:
    lower = row("linear_ce", "liger", "liger-kernel", ms={"full": [1.0, 2.0, 3.0]}, peak_mib=9.0)
    wrong = row("linear_kd/jsd", "eager", None, ms={"full": [1.0, 2.0, 3.0]}, status="wrong")
    said = "\n".join(overview.table(record(lower, wrong), WIDTH))
    assert "Less time than SAD: Liger (cross-entropy). Less memory than SAD: Liger (cr" in said
    nobody = "\n".join(overview.table(record(row("linear_ce", "eager", None)), WIDTH))
    assert "Less time than SAD: none. Less memory than SAD: none." in nobody


def test_a_package_without_a_time_has_no_row_and_two_losses_are_said_to_be_two() -> None:
    trl, unsloth = (row("linear_ce", name, name) for name in ("trl", "unsloth_zoo"))
    for rows, said in (
        ([], " no such loss. "),
        ([trl], "TRL has no CE + KL: both its losses, one after the other."),
        ([trl, unsloth], "TRL and Unsloth have no CE + KL: both their losses, one after the"),
    ):
        text = "\n".join(overview.table(record(*rows), WIDTH))
        assert said in text and "QuACK" not in text
        assert [name in text for name in ("TRL", "Unsloth")] == [rows != [], len(rows) == 2]


def texts(path: Path) -> list[str]:
    """Every text of a drawing, each of which stands in a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("theme", overview.THEMES)
def test_the_committed_pictures_say_what_the_results_say(theme: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = json.loads((RESULTS / readme.KERNELS["gpu"]).read_text())
    overview.draw(result, targets.WIDTH, tmp_path)
    name = f"overview-{theme}.svg"
    found = texts(tmp_path / name)
    assert found == texts(readme.PLOTS / name), "run python -m bench --readme"
    entries = overview.entries(result, targets.WIDTH)
    for package, of_package in entries.items():
        if overview.PICTURED in of_package:
            entry = of_package[overview.PICTURED]
            assert {overview.PACKAGES[package], f"{entry.ms:.0f} ms"} <= set(found)


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, again = (overview.draw(record(), WIDTH, tmp_path / name) for name in "ab")
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in again]
    light, dark = first
    assert light.read_bytes() != dark.read_bytes()
