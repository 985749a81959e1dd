"""How numbers are shown to people: formats, the progress bar, and aligned lines elsewhere.

Everything here turns records into text and writes nothing but the bar. Terminal, result table and
report share the formats: one number reads the same everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

LINES_PER_TITLE = 20
"""How many lines of numbers follow one line of column titles."""

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n:,}/{total:,} [{elapsed}<{remaining}{postfix}]"

METRIC_TITLES = {
    "perplexity": "perplexity",
    "nll": "NLL",
    "kl": "KL",
    "agreement": "agreement",
    "accuracy": "accuracy",
    "bits_per_byte": "bits/byte",
}
"""What an evaluation reports, in the order it is shown."""


def format_metric(name: str, value: float | None) -> str:
    """A metric as people read it: shares in per cent, the rest to four decimals, ``-`` for none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:f}"
    if name in ("agreement", "accuracy"):
        return f"{100 * value:.1f} %"
    if name == "perplexity":
        return (
            f"{value:,.2f}" if value < 1e4 else f"{value:,.0f}" if value < 1e8 else f"{value:.2e}"
        )
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2e}"


def format_count(value: float | None) -> str:
    """A count to three digits, with a unit prefix from 1000 on: ``950``, ``12.3k``, ``4.52M``."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:f}"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:  # below that three digits do not round up to the unit
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


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
    prefixes = list(dict.fromkeys(key.partition("/")[0] for key in record if "/" in key))
    names = [m for m in METRIC_TITLES if any(f"{prefix}/{m}" in record for prefix in prefixes)]
    width = max(map(len, prefixes), default=0)
    lines = []
    for prefix in prefixes:
        texts = [format_metric(name, record.get(f"{prefix}/{name}")) for name in names]
        cells = [f"{METRIC_TITLES[n]} {t:>7}" for n, t in zip(names, texts, strict=True)]
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


def bar_postfix(record: Mapping[str, Any]) -> str:
    """What the bar says besides its position. A narrow terminal cuts it from the right."""
    losses = " ".join(f"{cell.title} {cell.text}" for cell in _loss_cells(record))
    lr, _, rate, memory = (cell.text for cell in _state_cells(record))
    skipped = f" skipped {record['skipped']}" if record.get("skipped") else ""
    return f"{losses} lr {lr} {rate} tok/s {memory} GiB{skipped}"


class AlignedLines:
    """Train records as lines in columns; titles return now and then, or with new columns."""

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
        elapsed = time.monotonic() - self._began
        left = elapsed * (self._total - step) / max(step - self._initial, 1)
        total = f"{self._total:,}"
        return [
            _Cell("micro-batch", f"{step:,}/{total}", max(11, 2 * len(total) + 1)),
            _Cell("step", f"{record['global_step']:,}", 7),
            _Cell("epoch", f"{record['epoch']:.2f}", 6),
            *_loss_cells(record),
            *_state_cells(record),
            _Cell("elapsed", format_duration(elapsed), 8),
            _Cell("left", format_duration(left), 8),
        ]


class _Cell(NamedTuple):
    title: str
    text: str
    width: int


def _loss_cells(record: Mapping[str, Any]) -> list[_Cell]:
    """The loss and those of its parts that count; CE always: it says what the student knows."""
    weights = record.get("weights", {})
    names = dict.fromkeys(["ce", "kd", "z", *weights])
    parts = [name for name in names if name in record and (name == "ce" or weights.get(name))]
    names = ("loss", *parts)
    return [_Cell(name, format_metric(name, record[name]), max(9, len(name))) for name in names]


def _state_cells(record: Mapping[str, Any]) -> list[_Cell]:
    memory = record.get("cuda_used_bytes", record.get("rss_bytes"))
    return [
        _Cell("lr", f"{record['lr']:.2e}", 9),
        _Cell("grad norm", format_metric("grad_norm", record.get("grad_norm")), 9),
        _Cell("tok/s", format_count(record.get("tokens_per_second")), 6),
        _Cell("GiB", "-" if memory is None else f"{memory / 2**30:.2f}", 6),
    ]
