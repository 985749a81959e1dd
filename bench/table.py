"""Results as a text table: ratios, times, memory and errors of every peer, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

Row = dict[str, Any]


def lines(record: Row) -> Iterator[str]:
    """One table per case: ours first, then peers by time; skipped ones with their reason."""
    for title, rows in groupby(record["rows"], key=title_of):
        yield ""
        yield title
        block = list(rows)
        timed = sorted((r for r in block if r["status"] != "skipped"), key=_order)
        if timed:
            yield from _aligned(_cells(timed), [r["reason"] or "" for r in timed])
        skipped: dict[str, list[str]] = {}
        for row in block:
            if row["status"] == "skipped":
                skipped.setdefault(row["reason"], []).append(row["peer"])
        yield from (f"skipped: {', '.join(names)}: {why}" for why, names in skipped.items())
    yield ""
    yield from (f"note: {note}" for note in record.get("notes", []))


def measured(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The rows of cases that any peer has a time for, and the titles of all other cases."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(title_of(row), []).append(row)
    timed = {title for title, of in cases.items() if any(row.get("ms") for row in of)}
    kept = [row for title, of in cases.items() if title in timed for row in of]
    return kept, [title for title in cases if title not in timed]


def is_ours(peer: str) -> bool:
    """Whether a peer of this name is ``sad_kernels``: ``ours``, or a setting such as ``ours X``."""
    return peer.partition(" ")[0] == "ours"


def title_of(row: Row) -> str:
    """The case of a row in one line: loss, sizes, dtype and what differs from the defaults."""
    sizes = " ".join(f"{name}={value:,}" for name, value in row["shape"].items())
    more = []
    if row.get("ignored"):
        more.append(f"{row['ignored']:.0%} ignored")
    if row.get("upstream", 0.125) != 0.125:
        more.append(f"upstream {row['upstream']:g}")
    if row.get("options", {}).get("kl", 0.1) != 0.1:
        more.append(f"KL about {row['options']['kl']:g}")
    return ", ".join([f"{row['case']}: {sizes}", row["dtype"], *more])


def _order(row: Row) -> tuple[int, float]:
    if row["peer"] == "ours":
        return -1, 0.0
    return (0, row["ms"]["full"][1]) if row.get("ms") else (1, 0.0)


def _roofline(row: Row) -> str:
    return number(row.get("ratio_gemm") or row.get("ratio_copy"), 2)


def _full(row: Row) -> str:
    if not row.get("ms"):
        return "-"
    low, middle, high = row["ms"]["full"]
    return f"{number(middle, 3)} ({number(low, 3)}-{number(high, 3)})"


def _part(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        values = (row.get("ms") or {}).get(name)
        return number(values[1] if values else None, 3)

    return show


def _field(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: number(row.get(name), digits)


def _graph(row: Row) -> str:
    """Milliseconds of a CUDA graph's replay, or why there is none; the JSON has the details."""
    reason = row.get("graph_reason", "")
    if not reason or "graphs" in reason:
        return number(row.get("graph_ms"), 3)
    return "syncs" if reason.startswith("waits") else "fails"


def _rate(row: Row) -> str:
    if "tflop_s" in row:
        return f"{number(row['tflop_s'], 3)} TFLOP/s"
    return f"{number(row['gb_s'], 3)} GB/s" if "gb_s" in row else "-"


def errors(row: Row) -> str:
    """Relative errors of the loss and of each gradient against float64."""
    found = {k: v for k, v in (row.get("err") or {}).items() if k != "loss"}
    return " ".join(f"{k.removesuffix('_relative')} {_percent(v)}" for k, v in found.items()) or "-"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("peer", lambda row: row["peer"]),
    ("x roofline", _roofline),
    ("x eager", _field("ratio_eager", 2)),
    ("ms (p20-p80)", _full),
    ("forward", _part("forward")),
    ("backward", _part("backward")),
    ("no grad", _part("no_grad")),
    ("graph", _graph),
    ("x roofline", _field("ratio_graph", 2)),
    ("host us", _field("host_us", 3)),
    ("first s", _field("compile_s", 2)),
    ("rate", _rate),
    ("MiB", _field("peak_mib", 4)),
    ("RSS MiB", _field("rss_mib", 4)),
    ("gradients", _field("gradient_mib", 4)),
    ("errors", errors),
    ("status", lambda row: row["status"]),
)


def number(value: float | str | None, digits: int) -> str:
    """With so many significant digits; ``-`` for None, and texts such as ``nan`` as they are."""
    if value is None:
        return "-"
    if isinstance(value, str):  # not a number
        return value
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value else "0"


def _percent(value: float | str) -> str:
    return value if isinstance(value, str) else f"{100 * value:.2g}%"


def _cells(rows: list[Row]) -> list[list[str]]:
    """The table's header and rows, without columns that are empty everywhere."""
    columns = [[name, *(show(row) for row in rows)] for name, show in COLUMNS]
    columns = [column for column in columns if set(column[1:]) != {"-"}]
    return [list(line) for line in zip(*columns, strict=True)]


def _aligned(cells: list[list[str]], remarks: list[str]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row, remark in zip(cells, ["", *remarks], strict=True):
        first, *rest = row
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([*padded, remark or ""]).rstrip()
