"""Scaling curves: every point or its reason, growth of memory, errors, and the largest batch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sad_kernels import cross_entropy
from sad_kernels._torch.sources import HeadSource
from torch import Tensor

from bench.kernels import curves, measure
from bench.kernels.curves import CASES, Setup, Shape, Sizes, largest
from bench.kernels.timing import MIB, Cpu, Times
from bench.peers import Peer, Unsupported, for_case
from bench.problems.cases import LossCase
from bench.problems.inputs import Hidden, draw

TINY = Setup(
    shape=Shape(12, 96, 8, 12),
    tokens=(6, 12),
    vocabularies=(64, 96),
    dtype="float32",
    chunked=Shape(16, 1024, 8, 8),
    chunks=(1, 2, 8),
    limited=Shape(0, 512, 8, 8),
    limits=(0, 1, 2),  # nothing, something and everything fits
    batches=(32, 64, 128),
    rounds=2,
    seconds=60,
)
XS = {
    "memory_tokens": TINY.tokens,
    "memory_vocab": TINY.vocabularies,
    "time_rows": TINY.tokens,
    "error_chunks": TINY.chunks,
    "largest_batch": TINY.limits,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(one_thread: None) -> dict[str, Any]:
    return curves.measure(TINY)


def effort(seconds: float = 60.0, rounds: int = 0) -> Sizes:
    return Sizes(rounds, 1, time.monotonic() + seconds, graphs=False)


def points_of(curve: dict[str, Any], peer: str) -> list[Any]:
    return next(s["points"] for s in curve["series"] if s["peer"] == peer)


def only(*names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict the curves to the named peers."""
    every = for_case(LossCase(name="linear_ce", N=1, V=1, D_s=1))
    some = tuple(peer for peer in every if peer.name in names)
    monkeypatch.setattr(curves, "for_case", lambda case: some)


def hidden(name: str, shape: Shape, dtype: str = "float32") -> Hidden:
    problem = draw(LossCase(name=name, **shape._asdict(), dtype=dtype), torch.device("cpu"))
    assert isinstance(problem, Hidden)
    return problem


# Points and reasons


@pytest.mark.slow
def test_every_series_has_every_point_or_a_reason(result: dict[str, Any]) -> None:
    assert {c["name"] for c in result["curves"]} == set(XS)
    assert result["notes"] == []
    for curve in result["curves"]:
        case = LossCase(name=curve["case"], N=1, V=1, D_s=1)
        assert [s["peer"] for s in curve["series"]] == [p.name for p in for_case(case)]
        for series in curve["series"]:
            if not series["points"]:
                assert series["reason"], (curve["name"], series)
                continue
            xs = [p["x"] if isinstance(p, dict) else p[0] for p in series["points"]]
            assert tuple(xs) == XS[curve["name"]], (curve["name"], series)
            for point in series["points"]:
                if isinstance(point, dict):
                    assert point["reason"]
                else:
                    _, y, low, high = point
                    assert 0 < low <= y <= (math.inf if high is None else high)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("case", CASES)
def test_ours_and_eager_have_what_they_can_have(result: dict[str, Any], case: str) -> None:
    for curve in (c for c in result["curves"] if c["case"] == case):
        ours, eager = points_of(curve, "ours"), points_of(curve, "eager")
        missing = 1 if curve["name"] == "largest_batch" else 0  # nothing fits 0 MiB
        assert sum(isinstance(p, dict) for p in ours) == missing, curve["name"]
        if curve["name"] == "error_chunks":
            assert isinstance(eager[0], list) and all("x" in p for p in eager[1:])
            assert all(p[1] < 0.02 for p in ours)
        else:
            assert sum(isinstance(p, dict) for p in eager) == missing, curve["name"]


def test_quantities_and_sizes_are_named(result: dict[str, Any]) -> None:
    found = {(c["name"], c["y"], c["unit"]) for c in result["curves"]}
    assert found == {
        ("memory_tokens", "peak", "MiB"),
        ("memory_vocab", "peak", "MiB"),
        ("time_rows", "time", "ms"),
        ("time_rows", "ratio", "x GEMMs"),
        ("error_chunks", "error of loss", "nats"),
        ("error_chunks", "error of dhidden", "of its norm"),
        ("error_chunks", "error of dweight", "of its norm"),
        ("largest_batch", "largest batch", "tokens"),
    }
    at = {c["name"]: c["at"] for c in result["curves"] if c["case"] == CASES[0]}
    assert at["memory_tokens"] == {"V": 96, "D_s": 8, "D_t": 12}
    assert at["memory_vocab"] == {"N": 12, "D_s": 8, "D_t": 12}
    assert at["largest_batch"] == {"V": 512, "D_s": 8, "D_t": 8}


def test_when_time_is_over_every_point_says_so() -> None:
    late = curves.measure(replace(TINY, seconds=-1.0))
    for curve in late["curves"]:
        for series in curve["series"]:
            assert not series["points"]
            assert series["reason"], series
        assert curve["series"][0]["reason"] == "no time was left"


def test_a_wrong_result_has_no_point_and_a_failure_ends_its_own_series(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def right(problem: Hidden) -> Callable[[], Tensor]:
        return lambda: cross_entropy(problem.hidden @ problem.weight.T, problem.labels)

    def wrong(problem: Hidden) -> Callable[[], Tensor]:
        return lambda: 1.1 * right(problem)()

    def failing(problem: Hidden) -> Callable[[], Tensor]:
        raise RuntimeError("no such kernel")

    peers = tuple(Peer(f.__name__, "", f) for f in (right, wrong, failing))
    monkeypatch.setattr(curves, "for_case", lambda case: peers)
    for curve in curves.against_tokens("linear_ce", TINY, Cpu(), effort(rounds=2)):
        by_peer = {s["peer"]: s for s in curve["series"]}
        assert len(by_peer["right"]["points"]) == 2
        assert "over 5 %" in by_peer["wrong"]["reason"]
        assert by_peer["failing"]["reason"] == "RuntimeError: no such kernel"


def test_ratios_are_to_the_products_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(case: Any, entries: list[Any], device: Any, effort: Any) -> Any:
        for entry in entries:
            entry.figures["peak_mib"] = 1.0
            entry.rounds = [[Times(4.0, 0.0)], [Times(20.0, 10.0)]]
        return None, measure.Gemm(full=[2.0, 10.0])

    monkeypatch.setattr(curves, "fill", fill)
    _, ms, ratio = curves.against_tokens("linear_ce", TINY, Cpu(), effort(rounds=2))
    assert points_of(ratio, "ours")[0] == [6, 2.5, 2.2, 2.8]  # of 2 and 3; 34 / 12 it is not
    assert points_of(ms, "ours")[0][1] == 17.0


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ours_keeps_to_its_formula_and_eager_grows_with_tokens_and_vocabulary(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("ours", "eager", monkeypatch=monkeypatch)
    V, D = 8192, 16
    setup = replace(TINY, shape=Shape(256, V, D, D), tokens=(256, 1024), vocabularies=(1024, V))
    memory = next(curves.against_tokens(name, setup, Cpu(), effort()))
    small, large = (y * MIB for _, y, *_ in points_of(memory, "ours"))
    for N, peak in ((256, small), (1024, large)):  # of the docstring of sad_kernels.linear
        gradients = 4 * (N * D + V * D)
        assert peak <= 1.25 * (32 << 20) + 256 * N + gradients + 4 * N * D
    eager_small, eager_large = (y * MIB for _, y, *_ in points_of(memory, "eager"))
    logits = 768 * V * 4  # that so many more tokens have
    assert eager_large - eager_small > 2.9 * logits
    assert 0 <= large - small < 0.5 * (eager_large - eager_small)

    vocab = next(curves.against_vocabulary(name, setup, Cpu(), effort()))
    low, high = (y * MIB for _, y, *_ in points_of(vocab, "eager"))
    assert high - low > 2.9 * 256 * (V - 1024) * 4


# Chunks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("N", "V", "pieces"), [
    (24, 2048, 1), (24, 2048, 2), (24, 2048, 64), (512, 2048, 2), (512, 2048, 8), (1500, 250, 2)
])  # fmt: skip
def test_the_work_is_cut_into_as_many_pieces_as_asked(
    name: str, N: int, V: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of whole rows, and tiles where whole rows do not fit."""
    problem = hidden(name, Shape(N, V, 8, 8))
    size = curves.chunk_bytes_for(problem, pieces)
    assert curves.our_pieces(problem, size) == pieces
    assert curves.our_pieces(problem, size - 1) != pieces
    loads = []

    def counting(source: HeadSource, rows: slice, columns: slice) -> None:
        if source.name == "s":
            loads.append((rows, columns))
        load(source, rows, columns)

    load = HeadSource.load
    monkeypatch.setattr(HeadSource, "load", counting)
    ours = next(peer for peer in for_case(problem.case) if peer.name == "ours")
    loss = curves.in_pieces(ours, problem, pieces)(problem)()
    assert isinstance(loss, Tensor)
    assert len(loads) == pieces  # before backward, which would make tiles once more


def test_peers_are_cut_or_say_why_not() -> None:
    problem = hidden("linear_kd/joint", Shape(64, 128, 8, 8))
    peers = {peer.name: peer for peer in for_case(problem.case)}
    assert curves.in_pieces(peers["eager"], problem, 1) is peers["eager"].build
    for name in ("eager", "trl", "liger flce 16"):
        with pytest.raises(Unsupported):
            curves.in_pieces(peers[name], problem, 4)
    with pytest.raises(Unsupported, match="no chunk_bytes makes 100000 pieces"):
        curves.chunk_bytes_for(problem, 100_000)


@pytest.mark.parametrize(("pieces", "const"), [(1, 128), (2, 64), (64, 2), (128, 1)])
def test_pieces_of_liger(pieces: int, const: int) -> None:
    """A constant c gives ceil(N / next_pow2(ceil(N / ceil(V / (c D))))) chunks."""
    problem = hidden("linear_ce", Shape(256, 1024, 8, 8))
    assert 1024 // 8 == 128
    found = curves._flce_const(problem, pieces)
    assert found <= const
    rows = math.ceil(256 / math.ceil(1024 / (found * 8)))
    assert math.ceil(256 / 2 ** math.ceil(math.log2(rows))) == pieces


# The largest batch


@pytest.mark.parametrize("threshold", [10, 63, 64, 65, 70, 100, 127, 128, 200, 511, 512, 513, 9999])
def test_the_search_finds_a_planted_step(threshold: int) -> None:
    measured: dict[int, float] = {}

    def peak_of(N: int) -> float:
        measured[N] = 1.0 if N <= threshold else 100.0
        return measured[N]

    sizes = [64, 128, 256, 512]
    fits, fails = largest(peak_of, 50, sizes, halvings=3)
    if threshold < 64:
        assert (fits, fails) == (None, 64)
    elif threshold >= 512:
        assert (fits, fails) == (512, None)
    else:
        assert fits is not None and fails is not None
        assert fits <= threshold < fails
        assert measured[fits] <= 50 < measured[fails]
        assert fails - fits == 2 ** (int(math.log2(threshold)) - 3)


def test_the_search_sees_past_sizes_that_need_more_than_larger_ones() -> None:
    """Peak memory need not grow with rows: one chunk of 511 rows needs more than two of 256."""
    fits, fails = largest(lambda N: N / max(1, N // 256), 300, [128, 256, 512, 1024], 3)
    assert (fits, fails) == (1024, None)
    assert largest(lambda N: N, 300, [128, 256, 512, 1024], 3) == (288, 320)


@pytest.mark.parametrize("peer", ["ours", "eager"])
def test_sizes_that_are_said_to_fit_were_measured_to(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[int, float] = {}

    def peak(peer: Peer, case: LossCase, device: Any) -> float:
        measured[case.N] = original(peer, case, device)
        return measured[case.N]

    original = curves._peak
    monkeypatch.setattr(curves, "_peak", peak)
    only(peer, monkeypatch=monkeypatch)
    [curve] = curves.against_limits("linear_ce", TINY, Cpu(), effort())
    points = [p for p in points_of(curve, peer) if isinstance(p, list)]
    assert points
    for limit, fits, low, fails in points:
        assert low == fits and measured[fits] <= limit
        assert fails is None or measured[fails] > limit
    assert len(measured) <= len(TINY.batches) + TINY.halvings * len(TINY.limits)


def test_a_size_that_fails_for_another_reason_is_none_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def peak(peer: Peer, case: LossCase, device: Any) -> float:
        if case.N > 64:
            raise RuntimeError("an index of 32 bits")
        return case.N / 50

    monkeypatch.setattr(curves, "_peak", peak)
    [curve] = curves.against_limits("linear_ce", TINY, Cpu(), effort())
    none, one, two = points_of(curve, "ours")
    assert none["reason"] == "32 tokens need 0.64 MiB"
    assert one == [1, 48, 48, 52]
    assert two["reason"] == "64 tokens fit; of more: RuntimeError: an index of 32 bits"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("setup", "impl"), [(curves.CPU, "torch"), (curves.GPU, "triton")])
def test_the_sizes_that_are_measured_can_be(
    setup: Setup, impl: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(b == 2 * a for a, b in zip(setup.batches, setup.batches[1:], strict=False))
    assert setup.batches[0] >> setup.halvings  # halves stay whole
    assert list(setup.limits) == sorted(setup.limits)
    monkeypatch.setattr(curves, "resolve_impl", lambda *how: impl)
    N, V, D_s, D_t = setup.chunked
    sizes = ((N, D_s), (V, D_s), (N,), (), (N, D_t), (V, D_t))
    tensors = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    problem = Hidden(curves._case(name, setup.chunked, "bfloat16"), *tensors)
    for pieces in setup.chunks:
        assert N % pieces == 0
        assert curves.our_pieces(problem, curves.chunk_bytes_for(problem, pieces)) == pieces
        if setup is curves.GPU:
            assert curves._flce_const(problem, pieces)
