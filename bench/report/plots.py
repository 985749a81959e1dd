"""The plots of the benchmarks, drawn from their JSON alone, with matplotlib (the extra ``report``).

Of ``curves.json`` one figure for every name among its curves, with a panel for each of them. Of a
record of the kernel benchmark (``record.py``): time against memory of the losses from hidden
states, each point with its error; the ratio to the floor against tokens; errors by peer.

Ours is blue and wide in all of them. Every other package has a colour (Okabe and Ito's, which the
colour-blind can tell apart) and a marker of its own; its settings differ in dash and filling.
Nothing is hidden: legends stand beside the axes, ours lies below what coincides with it, and below
the axes is why a peer has no point. The same JSON gives the same bytes.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, offset_copy

from bench import table
from sad.report.plots import DASHES, STYLE
from sad.report.theme import LIGHT

Json = Mapping[str, Any]
Points = dict[str, list[tuple[Any, ...]]]  # by peer: x, y, low, high; high None: maybe more
Missing = tuple[str, str, str]  # reason, who, case

PACKAGES = {
    None: ("#4a4f55", "s"),  # written by hand, compiled or not
    "liger-kernel": ("#d55e00", "^"),
    "trl": ("#009e73", "v"),
    "torch": ("#e69f00", "D"),
    "cut-cross-entropy": ("#cc79a7", "P"),
    "quack-kernels": ("#56b4e9", "X"),
    "flash-linear-attention": ("#8c5a2b", "<"),
}
UNKNOWN = (LIGHT["muted"], "h")
FILLS = ("full", "none", "left", "bottom", "right", "top")

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
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Of a point, where its label may be, the best first."""


class Look(NamedTuple):
    colour: str
    marker: str
    fill: Any = "full"
    dash: Any = "-"
    width: float = 1.3
    size: float = 5.5
    order: float = 3.0

    @property
    def dot(self) -> dict[str, Any]:
        return {
            "color": self.colour, "marker": self.marker, "fillstyle": self.fill, "linestyle": "",
            "markerfacecoloralt": LIGHT["paper"], "markersize": self.size, "zorder": self.order,
        }  # fmt: skip

    @property
    def line(self) -> dict[str, Any]:
        return self.dot | {"linestyle": self.dash, "linewidth": self.width}


OURS = Look(LIGHT["student"], "o", width=3.2, size=8.5, order=2.5)


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
            found[name] = _of_curves(name, group, _about(curves))
        found["time_memory"] = _time_memory(rows, _about(record))
        found["floor_ratio"] = _floor_ratio(rows, _about(record))
        found["errors"] = _errors(rows, _about(record))
    return {name: figure for name, figure in found.items() if figure is not None}


def looks(series: Iterable[Json]) -> dict[str, Look]:
    """By peer, in the order in which all peers of a result are listed."""
    found: dict[str, Look] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for peer, package in dict.fromkeys((s["peer"], s.get("package")) for s in series):
        if peer == "ours":
            found[peer] = OURS
            continue
        kind = PACKAGES.get(package, UNKNOWN)
        i, counts[kind] = counts[kind], counts[kind] + 1
        found[peer] = Look(*kind, FILLS[i % len(FILLS)], DASHES[i % len(DASHES)])
    return found


# --- Curves --------------------------------------------------------------------------------------


def _of_curves(name: str, group: Sequence[Json], about: str) -> Figure:
    cases = list(dict.fromkeys(c["case"] for c in group))
    columns = len(group) // len(cases) if len(group) > len(cases) else len(cases)
    title, note = CURVES.get(name, (name, ""))
    figure, grid = _sheet(len(group), columns, title, about)
    look = looks(series for curve in group for series in curve["series"])
    missing: list[Missing] = []
    for axes, curve in zip(grid, group, strict=True):
        _title(axes, curve["case"], curve["at"], curve["dtype"])
        axes.set_xlabel(f"{curve['x']} ({curve['x_unit']})")
        axes.set_ylabel(f"{curve['y']} ({curve['unit']})")
        points = {s["peer"]: [_point(p) for p in s["points"]] for s in curve["series"]}
        _plot(axes, points, look, beside=5 if name == "largest_batch" else 0)
        missing += [m for s in curve["series"] for m in _missing(s, curve["case"])]
    _finish(figure, _shown(grid, look), [note, *_notes(missing, cases)])
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
            at.setdefault(point["reason"], []).append(_number(point["x"]))
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
    figure, grid = _sheet(len(by_case), min(3, len(by_case)), title, about)
    labels = []
    for axes, (case, of_case) in zip(grid, by_case.items(), strict=True):
        _title(axes, case, of_case[0]["shape"], of_case[0]["dtype"])
        axes.set_xlabel("peak beyond the inputs (MiB)")
        axes.set_ylabel("forward and backward (ms)")
        shown = [r for r in of_case if _timed(r)]
        points: Points = {}
        for row in shown:
            low, middle, high = row["ms"]["full"]
            points[row["peer"]] = [(row["peak_mib"], middle, low, high)]
        _plot(axes, points, look)
        _scale(axes, "x", [r["peak_mib"] for r in shown] or [0.0])
        labels.append([(*points[r["peer"]][0][:2], *_said(r)) for r in shown])
    _finish(figure, _shown(grid, look), ["Bars from 20 to 80 %.", *_without(rows, _timed)])
    for axes, of_axes in zip(grid, labels, strict=True):
        _label(axes, of_axes)
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
    figure, grid = _sheet(len(chosen), min(3, len(chosen)), title, about)
    for axes, (case, of_case) in zip(grid, chosen.items(), strict=True):
        at = {name: size for name, size in of_case[0]["shape"].items() if name != "N"}
        _title(axes, case, at, of_case[0]["dtype"])
        axes.set_xlabel("tokens (rows)")
        axes.set_ylabel("time (x GEMMs)" if case.startswith("linear_") else "time (x copy)")
        points: Points = {}
        for row in sorted(of_case, key=lambda r: r["shape"]["N"]):
            y = _ratio(row) or math.nan
            points.setdefault(row["peer"], []).append((row["shape"]["N"], y, y, y))
        one = len({r["shape"]["N"] for r in of_case}) == 1
        _plot(axes, points, look, beside=14 if one else 0)
    _finish(figure, _shown(grid, look), [BESIDE, *_without(shown, _ratio)])
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
    figure, grid = _sheet(len(by_case), min(3, len(by_case)), "Errors by peer", about, size)
    names: dict[str, str] = {}
    for axes, (case, of_case) in zip(grid, by_case.items(), strict=True):
        of_case = [r for r in of_case if r.get("err")]
        _title(axes, case, of_case[0]["shape"], of_case[0]["dtype"])
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
        _scale(axes, "x", drawn)
    handles = {n: Line2D([], [], **Look(LIGHT["ink"], "o", f).dot) for n, f in names.items()}
    handles["wrong beyond: 5 %"] = Line2D([], [], color=LIGHT["bad"], linestyle=DASHES[1])
    _finish(figure, handles, list(_without(rows, lambda row: row.get("err"))))
    return figure


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


# --- How it is drawn -----------------------------------------------------------------------------


def _sheet(
    count: int, columns: int, title: str, about: str, size: tuple[float, float] = (3.6, 3.1)
) -> tuple[Figure, list[Axes]]:
    """So many axes, each of about this size in inches, with its labels."""
    rows = math.ceil(count / columns)
    size = size[0] * columns + 1.8, size[1] * rows + 1.0
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{about}", x=0.01, ha="left", fontsize=10, color=LIGHT["ink"])
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _title(axes: Axes, case: str, sizes: Json, dtype: str) -> None:
    text = ", ".join(f"{name}={size:,}" for name, size in sizes.items())
    lines = "\n".join([f"{case}, {dtype}", *textwrap.wrap(text, 48)])
    axes.set_title(lines, loc="left", fontsize=7.5, fontweight="normal")


def _plot(axes: Axes, points: Points, look: Mapping[str, Look], beside: float = 0) -> None:
    """Every peer that has a point, on axes that suit them; ``beside`` each other by so much."""
    shown = {peer: of for peer, of in points.items() if any(math.isfinite(p[1]) for p in of)}
    if not shown:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no point", transform=axes.transAxes, ha="center")
        return
    for i, (peer, of_peer) in enumerate(shown.items()):
        dx = beside * (i - (len(shown) - 1) / 2)
        bar = {"color": look[peer].colour, "linewidth": 1.0, "zorder": look[peer].order}
        there, above = (_moved(axes, dx, dy) for dy in (0, 8))
        x, y, low, high = zip(*of_peer, strict=True)
        axes.plot(x, y, label=peer, transform=there, **look[peer].line)
        for at, bottom, top in zip(x, low, high, strict=True):
            if top is None:
                axes.plot(at, bottom, "^", markersize=3, transform=above, clip_on=False, **bar)
            elif top > bottom:
                axes.plot([at, at], [bottom, top], transform=there, **bar)
    every = [p for of_peer in shown.values() for p in of_peer]
    xs = sorted({p[0] for p in every})
    _scale(axes, "x", xs)
    _scale(axes, "y", [v for p in every for v in p[1:] if v is not None and math.isfinite(v)])
    axes.xaxis.set_major_locator(FixedLocator(_apart(xs)))


def _moved(axes: Axes, x: float, y: float) -> Any:
    """The axes' data, but moved by some points."""
    return offset_copy(axes.transData, axes.figure, x, y, "points") if x or y else axes.transData  # type: ignore


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """An axis for these values; a logarithmic one if they span most of a decade, or more."""
    axis: Axis = getattr(axes, f"{which}axis")
    low, high = min(values), max(values)
    if low > 0 and high > 5 * low:
        getattr(axes, f"set_{which}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
        axis.set_minor_locator(NullLocator())
        room = (high / low) ** 0.08
        ends = low / room, high * room
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        room = 0.08 * (high - low) or 1.0
        ends = low - room, high + room
    getattr(axes, f"set_{which}lim")(*ends)
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _apart(values: Sequence[float]) -> list[float]:
    """Those of the values whose labels have room, from the last one on."""
    place = math.log if values[0] > 0 and values[-1] > 5 * values[0] else float
    room, kept = (place(values[-1]) - place(values[0])) / 8, [values[-1]]
    for value in reversed(values[:-1]):
        if place(kept[-1]) - place(value) >= room:
            kept.append(value)
    return kept


def _number(value: float) -> str:
    if 0 < abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _shown(grid: Sequence[Axes], look: Mapping[str, Look]) -> dict[str, Line2D]:
    """Who has a point in one of the panels, in the order of all."""
    found = {line.get_label() for axes in grid for line in axes.get_lines()}
    return {peer: Line2D([], [], **look[peer].line) for peer in look if peer in found}


def _finish(figure: Figure, handles: Mapping[str, Line2D], notes: Sequence[str]) -> None:
    """The legend beside the axes, the notes below them."""
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    width = int(17 * figure.get_figwidth())
    lines = "\n".join(line for note in notes for line in textwrap.wrap(note, width))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=7, color=LIGHT["muted"])


def _label(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Texts beside their points, each at the first place where nothing else is."""
    axes.figure.draw_without_rendering()  # type: ignore
    frame, points = axes.get_window_extent(), axes.transData.transform([x[:2] for x in labels])
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    aligned = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
    for x, y, said, colour in labels:
        for away, (dx, dy) in itertools.product((7, 13, 20, 30, 42, 56, 72), SIDES):
            text = axes.annotate(
                said, (x, y), (away * dx, away * dy), textcoords="offset points", fontsize=7,
                ha=aligned[dx][0], va=aligned[dy][1], color=colour, in_layout=False,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour} if away > 7 else None,
            )  # fmt: skip
            text.get_window_extent()  # moves it to its point
            box = Text.get_window_extent(text)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:  # over something else rather than not at all
            axes.annotate(said, (x, y), fontsize=7, color=colour, in_layout=False)


def _about(result: Json) -> str:
    """Where and when it was measured."""
    machine, run = result.get("machine") or {}, result.get("run") or {}
    device = machine.get("gpu") or machine.get("cpu") or "device not said"
    day = str(run.get("utc") or "")[:10] or "date not said"
    return f"{device}, {day}" + (f", commit {run['commit'][:8]}" if run.get("commit") else "")
