"""Scaling curves: memory, time and error by tokens, vocabulary and chunks; the largest batch.

Measured are the joint CE and KD loss of hidden states and the linear cross-entropy, ours and every
peer's. A table shows one shape; a curve shows which peer keeps ``N V`` numbers, from which size on
that matters, and what many chunks cost in accuracy.

``memory_tokens``, ``memory_vocab``: MiB at the peak of forward and backward beyond the inputs.
``time_rows``: milliseconds of forward and backward, and their ratio to the bare GEMMs of the case
in the same round; rounds as in ``measure.py``. ``low``, ``high``: the 20th and 80th percentile.
``error_chunks``: error of bfloat16 inputs against float64, by the number of chunks: of rows, and in
our CPU path of the vocabulary.
``largest_batch``: the most tokens whose peak was measured to fit a limit (also ``low``), and as
``high`` the fewest beyond them measured not to fit, or null if nothing larger was tried. The gap
between both is ``2 ** -halvings`` of that between two of ``batches``.

A curve is one quantity of one case: ``name`` (curves of one name share a figure), ``case``,
``dtype``, ``at`` (the fixed sizes), ``x`` in ``x_unit``, ``y`` in ``unit``, and ``series``, one for
every peer. A point is ``[x, y, low, high]``, or ``{x, reason}``; a series without any has a
``reason``. ``notes`` hold the exceptions that ended a part.
"""

from __future__ import annotations

import bisect
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from sad_kernels import Head, TeacherHidden, linear
from sad_kernels._dispatch import resolve_impl
from sad_kernels._rows import LossSpec
from sad_kernels._tiles import TileShape, chunk_rows, cut
from sad_kernels._torch.linear import pieces_of
from sad_kernels._torch.problem import head_input
from torch import Tensor

from bench.kernels import check
from bench.kernels import run as kernels
from bench.kernels.entry import NO_TIME, Effort, Entry
from bench.kernels.measure import fill
from bench.kernels.timing import MIB, Device, one_line, percentiles
from bench.peers import Peer, Unsupported, for_case, liger, torch_linear
from bench.problems import oracle
from bench.problems.cases import LossCase
from bench.problems.inputs import Hidden, draw

CASES = ("linear_kd/joint", "linear_ce")
X = {
    "N": ("tokens", "rows"),
    "V": ("vocabulary", "entries"),
    "chunks": ("chunks", "pieces"),
    "limit": ("memory limit", "MiB"),
}

Curve = dict[str, Any]
Point = list[float | None] | dict[str, Any]
Points = dict[str, list[Point]]  # by peer
Measured = tuple[LossCase, list[Entry], list[float]]  # and ms of the bare products, by round
Build = Callable[[Hidden], Callable[[], Tensor]]


class Shape(NamedTuple):
    N: int
    V: int
    D_s: int
    D_t: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes and effort of a run. A curve replaces one size of its shape by the values it varies."""

    shape: Shape  # of memory and time
    tokens: tuple[int, ...]
    vocabularies: tuple[int, ...]
    dtype: str
    chunked: Shape  # of errors
    chunks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    limited: Shape  # of the largest batch
    limits: tuple[int, ...]  # MiB
    batches: tuple[int, ...]  # tokens, doubling
    halvings: int = 3  # bisection steps between two batches
    rounds: int = 5
    calls: int = 1
    round_ms: float = 300  # on a GPU: the longest round of one peer, but two calls at least
    seconds: float  # later points get a reason instead of a number


CPU = Setup(
    shape=Shape(256, 32768, 128, 256),
    tokens=(64, 128, 256, 512, 1024),
    vocabularies=(4096, 8192, 16384, 32768, 65536),
    dtype="float32",
    chunked=Shape(1024, 8192, 128, 256),
    limited=Shape(0, 16384, 64, 128),
    limits=tuple(2**i for i in range(6, 12)),
    batches=tuple(2**i for i in range(6, 14)),
    seconds=600,
)
GPU = Setup(
    shape=Shape(4096, 151936, 1024, 4096),
    tokens=(512, 1024, 2048, 4096, 8192, 16384),
    vocabularies=(32000, 50257, 100352, 151936, 262144),
    dtype="bfloat16",
    chunked=Shape(8192, 65536, 512, 1024),
    limited=Shape(0, 151936, 1024, 4096),
    limits=tuple(2**i for i in range(10, 17)),
    batches=tuple(2**i for i in range(9, 18)),
    calls=5,
    seconds=480,
)


class Sizes(Effort):
    """The effort of a curve: peers that would compile for every size are skipped."""

    def skip_reason(self, peer: Peer, device: Device) -> str | None:
        late = "compiles anew for every size" if peer.compiles else None
        return super().skip_reason(peer, device) or late


def measure(setup: Setup | None = None) -> dict[str, Any]:
    """Measure every curve, with the GPU's setup if there is a GPU, else the CPU's."""
    device = kernels.device_for(None)
    setup = setup or (GPU if device.device.type == "cuda" else CPU)
    end = time.monotonic() + setup.seconds
    effort = Sizes(setup.rounds, setup.calls, end, round_ms=setup.round_ms, graphs=False)
    parts = (against_tokens, against_vocabulary, against_chunks, against_limits)
    curves: list[Curve] = []
    notes: list[str] = []
    for part, name in itertools.product(parts, CASES):
        try:
            curves += part(name, setup, device, effort)
        except Exception as error:  # such as a lost GPU: the curves so far are kept
            notes.append(f"{name} {part.__name__}: {one_line(error)}")
    return {"case": "curves", "setup": asdict(setup), "curves": curves, "notes": notes}


# --- Memory and time -----------------------------------------------------------------------------


def against_tokens(name: str, setup: Setup, device: Device, effort: Effort) -> Iterator[Curve]:
    cases = [_case(name, setup.shape._replace(N=N), setup.dtype) for N in setup.tokens]
    measured = [_measured(case, device, effort) for case in cases]
    yield _curve("memory_tokens", cases[0], "N", "peak", "MiB", _points(measured, "N", _memory))
    yield _curve("time_rows", cases[0], "N", "time", "ms", _points(measured, "N", _time))
    yield _curve("time_rows", cases[0], "N", "ratio", "x GEMMs", _points(measured, "N", _ratio))


def against_vocabulary(name: str, setup: Setup, device: Device, effort: Effort) -> Iterator[Curve]:
    cases = [_case(name, setup.shape._replace(V=V), setup.dtype) for V in setup.vocabularies]
    measured = [_measured(case, device, replace(effort, rounds=0)) for case in cases]
    yield _curve("memory_vocab", cases[0], "V", "peak", "MiB", _points(measured, "V", _memory))


def _case(name: str, shape: Shape, dtype: str) -> LossCase:
    return LossCase(name=name, **shape._asdict(), dtype=dtype)


def _measured(case: LossCase, device: Device, effort: Effort) -> Measured:
    entries, gemm = [Entry(peer) for peer in for_case(case)], []
    print(f"{case.name} {case.shape}: {effort.left():.0f} s left", flush=True)
    try:
        if effort.left() < 0:
            raise Unsupported(NO_TIME)
        device.free()
        gc.freeze()  # later collections need not scan the peers' modules
        gemm = fill(case, entries, device, effort)[1].full
    except Exception as error:  # of the case or the GPU; fill() catches those of a peer
        for entry in entries:
            entry.end("failed", _reason(error))
    return case, entries, gemm


def _memory(entry: Entry, gemm: list[float]) -> Sequence[float]:
    return [entry.figures["peak_mib"]] * 3


def _time(entry: Entry, gemm: list[float]) -> Sequence[float]:
    return percentiles([t.full for times in entry.rounds for t in times]) if entry.rounds else ()


def _ratio(entry: Entry, gemm: list[float]) -> Sequence[float]:
    """Percentiles of the ratio to the bare products of the same round."""
    ratios = [a / b for a, b in zip(entry.full, gemm, strict=False)]
    return percentiles(ratios) if ratios else ()


def _points(
    measured: Iterable[Measured], x: str, of: Callable[[Entry, list[float]], Sequence[float]]
) -> Points:
    """Points by peer. ``of`` returns low, middle and high, or nothing; failures become reasons."""
    found: Points = {}
    for case, entries, gemm in measured:
        at = case.shape[x]
        for entry in entries:
            # A wrong or failed result has a reason, and its numbers are not shown.
            values = () if entry.reason else of(entry, gemm)
            low, y, high = values or (None, None, None)
            point: Point = [at, y, low, high]
            if y is None:
                point = {"x": at, "reason": entry.reason or "was not measured"}
            found.setdefault(entry.peer.name, []).append(point)
    return found


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Unsupported) else one_line(error)


# --- Errors --------------------------------------------------------------------------------------


def against_chunks(name: str, setup: Setup, device: Device, effort: Effort) -> Iterator[Curve]:
    case = _case(name, setup.chunked, "bfloat16")
    device.free()
    problem = draw(case, device.device)
    assert isinstance(problem, Hidden)
    truth = oracle.truth_of(problem)
    units = {"loss": "nats", "dhidden": "of its norm", "dweight": "of its norm"}
    found: dict[str, Points] = {quantity: {} for quantity in units}
    for peer in for_case(case):
        for pieces in setup.chunks:
            errors = _errors(peer, problem, truth, pieces, effort.skip_reason(peer, device))
            for quantity, points in found.items():
                point: Point = {"x": pieces, "reason": errors}
                if not isinstance(errors, str):
                    point = [pieces, *[errors[quantity]] * 3]
                points.setdefault(peer.name, []).append(point)
    for quantity, unit in units.items():
        yield _curve("error_chunks", case, "chunks", f"error of {quantity}", unit, found[quantity])


def _errors(
    peer: Peer, problem: Hidden, truth: oracle.Truth, pieces: int, absent: str | None
) -> dict[str, float] | str:
    """A peer's errors with its work in ``pieces`` chunks, or the reason why there are none."""
    try:
        if absent:
            raise Unsupported(absent)
        step = check.step_of(replace(peer, build=in_pieces(peer, problem, pieces)), problem)
        step.prepare()
        errors = truth.errors(step(), problem.leaves)
        step.prepare()
    except Exception as error:
        return _reason(error)
    return errors if all(map(math.isfinite, errors.values())) else "not finite"


def in_pieces(peer: Peer, problem: Hidden, pieces: int) -> Build:
    """The peer's call with its work in ``pieces`` chunks; ``Unsupported`` if that cannot be set."""
    rows = problem.case.N // pieces
    match peer.name:
        case "ours":
            return functools.partial(_ours, chunk_bytes=chunk_bytes_for(problem, pieces))
        case "eager" if pieces == 1:
            return peer.build
        case "eager":
            raise Unsupported("keeps all logits at once")
        case "liger chunked":
            return liger.chunked(compiled=False, chunk_size=rows)
        case "liger flce":
            return liger.linear_ce(chunk_mem_const=_flce_const(problem, pieces))
        case "liger flce fp32":
            const = _flce_const(problem, pieces)
            return liger.linear_ce(chunk_mem_const=const, accum_dtype=torch.float32)
        case "torch chunked":
            return torch_linear.of_labels(batch_chunk_size=rows, chunking_method=None)
        case _:
            raise Unsupported("is called with one size of chunks")


def _ours(problem: Hidden, chunk_bytes: int) -> Callable[[], Tensor]:
    case, h, w, labels = problem.case, problem.hidden, problem.weight, problem.labels
    if case.kind == "ce":
        return lambda: linear.linear_cross_entropy(h, w, labels, chunk_bytes=chunk_bytes)
    teacher = TeacherHidden(problem.teacher_hidden, Head(problem.teacher_weight))
    arguments = h, Head(w), labels, teacher, case.objective
    return lambda: linear.linear_distill_loss(*arguments, chunk_bytes=chunk_bytes).loss


def chunk_bytes_for(problem: Hidden, pieces: int) -> int:
    """The smallest ``chunk_bytes`` with which ours works in ``pieces`` chunks or tiles."""
    sizes = range(1 << 40)
    for count in (our_chunks, our_tiles):  # each falls with the size
        size = bisect.bisect_left(sizes, -pieces, lo=1, key=lambda size: -count(problem, size))
        if our_pieces(problem, size) == pieces:
            return size
    raise Unsupported(f"no chunk_bytes makes {pieces} pieces")


def our_pieces(problem: Hidden, chunk_bytes: int) -> int:
    """Number of pieces of ours: chunks of rows, or on a CPU tiles where whole rows do not fit."""
    chunks = our_chunks(problem, chunk_bytes)
    return chunks if chunks <= problem.case.N else our_tiles(problem, chunk_bytes)


def our_chunks(problem: Hidden, chunk_bytes: int) -> int:
    """Number of chunks of whole rows; more than there are rows where too few fit."""
    case, h = problem.case, problem.hidden.detach()
    if resolve_impl("auto", h) == "triton":
        sides = 1 + (case.kind != "ce")
        sizes = chunk_rows(case.V, sides, h.element_size(), chunk_bytes)
        return len(cut(case.N, sizes.gradient))
    rows, _ = _cpu_pieces(problem, chunk_bytes)
    return len(cut(case.N, rows)) if rows else case.N + 1


def our_tiles(problem: Hidden, chunk_bytes: int) -> int:
    """Number of tiles of vocabulary and rows on a CPU."""
    case, (_, tile) = problem.case, _cpu_pieces(problem, chunk_bytes)
    return len(cut(case.N, tile.rows)) * len(cut(case.V, tile.columns))


def _cpu_pieces(problem: Hidden, chunk_bytes: int) -> tuple[int, TileShape]:
    case, h = problem.case, problem.hidden.detach()
    joint = case.kind != "ce"
    student = head_input(h, Head(problem.weight))
    teacher = head_input(problem.teacher_hidden, Head(problem.teacher_weight)) if joint else None
    spec = LossSpec(case.objective, case.V, -100, compute_ce=True, compute_metrics=joint)
    return pieces_of(spec, student, teacher, chunk_bytes)


def _flce_const(problem: Hidden, pieces: int) -> int:
    """``chunk_mem_const`` for so many chunks, by the rule of Liger 0.8.5
    (liger_kernel/ops/fused_linear_cross_entropy.py).
    """
    N, V, D = problem.case.N, problem.case.V, problem.case.D_s
    for const in range(1, V // D + 2):
        rows = -(-N // -(-V // (const * D)))
        if -(-N // min(N, 1 << (rows - 1).bit_length())) == pieces:
            return const
    raise Unsupported(f"no chunk_mem_const makes {pieces} pieces")


# --- The largest batch ---------------------------------------------------------------------------


def against_limits(name: str, setup: Setup, device: Device, effort: Effort) -> Iterator[Curve]:
    case = _case(name, setup.limited, setup.dtype)
    points = {
        peer.name: list(_largest_batches(peer, case, setup, device, effort))
        for peer in for_case(case)
    }
    yield _curve("largest_batch", case, "limit", "largest batch", "tokens", points)


def _largest_batches(
    peer: Peer, case: LossCase, setup: Setup, device: Device, effort: Effort
) -> Iterator[Point]:
    @functools.cache
    def peak_of(N: int) -> float:
        absent = effort.skip_reason(peer, device)
        if absent:
            raise Unsupported(absent)
        return _peak(peer, replace(case, N=N), device)

    tried: list[int] = []
    end = None
    try:
        for N in setup.batches:
            peak = peak_of(N)
            tried.append(N)
            if peak > max(setup.limits):
                break
    except Exception as error:
        end = _reason(error)
    for limit in setup.limits:
        yield _largest_batch(peak_of, limit, tried, setup.halvings, end)


def _largest_batch(
    peak_of: Callable[[int], float], limit: int, tried: list[int], halvings: int, end: str | None
) -> Point:
    """The point of one limit. ``end`` is the reason why no batch beyond ``tried`` was measured."""
    if not tried:
        return {"x": limit, "reason": end}
    try:
        fits, fails = largest(peak_of, limit, tried, halvings)
    except Exception as error:
        return {"x": limit, "reason": _reason(error)}
    if fits is None:
        return {"x": limit, "reason": f"{tried[0]} tokens need {peak_of(tried[0]):.3g} MiB"}
    if fails is None and end:
        return {"x": limit, "reason": f"{fits} tokens fit; of more: {end}"}
    return [limit, fits, fits, fails]


def largest(
    peak_of: Callable[[int], float], limit: float, sizes: Sequence[int], halvings: int
) -> tuple[int | None, int | None]:
    """The most tokens measured to fit, and the fewest beyond them measured not to, if any were.

    All ``sizes`` are checked before bisecting above the largest that fits: peak memory need not
    grow with tokens, since a peer with fixed chunks may need more for 1.9 of them than for two.
    """
    fits = max((N for N in sizes if peak_of(N) <= limit), default=None)
    if fits is None:
        return None, sizes[0]
    fails = min((N for N in sizes if N > fits), default=None)
    if fails is not None:
        for _ in range(halvings):
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if peak_of(middle) <= limit else (fits, middle)
    return fits, fails


def _peak(peer: Peer, case: LossCase, device: Device) -> float:
    """Peak MiB beyond the inputs; infinite if the device runs out of memory."""
    device.free()
    try:
        problem = draw(case, device.device)
        assert isinstance(problem, Hidden)
        step = check.step_of(peer, problem)
        if device.device.type == "cuda":
            step.prepare()
            step()  # autotuning, and buffers that later calls keep
        return device.peak(step) / MIB
    except torch.OutOfMemoryError:
        return math.inf


# --- The JSON ------------------------------------------------------------------------------------


def _curve(name: str, case: LossCase, x: str, y: str, unit: str, points: Points) -> Curve:
    label, x_unit = X[x]
    varies = "N" if x == "limit" else x
    peers = {peer.name: peer for peer in for_case(case)}
    return {
        "name": name,
        "case": case.name,
        "dtype": case.dtype,
        "at": {size: value for size, value in case.shape.items() if size != varies},
        "x": label,
        "x_unit": x_unit,
        "y": y,
        "unit": unit,
        "series": [_series(peers[name], of_peer) for name, of_peer in points.items()],
    }


def _series(peer: Peer, points: list[Point]) -> dict[str, Any]:
    series: dict[str, Any] = {"peer": peer.name, "package": peer.package}
    reasons = {p["reason"] if isinstance(p, dict) else None for p in points}
    if len(reasons) == 1 and None not in reasons:
        return series | {"points": [], "reason": reasons.pop()}
    return series | {"points": [p if isinstance(p, dict) else _rounded(p) for p in points]}


def _rounded(point: list[float | None]) -> list[float | None]:
    return [float(f"{v:.5g}") if isinstance(v, float) else v for v in point]
