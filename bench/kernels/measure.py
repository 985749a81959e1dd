"""Measurement of one case: check every peer against float64, then time all of them in turn.

The peers are interleaved within each round, in reverse order every second round, so that clock
drift affects all alike. The bare products of a linear case are timed in every round; a ratio is
taken within a round, and the median over the rounds is kept. An exception ends its peer's
measurement of the case and becomes its row's reason.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.kernels import check, roofline, rss
from bench.kernels.entry import NO_TIME, Effort, Entry, Gemm, Row
from bench.kernels.rows import row_of
from bench.kernels.timing import Device, DeviceLost, Unmeasurable, host_us, one_line
from bench.peers import Unsupported, for_case
from bench.problems import oracle
from bench.problems.cases import Case, LossCase
from bench.problems.inputs import Hidden, Parameters, draw

EAGER = ("eager", "foreach lerp", "foreach")
"""Peers that are plain PyTorch: ``ratio_eager`` is over the first of them that was timed."""


def measure(
    case: Case, device: Device, effort: Effort, copy_rate: float
) -> tuple[list[Row], list[roofline.Roofline]]:
    """The result rows of a case, and the GEMM rooflines measured with it."""
    entries = [Entry(peer) for peer in for_case(case)]
    loss, gemm = None, Gemm()
    try:
        if effort.left() < 0:
            raise Unsupported(NO_TIME)
        loss, gemm = fill(case, entries, device, effort)
    except DeviceLost:
        raise
    except Exception as error:  # of the case itself: those of peers end in _guarded
        status, reason = _status_of(error)
        for entry in entries:
            entry.end(status, reason)
    device.free()
    device.finish()
    eager = next((e.full for n in EAGER for e in entries if e.peer.name == n and e.rounds), [])
    rows = [
        row_of(case, entry, copy_rate, gemm.full, eager) | {"true_loss": loss} for entry in entries
    ]
    return rows, roofline.gemm_rooflines(case, gemm.full) if isinstance(case, LossCase) else []


def fill(
    case: Case, entries: list[Entry], device: Device, effort: Effort
) -> tuple[float | None, Gemm]:
    """Fill the entries; return the float64 loss and the bare products' times."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # dynamo stops after eight recompilations of one function
    problem = draw(case, device.device)
    truth = None if isinstance(problem, Parameters) else oracle.truth_of(problem)
    loss = truth.loss if truth else None
    # First every peer alone: its results against float64, and its peak memory.
    for entry in entries:
        with _guarded(entry, device):
            absent = effort.skip_reason(entry.peer, device)
            if absent:
                raise Unsupported(absent)
            check.prepare(entry, problem, truth, device)
    truth = None  # its float64 gradients would only take memory from the timed calls
    device.free()
    gemm = Gemm(roofline.gemm_step(problem) if isinstance(problem, Hidden) else None)
    _time(entries, gemm, device, effort)
    # Graphs last: a capture that fails may leave memory unusable.
    for entry in entries:
        if entry.step is not None and effort.graphs and effort.left() > 0:
            with _guarded(entry, device):
                _graph(entry, device, effort)
        entry.step = None
    if isinstance(case, LossCase) and effort.resident:
        del problem
        for entry in entries:
            _resident(case, entry, effort)
    return loss, gemm


@contextmanager
def _guarded(entry: Entry, device: Device) -> Iterator[None]:
    """Record an exception in its entry and continue; only ``DeviceLost`` is raised further."""
    try:
        yield
    except DeviceLost:
        raise
    except Exception as error:
        entry.end(*_status_of(error))
    if entry.status == "failed":
        device.finish()
    if entry.step is not None:  # drop gradients, restore logits that were overwritten
        entry.step.prepare()
    if entry.status == "failed":
        entry.step = None
        device.free()


def _status_of(error: Exception) -> tuple[str, str]:
    """Status and reason of a row whose measurement raised."""
    if isinstance(error, Unsupported):
        return "skipped", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "failed", f"does not fit into the GPU's memory: {one_line(error)}"
    return "failed", one_line(error)


def _time(entries: list[Entry], gemm: Gemm, device: Device, effort: Effort) -> None:
    for i in range(effort.rounds):
        for entry in entries if i % 2 == 0 else reversed(entries):
            # The first round is always completed, so that every peer has a time.
            if i and effort.left() < 0:
                return
            if entry.step is not None:
                with _guarded(entry, device):
                    _round(entry, device, effort)
        if gemm.step is not None:
            try:
                times = device.time(gemm.step, effort.calls + 1)[1:]
                gemm.full.append(statistics.median(t.full for t in times))
            except torch.OutOfMemoryError:
                gemm.step = None  # without it the rows have no ratio_gemm
                device.free()


def _round(entry: Entry, device: Device, effort: Effort) -> None:
    """Time one round: more calls of a short step, fewer of a long one."""
    assert entry.step is not None
    calls = effort.calls
    if device.device.type == "cuda":
        [once] = device.time(entry.step, 1)
        longest = int(effort.round_ms / max(once.full, 0.1))
        calls = max(2, min(longest, max(calls, min(4 * calls, int(20 / max(once.full, 0.1))))))
    times = device.time(entry.step, calls)
    if entry.no_grad is not None:
        forward = check.without_grad(entry.step)
        entry.no_grad += [t.forward for t in device.time(forward, calls)]
    entry.rounds.append(times)


def _graph(entry: Entry, device: Device, effort: Effort) -> None:
    assert entry.step is not None
    try:
        entry.figures["graph_ms"] = device.graph(entry.step, effort.calls)
    except Unmeasurable as error:
        entry.figures["graph_reason"] = str(error)
    device.finish()


def _resident(case: LossCase, entry: Entry, effort: Effort) -> None:
    if not entry.rounds or effort.left() < 0:
        return
    try:
        entry.figures["rss_mib"] = rss.extra_mib(case, entry.peer.name)
    except Unmeasurable as error:
        entry.figures["rss_reason"] = str(error)


def add_host_times(rows: list[Row], cases: list[Case], device: Device, effort: Effort) -> None:
    """Add ``host_us`` to the rows: host microseconds of a call, per loss, dtype and peer.

    Ours come first, in case time runs out. Peers that compile are left out: they would have to
    compile for the tiny shape that this is measured on.
    """
    small = {(c.name, c.dtype): c.small() for c in cases if isinstance(c, LossCase)}
    wanted = {
        (row["case"], row["dtype"], row["peer"])
        for row in rows
        if row["status"] in ("ok", "wrong") and (row["case"], row["dtype"]) in small
        if not row.keys() & {"host_us", "host_reason"}  # of a run that this one continues
    }
    for name, dtype, peer_name in sorted(wanted, key=lambda key: key[2] != "ours"):
        if effort.left() < 0:
            return
        case = small[name, dtype]
        peer = next(p for p in for_case(case) if p.name == peer_name)
        if peer.compiles:
            continue
        found: Row = {}
        try:
            problem = draw(case, device.device)
            assert not isinstance(problem, Parameters)
            found["host_us"] = host_us(device, check.step_of(peer, problem))
        except Exception as error:
            found["host_reason"] = one_line(error)
            device.finish()
        for row in rows:
            if (row["case"], row["dtype"], row["peer"]) == (name, dtype, peer_name):
                row |= found
