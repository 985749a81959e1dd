"""The oracle of losses whose logits are stored as codes: the same losses of rounded logits.

What is stored is the logit. So a loss of codes is judged by the one rule of tolerance like any
other, against the specification with logits that are rounded as the code says, here in float64 and
by its definition. That the gradient passes the rounding as if it was none is part of it.

A product that is off by its own rounding may be rounded to the neighbouring code, a thousand times
as far. So leaves are taken (``exact_products``) whose products are exact in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from sad_kernels import Head, reference
from torch import Tensor

from support.oracle import Problem, judge_outputs, measure, measure_of
from support.oracle.exact import replaced

GROUP = 256
MANTISSA = 12
FARTHEST = 8191.0


def rounded(z: Tensor) -> Tensor:  # [n, V] -> the same
    """Each logit as its code has it: its distance from the group's maximum, plus 1/4, with 12 bits
    of mantissa, halves rounded up, and no finite one above FARTHEST."""
    x = z.detach().double()
    n, V = x.shape
    full = torch.nn.functional.pad(x, (0, -V % GROUP), value=-torch.inf).view(n, -1, GROUP)
    k = full.amax(-1, keepdim=True)
    v = k - full + 0.25
    last = torch.ldexp(torch.ones_like(v), v.frexp().exponent - 1 - MANTISSA)
    v = torch.where(v.isfinite(), (v / last + 0.5).floor() * last, v)
    v = torch.where(v.isfinite(), v.clamp(max=FARTHEST), v)
    found = (k + 0.25 - v).view(n, -1)[:, :V].to(z.dtype)
    return z + (found - z.detach())


@contextmanager
def codes_in_the_reference(teacher_share: float = 1.0) -> Iterator[None]:
    """Within, all logits that the reference computes from hidden states are rounded; of a teacher
    that is mixed with the student, the mixture is."""
    product = reference._logits
    student: list[Tensor] = []

    def logits(hidden: Tensor, head: Head, V: int, dtype: torch.dtype) -> Tensor:
        z = product(hidden, head, V, dtype)
        if hidden.requires_grad or head.weight.requires_grad:
            student[:] = [rounded(z)]
            return student[0]
        if teacher_share == 1:
            return rounded(z)
        own = (1 - teacher_share) * student[0].detach()
        return (rounded(own + teacher_share * z) - own) / teacher_share

    with replaced(_logits=logits):
        yield


def exact_products(problem: Problem) -> Problem:
    """The problem with leaves of multiples of 1/64, which no sum of products rounds."""
    leaves = {name: ((x * 64).round() / 64).to(x.dtype) for name, x in problem.leaves.items()}
    return replace(problem, leaves=leaves)


def judge_codes(problem: Problem, ops: object, teacher_share: float = 1.0) -> float:
    """``judge`` for a loss whose logits are codes."""
    with codes_in_the_reference(teacher_share):
        by = measure_of(problem, rounds_products=True, plain_forms=True)
    return judge_outputs(problem, measure(problem, ops), by)
