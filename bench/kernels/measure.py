"""One case: draw its tensors, check every peer against float64, then time all of them in turn.

Rounds are interleaved, every second one in reverse, so that a clock that drifts drifts for all. The
bare products of a linear case take part in every round; ratios are those of a round, and the median
of the rounds is kept. An exception ends its peer's part in the case and becomes its row's reason.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.kernels import check, floors, rss
from bench.kernels.entry import Effort, Entry, Gemm, Row
from bench.kernels.rows import row_of
from bench.kernels.timing import Device, Lost, Unfit, host_us, one_line
from bench.peers import Unable, for_case
from bench.problems import oracle
from bench.problems.cases import Case, LossCase
from bench.problems.inputs import Hidden, Parameters, draw


def measure(
    case: Case, device: Device, effort: Effort, copy_rate: float
) -> tuple[list[Row], list[floors.Floor]]:
    """The rows of a case, and the floors of its own that were measured with it."""
    entries = [Entry(peer) for peer in for_case(case)]
    loss, gemm = None, Gemm()
    try:
        if effort.left() < 0:
            raise Unable("no time was left")
        loss, gemm = fill(case, entries, device, effort)
    except Lost:
        raise
    except Exception as error:  # peers' own do not get here
        status, reason = _verdict(error)
        for entry in entries:
            entry.end(status, reason)
    device.free()
    device.finish()
    eager = next((e.full for e in entries if e.peer.name == "eager"), [])
    rows = [
        row_of(case, entry, copy_rate, gemm.full, eager) | {"true_loss": loss} for entry in entries
    ]
    return rows, floors.gemm_floors(case, gemm.full) if isinstance(case, LossCase) else []


def fill(
    case: Case, entries: list[Entry], device: Device, effort: Effort
) -> tuple[float | None, Gemm]:
    """Fill the entries; return the true loss and the bare products' times."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it gives up on a function that it has compiled for eight shapes
    problem = draw(case, device.device)
    truth = None if isinstance(problem, Parameters) else oracle.truth_of(problem)
    loss = truth.loss if truth else None
    for entry in entries:
        with _guarded(entry, device):
            absent = effort.leaves_out(entry.peer, device)
            if absent:
                raise Unable(absent)
            check.prepare(entry, problem, truth, device)
    truth = None
    device.free()
    gemm = Gemm(floors.gemm_step(problem) if isinstance(problem, Hidden) else None)
    _time(entries, gemm, device, effort)
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
    """Let an action fail for its entry alone. ``Lost`` goes through: no entry can go on then."""
    try:
        yield
    except Lost:
        raise
    except Exception as error:
        entry.end(*_verdict(error))
    if entry.status == "failed":
        device.finish()
    if entry.step is not None:  # gradients go, and logits that were overwritten come back
        entry.step.prepare()
    if entry.status == "failed":
        entry.step = None
        device.free()


def _verdict(error: Exception) -> tuple[str, str]:
    """Status and reason of a row that ended with an exception."""
    if isinstance(error, Unable):
        return "skipped", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "failed", f"does not fit into the GPU's memory: {one_line(error)}"
    return "failed", one_line(error)


def _time(entries: list[Entry], gemm: Gemm, device: Device, effort: Effort) -> None:
    for i in range(effort.rounds):
        for entry in entries if i % 2 == 0 else reversed(entries):
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
                gemm.step = None  # no ratios then
                device.free()


def _round(entry: Entry, device: Device, effort: Effort) -> None:
    """Warm up, then time as many calls as the effort asks for: more short ones, fewer long ones."""
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
    except Unfit as error:
        entry.figures["graph_reason"] = str(error)
    device.finish()


def _resident(case: LossCase, entry: Entry, effort: Effort) -> None:
    if not entry.rounds or effort.left() < 0:
        return
    try:
        entry.figures["rss_mib"] = rss.extra_mib(case, entry.peer.name)
    except Unfit as error:
        entry.figures["rss_reason"] = str(error)


def add_host_times(rows: list[Row], cases: list[Case], device: Device, effort: Effort) -> None:
    """Host microseconds of a call, one for each loss, dtype and peer; ours first if time is short.

    Peers that compile are left out: they would compile anew for a shape that nobody wants.
    """
    small = {(c.name, c.dtype): c.small() for c in cases if isinstance(c, LossCase)}
    wanted = {
        (row["case"], row["dtype"], row["peer"])
        for row in rows
        if row["status"] in ("ok", "wrong") and (row["case"], row["dtype"]) in small
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
