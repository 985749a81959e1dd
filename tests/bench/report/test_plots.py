"""The benchmarks' plots: everything that the JSON has is there, named, and drawn the same again."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench.record import RESULTS
from bench.report import plots
from sad.report.theme import LIGHT

PACKAGES = {
    "ours": None,
    "eager": None,
    "compile": None,
    "liger flce": "liger-kernel",
    "liger chunked": "liger-kernel",
    "trl": "trl",
    "torch chunked": "torch",
    "cce": "cut-cross-entropy",
    "quack": "quack-kernels",
    "fla": "flash-linear-attention",
    "newcomer": "unheard-of",
}
ABOUT = {
    "run": {"utc": "2026-11-26T13:32:50+00:00", "commit": "84afa542c3b1", "command": "x"},
    "machine": {"gpu": "NVIDIA H100", "cpu": "some CPU"},
}
CASES = ("linear_kd/joint", "linear_ce")


def curve(name: str, case: str = CASES[0], y: str = "peak", **changes: Any) -> dict[str, Any]:
    """Every peer at three sizes; two that have no point, and one that lacks the last."""
    xs = (64, 128, 1024)
    series: list[dict[str, Any]] = [
        {"peer": peer, "package": package, "points": [[x, i + x, i + 0.9 * x, i + x] for x in xs]}
        for i, (peer, package) in enumerate(PACKAGES.items())
    ]
    for i in (2, 8):
        series[i] |= {"points": [], "reason": "compiles anew"}
    series[1]["points"][2] = {"x": 1024, "reason": "does not fit"}
    about = {"case": case, "dtype": "float32", "at": {"V": 32768}, "x": "tokens", "x_unit": "rows"}
    return about | {"name": name, "y": y, "unit": "MiB", "series": series} | changes


def curves(*some: dict[str, Any]) -> dict[str, Any]:
    every = [
        *(curve(name, case) for name in plots.CURVES for case in CASES if name != "time_rows"),
        *(curve("time_rows", case, y) for case in CASES for y in ("time", "ratio")),
    ]
    return ABOUT | {"case": "curves", "curves": list(some) or every}


def row(case: str, peer: str, N: int = 8192, **changes: Any) -> dict[str, Any]:
    i = list(PACKAGES).index(peer)
    ms = 200.0 if peer == "fla" else 50.0 + 2 * i  # most points are close to each other
    linear = case.startswith("linear")
    gradients = ("dhidden", "dweight") if linear else ("dlogits",)
    return {
        "case": case,
        "peer": peer,
        "package": PACKAGES[peer],
        "shape": {"N": N, "V": 128256} | ({"D_s": 4096} if linear else {}),
        "dtype": "bfloat16",
        "status": "ok",
        "reason": None,
        "ms": {"full": [ms - 1, ms, ms + 1]},
        "peak_mib": 1000.0 * (1 + i % 2),
        "ratio_gemm" if linear else "ratio_copy": 1.1 + 0.2 * i,
        "err": {"loss": 1e-5, "loss_relative": 1e-6} | dict.fromkeys(gradients, 0.0017 + i / 1e4),
    } | changes


def record() -> dict[str, Any]:
    """Some losses of logits at two sizes, all from hidden states at one; all that can go wrong."""
    rows = [row(case, peer) for case in CASES for peer in PACKAGES]
    rows += [row("ce", peer, N) for N in (256, 8192) for peer in ("ours", "eager", "quack")]
    for found in rows:
        if found["peer"] == "compile":
            found |= {"status": "skipped", "reason": "left out of small sets"}
            for name in ("ms", "peak_mib", "ratio_gemm", "err"):
                found.pop(name, None)
        if (found["peer"], found["case"]) == ("eager", CASES[0]):
            found |= {"status": "wrong", "reason": "an error over 5 %"}
            found["err"] |= {"dhidden": 0.062, "dweight": "nan"}
    return ABOUT | {"rows": rows}


def words(figure: Figure) -> str:
    """All that a figure says."""
    found = [figure.get_suptitle(), figure.get_supxlabel()]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")]
        found += [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())]
    return "\n".join(found)


def lines(axes: Axes) -> dict[str, Any]:
    """By label; bars and marks have none of their own."""
    return {str(line.get_label()): line for line in axes.get_lines()}


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return plots.figures(curves(), record())


@pytest.mark.slow
def test_the_same_json_gives_the_same_bytes(tmp_path: Path) -> None:
    given = json.dumps([curves(curve("memory_tokens"), curve("largest_batch")), record()])
    (results, rows), (same, other) = json.loads(given), json.loads(given)
    first = plots.draw(results, rows, tmp_path / "a")
    again = plots.draw(same, other, tmp_path / "b")
    assert [path.name for path in first] == [
        "memory_tokens.png", "largest_batch.png", "time_memory.png", "floor_ratio.png", "errors.png"
    ]  # fmt: skip
    for path, other in zip(first, again, strict=True):
        assert path.parent.name == "a" and path.read_bytes() == other.read_bytes()
    assert first[0].read_bytes()[:4] == b"\x89PNG" and b"Software" not in first[0].read_bytes()


def test_every_curve_and_peer_is_named_in_its_figure(figures: dict[str, Figure]) -> None:
    assert set(figures) == {*plots.CURVES, "time_memory", "floor_ratio", "errors"}
    for name, figure in figures.items():
        said = words(figure)
        for peer in PACKAGES:
            assert re.search(rf"(?m)(^|[ ,\n]){peer}\b", said), (name, peer)
        assert "NVIDIA H100, 2026-11-26, commit 84afa542" in said
        assert all(case in said for case in CASES)
    for name in plots.CURVES:
        said = words(figures[name])
        assert len(figures[name].axes) == (4 if name == "time_rows" else 2)
        assert "eager at 1,024: does not fit." in said
        assert "compile, quack: compiles anew." in said


def test_points_are_those_of_the_json(figures: dict[str, Figure]) -> None:
    for axes, case in zip(figures["memory_tokens"].axes, CASES, strict=True):
        assert axes.get_title(loc="left").startswith(f"{case}, float32")
        for series in curve("memory_tokens")["series"]:
            if not series["points"]:
                assert series["peer"] not in lines(axes)
                continue
            shown = lines(axes)[series["peer"]].get_xydata()
            for (x, y), point in zip(shown, series["points"], strict=True):
                if isinstance(point, dict):
                    assert x == point["x"] and math.isnan(y)
                else:
                    assert [x, y] == point[:2]


def test_axes_have_names_and_units(figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        for axes in figure.axes:
            assert re.fullmatch(r".+ \(.+\)", axes.get_xlabel()), name
            if name == "errors":  # its lines are peers
                assert next(t.get_text() for t in axes.get_yticklabels()) == "ours"
            else:
                assert re.fullmatch(r".+ \(.+\)", axes.get_ylabel()), name


def test_axes_are_logarithmic_where_values_span_decades() -> None:
    near = [{"peer": "ours", "package": None, "points": [[8, 3.0, 3.0, 3.0], [16, 4.0, 4.0, 4.0]]}]
    far = [{"peer": "ours", "package": None, "points": [[8, 3.0, 3.0, 3.0], [999, 400, 400, 400]]}]
    both = curves(curve("memory_tokens", series=near), curve("memory_tokens", series=far))
    left, right = plots.figures(both, None)["memory_tokens"].axes
    assert (left.get_xscale(), left.get_yscale()) == ("linear", "linear")
    assert (right.get_xscale(), right.get_yscale()) == ("log", "log")


def test_a_colour_and_a_marker_are_one_package_s_in_all_figures(
    figures: dict[str, Figure],
) -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    for figure in figures.values():
        for axes in figure.axes:
            for peer, line in lines(axes).items():
                if peer in PACKAGES:
                    kind = to_hex(line.get_color()), line.get_marker()
                    found.setdefault(peer, set()).add(kind)
    assert found["ours"] == {(LIGHT["student"], "o")}
    assert all(len(kinds) == 1 for kinds in found.values())
    assert found["liger flce"] == found["liger chunked"]
    different = [found[peer] for peer in found if peer != "liger flce"]
    for one, other in itertools.combinations(different, 2):
        assert not {c for c, _ in one} & {c for c, _ in other}
        assert not {m for _, m in one} & {m for _, m in other}
    flce, chunked = (lines(figures["memory_tokens"].axes[0])[f"liger {n}"] for n in
                     ("flce", "chunked"))  # fmt: skip
    assert flce.get_fillstyle() != chunked.get_fillstyle()


def test_ours_hides_nobody(figures: dict[str, Figure]) -> None:
    for axes in figures["memory_tokens"].axes:
        shown = lines(axes)
        ours = shown.pop("ours")
        others = [line for peer, line in shown.items() if peer in PACKAGES]
        assert others and all(line.get_zorder() > ours.get_zorder() for line in others)
        assert all(line.get_markersize() < ours.get_markersize() for line in others)


def test_legends_and_labels_stay_off_the_data(figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        figure.draw_without_rendering()
        page = figure.bbox
        for axes in figure.axes:
            frame = axes.get_window_extent()
            for legend in figure.legends:
                assert not legend.get_window_extent().overlaps(frame), name
            assert page.x0 <= frame.x0 and frame.x1 <= page.x1 and page.y0 < frame.y0, name
    for axes in figures["time_memory"].axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) == len(PACKAGES) - 1
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_points_are_labelled_with_their_error(figures: dict[str, Figure]) -> None:
    said = {axes.get_title(loc="left").split(",")[0]: [t.get_text() for t in axes.texts]
            for axes in figures["time_memory"].axes}  # fmt: skip
    assert "ours 0.17 %" in said["linear_ce"] and "trl 0.22 %" in said["linear_ce"]
    assert "eager 6.2 %, wrong" in said["linear_kd/joint"]


def test_times_of_wrong_results_are_struck_out(figures: dict[str, Figure]) -> None:
    panels = {axes.get_title(loc="left").split(",")[0]: axes for axes in
              figures["floor_ratio"].axes}  # fmt: skip
    assert "eager" in lines(panels["linear_ce"])
    assert "eager" not in lines(panels["linear_kd/joint"])
    assert "eager (linear_kd/joint): an error over 5 %." in words(figures["floor_ratio"])
    assert list(lines(panels["ce"])["ours"].get_xdata()) == [256, 8192]


def test_what_may_be_more_is_marked() -> None:
    points = [[64, 100, 100, 120], [128, 400, 400, None]]
    series = [{"peer": "ours", "package": None, "points": points}]
    [axes] = plots.figures(curves(curve("largest_batch", series=series)), None)[
        "largest_batch"
    ].axes
    found = list(lines(axes).values())
    marks = [line for line in found if line.get_marker() == "^"]
    assert [line.get_xydata().tolist() for line in marks] == [[[128, 400]]]
    bars = [line for line in found if line.get_marker() == "None"]
    assert [line.get_xydata().tolist() for line in bars] == [[[64, 100], [64, 120]]]


@pytest.mark.parametrize(
    "nothing",
    [{}, {"rows": []}, {"rows": [{"dtype": "float32"}, {"case": "a fault", "peer": "trl"}]}],
)
def test_without_rows_and_curves_there_is_no_figure(nothing: Any, tmp_path: Path) -> None:
    assert plots.draw(nothing, nothing, tmp_path) == []
    assert plots.draw(None, None, tmp_path) == []


def test_series_with_nothing_but_reasons_are_drawn_as_such(tmp_path: Path) -> None:
    series = [{"peer": "ours", "package": None, "points": [], "reason": "no time was left"}]
    empty = curves(curve("memory_tokens", series=series))
    assert plots.draw(empty, None, tmp_path)
    said = words(plots.figures(empty, None)["memory_tokens"])
    assert "no point" in said and "ours: no time was left." in said
    skipped = {"status": "skipped", "reason": "needs a GPU", "ms": None, "err": None}
    rows = [row("linear_ce", "trl", **skipped), row("linear_ce", "ours")]
    found = plots.figures(None, {"rows": rows})
    assert set(found) == {"time_memory", "floor_ratio", "errors"}
    assert all("trl: needs a GPU." in words(figure) for figure in found.values())
    assert plots.figures(None, {"rows": rows[:1]}) == {}


@pytest.mark.few(12)
@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_result_can_be_given(path: Path) -> None:
    result = json.loads(path.read_text())
    assert plots.figures(result, result) or not (result.get("curves") or result.get("settings"))
