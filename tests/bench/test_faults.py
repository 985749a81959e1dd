"""The fault benchmark: ours are right, and rows and table report every outcome correctly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sad_kernels import reference
from torch import Tensor

from bench import faults
from bench.faults import calls, cases, interpreter, text
from bench.faults.calls import Call
from bench.faults.cases import Effort
from bench.faults.core import INTERPRETED, Fault, rows_of
from bench.faults.problem import Heads, Problem, Rows, heads
from bench.peers.base import Unsupported

SMALL = Effort(rows=4, seeds=2, vocab=2000)
PEERS = {"liger-kernel": "liger_kernel", "trl": "trl", "flash-linear-attention": "fla"}
BY_HAND = {
    "weight_gradient_in_16_bits": {"right"},
    "sharp_divergence": {"shown"},
    "minus_infinity_in_both": {"shown"},
    "leading_minus_infinity": {"right"},
    "nan_in_an_ignored_row": {"shown"},
    "fp16_loss_scale": {"right"},
}
"""The expected status of eager torch, which is always installed."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def wide_tiles(small_tiles: None) -> Iterator[None]:
    """As without a GPU in the benchmark: the narrow tiles of other tests take ten times as long."""
    with interpreter.wide_tiles() if INTERPRETED else nullcontext():
        yield


@pytest.fixture(autouse=True)
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the peers' packages, whether this environment has them or not."""

    class Absent:
        def find_spec(self, name: str, *_: Any) -> None:
            if name in PEERS.values():
                raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    for name in list(sys.modules):
        if name.partition(".")[0] in PEERS.values():
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.few(2)
@pytest.mark.parametrize("fault", cases.FAULTS, ids=lambda fault: fault.__name__)
def test_ours_is_right_and_the_absent_keep_their_rows(
    fault: Callable[[Effort], Iterator[Fault]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "FAULTS", (fault,))
    rows = faults.rows(SMALL)
    wanted = [call for each in fault(SMALL) for call in each.peers]
    assert [(row["peer"], row["call"]) for row in rows] == [(c.peer, c.call) for c in wanted]
    for row in rows:
        assert row["fault"] == fault.__name__
        assert row["ours_right"], row
        assert set(row["ours"]) == {"torch", "triton"}
        if row["package"] in PEERS:
            assert row["status"] == "absent" and row["peer_value"] is None
            assert row["reason"] == f"{row['package']} is not installed"
        else:
            assert row["status"] in ("shown", "right", "raises") and row["package"] == "torch"
    by_hand = {row["status"] for row in rows if row["peer"] == "eager"}
    assert by_hand == BY_HAND.get(fault.__name__, set())
    json.dumps(rows, allow_nan=False)


# --- Planted peers -------------------------------------------------------------------------------


def only(case: Callable[[Effort], Iterator[Fault]]) -> Fault:
    return next(iter(case(SMALL)))


def verdicts(fault: Fault, *losses: Callable[[Any], Tensor], kernels: bool = False) -> Any:
    """The fault's rows for peers with these losses."""
    peers = [Call("planted", "planted", "planted()", loss, kernels) for loss in losses]
    return rows_of(replace(fault, peers=peers))


class KeptGradient(torch.autograd.Function):
    """Planted fault: backward scales the kept gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.kept = gradient
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return ctx.kept.mul_(upstream), None


def kept(p: Rows) -> Tensor:
    logits = p.logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(calls.ce(Rows(p.labels, logits)), logits)
    return KeptGradient.apply(p.logits, gradient)  # pyright: ignore[reportReturnType]


def overwriting(p: Rows) -> Tensor:
    loss = calls.ce(Rows(p.labels, p.logits.clone()))
    p.logits.detach().zero_()
    return loss


def rounded(p: Heads) -> Tensor:
    return calls.linear_ce(p).bfloat16()


def with_logits_in_16_bits(p: Heads) -> Tensor:
    s, t = p.hidden @ p.weight.T, p.teacher_hidden @ p.teacher_weight.T
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def padded_with_zeros(p: Heads) -> Tensor:
    pads = len(p.teacher_weight) - len(p.weight)
    weight = torch.cat((p.weight, p.weight.new_zeros(pads, p.weight.shape[1])))
    return calls.linear_kl(replace(p, weight=weight))


def worse_with_chunks(p: Heads) -> Tensor:
    """Planted fault: an error of 0.01 % of dweight per chunk, too much for 64 chunks."""
    p.weight.register_hook(lambda g: g.float().mul(1 + 1e-4 * p.chunks).to(g.dtype))
    return calls.linear_ce(p)


PLANTED = [
    (cases.logits_overwritten, overwriting, math.log(500)),
    (cases.replay, kept, 3.0),
    (cases.weight_gradient_in_16_bits, worse_with_chunks, None),
    (cases.loss_in_16_bits, rounded, None),
    (cases.near_zero_divergence, with_logits_in_16_bits, None),
    (cases.padded_head, padded_with_zeros, None),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("case", "faulty", "value"), PLANTED)
def test_a_planted_fault_is_shown_and_what_is_right_is_right(
    case: Callable[[Effort], Iterator[Fault]], faulty: Any, value: float | None
) -> None:
    fault = only(case)
    row, right = verdicts(fault, faulty, fault.ours)
    assert (row["status"], row["reason"]) == ("shown", None)
    assert right["status"] == "right"
    if value is not None:
        assert row["peer_value"] == pytest.approx(value, rel=1e-4)


def test_a_peer_that_fails_has_its_reason() -> None:
    def unable(p: Problem) -> Tensor:
        raise Unsupported("has no cross-entropy")

    def failing(p: Problem) -> Tensor:
        raise RuntimeError("no such\nkernel")

    fault = only(cases.logits_overwritten)
    absent, raises = verdicts(fault, unable, failing)
    assert (absent["status"], absent["reason"]) == ("absent", "has no cross-entropy")
    assert (raises["status"], raises["reason"]) == ("raises", "RuntimeError: no such kernel")
    assert raises["peer_value"] is None and raises["ours_right"]
    if INTERPRETED:  # which may be to blame
        (row,) = verdicts(fault, failing, kernels=True)
        assert row["status"] == "absent" and row["reason"].startswith("needs a GPU")


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_a_divergence_means_the_same_to_all(beta: float) -> None:
    """The divergence that ``beta`` selects is that of a hand-written ``F.kl_div``."""
    problem = replace(heads(5, 97, 8), beta=beta).double()
    exact = calls.linear_kl(problem, library=reference)
    assert float(calls.eager_linear_kl.loss(problem)) == pytest.approx(float(exact), rel=1e-6)
    s, t = (h @ problem.weight.T for h in (problem.hidden, problem.teacher_hidden))
    of_logits = calls.kl(Rows(problem.labels, s, t, beta), library=reference)
    assert float(of_logits) == pytest.approx(float(exact), rel=1e-6)


# --- Ours, wrong ---------------------------------------------------------------------------------


def test_an_error_of_ours_is_seen() -> None:
    def wrong(p: Heads, impl: str = "", **how: Any) -> Tensor:
        return calls.linear_kl(p, **how) * (1.01 if impl == "triton" else 1.0)

    def failing(p: Heads, impl: str = "", **how: Any) -> Tensor:
        if impl == "torch":
            raise RuntimeError("out of order")
        return calls.linear_kl(p, **how)

    fault = only(cases.minus_infinity_in_both)
    for ours in (wrong, failing):
        (row,) = rows_of(replace(fault, ours=ours, peers=fault.peers[-1:]))
        assert not row["ours_right"] and row["status"] == "shown"
        assert "**wrong: " in text.table({"rows": [row]})[-1]
    assert row["ours"]["torch"] == "RuntimeError: out of order"


def test_a_fault_that_cannot_be_posed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unposed(_: Effort) -> Iterator[Fault]:
        raise MemoryError("too large")
        yield

    monkeypatch.setattr(faults, "FAULTS", (unposed, cases.logits_overwritten))
    first, *others = faults.rows(SMALL)
    assert first["fault"] == "unposed" and not first["ours_right"]
    assert first["ours"]["float64"] == "MemoryError: too large"
    assert len(others) == 3
    assert len(faults.table({"rows": [first, *others]})) == 2 + 4


# --- The table and the process -------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    return {
        "fault": "slug",
        "title": "Something | is wrong",
        "inputs": "",
        "peer": "Peer",
        "package": "peer",
        "call": "f(x)",
        "interpreted": False,
        "status": "shown",
        "reason": None,
        "peer_value": 6.2146,
        "true_value": 5.7364,
        "ours": {"torch": 5.7364, "triton": 5.7364},
        "unit": "nats",
        "ours_right": True,
    } | changes


def test_the_table_has_every_row() -> None:
    many = {"peer_value": [0.1, 0.2, 0.25, 0.3, -0.1], "true_value": [0.0] * 5}
    percent = {"unit": "relative error of dweight", "true_value": 0.0}
    rows = [
        row(),
        row(peer_value="nan", interpreted=True, ours={"torch": 5.7364, "triton": "needs a GPU"}),
        row(status="right", peer_value=15.0, true_value=14.97),
        row(status="absent", reason="peer is not installed", peer_value=None),
        row(**percent, peer_value=[0.00177, 0.193], ours={"torch": 0.0017, "triton": 0.0018}),
        row(**many, ours_right=False, ours={"torch": "ValueError: no", "triton": 1.0}),
    ]
    lines = faults.table({"rows": rows})
    assert lines == [
        "| fault | who | their value | float64 | ours |",
        "| - | - | - | - | - |",
        "| Something / is wrong (nats) | Peer, `f(x)` | **6.21** | 5.74 | 5.74 |",
        "|  | Peer, `f(x)` (interpreted) | **nan** | 5.74 | 5.74 (triton: needs a GPU) |",
        "|  | Peer, `f(x)` | 15.00 | 14.97 | 5.74 |",
        "|  | Peer, `f(x)` | absent: peer is not installed | 5.74 | 5.74 |",
        "| Something / is wrong (relative error of dweight) | Peer, `f(x)` "
        "| **0.177 % / 19.3 %** | 0 % | 0.170 % (triton: 0.180 %) |",
        "| Something / is wrong (nats) | Peer, `f(x)` | **-0.100 to 0.300** | 0 "
        "| **wrong: ValueError: no (triton: 1.00)** |",
    ]


def test_rows_come_from_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = 0

    def run(words: list[str], *, env: dict[str, str], **_: Any) -> Any:
        assert words == [sys.executable, "-m", "bench.faults"]
        assert env["TRITON_INTERPRET"] == ("0" if torch.cuda.is_available() else "1")
        said = f"a peer says hello\n{json.dumps([row()])}\n"
        return subprocess.CompletedProcess(words, ended, said, "Killed")

    monkeypatch.setattr(subprocess, "run", run)
    assert faults.measure() == {"case": "faults", "rows": [row()]}
    ended = -9
    with pytest.raises(RuntimeError, match="-9: Killed"):
        faults.measure()


def test_the_interpreter_rounds_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import triton.language as tl
    from sad_kernels._triton.tile_sizes import choose_tile
    from triton.runtime import interpreter as its

    monkeypatch.setattr(its, "_convert_float", lambda *_: "its own way")
    with interpreter.prepared():
        assert choose_tile(torch.device("cpu"), "gradient", 2000, 1).block == 2048
    x = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8], [-1.7, 3e-39]])
    bits: Any = its._convert_float(x.numpy(), tl.float32, tl.bfloat16, None)  # pyright: ignore
    assert np.array_equal(bits, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert its._convert_float(x.numpy(), tl.float32, tl.float16, None) == "its own way"  # pyright: ignore
