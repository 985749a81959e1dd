"""The content of a run's plots: which lines each panel has, taken from the records of its log.

Which metric belongs to which panel is said by ``sad.metrics``. How a panel is drawn is in
``sad.report.plots``; nothing here needs matplotlib.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any, Literal

from sad.metrics import (
    METRICS,
    OWN_PANEL,
    PANELS,
    Metric,
    Panel,
    in_order,
    is_number,
    metric,
    plot_scale,
)
from sad.report.log import Record
from sad.report.theme import DASHES, LINE_COLOURS

Group = Literal["evaluation", "training"]

SCORED = (("eval", "student", "student"), ("eval_ema", "student, EMA", "ema"))
"""Prefix of an evaluation's metrics, and label and colour of its line."""

CE_ONLY = (("eval", "CE only"), ("eval_ema", "CE only, EMA"))
"""The same of the baseline without a teacher."""

MIXED_UNITS = "per target, token or sequence"
"""The unit of a loss whose structural terms are means over units of their own."""


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
class Line:
    """One curve over micro-batches; values need not be finite."""

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
class Level:
    """A horizontal line that curves are compared with."""

    value: float
    label: str
    colour: str


@dataclass(frozen=True)
class FilledPanel:
    """A panel with its lines, of which there is at least one."""

    name: str
    group: Group
    spec: Panel
    lines: Sequence[Line]
    level: Level | None = None
    resumed_at: Sequence[int] = ()


def filled_panels(
    run: History,
    baseline: History | None,
    teacher: Mapping[str, float],
    max_grad_norm: float | None = None,
) -> Iterator[FilledPanel]:
    """Every panel that the records have data for.

    ``baseline`` is the run without a teacher, drawn beside; ``teacher`` the teacher's own metrics
    (``nll``, ``accuracy``, ...), drawn as levels, as is ``max_grad_norm``.
    """
    for filled in (
        *_evaluation_panels(run, baseline, teacher),
        *_training_panels(run, baseline, max_grad_norm),
    ):
        if filled.lines:
            yield filled


# Evaluations


def _evaluation_panels(
    run: History, baseline: History | None, teacher: Mapping[str, float]
) -> Iterator[FilledPanel]:
    terms = _weights(run.train)
    recorded = {
        key.removeprefix(f"{prefix}/")
        for record in run.evaluations
        for key, value in record.items()
        for prefix, *_ in SCORED
        if key.startswith(f"{prefix}/") and is_number(value)
    }
    groups: dict[str | Metric, list[Metric]] = {}
    for row in in_order(recorded):
        undeclared_term = row.name in terms and row.name not in METRICS
        _put(row, "eval_terms" if undeclared_term else row.eval_panel, groups)
    for key, rows in groups.items():
        if len(rows) == 1:
            lines, level = _compared(rows[0], run, baseline), _teacher_level(rows[0], teacher)
        else:  # a line for each metric leaves no room for whom to compare with
            lines = [
                _line(run.evaluations, row, _label(row), colour, dash, prefix="eval/")
                for row, (dash, colour) in zip(rows, product(DASHES, LINE_COLOURS), strict=False)
            ]
            level = None
        name = key if isinstance(key, str) else f"eval_{key.name}"
        spec, shown = _panel(key), _with_data(lines)
        yield FilledPanel(name, "evaluation", spec, shown, level, run.resumed_at)


def _compared(row: Metric, run: History, baseline: History | None) -> list[Line]:
    """One metric of the student, and of the baseline, under raw and averaged weights."""
    lines = [
        _line(run.evaluations, row, label, colour, dash, prefix=f"{prefix}/")
        for (prefix, label, colour), dash in zip(SCORED, DASHES, strict=False)
    ]
    if baseline is not None:
        lines += [
            _line(baseline.evaluations, row, label, "baseline", dash, prefix=f"{prefix}/")
            for (prefix, label), dash in zip(CE_ONLY, DASHES, strict=False)
        ]
    return lines


def _teacher_level(row: Metric, teacher: Mapping[str, float]) -> Level | None:
    value = teacher.get(row.name)
    return None if value is None else Level(plot_scale(row.name) * value, "teacher", "teacher")


# Training


def _training_panels(
    run: History, baseline: History | None, max_grad_norm: float | None
) -> Iterator[FilledPanel]:
    weights = _weights(run.train)
    recorded = {key for record in run.train for key, value in record.items() if is_number(value)}
    groups: dict[str | Metric, list[Metric]] = {name: [] for name in PANELS}  # in their order
    for row in in_order(recorded):
        undeclared_term = row.name in weights and row.name not in METRICS
        _put(row, "loss" if undeclared_term else row.train_panel, groups)
    for key, rows in groups.items():
        spec, level = _panel(key), None
        if key == "loss":
            lines = _loss_lines(rows, run, baseline)
            if not weights.keys() <= {"ce", "kd", "z"}:
                spec = replace(spec, unit=MIXED_UNITS)
        elif key == "weights":
            lines = _weight_lines(run.train)
        else:
            lines = _one_each(rows, run.train)
        if key == "grad_norm" and max_grad_norm:
            level = Level(max_grad_norm, f"clipped at {max_grad_norm:g}", "muted")
        name = key if isinstance(key, str) else key.name
        yield FilledPanel(name, "training", spec, _with_data(lines), level, run.resumed_at)


def _loss_lines(rows: Sequence[Metric], run: History, baseline: History | None) -> list[Line]:
    """The loss, and those of its terms that ever had a weight; CE in any case."""
    weights = _weights(run.train)
    weighted = {name for name, curve in weights.items() if any(curve.values())} | {"ce"}
    if not weights:
        weighted |= {"kd"}
    loss = [row for row in rows if row.name == "loss"]
    parts = [
        row
        for row in rows
        if row not in loss and (row.name in weighted or not (row.loss_term or row.name in weights))
    ]
    # The loss is wider than its parts: with a single part both coincide.
    lines = [replace(_line(run.train, row, _label(row), "ink"), width=2.6) for row in loss]
    lines += _one_each(parts, run.train)
    if baseline is not None:
        lines.append(_line(baseline.train, metric("ce"), "CE, CE-only run", "baseline", DASHES[1]))
    return lines


def _weight_lines(records: Sequence[Record]) -> list[Line]:
    return [
        Line(_label(metric(name)), list(curve), list(curve.values()), colour, dash)
        for (name, curve), colour, dash in zip(
            _weights(records).items(), cycle(LINE_COLOURS), cycle(DASHES)
        )
    ]


def _weights(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Each loss term's weight by micro-batch."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, weight in record.get("weights", {}).items():
            curves[name][record["micro_step"]] = weight
    return dict(curves)


# Details


def _one_each(rows: Sequence[Metric], records: Sequence[Record]) -> list[Line]:
    """A line for each metric; with more of them than colours, the next dash."""
    looks = product(DASHES, LINE_COLOURS)
    return [
        _line(records, row, _label(row), colour, dash)
        for row, (dash, colour) in zip(rows, looks, strict=False)
    ]


def _line(
    records: Sequence[Record],
    row: Metric,
    label: str,
    colour: str,
    dash: Any = "-",
    *,
    prefix: str = "",
) -> Line:
    scale, key = plot_scale(row.name), prefix + row.name
    points = [(r["micro_step"], scale * r[key]) for r in records if is_number(r.get(key))]
    if all(y == row.neutral for _, y in points):
        points = []
    return Line(label, [x for x, _ in points], [y for _, y in points], colour, dash)


def _label(row: Metric) -> str:
    return row.label or row.title


def _put(row: Metric, panel: str | None, groups: dict[str | Metric, list[Metric]]) -> None:
    """Add a metric to its panel: a key of ``PANELS``, or the metric itself if it has its own."""
    if panel is not None:
        groups.setdefault(row if panel == OWN_PANEL else panel, []).append(row)


def _panel(key: str | Metric) -> Panel:
    if isinstance(key, str):
        return PANELS[key]
    return Panel(key.heading or key.title, key.unit)


def _with_data(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.x]
