"""What faults are shown on: small problems drawn from a seed, and exact copies of them.

Numbers are drawn on the CPU, so that a GPU gets the same ones. A ``Loss`` takes a problem and
returns a scalar, a peer's, ours, or float64's, which gets the same rounded inputs in float64.
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
    """Tensors by name. The first ones of ``leaves`` want gradients in a fresh copy."""

    labels: Tensor  # [N]

    leaves = ()

    def double(self) -> Self:
        return self._map(lambda _, x: x.double() if x.is_floating_point() else x)

    def fresh(self) -> Self:
        """A copy whose leaves want gradients, for one call: some peers write into their inputs."""
        return self._map(lambda name, x: x.detach().clone().requires_grad_(name in self.leaves))

    def wanted(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.leaves]

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {k: change(k, x) for k, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Rows(Problem):
    """Logits that are there. ``beta``: 0 is the forward KL, 1 the reverse, JSD between."""

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
    chunks: int = 0  # that rows are to be cut into, if one may choose

    leaves = ("hidden", "weight")


Loss = Callable[[Any], Tensor]


@dataclass
class Draw:
    """Numbers from one seed, in order."""

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
    """A student whose logits have this standard deviation, and a teacher that is it with noise.

    Both heads are one; the noise is in the teacher's hidden states. Without noise they are another
    model's.
    """
    draw = Draw(seed)
    hidden, weight = draw.normal(N, D), draw.normal(V, D, scale=spread * D**-0.5)
    other = draw.normal(N, D)
    teacher = hidden + noise * other if noise else other
    return Heads(draw.labels(N, V), hidden, weight, teacher, weight.clone())


def narrow(problem: Heads, dtype: torch.dtype) -> Heads:
    """The same in 16 bits: all that is called exact later is exact for these."""
    return problem._map(lambda _, x: x.to(dtype) if x.is_floating_point() else x)


def gradients(loss: Loss, problem: Problem, upstream: float = 1.0) -> tuple[float, list[Tensor]]:
    """The value, and the gradients of the leaves, copied: some peers overwrite theirs later."""
    problem = problem.fresh()
    result = loss(problem)
    found = torch.autograd.grad(result, problem.wanted(), torch.full_like(result, upstream))
    return float(result.detach()), [g.clone() for g in found]


def values(loss: Loss, problems: Sequence[Problem]) -> list[float]:
    """Of the losses alone, as in training, where leaves want gradients."""
    return [float(loss(problem.fresh()).detach()) for problem in problems]
