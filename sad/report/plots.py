"""The plots of a run, drawn from its log: each is one panel, as SVG for the report and as PNG.

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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sad.report.log import Record
from sad.report.theme import LIGHT, with_variables

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

COLOURS = ("student", "ema", "third", "teacher", "fourth", "baseline")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


class Plot(NamedTuple):
    """One finished panel."""

    name: str
    group: str
    title: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class History:
    """The records of one run that are drawn, ordered by position."""

    train: Sequence[Record]
    evaluations: Sequence[Record]
    resumed_at: Sequence[int] = ()

    @classmethod
    def of(cls, records: Sequence[Record]) -> History:
        def of_kind(kind: str) -> list[Record]:
            chosen = (r for r in records if r["kind"] == kind and "micro_step" in r)
            return sorted(chosen, key=lambda record: record["micro_step"])

        starts = {r.get("resumed_from", 0) for r in records if r["kind"] == "start"}
        return cls(of_kind("train"), of_kind("eval"), sorted(starts - {0}))


@dataclass(frozen=True)
class _Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: Any = "-"
    width: float = 1.5

    @property
    def finite(self) -> list[float]:
        return [value for value in self.y if math.isfinite(value)]


@dataclass(frozen=True)
class _Panel:
    """What a panel shows; a panel without a single line is not drawn."""

    name: str
    group: str
    title: str
    unit: str
    lines: Sequence[_Line]
    level: float | None = None
    level_label: str = ""
    resumed_at: Sequence[int] = ()
    from_zero: bool = False
    log_if_wide: bool = False


def draw_plots(
    run: History,
    baseline: History | None,
    teacher: Mapping[str, float],
    max_grad_norm: float | None = None,
) -> Iterator[Plot]:
    """Every panel that the records have data for.

    ``baseline`` is the run without a teacher, drawn beside; ``teacher`` the teacher's own metrics
    (``nll``, ``accuracy``), drawn as levels, as is ``max_grad_norm``.
    """
    panels = [
        *_evaluation_panels(run, baseline, teacher),
        *_train_panels(run, baseline, max_grad_norm),
    ]
    for panel in panels:
        if panel.lines:
            yield _draw(panel)


# What is drawn


def _evaluation_panels(
    run: History, baseline: History | None, teacher: Mapping[str, float]
) -> Iterator[_Panel]:
    panels = (
        ("nll", "Held-out loss", "nats per target", 1.0),
        ("kl", "KL to the teacher", "nats per target", 1.0),
        ("agreement", "Top-1 agreement with the teacher", "% of targets", 100.0),
        ("accuracy", "Top-1 accuracy", "% of targets", 100.0),
    )
    for metric, title, unit, scale in panels:
        lines = [
            _line(run.evaluations, f"eval/{metric}", "student", "student", scale=scale),
            _line(run.evaluations, f"eval_ema/{metric}", "student, EMA", "ema", DASHES[1], scale),
        ]
        if baseline is not None:
            beside = baseline.evaluations
            lines += [
                _line(beside, f"eval/{metric}", "text alone", "baseline", DASHES[0], scale),
                _line(
                    beside, f"eval_ema/{metric}", "text alone, EMA", "baseline", DASHES[1], scale
                ),
            ]
        level = teacher.get(metric) if metric in ("nll", "accuracy") else None
        yield _Panel(
            name=f"eval_{metric}",
            group="evaluation",
            title=title,
            unit=unit,
            lines=_with_data(lines),
            level=None if level is None else scale * level,
            level_label="teacher",
            resumed_at=run.resumed_at,
        )


def _train_panels(
    run: History, baseline: History | None, max_grad_norm: float | None
) -> Iterator[_Panel]:
    def panel(name: str, title: str, unit: str, lines: Sequence[_Line], **options: Any) -> _Panel:
        shown = _with_data(lines)
        return _Panel(name, "training", title, unit, shown, resumed_at=run.resumed_at, **options)

    losses = _loss_lines(run, baseline)
    plain = _weights(run.train).keys() <= {"ce", "kd", "z"}
    unit = "nats per target" if plain else "per target, token or sequence"
    yield panel("loss", "Training loss and its parts", unit, losses)

    rate = [_line(run.train, "lr", "learning rate", "student")]
    yield panel("learning_rate", "Learning rate", "learning rate", rate, from_zero=True)

    weights = _weight_lines(run.train)
    yield panel("weights", "Weights of the loss terms", "weight", weights, from_zero=True)

    norm = [_line(run.train, "grad_norm", "global norm", "student")]
    clip = max_grad_norm or None
    level = {"level": clip, "level_label": f"clipped at {clip:g}" if clip else ""}
    yield panel(
        "grad_norm", "Gradient norm", "norm before clipping", norm, log_if_wide=True, **level
    )

    speed = [_line(run.train, "tokens_per_second", "tokens/s", "student")]
    yield panel("throughput", "Throughput", "tokens per second", speed, from_zero=True)

    memory = _memory_lines(run.train)
    yield panel("memory", "Memory", "GiB", memory, from_zero=True)


def _loss_lines(run: History, baseline: History | None) -> list[_Line]:
    """The loss, and those of its parts that ever had a weight; CE in any case."""
    weights = _weights(run.train)
    names = dict.fromkeys(["ce", "kd", *weights])
    shown = [n for n in names if n == "ce" or not weights or any(weights[n].values())]
    # The loss is wider than its parts: with a single part both coincide.
    lines = [replace(_line(run.train, "loss", "loss", "ink"), width=2.6)]
    looks = product(DASHES, COLOURS)  # more parts than colours: the next dash
    lines += [
        _line(run.train, name, _term(name), colour, dash)
        for name, (dash, colour) in zip(shown, looks, strict=False)
    ]
    if baseline is not None:
        lines.append(_line(baseline.train, "ce", "CE, text alone", "baseline", DASHES[1]))
    return lines


def _weight_lines(records: Sequence[Record]) -> list[_Line]:
    return [
        _Line(_term(name), list(curve), list(curve.values()), colour, dash)
        for (name, curve), colour, dash in zip(
            _weights(records).items(), cycle(COLOURS), cycle(DASHES)
        )
    ]


def _memory_lines(records: Sequence[Record]) -> list[_Line]:
    labels = {
        "rss_bytes": "process (RSS)",
        "cuda_used_bytes": "device, in use",
        "cuda_reserved_bytes": "device, reserved",
        "cuda_peak_bytes": "device, peak of tensors",
    }
    return [
        _line(records, key, label, colour, scale=2.0**-30)
        for (key, label), colour in zip(labels.items(), COLOURS, strict=False)
    ]


def _weights(records: Sequence[Record]) -> defaultdict[str, dict[int, float]]:
    """Each term's weight by micro-batch."""
    curves: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, weight in record.get("weights", {}).items():
            curves[name][record["micro_step"]] = weight
    return curves


def _term(name: str) -> str:
    """How a loss term is written: abbreviations in capitals."""
    return name.upper() if len(name) == 2 else name


def _line(
    records: Sequence[Record],
    key: str,
    label: str,
    colour: str,
    dash: Any = "-",
    scale: float = 1.0,
) -> _Line:
    points = [(r["micro_step"], scale * r[key]) for r in records if _is_number(r.get(key))]
    return _Line(label, [x for x, _ in points], [y for _, y in points], colour, dash)


def _with_data(lines: Sequence[_Line]) -> list[_Line]:
    return [line for line in lines if line.x]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# How it is drawn


def _draw(panel: _Panel) -> Plot:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": panel.name}):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot()
        for line in panel.lines:
            _draw_line(axes, line)
        if panel.level is not None and math.isfinite(panel.level):
            _draw_level(axes, panel)
        _draw_marks(axes, panel)
        _dress(axes, panel)
        _legend(figure, axes, panel)

        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True)
    return Plot(
        panel.name, panel.group, panel.title, _for_page(svg.getvalue(), panel.title), png.getvalue()
    )


def _draw_line(axes: Axes, line: _Line) -> None:
    y = [value if math.isfinite(value) else math.nan for value in line.y]
    colour = LIGHT[line.colour]
    marked = _alone(y) if len(y) > FEW_POINTS else list(range(len(y)))
    axes.plot(
        line.x, y, color=colour, linestyle=line.dash, linewidth=line.width, label=line.label,
        marker="o" if marked else "", markersize=4.2 if line.dash == "-" else 2.6, markevery=marked,
    )  # fmt: skip


def _alone(y: Sequence[float]) -> list[int]:
    """Indices of finite values between two that are not: without a marker they would not show."""
    padded = [math.nan, *y, math.nan]
    return [
        i
        for i, (before, value, after) in enumerate(zip(padded, y, padded[2:], strict=False))
        if math.isfinite(value) and not (math.isfinite(before) or math.isfinite(after))
    ]


def _draw_level(axes: Axes, panel: _Panel) -> None:
    is_teacher = panel.level_label == "teacher"
    colour = LIGHT["teacher" if is_teacher else "muted"]
    axes.axhline(
        panel.level or 0.0,
        color=colour,
        linestyle=DASHES[3],
        linewidth=1.2,
        label=panel.level_label,
    )


def _draw_marks(axes: Axes, panel: _Panel) -> None:
    """Where the run was resumed, and where a value was not finite."""
    for i, micro_step in enumerate(panel.resumed_at):
        axes.axvline(
            micro_step, color=LIGHT["muted"], linestyle=":", linewidth=1.0,
            label="" if i else "resumed",
        )  # fmt: skip
    bad = sorted(
        {
            x
            for line in panel.lines
            for x, y in zip(line.x, line.y, strict=True)
            if not math.isfinite(y)
        }
    )
    if bad:
        axes.plot(
            bad, [0.03] * len(bad), transform=axes.get_xaxis_transform(), linestyle="none",
            marker="x", color=LIGHT["bad"], label=f"not finite ({len(bad)})",
        )  # fmt: skip


def _dress(axes: Axes, panel: _Panel) -> None:
    axes.set_xlabel("micro-batches")
    axes.set_ylabel(panel.unit)
    axes.yaxis.set_label_coords(-0.115, 0.5)
    values = [value for line in panel.lines for value in line.finite]
    if not values:
        axes.set_yticks([])
    elif panel.log_if_wide and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if panel.from_zero and min(values) >= 0:
            axes.set_ylim(0, 1.06 * max(values) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlim(0, 1.03 * max(max(line.x) for line in panel.lines) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, position: int | None) -> str:
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _legend(figure: Figure, axes: Axes, panel: _Panel) -> None:
    """Title and legend above the axes, where they cover nothing; no legend for a single line.

    Margins are fixed, so that panels beside each other line up.
    """
    handles, labels = axes.get_legend_handles_labels()
    columns = 4 if sum(map(len, labels)) < 42 else 3
    rows = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    if rows:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)
    axes.set_title(panel.title, loc="left", pad=8 + 13 * rows)
    top = 1 - (0.36 + 0.18 * rows) / SIZE[1]
    figure.subplots_adjust(left=0.125, right=0.97, bottom=0.14, top=top)


def _for_page(svg: str, title: str) -> str:
    """The bare ``<svg>`` element: scalable, themed by CSS variables, without unused ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    used = set(re.findall(r"#([A-Za-z]\w*)[\"')]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    return with_variables(svg).replace(
        "<svg", f'<svg class="plot" role="img" aria-label="{title}"', 1
    )
