"""The plots of a run: each is one panel, as SVG for the report and as PNG.

Needs matplotlib (the extra ``report``), which only this module imports. The same log gives the same
bytes: identifiers are salted with a fixed text and no date is written.

Nothing is hidden. Legends stand above the axes; values that are not finite are marked at the bottom
edge; a point without neighbours gets a marker; lines that may coincide differ in dash or width.

In the SVG every colour is a CSS variable, so that the page decides between light and dark; the PNG
is light.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sad.report.panels import FilledPanel, Group, Level, Line
from sad.report.theme import DASHES, LIGHT, with_variables

STYLE: dict[Any, Any] = {
    "axes.edgecolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": "none",
    "font.size": 8.5,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "legend.borderaxespad": 0.0,
    "legend.columnspacing": 1.2,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.labelcolor": LIGHT["ink"],
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}

SIZE = (5.2, 3.1)
"""Inches."""

FEW_POINTS = 25
"""Up to here every point is marked."""


class Plot(NamedTuple):
    """One finished panel."""

    name: str
    group: Group
    title: str
    svg: str
    png: bytes
    points: int
    """Of its longest line."""


def draw_plots(panels: Iterable[FilledPanel]) -> Iterator[Plot]:
    """Draw each panel under a name of its own, which is also that of its file."""
    taken: set[str] = set()
    for panel in panels:
        name = re.sub(r"[^\w.-]", "_", panel.name)  # a name out of the log may hold anything
        while name in taken:
            name += "_"
        taken.add(name)
        yield _draw(replace(panel, name=name))


def _draw(panel: FilledPanel) -> Plot:
    # The salt makes ids unique among the plots of a page, and the same in every drawing.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": panel.name}):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot()
        for line in panel.lines:
            _draw_line(axes, line)
        if panel.level is not None and math.isfinite(panel.level.value):
            _draw_level(axes, panel.level)
        _draw_marks(axes, panel)
        _set_axes(axes, panel)
        _legend(figure, axes, panel)

        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True)
    title = panel.spec.title
    points = max(len(line.x) for line in panel.lines)
    page_svg = _for_page(svg.getvalue(), title)
    return Plot(panel.name, panel.group, title, page_svg, png.getvalue(), points)


def _draw_line(axes: Axes, line: Line) -> None:
    # NaN breaks a line, and infinities would stretch the axis.
    y = [value if math.isfinite(value) else math.nan for value in line.y]
    colour = LIGHT[line.colour]
    marked = _isolated(y) if len(y) > FEW_POINTS else list(range(len(y)))
    axes.plot(
        line.x, y, color=colour, linestyle=line.dash, linewidth=line.width, label=line.label,
        marker="o" if marked else "", markersize=4.2 if line.dash == "-" else 2.6, markevery=marked,
    )  # fmt: skip


def _isolated(y: Sequence[float]) -> list[int]:
    """Indices of finite values between two that are not: without a marker they would not show."""
    padded = [math.nan, *y, math.nan]
    return [
        i
        for i, (before, value, after) in enumerate(zip(padded, y, padded[2:], strict=False))
        if math.isfinite(value) and not (math.isfinite(before) or math.isfinite(after))
    ]


def _draw_level(axes: Axes, level: Level) -> None:
    colour = LIGHT[level.colour]
    axes.axhline(level.value, color=colour, linestyle=DASHES[3], linewidth=1.2, label=level.label)


def _draw_marks(axes: Axes, panel: FilledPanel) -> None:
    """Where the run was resumed, and where a value was not finite."""
    for i, micro_step in enumerate(panel.resumed_at):
        axes.axvline(
            micro_step, color=LIGHT["muted"], linestyle=":", linewidth=1.0,
            label="" if i else "resumed",
        )  # fmt: skip
    not_finite = sorted(
        {
            x
            for line in panel.lines
            for x, y in zip(line.x, line.y, strict=True)
            if not math.isfinite(y)
        }
    )
    if not_finite:  # x in data, y as a share of the axis: there is no value to stand at
        axes.plot(
            not_finite, [0.03] * len(not_finite), transform=axes.get_xaxis_transform(),
            linestyle="none", marker="x", color=LIGHT["bad"],
            label=f"not finite ({len(not_finite)})",
        )  # fmt: skip


def _set_axes(axes: Axes, panel: FilledPanel) -> None:
    """Labels, limits, scale and ticks of both axes."""
    axes.set_xlabel("micro-batches")
    axes.set_ylabel(panel.spec.unit)
    axes.yaxis.set_label_coords(-0.115, 0.5)
    values = [value for line in panel.lines for value in line.finite]
    if not values:
        axes.set_yticks([])
    elif panel.spec.log_if_wide and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if panel.spec.from_zero and min(values) >= 0:
            axes.set_ylim(0, 1.06 * max(values) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    # From 0 in any case, so that panels beside each other share their horizontal axis.
    axes.set_xlim(0, 1.03 * max(max(line.x) for line in panel.lines) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, position: int | None) -> str:
    """A number as short as it can be: ``2.5e-4``, ``0.01``, ``1,250``."""
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _legend(figure: Figure, axes: Axes, panel: FilledPanel) -> None:
    """Title and legend above the axes, where they cover nothing; no legend for a single line.

    Margins are fixed, so that panels beside each other line up.
    """
    handles, labels = axes.get_legend_handles_labels()
    # Three long labels fill the width of a panel, four short ones do.
    columns = 4 if sum(map(len, labels)) < 42 else 3
    rows = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    if rows:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)
    axes.set_title(panel.spec.title, loc="left", pad=8 + 13 * rows)
    top = 1 - (0.36 + 0.18 * rows) / SIZE[1]
    figure.subplots_adjust(left=0.125, right=0.97, bottom=0.14, top=top)


def _for_page(svg: str, title: str) -> str:
    """The bare ``<svg>`` element: scalable, themed by CSS variables, without unused ids."""
    svg = svg[svg.index("<svg") :]  # without XML declaration and doctype
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    # An id occurs once on a page, so only those stay that a clip path or a <use> refers to.
    used = set(re.findall(r"#([A-Za-z]\w*)[\"')]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    return with_variables(svg).replace(
        "<svg", f'<svg class="plot" role="img" aria-label="{escape(title)}"', 1
    )
