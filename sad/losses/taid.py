"""Distillation targets that adapt to the student: TAID's interpolation schedule, adaptive KL.

TAID (arXiv 2501.16937) distils from ``softmax(((1 - u) sg s + u t) / T)``, a teacher mixed with
the student itself, and moves u from ``start`` to ``end``, faster while training goes well.
Adaptive KL (arXiv 2404.02657) weighs forward and reverse KL by where student and teacher differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sad.losses._rows import require_no_grad, row_kl, upcast


class TAIDSchedule:
    """Schedule of the teacher's share u in TAID's target; per optimizer step, with its loss J:

        m <- beta m + (1 - beta) (J_prev - J) / J_prev
        u <- min(end, max(start + (end - start) progress, u + alpha sigmoid(m) (1 - u)))

    u never falls. Up to some 4000 steps the linear floor is ahead of what alpha adds, and the
    schedule is the line.
    """

    def __init__(
        self, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99
    ) -> None:
        self._start, self._end, self._alpha, self._beta = start, end, alpha, beta
        self._u, self._momentum = start, 0.0
        self._previous: float | None = None

    @property
    def value(self) -> float:
        """The teacher's share u in the next step's target."""
        return self._u

    def update(self, loss: float, progress: float) -> None:
        """Advance by a step with this loss; ``progress`` is the share of training done, 0 to 1.

        The first loss has nothing to be compared with and leaves m at 0, as does a loss that
        follows 0. One that is not finite moves u by the floor alone: its step was skipped.
        """
        u = self._u
        if math.isfinite(loss):
            if self._previous:
                gain = (self._previous - loss) / self._previous
                self._momentum = self._beta * self._momentum + (1 - self._beta) * gain
            self._previous = loss
            u += self._alpha * _sigmoid(self._momentum) * (1 - u)
        floor = self._start + (self._end - self._start) * progress
        self._u = min(self._end, max(floor, u))

    def state_dict(self) -> dict[str, Any]:
        """u, m and J_prev as floats, which JSON keeps exactly; J_prev is None before any loss."""
        return {"u": self._u, "momentum": self._momentum, "previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self._u, self._momentum = state["u"], state["momentum"]
        self._previous = state["previous"]


def adaptive_kl(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    head_mass: float = 0.5,
) -> Tensor:
    """Adaptive KL per row at temperature 1, nats, [N]; fp32 (float64 if the inputs are).

    With p the teacher and q the student, the head of a row is its most probable teacher tokens
    while their cumulative p is at most ``head_mass``, the first in any case; the rest is its tail.
    With g the sum of ``|p - q|`` over each, without gradient:

        (g_head KL(p||q) + g_tail KL(q||p)) / (g_head + g_tail),    0 where p = q

    A reference: it sorts V and holds several [N, V]. Raises ``ValueError`` for a teacher that
    requires a gradient.
    """
    require_no_grad(teacher_logits)
    log_q, log_p = upcast(student_logits).log_softmax(-1), upcast(teacher_logits).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    with torch.no_grad():
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        in_head = ordered.cumsum(-1) <= head_mass
        in_head[:, 0] = True
        gap = (p - q).abs()
        g_head = torch.where(in_head, gap.gather(-1, order), 0.0).sum(-1)
        total = gap.sum(-1)
        head = g_head / torch.where(total == 0, 1.0, total)
        tail = (total - g_head) / torch.where(total == 0, 1.0, total)
    return head * row_kl(p, log_p, log_q) + tail * row_kl(q, log_q, log_p)


def _sigmoid(x: float) -> float:
    return (1 + math.tanh(x / 2)) / 2
