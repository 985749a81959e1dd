"""The plots of the benchmarks, drawn from their JSON alone, with matplotlib (the extra ``report``).

Of ``curves.json`` one figure for every name among its curves, with a panel for each of them. Of a
record of the kernel benchmark (``record.py``): time against memory of the losses from hidden
states, each point with its error; the ratio to the floor against tokens; errors by peer.

Nothing is hidden: legends stand beside the axes, ours lies below what coincides with it, and below
the axes is why a peer has no point. The same JSON gives the same bytes. How things are drawn is in
``drawing.py``, the picture of the README in ``overview.py``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench import table
from bench.report.drawing import (
    Json,
    Look,
    Points,
    describe_source,
    finish,
    label_points,
    legend_handles,
    looks,
    number,
    plot,
    set_scale,
    set_title,
    sheet,
)
from sad.report.plots import DASHES, STYLE
from sad.report.theme import LIGHT

Missing = tuple[str, str, str]
"""Why a peer has no point: reason, peer, case."""

BEYOND = "Peak of forward and backward beyond the inputs."
BESIDE = "Points of one size stand side by side."
CURVES = {
    "memory_tokens": ("Memory against tokens", BEYOND),
    "memory_vocab": ("Memory against the vocabulary", BEYOND),
    "time_rows": (
        "Time of forward and backward against tokens",
        "Medians; bars from 20 to 80 %. GEMMs: the bare products of the case, in the same rounds.",
    ),
    "error_chunks": ("Error against the number of chunks", "Distance from float64."),
    "largest_batch": (
        "Largest batch that fits a memory limit",
        f"{BEYOND} Bars end at the fewest tokens measured not to fit; with a triangle above, "
        f"nothing larger was tried. {BESIDE}",
    ),
}
ROW = {"case", "shape", "dtype", "peer", "status"}
"""What a row of a record has in any case."""
QUANTITIES = {
    "loss_relative": (-0.25, "none", "loss"),
    "dhidden": (0.0, "left", "gradient of hidden states"),
    "dweight": (0.25, "full", "gradient of the head"),
    "dlogits": (0.25, "full", "gradient of logits"),
}
"""Of an error: its place on its peer's line, its filling, its name."""
LEAST = 1e-10  # of an error that is drawn: a logarithm takes no 0


def draw(curves: Json | None, record: Json | None, folder: Path) -> list[Path]:
    """Every figure that there is data for, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures(curves, record).items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=160, metadata={"Software": None})
    return paths


def figures(curves: Json | None, record: Json | None) -> dict[str, Figure]:
    found: dict[str, Figure | None] = {}
    curves, record = curves or {}, record or {}
    rows, _ = table.measured(r for r in record.get("rows") or () if ROW <= set(r))
    with matplotlib.rc_context(STYLE):
        by_name: dict[str, list[Json]] = {}
        for curve in curves.get("curves") or ():
            by_name.setdefault(curve["name"], []).append(curve)
        for name, group in by_name.items():
            found[name] = _of_curves(name, group, describe_source(curves))
        found["time_memory"] = _time_memory(rows, describe_source(record))
        found["floor_ratio"] = _floor_ratio(rows, describe_source(record))
        found["errors"] = _errors(rows, describe_source(record))
    return {name: figure for name, figure in found.items() if figure is not None}


# --- Curves --------------------------------------------------------------------------------------


def _of_curves(name: str, group: Sequence[Json], about: str) -> Figure:
    cases = list(dict.fromkeys(c["case"] for c in group))
    columns = len(group) // len(cases) if len(group) > len(cases) else len(cases)
    title, note = CURVES.get(name, (name, ""))
    figure, grid = sheet(len(group), columns, title, about)
    look = looks(series for curve in group for series in curve["series"])
    missing: list[Missing] = []
    for axes, curve in zip(grid, group, strict=True):
        set_title(axes, curve["case"], curve["at"], curve["dtype"])
        axes.set_xlabel(f"{curve['x']} ({curve['x_unit']})")
        axes.set_ylabel(f"{curve['y']} ({curve['unit']})")
        points = {s["peer"]: [_point(p) for p in s["points"]] for s in curve["series"]}
        plot(axes, points, look, beside=5 if name == "largest_batch" else 0)
        missing += [m for s in curve["series"] for m in _missing(s, curve["case"])]
    finish(figure, legend_handles(grid, look), [note, *_notes(missing, cases)])
    return figure


def _point(point: Any) -> tuple[Any, ...]:
    """One that is missing leaves a gap in the line."""
    return (point["x"], *[math.nan] * 3) if isinstance(point, Mapping) else tuple(point)


def _missing(series: Json, case: str) -> Iterator[Missing]:
    if series.get("reason"):
        yield series["reason"], series["peer"], case
    at: dict[str, list[str]] = {}
    for point in series["points"]:
        if isinstance(point, Mapping):
            at.setdefault(point["reason"], []).append(number(point["x"]))
    for reason, xs in at.items():
        yield reason, f"{series['peer']} at {' to '.join(dict.fromkeys((xs[0], xs[-1])))}", case


def _notes(missing: Iterable[Missing], cases: Sequence[str]) -> Iterator[str]:
    """A sentence for every reason; cases are named if others have a point."""
    of_peer: dict[tuple[str, str], list[str]] = {}
    for reason, who, case in dict.fromkeys(missing):
        of_peer.setdefault((reason, who), []).append(case)
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, who), of in of_peer.items():
        found.setdefault((reason, tuple(of)), []).append(who)
    for (reason, of), peers in found.items():
        where = "" if len(of) == len(cases) else f" ({', '.join(of)})"
        yield f"{', '.join(peers)}{where}: {textwrap.shorten(reason, 90)}."


# --- A record of the kernel benchmark ------------------------------------------------------------


def _time_memory(rows: Sequence[Json], about: str) -> Figure | None:
    """Of the losses from hidden states, in the situation that the record begins with."""
    linear = [r for r in rows if r["case"].startswith("linear_")]
    rows = [r for r in linear if _situation(r, "D_t") == _situation(linear[0], "D_t")]
    if not any(map(_timed, rows)):
        return None
    by_case, look = _by_case(rows), looks(rows)
    title = "Time against memory, and of each peer the larger error of both gradients"
    figure, grid = sheet(len(by_case), _columns(by_case), title, about)
    labels = []
    for axes, (case, of_case) in zip(grid, by_case.items(), strict=True):
        set_title(axes, case, of_case[0]["shape"], of_case[0]["dtype"])
        axes.set_xlabel("peak beyond the inputs (MiB)")
        axes.set_ylabel("forward and backward (ms)")
        shown = [r for r in of_case if _timed(r)]
        points: Points = {}
        for row in shown:
            low, middle, high = row["ms"]["full"]
            points[row["peer"]] = [(row["peak_mib"], middle, low, high)]
        plot(axes, points, look)
        set_scale(axes, "x", [r["peak_mib"] for r in shown] or [0.0])
        labels.append([(*points[r["peer"]][0][:2], *_said(r)) for r in shown])
    finish(figure, legend_handles(grid, look), ["Bars from 20 to 80 %.", *_without(rows, _timed)])
    for axes, of_axes in zip(grid, labels, strict=True):
        label_points(axes, of_axes)
    return figure


def _floor_ratio(rows: Sequence[Json], about: str) -> Figure | None:
    """Of each case in the situation of which most sizes were measured."""
    chosen: dict[str, list[Json]] = {}
    for case, of_case in _by_case([r for r in rows if "N" in r["shape"]]).items():
        groups: dict[Any, list[Json]] = {}
        for row in of_case:
            groups.setdefault(_situation(row, "N"), []).append(row)
        sizes = {key: {r["shape"]["N"] for r in of if _ratio(r)} for key, of in groups.items()}
        most = max(groups, key=lambda key: len(sizes[key]))
        if sizes[most]:
            chosen[case] = groups[most]
    if not chosen:
        return None
    shown = [r for of_case in chosen.values() for r in of_case]
    look = looks(shown)
    title = "Time over that of the bare products (GEMMs), or of a copy of the least bytes"
    figure, grid = sheet(len(chosen), _columns(chosen), title, about)
    for axes, (case, of_case) in zip(grid, chosen.items(), strict=True):
        at = {name: size for name, size in of_case[0]["shape"].items() if name != "N"}
        set_title(axes, case, at, of_case[0]["dtype"])
        axes.set_xlabel("tokens (rows)")
        axes.set_ylabel("time (x GEMMs)" if case.startswith("linear_") else "time (x copy)")
        points: Points = {}
        for row in sorted(of_case, key=lambda r: r["shape"]["N"]):
            y = _ratio(row) or math.nan
            points.setdefault(row["peer"], []).append((row["shape"]["N"], y, y, y))
        one = len({r["shape"]["N"] for r in of_case}) == 1
        plot(axes, points, look, beside=14 if one else 0)
    finish(figure, legend_handles(grid, look), [BESIDE, *_without(shown, _ratio)])
    return figure


def _errors(rows: Sequence[Json], about: str) -> Figure | None:
    """Of each loss in the situation in which the record has it first; a line for every peer."""
    first = {r["case"]: _situation(r) for r in reversed(rows) if "loss" in (r.get("err") or {})}
    if not first:
        return None
    rows = [r for r in rows if _situation(r) == first.get(r["case"])]
    by_case, look = _by_case(rows), looks(rows)
    most = max(sum(bool(r.get("err")) for r in of_case) for of_case in by_case.values())
    size = 4.2, max(2.5, 0.25 * most + 1.0)
    figure, grid = sheet(len(by_case), _columns(by_case), "Errors by peer", about, size)
    names: dict[str, str] = {}
    for axes, (case, of_case) in zip(grid, by_case.items(), strict=True):
        of_case = [r for r in of_case if r.get("err")]
        set_title(axes, case, of_case[0]["shape"], of_case[0]["dtype"])
        drawn = [0.05]
        for i, row in enumerate(of_case):
            for quantity, error in row["err"].items():
                if quantity in QUANTITIES and isinstance(error, int | float):
                    shift, fill, name = QUANTITIES[quantity]
                    names[name] = fill
                    dot = look[row["peer"]]._replace(fill=fill, size=5.0).dot
                    drawn.append(max(error, LEAST))
                    axes.plot(drawn[-1], i + shift, **dot)
        axes.axvline(0.05, color=LIGHT["bad"], linewidth=1.0, linestyle=DASHES[1])
        axes.set_yticks(range(len(of_case)), [r["peer"] for r in of_case])
        axes.set_ylim(len(of_case) - 0.5, -0.5)
        axes.set_xlabel("distance from float64 (relative)")
        set_scale(axes, "x", drawn)
    handles = {n: Line2D([], [], **Look(LIGHT["ink"], "o", f).dot) for n, f in names.items()}
    handles["wrong beyond: 5 %"] = Line2D([], [], color=LIGHT["bad"], linestyle=DASHES[1])
    finish(figure, handles, list(_without(rows, lambda row: row.get("err"))))
    return figure


def _columns(panels: Sized) -> int:
    """At most three beside each other, and four as two by two."""
    return 2 if len(panels) == 4 else min(3, len(panels))


def _by_case(rows: Iterable[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def _situation(row: Json, *without: str) -> tuple[Any, ...]:
    """What a case is measured in, whichever it is."""
    sizes = tuple((name, size) for name, size in row["shape"].items() if name not in without)
    kl = (row.get("options") or {}).get("kl")
    return sizes, row["dtype"], row.get("ignored"), row.get("upstream"), kl


def _without(rows: Sequence[Json], has: Callable[[Json], Any]) -> Iterator[str]:
    missing = [(r.get("reason") or "no figure", r["peer"], r["case"]) for r in rows if not has(r)]
    return _notes(missing, list(_by_case(rows)))


def _timed(row: Json) -> bool:
    return bool(row.get("ms")) and isinstance(row.get("peak_mib"), int | float)


def _ratio(row: Json) -> float | None:
    return row.get("ratio_gemm") or row.get("ratio_copy") if row["status"] == "ok" else None


def _said(row: Json) -> tuple[str, str]:
    """A peer with its error, and in which colour."""
    errors = [e for name, e in (row.get("err") or {}).items() if not name.startswith("loss")]
    numbers = [e for e in errors if isinstance(e, int | float)]  # one that is not finite is a word
    said = f"{row['peer']} {100 * max(numbers):.2g} %" if numbers else row["peer"]
    return (f"{said}, wrong", LIGHT["bad"]) if row["status"] == "wrong" else (said, LIGHT["ink"])
