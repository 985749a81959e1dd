"""What outcomes cost: the joint loss that compares them beside the one that compares columns.

The cells are the joint losses of hidden states of the CPU's set, forward and backward. Both sides
keep their widths, so that products and cross-entropy are the same work. Two pairs of tables: one
column per outcome, as between equal tokenizers, and vocabularies of which the student has two
columns for half of the outcomes, in an order of their own.

Runs alternate, and a ratio is that of neighbours: what else the machine does falls on both. Times
are CPU seconds of the process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sad_kernels import Head, Outcomes, TeacherHidden, linear_distill_loss

from bench.problems import cases
from bench.problems.inputs import Hidden, draw

NAME = "linear_kd/joint"


def tables(kind: str, V: int) -> Outcomes:
    """Outcomes of two vocabularies of V columns."""
    generator = torch.Generator().manual_seed(0)
    if kind == "one column each":
        own = torch.arange(V, dtype=torch.int32)
        return Outcomes(own, own, V)
    count = V * 2 // 3
    student, teacher = (
        (torch.arange(V) % count)[torch.randperm(V, generator=generator)].int() for _ in range(2)
    )
    return Outcomes(student, teacher, count)


KINDS = ("one column each", "one or two columns")


def step(problem: Hidden, outcomes: Outcomes | None) -> Callable[[], None]:
    case = problem.case
    teacher = TeacherHidden(problem.teacher_hidden, Head(problem.cut_teacher_weight))
    head, leaves = Head(problem.weight), [problem.hidden, problem.weight]

    def run() -> None:
        out = linear_distill_loss(
            problem.hidden, head, problem.labels, teacher, case.objective, outcomes=outcomes
        )
        torch.autograd.grad(out.loss, leaves, problem.upstream)

    return run


def compared(problem: Hidden, outcomes: Outcomes, rounds: int) -> dict[str, Any]:
    """Seconds of both sides, and their ratio round by round."""
    sides = step(problem, None), step(problem, outcomes)
    for side in sides:
        side()
    seconds: list[list[float]] = [[], []]
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            before = time.process_time()
            sides[which]()
            seconds[which].append(time.process_time() - before)
    each = [b / a for a, b in zip(*seconds, strict=True)]
    return {
        "seconds": {
            "columns": round(statistics.median(seconds[0]), 4),
            "outcomes": round(statistics.median(seconds[1]), 4),
        },
        "ratio": round(statistics.median(each), 3),
        "ratios": [round(x, 3) for x in each],
    }


def measure(rounds: int = 9) -> dict[str, Any]:
    """CPU seconds of both losses with one thread, and their ratio, for every cell and table."""
    threads = torch.get_num_threads()
    rows = []
    try:
        torch.set_num_threads(1)
        for case in cases.chosen(cases.cpu(), [NAME]):
            problem = draw(case, torch.device("cpu"))
            assert isinstance(problem, Hidden)
            for kind in KINDS:
                found = compared(problem, tables(kind, problem.case.V), rounds)
                rows.append({"shape": case.shape, "dtype": case.dtype, "tables": kind} | found)
    finally:
        torch.set_num_threads(threads)
    return {"case": NAME, "threads": 1, "rounds": rounds, "rows": rows}
