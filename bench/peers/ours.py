"""``sad_kernels``, called as a training loop calls it."""

from __future__ import annotations

from collections.abc import Callable

import sad_kernels
from sad_kernels import Head, TeacherHidden, TeacherLogits, TeacherTopK
from sad_kernels.objective import Teacher
from torch import Tensor

from bench.peers.base import Average, Peer
from bench.problems.inputs import Hidden, Logits, Parameters


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    objective, labels = problem.case.objective, problem.labels
    match problem.case.kind:
        case "ce":
            return lambda: sad_kernels.cross_entropy(problem.logits, labels)
        case "kd":
            return lambda: sad_kernels.kl_div(
                problem.logits,
                problem.teacher,
                temperature=objective.temperature,
                divergence=objective.divergence,
                beta=objective.beta,
                scale_t2=objective.scale_t2,
                labels=labels,
            )
        case "joint":
            teacher: Teacher
            if problem.ids is not None and problem.log_probs is not None:
                teacher = TeacherTopK(problem.ids, problem.log_probs)
            else:
                teacher = TeacherLogits(problem.teacher)
            return lambda: sad_kernels.distill_loss(problem.logits, labels, teacher, objective).loss


def of_hidden(problem: Hidden) -> Callable[[], Tensor]:
    objective, labels, V = problem.case.objective, problem.labels, problem.case.V
    if problem.case.kind == "ce":
        return lambda: sad_kernels.linear_cross_entropy(problem.hidden, problem.weight, labels)
    teacher = TeacherHidden(problem.teacher_hidden, Head(problem.teacher_weight, valid_vocab=V))
    head = Head(problem.weight, valid_vocab=V)

    def loss() -> Tensor:
        hidden = problem.hidden
        return sad_kernels.linear_distill_loss(hidden, head, labels, teacher, objective).loss

    return loss


def average(problem: Parameters) -> Average:
    params, decay = problem.params, problem.case.decay
    shadows = problem.shadows()
    if problem.case.name == "ema/update":
        return Average(shadows, lambda: sad_kernels.ema_update_(shadows, params, decay))

    def swap(_: object = None) -> None:
        sad_kernels.ema_swap_(shadows, params)

    return Average(shadows, swap, swap)


LOGITS = (Peer("ours", "sad_kernels.cross_entropy, kl_div, distill_loss", of_logits),)
HIDDEN = (Peer("ours", "sad_kernels.linear_cross_entropy, linear_distill_loss", of_hidden),)
EMA = (Peer("ours", "sad_kernels.ema_update_, ema_swap_", average),)
