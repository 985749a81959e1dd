"""From what was measured to the row that is kept; see ``record.py`` for its fields."""

from __future__ import annotations

import statistics

from bench.kernels.entry import Entry, Row
from bench.kernels.timing import percentiles
from bench.problems.cases import Case, EmaCase, LossCase


def row_of(
    case: Case, entry: Entry, copy_rate: float, gemm: list[float], eager: list[float]
) -> Row:
    peer = entry.peer
    row: Row = case.record | {
        "peer": peer.name,
        "call": peer.call,
        "settings": dict(peer.settings),
        "package": peer.package,
        "status": entry.status,
        "reason": entry.reason,
    }
    if entry.rounds:
        row |= _times(entry) | _against_floor(case, entry, copy_rate, gemm)
        row["ratio_eager"] = _ratio(entry.full, eager)
    return row | entry.figures


def _times(entry: Entry) -> Row:
    times = [t for of_round in entry.rounds for t in of_round]
    ms = {
        "full": percentiles([t.full for t in times]),
        "forward": percentiles([t.forward for t in times]),
        "backward": percentiles([t.backward for t in times]),
        "no_grad": percentiles(entry.no_grad) if entry.no_grad else None,
    }
    return {"ms": ms, "calls": len(times)}


def _against_floor(case: Case, entry: Entry, copy_rate: float, gemm: list[float]) -> Row:
    """Rates at the least work, and times over those of the hardware alone."""
    full = statistics.median(entry.full)
    if isinstance(case, LossCase) and case.linear:
        found: Row = {"tflop_s": case.flops(backward=True) / full / 1e9}
        found["ratio_gemm"] = _ratio(entry.full, gemm)
        floor = statistics.median(gemm) if gemm else None
    else:
        size = case.bytes() if isinstance(case, EmaCase) else case.bytes(backward=True)
        floor = size / copy_rate * 1e3
        found = {"gb_s": size / full / 1e6, "ratio_copy": full / floor}
    graph = entry.figures.get("graph_ms")
    return found | ({"ratio_graph": graph / floor} if graph and floor else {})


def _ratio(full: list[float], other: list[float]) -> float | None:
    """The median of the rounds' ratios."""
    ratios = [a / b for a, b in zip(full, other, strict=False)]
    return statistics.median(ratios) if ratios else None
