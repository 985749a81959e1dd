"""``sad_kernels``, called as a training loop calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sad_kernels
from sad_kernels import Head, TeacherHidden, TeacherLogits, TeacherTopK
from sad_kernels.objective import Teacher
from torch import Tensor

from bench.peers.base import Average, Peer, Unsupported
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


COMPACT = {"logits": "compact", "impl": "triton"}


def of_hidden(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        objective, labels, V = problem.case.objective, problem.labels, problem.case.V
        h, w, ht, wt = (
            problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight
        )  # fmt: skip
        if problem.case.kind == "ce":
            return lambda: sad_kernels.linear_cross_entropy(h, w, labels, **settings)
        teacher, head = TeacherHidden(ht, Head(wt, valid_vocab=V)), Head(w, valid_vocab=V)

        def loss() -> Tensor:
            out = sad_kernels.linear_distill_loss(h, head, labels, teacher, objective, **settings)
            return out.loss

        return loss

    return build


def compact(problem: Hidden) -> Callable[[], Tensor]:
    """Logits kept in 16 bits: CE, and the divergences that are sums over both models' logits."""
    if problem.case.objective.divergence not in ("forward_kl", "reverse_kl"):
        raise Unsupported("keeps the logits of mixtures in 32 bits")
    if problem.hidden.element_size() != 2:
        raise Unsupported("keeps the logits of 32-bit hidden states in 32 bits")
    return of_hidden(**COMPACT)(problem)


def average(problem: Parameters) -> Average:
    params, decay = problem.params, problem.case.decay
    shadows = problem.shadows()
    if problem.case.name == "ema/update":
        return Average(shadows, lambda: sad_kernels.ema_update_(shadows, params, decay))

    def swap(_: object = None) -> None:
        sad_kernels.ema_swap_(shadows, params)

    return Average(shadows, swap, swap)


LOGITS = (Peer("ours", "sad_kernels.cross_entropy, kl_div, distill_loss", of_logits),)
LINEAR = "sad_kernels.linear_cross_entropy, linear_distill_loss"
HIDDEN = (
    Peer("ours", LINEAR, of_hidden()),
    Peer("ours compact", LINEAR, compact, settings={"logits": "compact"}, devices=("cuda",)),
)
EMA = (Peer("ours", "sad_kernels.ema_update_, ema_swap_", average),)
