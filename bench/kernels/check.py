"""Preparation of a peer before it is timed: build its call, check its results, measure memory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bench.kernels.entry import Entry
from bench.kernels.timing import MIB, Device, Step, loss_step, one_line
from bench.peers import Peer
from bench.problems import oracle
from bench.problems.inputs import Hidden, Logits, Parameters, Problem


def prepare(
    entry: Entry,
    problem: Problem,
    truth: oracle.Truth | None,
    device: Device,
) -> None:
    """Build the peer's call, run it once, compare with float64, and measure its peak memory.

    Fills ``entry``: the step to be timed, the errors, the first call's time, and MiB.
    """
    if isinstance(problem, Parameters):
        _prepare_average(entry, problem, device)
        return
    assert truth is not None
    step = entry.step = step_of(entry.peer, problem)
    loss = _first_call(entry, step, device)
    errors = truth.errors(loss, problem.leaves)
    entry.figures["err"] = errors
    if oracle.is_wrong(errors):
        entry.status, entry.reason = "wrong", "an error over 5 % or a number that is not finite"
    entry.figures["gradient_mib"] = _gradient_bytes(problem) / MIB
    del loss  # and with it the graph, which must not count in the peak
    step.prepare()
    entry.figures["peak_mib"] = device.peak(step) / MIB
    step.prepare()
    # Some peers do not run without gradients; the reason is then recorded.
    try:
        without_grad(step)()
        entry.no_grad = []
    except (RuntimeError, TypeError) as error:
        entry.figures["no_grad_reason"] = one_line(error)


def step_of(peer: Peer, problem: Logits | Hidden) -> Step:
    """The peer's forward and backward on the problem, as one timed step."""
    originals = [x.detach().clone() for x in problem.leaves.values()] if peer.overwrites else []
    leaves = list(problem.leaves.values())
    return loss_step(peer.build(problem), problem.upstream, leaves, originals)


def without_grad(step: Step) -> Step:
    """The forward of ``step`` under ``torch.no_grad``."""

    def forward() -> Any:
        with torch.no_grad():
            return step.forward()

    return Step(forward, prepare=step.prepare)


def _first_call(entry: Entry, step: Step, device: Device) -> Any:
    step.prepare()
    device.finish()
    start = time.perf_counter()
    result = step()
    device.finish()
    entry.figures["compile_s"] = time.perf_counter() - start
    return result


def _gradient_bytes(problem: Logits | Hidden) -> int:
    """Bytes of the gradients, without those that a peer wrote over its inputs."""
    return sum(
        x.grad.nbytes
        for x in problem.leaves.values()
        if x.grad is not None and x.grad.data_ptr() != x.data_ptr()
    )


def _prepare_average(entry: Entry, problem: Parameters, device: Device) -> None:
    average = entry.peer.build(problem)
    for i, shadow in enumerate(average.shadows):
        shadow.copy_(problem.start(i).view_as(shadow))
    step = Step(average.forward, average.backward)
    if problem.case.name == "ema/update":
        _first_call(entry, step, device)
        errors = {"shadow": oracle.ema_error(problem, average.shadows)}
    else:
        errors = _swap_errors(entry, problem, average.shadows, step, device)
    entry.figures["err"] = errors
    if oracle.is_wrong(errors):
        entry.status, entry.reason = "wrong", "an error over 5 % or a number that is not finite"
    entry.figures["peak_mib"] = device.peak(step) / MIB
    entry.step = step


def _swap_errors(
    entry: Entry, problem: Parameters, shadows: list[Tensor], step: Step, device: Device
) -> dict[str, float]:
    """Errors of the parameters while swapped in, and of parameters and shadows afterwards."""
    before = [p.clone() for p in problem.params]
    device.finish()
    start = time.perf_counter()
    result = step.forward()
    device.finish()
    entry.figures["compile_s"] = time.perf_counter() - start
    starts = (problem.start(i) for i in range(len(before)))
    inside = _worst(zip(problem.params, starts, strict=True))
    step.backward(result)
    starts = (problem.start(i) for i in range(len(before)))
    back = [
        _worst(zip(problem.params, before, strict=True)),
        _worst(zip(shadows, starts, strict=True)),
    ]
    for param, old in zip(problem.params, before, strict=True):
        param.copy_(old)
    return {"param": inside, "restored": max(back)}


def _worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return max(oracle.relative_error(x.flatten(), y.flatten()) for x, y in pairs)
