"""Random input tensors of a case, equal for every peer and in every run.

Logits have a standard deviation of 3 and labels follow Zipf's law. The teacher's logits are the
student's plus noise of standard deviation ``sqrt(2 kl)``, at which ``KL(p || q)`` is about ``kl``.
With hidden states the noise is in the teacher's, or, if it has more of them, in the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bench.problems.cases import EmaCase, LossCase

SPREAD = 3.0
IGNORED = -100


@dataclass
class Logits:
    """Inputs of a loss of logits."""

    case: LossCase
    logits: Tensor  # [N, V], requires a gradient
    labels: Tensor  # [N]
    upstream: Tensor  # [] fp32
    teacher_logits: Tensor | None = None  # [N, V]
    ids: Tensor | None = None  # [N, K], with log_probs instead of logits
    log_probs: Tensor | None = None  # [N, K] fp32, at the objective's temperature

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"dlogits": self.logits}

    @property
    def teacher(self) -> Tensor:
        assert self.teacher_logits is not None, f"{self.case.name} has no teacher's logits"
        return self.teacher_logits


@dataclass
class Hidden:
    """Inputs of a loss of hidden states and heads."""

    case: LossCase
    hidden: Tensor  # [N, D_s], requires a gradient
    weight: Tensor  # [V, D_s], requires a gradient
    labels: Tensor  # [N]
    upstream: Tensor  # [] fp32
    teacher_hidden: Tensor  # [N, D_t]
    teacher_weight: Tensor  # [V_t or V, D_t]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"dhidden": self.hidden, "dweight": self.weight}

    @property
    def cut_teacher_weight(self) -> Tensor:
        """The teacher's weight without padding rows, for peers that do not support them."""
        return self.teacher_weight[: self.case.V]


@dataclass
class Parameters:
    """Inputs of a moving average: the parameters of a model. Every peer makes its own shadows."""

    case: EmaCase
    params: list[Tensor]

    def start(self, i: int) -> Tensor:
        """The initial value of shadow ``i``, from which the checked update starts."""
        generator = Generator(self.params[i].device).manual_seed(1 + i)
        return _normal(self.params[i].shape, 1.0, generator)

    def shadows(self) -> list[Tensor]:
        return [self.start(i) for i in range(len(self.params))]


Problem = Logits | Hidden | Parameters


def draw(case: LossCase | EmaCase, device: torch.device) -> Problem:
    """The inputs of a case, from a fixed seed."""
    generator = Generator(device).manual_seed(0)
    if isinstance(case, EmaCase):
        return _parameters(case, generator)
    return _hidden(case, generator) if case.linear else _logits(case, generator)


def _logits(case: LossCase, generator: Generator) -> Logits:
    shape = torch.Size((case.N, case.V))
    s = _normal(shape, SPREAD, generator).to(getattr(torch, case.dtype))
    problem = Logits(case, s, _labels(case, generator), _upstream(case, generator))
    if case.kind != "ce":
        t = _normal(shape, (2 * case.kl) ** 0.5, generator, s.dtype).add_(s)
        if case.top_k:
            problem.ids, problem.log_probs = _top_k(case, t)
        else:
            problem.teacher_logits = t
    s.requires_grad_()
    return problem


def _hidden(case: LossCase, generator: Generator) -> Hidden:
    dtype = getattr(torch, case.dtype)
    N, V, D_s, D_t = case.N, case.V_t or case.V, case.D_s, case.D_t
    noise, more = (2 * case.kl) ** 0.5, case.D_t - case.D_s
    hidden = _normal(torch.Size((N, D_s)), 1.0, generator)
    weight = _normal(torch.Size((V, D_s)), SPREAD * D_s**-0.5, generator)
    if case.kind == "ce":
        teacher_hidden, teacher_weight = hidden[:0], weight[:0]
    elif more == 0:
        teacher_hidden = hidden + _normal(hidden.shape, noise / SPREAD, generator)
        teacher_weight = weight.clone()
    elif more > 0:
        teacher_hidden = torch.cat((hidden, _normal(torch.Size((N, more)), 1.0, generator)), -1)
        rest = _normal(torch.Size((V, more)), noise * more**-0.5, generator)
        teacher_weight = torch.cat((weight, rest), -1)
    else:
        raise ValueError(f"D_t must be at least D_s, got {D_t} and {D_s}; swap the sizes")
    return Hidden(
        case,
        hidden.to(dtype).requires_grad_(),
        weight[: case.V].to(dtype, copy=True).requires_grad_(),
        _labels(case, generator),
        _upstream(case, generator),
        teacher_hidden.to(dtype),
        teacher_weight.to(dtype),
    )


def _parameters(case: EmaCase, generator: Generator) -> Parameters:
    """Parameters of nearly equal sizes, some odd, so that not every tensor is aligned alike."""
    each, dtype = case.parameters // case.tensors, getattr(torch, case.dtype)
    sizes = [each + (-1) ** i * (i // 2 % 7) for i in range(case.tensors)]
    return Parameters(case, [_normal(torch.Size((n,)), 1.0, generator).to(dtype) for n in sizes])


def _labels(case: LossCase, generator: Generator) -> Tensor:
    uniform = torch.rand(case.N, generator=generator, device=generator.device)
    labels = (case.V**uniform).long().sub_(1).clamp_(0, case.V - 1)  # P(rank r) about 1 / r
    order = torch.randperm(case.N, generator=generator, device=generator.device)
    labels[order[case.valid :]] = IGNORED
    return labels


def _upstream(case: LossCase, generator: Generator) -> Tensor:
    return torch.tensor(case.upstream, device=generator.device)


def _top_k(case: LossCase, t: Tensor) -> tuple[Tensor, Tensor]:
    chunks = [
        (rows.float() / case.objective.temperature).log_softmax(-1).topk(case.top_k)
        for rows in t.split(256)
    ]
    return torch.cat([c.indices for c in chunks]), torch.cat([c.values for c in chunks])


def _normal(
    shape: torch.Size, scale: float, generator: Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return x.mul_(scale)
