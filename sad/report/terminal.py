"""Records as text for the terminal: the progress bar, or aligned lines where there is no terminal.

Which metrics are shown, under which titles and in which format, is said by ``sad.metrics``, for the
report as well: a number reads the same everywhere. Nothing here writes anything but the bar.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO, TypeVar

from tqdm import tqdm

from sad.metrics import Metric, format_metric, in_order, is_number

T = TypeVar("T")

LINES_PER_TITLE = 20
"""How many lines of numbers follow one line of column titles."""

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n:,}/{total:,} [{elapsed}<{remaining}{postfix}]"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``0:03:12``."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def aligned_pairs(lines: Sequence[tuple[str, str]]) -> str:
    """Labels in one column, texts in the next; further lines of a text are indented to it."""
    width = max((len(label) for label, _ in lines), default=0) + 2
    indent = "\n" + " " * width
    return "\n".join(label.ljust(width) + text.replace("\n", indent) for label, text in lines)


def evaluation_lines(record: Mapping[str, Any]) -> str:
    """One line of aligned metrics per set of weights that was scored: raw, EMA, teacher."""
    scored: dict[str, None] = {}
    recorded: set[str] = set()
    for key in record:
        prefix, slash, name = key.partition("/")
        if slash:
            scored[prefix] = None
            recorded.add(name)
    shown = [row for row in in_order(recorded) if row.eval_line]
    width = max(map(len, scored), default=0)
    lines = []
    for prefix in scored:
        texts = (format_metric(row.name, record.get(f"{prefix}/{row.name}")) for row in shown)
        cells = [f"{row.title} {text:>7}" for row, text in zip(shown, texts, strict=True)]
        where = f"{prefix.ljust(width)} at micro-batch {record['micro_step']:,}"
        lines.append(f"{where}: {'  '.join(cells)}")
    return "\n".join(lines)


def progress_bar(name: str, total: int, initial: int, stream: TextIO) -> tqdm:
    """The bar over the micro-batches of the whole run, ``initial`` of them already done."""
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        file=stream,
        dynamic_ncols=True,
        mininterval=0.2,
        bar_format=BAR_FORMAT,
    )


def waiting_bar(items: Sequence[T], desc: str, delay: float = 1.0) -> Iterable[T]:
    """``items`` with a bar on standard error, if that is a terminal, after ``delay`` seconds.

    The bar goes when they have passed.
    """
    return tqdm(items, desc=desc, leave=False, disable=None, delay=delay)


def bar_postfix(record: Mapping[str, Any]) -> str:
    """What the bar says besides its position. A narrow terminal cuts it from the right."""
    weights = record.get("weights", {})
    texts = []
    for row in _train_metrics(record, lambda row: row.bar or row.loss_term or row.name in weights):
        value = record[row.name]
        if value != row.neutral:
            template = row.bar or f"{row.title} {{}}"
            texts.append(template.format(format_metric(row.name, value)))
    return " ".join(texts)


class AlignedLines:
    """Train records as lines in columns; titles come again now and then, and with new columns."""

    def __init__(self, total: int, initial: int) -> None:
        self._total = total
        self._initial = initial
        self._began = time.monotonic()
        self._titles = ""
        self._since_titles = 0

    def lines(self, record: Mapping[str, Any]) -> Iterator[str]:
        cells = self._cells(record)
        titles = " ".join(cell.title.rjust(cell.width) for cell in cells)
        if titles != self._titles or self._since_titles == LINES_PER_TITLE:
            self._titles, self._since_titles = titles, 0
            yield titles
        self._since_titles += 1
        yield " ".join(cell.text.rjust(cell.width) for cell in cells)

    def _cells(self, record: Mapping[str, Any]) -> list[_Cell]:
        step = record["micro_step"]
        # The rate is that of this process: what was done before it resumed took other time.
        elapsed = time.monotonic() - self._began
        left = elapsed * (self._total - step) / max(step - self._initial, 1)
        total = f"{self._total:,}"
        return [
            _Cell("micro-batch", f"{step:,}/{total}", max(11, 2 * len(total) + 1)),
            _Cell("step", f"{record['global_step']:,}", 7),
            _Cell("epoch", f"{record['epoch']:.2f}", 6),
            *_metric_cells(record),
            _Cell("elapsed", format_duration(elapsed), 8),
            _Cell("left", format_duration(left), 8),
        ]


class _Cell(NamedTuple):
    title: str
    text: str
    width: int


def _metric_cells(record: Mapping[str, Any]) -> list[_Cell]:
    return [
        _Cell(row.title, format_metric(row.name, record[row.name]), max(row.width, len(row.title)))
        for row in _train_metrics(record, lambda row: row.train_line)
    ]


def _train_metrics(
    record: Mapping[str, Any], wanted: Callable[[Metric], object]
) -> Iterator[Metric]:
    """The wanted metrics of a train record, of those with one title the first.

    The loss and its terms come before the rest. A term needs a weight to be shown, but for CE: it
    says what the student knows.
    """
    weights = record.get("weights", {})

    def is_part_of_loss(row: Metric) -> bool:
        return row.name == "loss" or row.loss_term or row.name in weights

    recorded = in_order({key for key, value in record.items() if is_number(value)})
    seen = set()
    for row in sorted(recorded, key=is_part_of_loss, reverse=True):  # stable, also in reverse
        is_term = is_part_of_loss(row) and row.name != "loss"
        weighted = row.name == "ce" or bool(weights.get(row.name))
        if wanted(row) and row.title not in seen and (weighted or not is_term):
            seen.add(row.title)
            yield row
