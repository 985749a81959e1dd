"""Small random problems that faults are shown on, and their exact float64 copies.

Numbers are drawn on the CPU, so that a GPU gets the same ones. A ``Loss`` maps a problem to a
scalar: a peer's, ours, or float64's, which gets the same rounded inputs in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Problem:
    """Named tensors. Those in ``leaves`` require gradients in a ``fresh`` copy."""

    labels: Tensor  # [N]

    leaves = ()

    def double(self) -> Self:
        return self._map(lambda _, x: x.double() if x.is_floating_point() else x)

    def fresh(self) -> Self:
        """A copy for one call, with leaves that require gradients: some peers overwrite inputs."""
        return self._map(lambda name, x: x.detach().clone().requires_grad_(name in self.leaves))

    def leaf_tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.leaves]

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {k: change(k, x) for k, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Rows(Problem):
    """Logits. ``beta`` 0 is the forward KL, 1 the reverse, between them the JSD."""

    logits: Tensor  # [N, V]
    teacher_logits: Tensor | None = None  # [N, V]
    beta: float = 0.5

    leaves = ("logits",)


@dataclass(frozen=True)
class Heads(Problem):
    """Hidden states and heads. Columns that only the teacher has are padding."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, D]
    teacher_weight: Tensor  # [>= V, D]
    bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    beta: float = 0.0
    chunks: int = 0  # of rows, for losses whose chunks can be set

    leaves = ("hidden", "weight")


Loss = Callable[[Any], Tensor]


@dataclass
class Draw:
    """A sequence of random tensors from one seed."""

    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul_(scale).to(DEVICE)

    def labels(self, N: int, V: int) -> Tensor:
        return torch.randint(V, (N,), generator=self.generator).to(DEVICE)


def heads(
    N: int, V: int, D: int, *, seed: int = 0, noise: float = 0.0, spread: float = 1.0
) -> Heads:
    """A student whose logits have standard deviation ``spread``, and a teacher of the same head.

    The teacher's hidden states are the student's plus ``noise``; without noise they are unrelated.
    """
    draw = Draw(seed)
    hidden, weight = draw.normal(N, D), draw.normal(V, D, scale=spread * D**-0.5)
    other = draw.normal(N, D)
    teacher = hidden + noise * other if noise else other
    return Heads(draw.labels(N, V), hidden, weight, teacher, weight.clone())


def narrow(problem: Heads, dtype: torch.dtype) -> Heads:
    """The problem rounded to 16 bits; true values are computed from the rounded numbers."""
    return problem._map(lambda _, x: x.to(dtype) if x.is_floating_point() else x)


def gradients(loss: Loss, problem: Problem, upstream: float = 1.0) -> tuple[float, list[Tensor]]:
    """The loss and copies of the leaves' gradients: some peers overwrite theirs later."""
    problem = problem.fresh()
    result = loss(problem)
    found = torch.autograd.grad(result, problem.leaf_tensors(), torch.full_like(result, upstream))
    return float(result.detach()), [g.clone() for g in found]


def values(loss: Loss, problems: Sequence[Problem]) -> list[float]:
    """The losses without backward, on leaves that require gradients."""
    return [float(loss(problem.fresh()).detach()) for problem in problems]
