"""Result rows made of measurements; ``record.py`` describes their fields."""

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
        row |= _times(entry) | _against_roofline(case, entry, copy_rate, gemm)
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


def _against_roofline(case: Case, entry: Entry, copy_rate: float, gemm: list[float]) -> Row:
    """Achieved rates at the least work, and times relative to the roofline's."""
    full = statistics.median(entry.full)
    if isinstance(case, LossCase) and case.linear:
        found: Row = {"tflop_s": case.flops(backward=True) / full / 1e9}
        found["ratio_gemm"] = _ratio(entry.full, gemm)
        roofline = statistics.median(gemm) if gemm else None
    else:
        size = case.bytes() if isinstance(case, EmaCase) else case.bytes(backward=True)
        roofline = size / copy_rate * 1e3
        found = {"gb_s": size / full / 1e6, "ratio_copy": full / roofline}
    graph = entry.figures.get("graph_ms")
    return found | ({"ratio_graph": graph / roofline} if graph and roofline else {})


def _ratio(full: list[float], other: list[float]) -> float | None:
    """The median over the rounds of ``full / other``."""
    ratios = [a / b for a, b in zip(full, other, strict=False)]
    return statistics.median(ratios) if ratios else None
