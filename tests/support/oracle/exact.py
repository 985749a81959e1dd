"""The oracle: the reference with exact divergences, on float64 copies of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from sad_kernels import Objective, Outcomes, TeacherHidden, TeacherTopK, reference
from sad_kernels.objective import Tail, Teacher
from torch import Tensor

from support.oracle.calls import Outputs, Problem, measure
from support.oracle.divergences import (
    Ratios,
    Sides,
    columns_of_outcomes,
    dense_sides,
    gradient_of,
    outcome_logits,
    ratios_of,
    top_k_sides,
    value_of,
)

Change = Callable[[Objective, Sides, Ratios, Tensor], Tensor]
"""From phi, the last of the arguments, to another one."""
MeanOff = Callable[[Sides, Ratios], Tensor]
"""What is wrong with the mean of the reverse KL's phi, [n, 1]."""


@dataclass(frozen=True)
class Inputs:
    """What a divergence is computed from; without a gradient."""

    objective: Objective
    s: Tensor  # [n, V]
    t: Tensor  # [n, V] logits, or [n, K] log-probabilities beside ids
    ids: Tensor | None = None  # [n, K]
    tail: Tail = "bucket"
    rest_off: Tensor | None = None  # [n, 1] what is wrong with the teacher's rest: top_k_sides
    outcomes: Outcomes | None = None  # t and ids are the teacher's columns and its outcomes then

    def value_and_gradient(
        self, change: Change | None = None, mean_off: MeanOff | None = None
    ) -> tuple[Tensor, Tensor]:
        """After T^2: [n], and by ``s`` [n, V], from phi or from what ``change`` makes of it."""
        name, beta, T = self.objective.divergence, self.objective.beta, self.objective.temperature
        parts = None
        if self.outcomes is not None:
            s = outcome_logits(self.s, self.outcomes.student, self.outcomes.count, T)
            if self.ids is None:
                t = outcome_logits(self.t, self.outcomes.teacher, self.outcomes.count, T)
                sides = dense_sides(s, t, T)
                parts = columns_of_outcomes(self.s, s, self.outcomes.student, T)
            else:
                sides, *parts = top_k_sides(s, self.ids, self.t, self.tail, T, self.rest_off)
                outcome, share = columns_of_outcomes(self.s, s, self.outcomes.student, T)
                parts = parts[0].gather(-1, outcome), share * parts[1].gather(-1, outcome)
        elif self.ids is None:
            sides = dense_sides(self.s, self.t, T, self.objective.teacher_share)
        else:
            sides, *parts = top_k_sides(self.s, self.ids, self.t, self.tail, T, self.rest_off)
        k = ratios_of(sides)
        of_phi = partial(change, self.objective, sides, k) if change else None
        gradient = gradient_of(name, beta, k, of_phi, mean_off(sides, k) if mean_off else 0.0)
        if parts is not None:  # each column has its share of its outcome's gradient
            outcome, share = parts
            gradient = share * gradient.gather(-1, outcome)
        scale = self.objective.kd_scale
        return scale * value_of(name, beta, k), scale / T * gradient


def inputs_of(
    s: Tensor,
    teacher: Teacher,
    keep: Tensor,
    objective: Objective,
    outcomes: Outcomes | None = None,
) -> tuple[Inputs, Tensor]:
    """From the arguments of ``reference._kd``; and the teacher's choices, [n]."""
    s, V, u = s.detach(), s.shape[-1], objective.teacher_share
    if isinstance(teacher, TeacherTopK):
        ids = reference._rows(teacher.ids, keep).long()
        log_probs = reference._rows(teacher.log_probs, keep).to(s.dtype)
        best = (log_probs == log_probs.amax(-1, keepdim=True)) & ~torch.isneginf(log_probs)
        choice = ids.masked_fill(~best, V).amin(-1)
        return Inputs(objective, s, log_probs, ids, teacher.tail, None, outcomes), choice
    if outcomes is not None:
        hidden = isinstance(teacher, TeacherHidden)
        V = teacher.head.vocab_size if hidden else teacher.valid_vocab or teacher.logits.shape[-1]
    if isinstance(teacher, TeacherHidden):
        t = reference._logits(reference._rows(teacher.hidden, keep), teacher.head, V, s.dtype)
        t = t.detach()
    else:
        t = reference._rows(teacher.logits, keep)[:, :V].to(s.dtype)
        t = reference._transformed(t, teacher.logit_scale, teacher.softcap)
    if outcomes is not None:
        return Inputs(objective, s, t, outcomes=outcomes), outcomes.teacher[t.argmax(-1)]
    return Inputs(objective, s, t), (t if u == 1 else (1 - u) * s + u * t).argmax(-1)


class _Known(torch.autograd.Function):
    """Values [n] whose gradient by ``s`` [n, V] is known."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g[:, None] * ctx.saved_tensors[0], None, None


def kd_of(
    move: Callable[[Inputs], Inputs] | None = None,
    change: Change | None = None,
    mean_off: MeanOff | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function in place of ``reference._kd``: exact, or of moved inputs and a changed phi."""

    def kd(
        s: Tensor,
        teacher: Teacher,
        keep: Tensor,
        objective: Objective,
        other_rows: Tensor | None = None,  # [n] bool
        outcomes: Outcomes | None = None,
    ) -> tuple[Tensor, Tensor]:
        inputs, choice = inputs_of(s, teacher, keep, objective, outcomes)
        inputs = move(inputs) if move else inputs
        value, gradient = inputs.value_and_gradient(change, mean_off)
        if other_rows is not None:  # each row has one, be the other infinite
            assert objective.other_divergence is not None
            other = replace(
                objective, divergence=objective.other_divergence, beta=objective.other_beta
            )
            others = replace(inputs, objective=other).value_and_gradient(change, mean_off)
            value = others[0].where(other_rows, value)
            gradient = others[1].where(other_rows[:, None], gradient)
        return _Known.apply(s, value, gradient), choice

    return kd


@contextmanager
def replaced(**functions: Any) -> Iterator[None]:
    """Functions of the reference, by name, replaced for a while."""
    originals = {name: getattr(reference, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(reference, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(reference, name, original)


def in_float64(problem: Problem) -> dict[str, Tensor]:
    return {name: x.double() for name, x in problem.leaves.items()}


def measure_exact(problem: Problem, leaves: dict[str, Tensor]) -> Outputs:
    """The outputs of the reference with exact divergences, in the precision of the leaves."""
    with replaced(_kd=kd_of()):
        return measure(problem, reference, leaves)


def measure_oracle(problem: Problem) -> Outputs:
    """What everything is held against."""
    return measure_exact(problem, in_float64(problem))


def measure_without_divergence(problem: Problem) -> Outputs:
    """The oracle of what else there is in the loss: cross-entropy and z-loss."""

    def nothing(s: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return s[:, :0].sum(-1), s.argmax(-1)

    with replaced(_kd=nothing):
        return measure(problem, reference, in_float64(problem))
