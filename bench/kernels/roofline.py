"""Measured rooflines: the time of a plain copy, and of a case's bare matrix products.

Every ratio in the results is a time over one of these, measured in the same process. The records
keep them under the key ``floors``.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels.timing import Device, Step
from bench.problems.cases import LossCase
from bench.problems.inputs import Hidden

DRIFT = 0.03
"""The relative change from start to end above which the results carry a note."""


@dataclass
class Roofline:
    """One measurement of a roofline. ``rate`` is in bytes or FLOP per second."""

    kind: str
    shape: dict[str, int]
    dtype: str
    ms: float
    rate: float
    when: str

    @property
    def record(self) -> dict[str, Any]:
        return vars(self)


def copy_roofline(device: Device, when: str, calls: int = 10) -> Roofline:
    """Memory bandwidth by a copy of 1 GiB (64 MiB on a CPU): ``2 bytes / time``."""
    size = 1 << (30 if device.device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device.device).random_()
    target = torch.empty_like(source)
    step = Step(lambda: target.copy_(source))
    device.time(step, 3 if device.device.type == "cpu" else 300)  # until clocks have risen
    ms = statistics.median(t.full for t in device.time(step, calls))
    return Roofline("copy", {"bytes": size}, "uint8", ms, 2 * size / ms * 1e3, when)


def gemm_step(problem: Hidden) -> Step:
    """The matrix products of a case, unchunked, in its dtype: logits forward, gradients backward.

    The logits stand in for their gradient, which has the same shape.
    """
    case, h, w = problem.case, problem.hidden.detach(), problem.weight.detach()
    ht, wt = problem.teacher_hidden, problem.cut_teacher_weight

    def forward() -> Any:
        if case.kind != "ce":
            _ = ht[: case.valid] @ wt.T
        return h[: case.valid] @ w.T

    def backward(g: Any) -> None:
        _ = g @ w
        _ = g.T @ h[: case.valid]

    return Step(forward, backward)


def gemm_rooflines(case: LossCase, full: list[float]) -> list[Roofline]:
    """The bare products' rate in the first and in the last round."""
    ends = ((full[0], "start"), (full[-1], "end")) if full else ()
    flops = case.flops(backward=True)
    return [
        Roofline("gemm", case.shape, case.dtype, ms, flops / ms * 1e3, when) for ms, when in ends
    ]


def drift(measured: list[Roofline]) -> float:
    """The relative change of a roofline's time from start to end."""
    return measured[-1].ms / measured[0].ms - 1
