"""``linear_distill_loss`` against naive autograd: joint CE and forward KL, forward and backward.

Naive is what a training loop writes by hand: both models' logits whole, ``log_softmax`` of each in
fp32, ``cross_entropy`` and ``kl_div``. Both get the same inputs and take turns in one process; the
result is the median over the rounds of the ratio within a round. Memory is the peak that torch's
allocator has alive beyond the inputs, summed over its own allocation events, so that no temporary
is missed and earlier peaks do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sad_kernels import Head, Objective, TeacherHidden, linear_distill_loss
from sad_kernels._torch.scratch import release_scratch
from torch import Tensor

from bench.kernels.timing import peak_bytes

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0, label_smoothing=0.1)
DTYPES = (torch.float32, torch.bfloat16)


class Problem(NamedTuple):
    """Hidden states and heads of both models, and labels. The student's tensors need gradients."""

    hidden: Tensor  # [N, D_s]
    weight: Tensor  # [V, D_s]
    teacher_hidden: Tensor  # [N, D_t]
    teacher_weight: Tensor  # [V, D_t]
    labels: Tensor  # [N]


def measure(N: int = 512, D_s: int = 256, D_t: int = 512, V: int = 128256, rounds: int = 5) -> Any:
    """Seconds and peak bytes of both losses, and their ratios, for each dtype."""
    shape = {"N": N, "D_s": D_s, "D_t": D_t, "V": V}
    rows = [_measure(_problem(N, D_s, D_t, V, dtype), rounds) for dtype in DTYPES]
    return {"shape": shape, "objective": vars(OBJECTIVE), "rounds": rounds, "rows": rows}


def _problem(N: int, D_s: int, D_t: int, V: int, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(scale).to(dtype)

    return Problem(
        normal(N, D_s).requires_grad_(),
        normal(V, D_s, D_s**-0.5).requires_grad_(),
        normal(N, D_t),
        normal(V, D_t, D_t**-0.5),
        torch.randint(V, (N,), generator=generator),
    )


def _measure(problem: Problem, rounds: int) -> dict[str, Any]:
    ways = {"naive": naive, "ours": ours}
    losses = {name: float(_step(way, problem)) for name, way in ways.items()}  # warm up
    steps: dict[str, Callable[[], Any]] = {
        name: lambda way=way: _step(way, problem) for name, way in ways.items()
    }
    steps["products"] = bare_products(problem)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    ratios, products = (
        [a / b for a, b in zip(seconds[name], seconds["naive"], strict=True)]
        for name in ("ours", "products")
    )
    memory = {name: _peak_bytes(way, problem) for name, way in ways.items()}
    return {
        "dtype": str(problem.hidden.dtype).removeprefix("torch."),
        "loss": losses,
        "seconds": seconds,
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "products_ratio": statistics.median(products),
        "extra_bytes": memory,
        "memory_ratio": memory["ours"] / memory["naive"],
    }


def _peak_bytes(way: Callable[[Problem], Tensor], problem: Problem) -> int:
    """Beyond the inputs, with the gradients, and with buffers that stay from call to call."""
    problem.hidden.grad = problem.weight.grad = None
    release_scratch()
    return peak_bytes(lambda: _step(way, problem))


def _step(way: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    problem.hidden.grad = problem.weight.grad = None
    loss = way(problem)
    loss.backward()
    return loss.detach()


def bare_products(problem: Problem) -> Callable[[], None]:
    """The matrix products of a step by themselves: both models' logits and two gradients, each in
    the dtype of the factors, into memory that is there."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in problem[:4])
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(teacher_hidden, teacher_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)

    step()
    return step


def ours(problem: Problem) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight, labels = problem
    teacher = TeacherHidden(teacher_hidden, Head(teacher_weight))
    return linear_distill_loss(hidden, Head(weight), labels, teacher, OBJECTIVE).loss


def naive(problem: Problem) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight, labels = problem
    T = OBJECTIVE.temperature
    logits, teacher_logits = (
        (hidden @ weight.T).float(),
        (teacher_hidden @ teacher_weight.T).float(),
    )
    ce = F.cross_entropy(logits, labels, label_smoothing=OBJECTIVE.label_smoothing)
    log_q, log_p = F.log_softmax(logits / T, -1), F.log_softmax(teacher_logits / T, -1)
    kd = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * T**2
    return OBJECTIVE.ce_weight * ce + OBJECTIVE.kd_weight * kd
