"""The result table of a run: its rows, the table as text, and one sentence on what was gained.

A row is a mapping with ``name``, ``parameters`` and the metrics of ``sad.metrics.table_metrics``;
what was not measured is None or absent. Rows are told apart by their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sad.metrics import Metric, format_count, format_metric, headline_metrics, metric, table_metrics

Row = Mapping[str, Any]

BASELINE_NAME = "student, CE only"
"""The row of the student that learned without its teacher, from cross-entropy alone."""

BASELINE_MARKS = ("CE only", "text alone")
"""What marks such a row; runs of earlier versions called it "student, text alone"."""


def format_results(rows: Sequence[Row]) -> str:
    """The result table as aligned text, one line per model; ``-`` where nothing was measured."""
    columns = columns_of(rows)
    titles = ["", "parameters", *(column.title for column in columns)]
    lines = [titles, *([name_of(row), *cells(row, columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    texts = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([texts[0], rule, *texts[1:]])


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: what distillation gained over CE only, or else where the student stands.

    Of several rows of the same student (raw, EMA) the one with the smallest NLL counts: the weights
    that are exported as best.
    """
    student, baseline, teacher = student_row(rows), _baseline_row(rows), teacher_row(rows)
    if student is None:
        return "There is no evaluation of the student yet."
    if not math.isfinite(_value(student, "nll")):
        return "The student's held-out loss is not finite: training diverged."
    if baseline is None:
        return _standing(student, teacher)
    return _gain(student, baseline) + _gap_closed(student, baseline, teacher)


def name_of(row: Row) -> str:
    return str(row.get("name", ""))


def columns_of(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that some row has; all of them if there is no row."""
    measured = {name for row in rows for name, value in row.items() if value is not None}
    return [column for column in table_metrics() if column.name in measured or not rows]


def cells(row: Row, columns: Sequence[Metric]) -> list[str]:
    """The row as the table shows it, without its name: parameters, then each metric."""
    metrics = [format_metric(column.name, row.get(column.name)) for column in columns]
    return [format_count(row.get("parameters")), *metrics]


def teacher_row(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if name_of(row).startswith("teacher")), None)


def student_row(rows: Sequence[Row]) -> Row | None:
    """The distilled student, or the only one there is."""
    students = [row for row in rows if row is not teacher_row(rows) and not _is_baseline(row)]
    distilled = [row for row in students if "distilled" in name_of(row)]
    return _smallest_nll(distilled or students)


def _baseline_row(rows: Sequence[Row]) -> Row | None:
    return _smallest_nll([row for row in rows if _is_baseline(row)])


def _is_baseline(row: Row) -> bool:
    return any(mark in name_of(row) for mark in BASELINE_MARKS)


def _smallest_nll(rows: Sequence[Row]) -> Row | None:
    def nll(row: Row) -> float:
        value = _value(row, "nll")
        return math.inf if math.isnan(value) else value

    return min(rows, key=nll, default=None)


def _value(row: Row, name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


# The parts of the sentence


def _standing(student: Row, teacher: Row | None) -> str:
    facts = [
        f"{shown.title} {format_metric(shown.name, student[shown.name])}"
        for shown in headline_metrics()
        if math.isfinite(_value(student, shown.name))
    ]
    against = ""
    if teacher is not None and math.isfinite(_value(teacher, "perplexity")):
        against = (
            f"; its teacher has perplexity {format_metric('perplexity', teacher['perplexity'])}"
        )
    # NLL is finite here, so a row without one of the headline metrics still says something.
    facts = facts or [f"NLL {format_metric('nll', student['nll'])}"]
    return f"The student reaches {_listed(facts)} on held-out text{against}."


def _gain(student: Row, baseline: Row) -> str:
    changes, better = [], []
    for shown in headline_metrics():
        before, after = _value(baseline, shown.name), _value(student, shown.name)
        if math.isfinite(before) and math.isfinite(after):
            changes.append(_change(shown.name, before, after))
            better.append(after > before if shown.better == "higher" else after < before)
    if not changes:
        return "The students' metrics are not finite, so they cannot be compared."
    judgement = (
        "Distillation helped" if all(better)
        else "Distillation helped in part" if any(better)
        else "Distillation did not help"
    )  # fmt: skip
    return (
        f"{judgement}: against the same student trained with CE only, for as many steps on the "
        f"same batches, {_listed(changes)}."
    )


def _change(name: str, before: float, after: float) -> str:
    shown = metric(name)
    what = shown.phrase or shown.title
    old, new = format_metric(name, before), format_metric(name, after)
    if old == new:
        return f"{what} stayed at {new}"
    verb = "rose" if after > before else "fell"
    if shown.format == "percent":
        size = f" ({100 * (after - before):+.1f} points)"
    else:
        size = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
    return f"{what} {verb} from {old} to {new}{size}"


def _gap_closed(student: Row, baseline: Row, teacher: Row | None) -> str:
    """The share of the NLL between baseline and teacher that the student made up, if it did."""
    if teacher is None:
        return ""
    gap = _value(baseline, "nll") - _value(teacher, "nll")
    made_up = _value(baseline, "nll") - _value(student, "nll")
    if not (gap > 0 and made_up > 0):
        return ""
    return f" That closes {100 * made_up / gap:.0f} % of that student's gap to its teacher in NLL."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
