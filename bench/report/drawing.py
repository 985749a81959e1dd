"""How the benchmark's plots are drawn: looks of peers, axes, legends, labels beside points.

What is drawn is decided in ``plots.py`` and ``overview.py``. Every peer keeps its look in all
figures: ours is blue and wide; every other package has a colour (Okabe and Ito's, which the
colour-blind can tell apart) and a marker, and its settings differ in dash and filling.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, offset_copy

from bench.table import is_ours
from sad.report.plots import DASHES
from sad.report.theme import LIGHT

Json = Mapping[str, Any]
Points = dict[str, list[tuple[Any, ...]]]
"""Peer -> its points (x, y, low, high); ``high`` None: the true value may be more."""

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


def looks(series: Iterable[Json]) -> dict[str, Look]:
    """By peer, in the order in which all peers of a result are listed."""
    found: dict[str, Look] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for peer, package in dict.fromkeys((s["peer"], s.get("package")) for s in series):
        if is_ours(peer):
            found[peer] = OURS if peer == "ours" else OURS._replace(fill="none", dash=DASHES[1])
            continue
        kind = PACKAGES.get(package, UNKNOWN)
        i, counts[kind] = counts[kind], counts[kind] + 1
        found[peer] = Look(*kind, FILLS[i % len(FILLS)], DASHES[i % len(DASHES)])
    return found


def sheet(
    count: int, columns: int, title: str, about: str, size: tuple[float, float] = (3.6, 3.1)
) -> tuple[Figure, list[Axes]]:
    """So many axes, each of about this size in inches, with its labels."""
    rows = math.ceil(count / columns)
    size = size[0] * columns + 1.8, size[1] * rows + 1.0
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{about}", x=0.01, ha="left", fontsize=10, color=LIGHT["ink"])
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def set_title(axes: Axes, case: str, sizes: Json, dtype: str) -> None:
    text = ", ".join(f"{name}={size:,}" for name, size in sizes.items())
    lines = "\n".join([f"{case}, {dtype}", *textwrap.wrap(text, 48)])
    axes.set_title(lines, loc="left", fontsize=7.5, fontweight="normal")


def plot(axes: Axes, points: Points, look: Mapping[str, Look], beside: float = 0) -> None:
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
    set_scale(axes, "x", xs)
    set_scale(axes, "y", [v for p in every for v in p[1:] if v is not None and math.isfinite(v)])
    axes.xaxis.set_major_locator(FixedLocator(_spaced(xs)))


def _moved(axes: Axes, x: float, y: float) -> Any:
    """The axes' data, but moved by some points."""
    return offset_copy(axes.transData, axes.figure, x, y, "points") if x or y else axes.transData  # type: ignore


def set_scale(axes: Axes, which: str, values: Sequence[float]) -> None:
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
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _spaced(values: Sequence[float]) -> list[float]:
    """Those of the values whose labels have room, from the last one on."""
    place = math.log if values[0] > 0 and values[-1] > 5 * values[0] else float
    room, kept = (place(values[-1]) - place(values[0])) / 8, [values[-1]]
    for value in reversed(values[:-1]):
        if place(kept[-1]) - place(value) >= room:
            kept.append(value)
    return kept


def number(value: float) -> str:
    if 0 < abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def legend_handles(grid: Sequence[Axes], look: Mapping[str, Look]) -> dict[str, Line2D]:
    """Who has a point in one of the panels, in the order of all."""
    found = {line.get_label() for axes in grid for line in axes.get_lines()}
    return {peer: Line2D([], [], **look[peer].line) for peer in look if peer in found}


def finish(figure: Figure, handles: Mapping[str, Line2D], notes: Sequence[str]) -> None:
    """The legend beside the axes, the notes below them."""
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    width = int(17 * figure.get_figwidth())
    lines = "\n".join(line for note in notes for line in textwrap.wrap(note, width))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=7, color=LIGHT["muted"])


def label_points(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
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


def describe_source(result: Json) -> str:
    """Where and when it was measured."""
    machine, run = result.get("machine") or {}, result.get("run") or {}
    device = machine.get("gpu") or machine.get("cpu") or "device not said"
    day = str(run.get("utc") or "")[:10] or "date not said"
    return f"{device}, {day}" + (f", commit {run['commit'][:8]}" if run.get("commit") else "")
