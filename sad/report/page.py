"""The report of a run: one page that can be read anywhere.

The page is written from what the run directory holds, so it can be made again at any time, also
while the run goes on or after it failed; whatever is missing is left out. It is one file without
scripts and without anything to load: style and plots are inside. All text is escaped, and a content
security policy forbids the page to run or fetch anything.

Read: ``run.json`` (``results``, ``samples``, ``environment``), ``log.jsonl``,
``baseline/log.jsonl``, ``status.json``, ``config.yaml``, and ``sad.json`` in ``best/`` and
``final/``. Written: ``report.html`` and ``plots/*.png``.

The template is ``page.html.jinja`` beside this file, the style ``page.css``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sad.checkpoint.atomic_files import read_object, read_text, write_atomic
from sad.errors import OutputError, UsageError
from sad.metrics import Metric, format_count, format_metric
from sad.report.log import Record, from_json, read_log
from sad.report.results import (
    Row,
    cells,
    columns_of,
    name_of,
    student_row,
    teacher_row,
    verdict,
)
from sad.report.terminal import format_duration
from sad.report.theme import DARK, LIGHT

if TYPE_CHECKING:
    from sad.report.plots import Plot

PLOTS_EXTRA = "student-aware-distillation[report]"

ENDED_EARLY = ("failed", "stopped")

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n){4,}")

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["repr"] = repr


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html``, and ``plots/*.png`` if there is matplotlib; return the page's path.

    Raises ``UsageError`` if the directory does not exist, ``OutputError`` if it cannot be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UsageError(f"run directory must exist, got {run_dir}; pass the output_dir of a run")
    plots = _draw_plots(run_dir)
    if plots:
        _make_directory(run_dir / "plots")
    for plot in plots or ():
        write_atomic(run_dir / "plots" / f"{plot.name}.png", plot.png)
    # The page comes last: a plot that cannot be written leaves the page of before.
    page = run_dir / "report.html"
    write_atomic(page, TEMPLATES.get_template("page.html.jinja").render(_content(run_dir, plots)))
    return page


def _content(run_dir: Path, plots: Sequence[Plot] | None) -> dict[str, Any]:
    """What the template shows, as plain text; of the plots the SVG is markup of ours."""
    run = _read_json(run_dir / "run.json")
    records = read_log(run_dir)
    rows = run.get("results", [])
    columns = columns_of(rows)
    samples = run.get("samples", [])
    status = _read_json(run_dir / "status.json")
    return {
        "name": run_dir.resolve().name,
        "light": LIGHT,
        "dark": DARK,
        "facts": list(_facts(run_dir, records, finished=bool(rows))),
        "verdict": verdict(rows),
        "failure": status.get("message") if status.get("state") in ENDED_EARLY else "",
        "scored": _scored(run.get("scored", {})),
        "columns": columns,
        "rows": [
            {
                "name": name_of(row),
                "cells": _cells(row, columns),
                "chosen": row is student_row(rows),
            }
            for row in rows
        ],
        "plots": plots,
        "how_to_plot": _how_to_plot(run_dir),
        "samples": [_sample(sample) for sample in samples],
        "exports": _exports(run_dir),
        "prompt": _short_prompt(samples),
        "header": _header(records),
        "warnings": [
            {"time": record["time"], "message": record.get("message", "")}
            for record in records
            if record["kind"] == "warning"
        ],
        "config": read_text(run_dir / "config.yaml") or "",
        "environment": [
            (key, value if isinstance(value, str) else json.dumps(value))
            for key, value in run.get("environment", {}).items()
        ],
    }


# What the run directory holds


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file, or none: a report of what there is beats no report."""
    return read_object(path, from_json) or {}


def _read_config(run_dir: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(read_text(run_dir / "config.yaml") or "")
    except (yaml.YAMLError, ValueError, RecursionError):  # a date or an int may be no such thing
        return {}
    return config if isinstance(config, dict) else {}


def _draw_plots(run_dir: Path) -> list[Plot] | None:
    """The plots; None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from sad.report.panels import History, filled_panels
    from sad.report.plots import draw_plots

    records = read_log(run_dir)
    beside = read_log(run_dir / "baseline")
    baseline = History.of(beside) if beside else None
    clip = _read_config(run_dir).get("max_grad_norm")
    clip = clip if isinstance(clip, int | float) else None
    teacher = _teacher_metrics(run_dir, records)
    return list(draw_plots(filled_panels(History.of(records), baseline, teacher, clip)))


def _teacher_metrics(run_dir: Path, records: Sequence[Record]) -> dict[str, float]:
    """The teacher's own evaluation, from the log or else from the result table."""
    row = teacher_row(_read_json(run_dir / "run.json").get("results", [])) or {}
    metrics = {name: value for name, value in row.items() if isinstance(value, float)}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval_teacher/"):
                metrics[key.removeprefix("eval_teacher/")] = value
    return metrics


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} must be writable, got {error.strerror}; free space or change its permissions"
        ) from error


# What the page says of it


def _facts(run_dir: Path, records: Sequence[Record], finished: bool) -> Iterator[str]:
    """One line on what happened: state, length, time, memory, date."""
    state = _read_json(run_dir / "status.json").get("state")
    if state == "running" and finished:
        state = "finished"  # the report is the last thing that a run writes before it says so
    if state:
        yield str(state)
    attempts = {record["attempt"] for record in records}
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        yield "nothing logged yet"
        return
    last = train[-1]
    yield f"{last['micro_step']:,} micro-batches"
    yield f"{last['global_step']:,} optimizer steps"
    duration = format_duration(sum(_seconds(records, attempt) for attempt in attempts))
    yield f"{format_count(last['tokens'])} tokens in {duration}"
    if len(attempts) > 1:
        yield f"{len(attempts)} attempts"
    if last.get("skipped"):
        yield f"{last['skipped']} updates skipped"
    # Of the GPU where there was one; on CPU the peak of the whole process.
    peaks = [r.get("cuda_peak_bytes") or r.get("rss_peak_bytes") or 0 for r in train]
    if max(peaks):
        yield f"peak memory {max(peaks) / 2**30:.2f} GiB"
    yield _date(records[-1]["time"])


def _date(time: str) -> str:
    """Day and minute of a record's time, in UTC."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M} UTC"


def _seconds(records: Sequence[Record], attempt: int) -> float:
    times = [datetime.fromisoformat(r["time"]) for r in records if r["attempt"] == attempt]
    return (max(times) - min(times)).total_seconds()


def _scored(counts: Mapping[str, Any]) -> str:
    """How much text the metrics are means over."""
    if not {"rows", "targets"} <= counts.keys():
        return ""
    return f"{counts['rows']:,} rows with {counts['targets']:,} targets"


def _cells(row: Row, columns: Sequence[Metric]) -> list[dict[str, str]]:
    """A row of the result table: each cell with its title and rank, for narrow screens."""
    titles = [("parameters", ""), *((c.title, "headline" * c.headline) for c in columns)]
    return [
        {"text": text, "title": title, "rank": rank}
        for text, (title, rank) in zip(cells(row, columns), titles, strict=True)
    ]


def _how_to_plot(run_dir: Path) -> str:
    call = f"from sad.report import write_report; write_report({str(run_dir)!r})"
    return f"pip install '{PLOTS_EXTRA}'\npython -c {json.dumps(call)}"


def _sample(sample: Mapping[str, Any]) -> dict[str, str]:
    return {key: _shortened(str(sample.get(key, ""))) for key in ("model", "prompt", "text")}


def _shortened(text: str) -> str:
    """The text with many blank lines counted, where it is not blank: students repeat themselves."""
    if not text.strip():
        return text

    def counted(run: re.Match[str]) -> str:
        blank = run[0].count("\n") - 1
        return f"\n[{blank} blank lines]\n"

    return BLANK_LINES.sub(counted, text)


def _short_prompt(samples: Sequence[Mapping[str, Any]]) -> str:
    """A prompt to try the student with, out of the first sample."""
    # The last line of the prompt, short enough for one line of code.
    words = str(samples[0].get("prompt", "")).strip() if samples else ""
    return words.rpartition("\n")[2][:40] or "The"


def _exports(run_dir: Path) -> list[dict[str, str]]:
    """The students that can be loaded, and where each comes from."""
    paths = [run_dir / name for name in ("best", "final")]
    return [
        {"path": str(path), "about": _origin(_read_json(path / "sad.json"))}
        for path in paths
        if (path / "sad.json").exists()
    ]


def _origin(facts: Mapping[str, Any]) -> str:
    if not {"weights", "metric", "value", "micro_step"} <= facts.keys():
        return ""
    weights = "EMA weights" if facts["weights"] == "ema" else "raw weights"
    name = str(facts["metric"])
    value = format_metric(name.rpartition("/")[2], facts["value"])
    rows = f" of {facts['micro_batch_rows']:,} rows" if "micro_batch_rows" in facts else ""
    return f"{weights} after micro-batch {facts['micro_step']:,}{rows}, {name} {value}"


def _header(records: Sequence[Record]) -> list[tuple[str, str]]:
    starts = [record for record in records if record["kind"] == "start"]
    return [(label, text) for label, text in starts[-1].get("header", [])] if starts else []
