"""What the hardware does with the work alone: a copy, and the bare products of a case.

Every ratio in the results is a time over one of these, measured in the same process.
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
"""Between start and end; a larger one is said in the results."""


@dataclass
class Floor:
    """A floor at one time. ``rate`` is in bytes or FLOP per second."""

    kind: str
    shape: dict[str, int]
    dtype: str
    ms: float
    rate: float
    when: str

    @property
    def record(self) -> dict[str, Any]:
        return vars(self)


def copy_floor(device: Device, when: str, calls: int = 10) -> Floor:
    """A copy of 1 GiB (64 MiB on a CPU): ``2 bytes / time``."""
    size = 1 << (30 if device.device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device.device).random_()
    target = torch.empty_like(source)
    step = Step(lambda: target.copy_(source))
    device.time(step, 3 if device.device.type == "cpu" else 300)  # until clocks have risen
    ms = statistics.median(t.full for t in device.time(step, calls))
    return Floor("copy", {"bytes": size}, "uint8", ms, 2 * size / ms * 1e3, when)


def gemm_step(problem: Hidden) -> Step:
    """The products of a case, unchunked and in its dtype: logits forward, gradients backward.

    The logits stand in for their gradient, which has the same size and no more zeros.
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


def gemm_floors(case: LossCase, full: list[float]) -> list[Floor]:
    """Of the first and of the last round."""
    ends = ((full[0], "start"), (full[-1], "end")) if full else ()
    flops = case.flops(backward=True)
    return [Floor("gemm", case.shape, case.dtype, ms, flops / ms * 1e3, when) for ms, when in ends]


def drift(floors: list[Floor]) -> float:
    """Of a floor from start to end, as a share of its start."""
    return floors[-1].ms / floors[0].ms - 1
