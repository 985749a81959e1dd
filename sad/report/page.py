"""The report of a run: one page that can be read anywhere, and the result table for the terminal.

The page is written from what the run directory holds, so it can be made again at any time, also
while the run goes on or after it failed; whatever is missing is left out. It is one file without
scripts and without anything to load: style and plots are inside. All text is escaped, and a content
security policy forbids the page to run or fetch anything.

Read: ``run.json`` (``results``, ``samples``, ``environment``), ``log.jsonl``,
``baseline/log.jsonl``, ``status.json``, ``config.yaml``, and ``sad.json`` in ``best/`` and
``final/``. Written: ``report.html`` and ``plots/*.png``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sad.checkpoint.atomic_files import write_atomic
from sad.errors import OutputError, UsageError
from sad.report.log import Record, from_json, read_log
from sad.report.terminal import METRIC_TITLES, format_count, format_duration, format_metric
from sad.report.theme import DOCUMENT, style_sheet

if TYPE_CHECKING:
    from sad.report.plots import Plot

Row = Mapping[str, Any]
"""A row of the result table: ``name``, ``parameters`` and the metrics of ``METRIC_TITLES``."""

BASELINE_NAMES = ("text alone", "CE only")
"""What marks the row of the student that learned without a teacher."""

HIGHER_IS_BETTER = frozenset({"agreement", "accuracy"})

PLOTS_EXTRA = "student-aware-distillation[report]"

TABLE_NOTE = """<p class="note">NLL in nats per target and perplexity = exp(NLL), KL from the
teacher's distribution to the student's in nats per target, agreement of both first choices,
accuracy of the first choice, bits per byte of text; all on held-out text. Arrows show the better
direction. The row in bold is the student that the sentence above speaks of.</p>"""

LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

student = AutoModelForCausalLM.from_pretrained({path!r})
tokenizer = AutoTokenizer.from_pretrained({path!r})
prompt = tokenizer({prompt!r}, return_tensors="pt").input_ids
print(tokenizer.decode(student.generate(prompt, max_new_tokens=64)[0]))"""


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
    page = run_dir / "report.html"
    write_atomic(page, _page(run_dir, plots))
    return page


def format_results(rows: Sequence[Row]) -> str:
    """The result table as aligned text, one line per model; ``-`` where nothing was measured."""
    titles = ["", "parameters", *METRIC_TITLES.values()]
    lines = [titles, *([_name(row), *_cells(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    texts = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([texts[0], rule, *texts[1:]])


def verdict(rows: Sequence[Row]) -> str:
    """What distillation gained over training on text alone, or else where the student stands.

    Of several rows of the same student (raw, EMA) the one with the smallest NLL speaks: the weights
    that are exported as best.
    """
    student, baseline, teacher = _student(rows), _baseline(rows), _teacher(rows)
    if student is None:
        return "There is no evaluation of the student yet."
    if not math.isfinite(_metric(student, "nll")):
        return "The student's held-out loss is not finite: training diverged."
    if baseline is None:
        return _standing(student, teacher)
    return _gain(student, baseline) + _gap_closed(student, baseline, teacher)


# The verdict


def _standing(student: Row, teacher: Row | None) -> str:
    facts = [
        f"{METRIC_TITLES[name]} {format_metric(name, student[name])}"
        for name in ("perplexity", "kl", "agreement")
        if math.isfinite(_metric(student, name))
    ]
    against = ""
    if teacher is not None and math.isfinite(_metric(teacher, "perplexity")):
        against = (
            f"; its teacher has perplexity {format_metric('perplexity', teacher['perplexity'])}"
        )
    return f"The student reaches {_listed(facts)} on held-out text{against}."


def _gain(student: Row, baseline: Row) -> str:
    changes, better = [], []
    for name in ("perplexity", "kl", "agreement"):
        before, after = _metric(baseline, name), _metric(student, name)
        if math.isfinite(before) and math.isfinite(after):
            changes.append(_change(name, before, after))
            better.append(after > before if name in HIGHER_IS_BETTER else after < before)
    if not changes:
        return "The students' metrics are not finite, so they cannot be compared."
    judgement = (
        "Distillation helped" if all(better)
        else "Distillation helped in part" if any(better)
        else "Distillation did not help"
    )  # fmt: skip
    return (
        f"{judgement}: against the same student trained on the text alone, for as many steps on "
        f"the same batches, {_listed(changes)}."
    )


def _change(name: str, before: float, after: float) -> str:
    what = {"kl": "KL to the teacher", "agreement": "top-1 agreement"}.get(name, name)
    old, new = format_metric(name, before), format_metric(name, after)
    if old == new:
        return f"{what} stayed at {new}"
    verb = "rose" if after > before else "fell"
    if name in HIGHER_IS_BETTER:
        size = f" ({100 * (after - before):+.1f} points)"
    else:
        size = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
    return f"{what} {verb} from {old} to {new}{size}"


def _gap_closed(student: Row, baseline: Row, teacher: Row | None) -> str:
    """The share of the NLL between baseline and teacher that the student made up, if it did."""
    if teacher is None:
        return ""
    gap = _metric(baseline, "nll") - _metric(teacher, "nll")
    made_up = _metric(baseline, "nll") - _metric(student, "nll")
    if not (gap > 0 and made_up > 0):
        return ""
    return f" That closes {100 * made_up / gap:.0f} % of that student's gap to its teacher in NLL."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _metric(row: Row, name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


def _name(row: Row) -> str:
    return str(row.get("name", ""))


def _teacher(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if _name(row).startswith("teacher")), None)


def _baseline(rows: Sequence[Row]) -> Row | None:
    return _smallest_nll([row for row in rows if _is_baseline(row)])


def _is_baseline(row: Row) -> bool:
    return any(mark in _name(row) for mark in BASELINE_NAMES)


def _student(rows: Sequence[Row]) -> Row | None:
    """The distilled student, or the only one there is."""
    students = [row for row in rows if row is not _teacher(rows) and not _is_baseline(row)]
    distilled = [row for row in students if "distilled" in _name(row)]
    return _smallest_nll(distilled or students)


def _smallest_nll(rows: Sequence[Row]) -> Row | None:
    def nll(row: Row) -> float:
        value = _metric(row, "nll")
        return math.inf if math.isnan(value) else value

    return min(rows, key=nll, default=None)


# What the run directory holds


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file, or none: a report of what there is beats no report."""
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _draw_plots(run_dir: Path) -> list[Plot] | None:
    """The plots; None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from sad.report.plots import History, draw_plots

    records = read_log(run_dir)
    beside = read_log(run_dir / "baseline")
    baseline = History.of(beside) if beside else None
    clip = _read_config(run_dir).get("max_grad_norm")
    clip = clip if isinstance(clip, int | float) else None
    return list(draw_plots(History.of(records), baseline, _teacher_metrics(run_dir, records), clip))


def _read_config(run_dir: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(_read_text(run_dir / "config.yaml"))
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _teacher_metrics(run_dir: Path, records: Sequence[Record]) -> dict[str, float]:
    """The teacher's own evaluation, from the log or else from the result table."""
    row = _teacher(_read_json(run_dir / "run.json").get("results", [])) or {}
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


# The page


def _page(run_dir: Path, plots: Sequence[Plot] | None) -> str:
    run = _read_json(run_dir / "run.json")
    records = read_log(run_dir)
    rows = run.get("results", [])
    sections = [
        _section("Result", _results(rows)),
        _section("On held-out text", _grid(plots, "evaluation")),
        _section("Training", _grid(plots, "training") if plots is not None else _no_plots(run_dir)),
        _section("What it writes", _samples(run.get("samples", []))),
        _section("Load the student", _loading(run_dir, run.get("samples", []))),
        _section("Run", _pairs(_header(records))),
        _section("Warnings", _warnings(records)),
        _folded("Configuration", _preformatted(_read_text(run_dir / "config.yaml"))),
        _folded("Environment", _pairs(_flat(run.get("environment", {})))),
    ]
    return DOCUMENT.format(
        name=escape(run_dir.resolve().name),
        style=style_sheet(),
        facts=" &middot; ".join(map(escape, _facts(run_dir, records, finished=bool(rows)))),
        body="\n".join(filter(None, sections)),
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>" if body else ""


def _facts(run_dir: Path, records: Sequence[Record], finished: bool) -> Iterator[str]:
    """One line on what happened: state, length, time, memory."""
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
    peaks = [r.get("cuda_peak_bytes") or r.get("rss_peak_bytes") or 0 for r in train]
    if max(peaks):
        yield f"peak memory {max(peaks) / 2**30:.2f} GiB"


def _seconds(records: Sequence[Record], attempt: int) -> float:
    times = [datetime.fromisoformat(r["time"]) for r in records if r["attempt"] == attempt]
    return (max(times) - min(times)).total_seconds()


def _results(rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>No results yet: they are written when the run ends.</p>"
    heads = ["<th></th><th>parameters</th>"]
    for name, title in METRIC_TITLES.items():
        arrow = "&uarr;" if name in HIGHER_IS_BETTER else "&darr;"
        heads.append(f"<th>{title}&nbsp;<span>{arrow}</span></th>")
    chosen = _student(rows)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row))
        mark = ' class="chosen"' if row is chosen else ""
        lines.append(f'<tr{mark}><th scope="row">{escape(_name(row))}</th>{cells}</tr>')
    return (
        f'<p class="verdict">{escape(verdict(rows))}</p>\n'
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n{TABLE_NOTE}"
    )


def _cells(row: Row) -> list[str]:
    metrics = [format_metric(name, row.get(name)) for name in METRIC_TITLES]
    return [format_count(row.get("parameters")), *metrics]


def _grid(plots: Sequence[Plot] | None, group: str) -> str:
    figures = [f"<figure>{plot.svg}</figure>" for plot in plots or () if plot.group == group]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _no_plots(run_dir: Path) -> str:
    call = f"from sad.report import write_report; write_report({str(run_dir)!r})"
    commands = f"pip install '{PLOTS_EXTRA}'\npython -c {json.dumps(call)}"
    return f"<p>The plots need matplotlib. To get them:</p>\n{_preformatted(commands)}"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(_sample(sample) for sample in samples)


def _sample(sample: Mapping[str, Any]) -> str:
    prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
    return (
        f'<figure class="sample"><figcaption>{escape(str(sample.get("model", "")))}</figcaption>'
        f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre></figure>"
    )


def _loading(run_dir: Path, samples: Sequence[Mapping[str, Any]]) -> str:
    """How to use what was exported, on a line of a sample's prompt; nothing without an export."""
    exported = [name for name in ("best", "final") if (run_dir / name / "sad.json").exists()]
    if not exported:
        return ""
    notes = "".join(f"<li>{_exported(run_dir / name)}</li>" for name in exported)
    words = str(samples[0].get("prompt", "")).strip() if samples else ""
    prompt = words.rpartition("\n")[2][:40] or "The"
    code = LOADING.format(path=str(run_dir / exported[0]), prompt=prompt)
    return f"<ul>{notes}</ul>\n{_preformatted(code)}"


def _exported(path: Path) -> str:
    facts = _read_json(path / "sad.json")
    text = f"<code>{escape(str(path))}</code>"
    if {"weights", "metric", "value", "micro_step"} <= facts.keys():
        weights = "EMA weights" if facts["weights"] == "ema" else "raw weights"
        text += escape(
            f": {weights} after micro-batch {facts['micro_step']:,}, "
            f"{facts['metric']} {format_metric('', facts['value'])}"
        )
    return text


def _header(records: Sequence[Record]) -> list[tuple[str, str]]:
    starts = [record for record in records if record["kind"] == "start"]
    return [(label, text) for label, text in starts[-1].get("header", [])] if starts else []


def _warnings(records: Sequence[Record]) -> str:
    warnings = [record for record in records if record["kind"] == "warning"]
    items = (
        f"<li><time>{escape(r['time'])}</time> {escape(str(r.get('message', '')))}</li>"
        for r in warnings
    )
    return f"<ul>{''.join(items)}</ul>" if warnings else ""


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    items = (f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in pairs)
    return f"<dl>{''.join(items)}</dl>" if pairs else ""


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, v if isinstance(v, str) else json.dumps(v)) for key, v in values.items()]


def _preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""
