"""Eager PyTorch losses as training loops write them by hand, and the same under torch.compile.

Projections in the dtype of the hidden states, ``log_softmax`` in fp32, a mean over the rows that
have a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sad_kernels import Objective
from torch import Tensor

from bench.peers.base import Peer, Unsupported
from bench.problems.inputs import IGNORED, Hidden, Logits


def ce(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), labels)


def kd(z: Tensor, t: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    T = objective.temperature
    log_q, log_p = F.log_softmax(z.float() / T, -1), F.log_softmax(t.float() / T, -1)
    return _mean(divergence(log_p, log_q, objective), labels)


def divergence(log_p: Tensor, log_q: Tensor, objective: Objective) -> Tensor:
    """The divergence of each row, from the teacher's and the student's log-probabilities."""
    match objective.divergence:
        case "forward_kl":
            return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        case "reverse_kl":
            return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        case "jsd":
            b = objective.beta
            log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log1p(-b))
            teacher = F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1)
            student = F.kl_div(log_m, log_q, log_target=True, reduction="none").sum(-1)
            return b * teacher + (1 - b) * student
        case other:
            raise Unsupported(f"has no hand-written {other}")


def joint(z: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    return o.ce_weight * ce(z, labels) + o.kd_weight * kd(z, t, labels, o)


def joint_top_k(z: Tensor, ids: Tensor, log_p: Tensor, labels: Tensor, o: Objective) -> Tensor:
    """CE and forward KL over the teacher's k tokens and one bucket for all others."""
    log_q = F.log_softmax(z.float() / o.temperature, -1).gather(-1, ids)
    p_rest = (1 - log_p.exp().sum(-1)).clamp(min=1e-30)
    q_rest = (1 - log_q.exp().sum(-1)).clamp(min=1e-30)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    return o.ce_weight * ce(z, labels) + o.kd_weight * _mean(rows, labels)


def linear_ce(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return ce(h @ w.T, labels)


def linear_kd(
    h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, labels: Tensor, objective: Objective
) -> Tensor:
    with torch.no_grad():
        t = ht @ wt.T
    return (joint if objective.ce_weight else kd)(h @ w.T, t, labels, objective)


def _mean(rows: Tensor, labels: Tensor) -> Tensor:
    keep = labels != IGNORED
    return rows.where(keep, 0).sum() / keep.sum()


def plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def compiled(**options: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def compile_(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        try:
            return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)
        except RuntimeError as error:
            raise Unsupported(f"this torch.compile refuses {options}: {error}") from None

    return compile_


def of_logits(how: Callable[[Any], Callable[..., Tensor]]) -> Callable[[Logits], Any]:
    def build(problem: Logits) -> Callable[[], Tensor]:
        z, labels, objective = problem.logits, problem.labels, problem.case.objective
        if problem.case.kind == "ce":
            call = how(ce)
            return lambda: call(z, labels)
        if problem.case.top_k:
            call = how(joint_top_k)
            return lambda: call(z, problem.ids, problem.log_probs, labels, objective)
        call = how(joint if problem.case.kind == "joint" else kd)
        return lambda: call(z, problem.teacher, labels, objective)

    return build


def of_hidden(how: Callable[[Any], Callable[..., Tensor]]) -> Callable[[Hidden], Any]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        h, w, labels = problem.hidden, problem.weight, problem.labels
        if problem.case.kind == "ce":
            call = how(linear_ce)
            return lambda: call(h, w, labels)
        call, objective = how(linear_kd), problem.case.objective
        ht, wt = problem.teacher_hidden, problem.cut_teacher_weight
        return lambda: call(h, w, ht, wt, labels, objective)

    return build


CHUNKED = {"auto_chunker.enable": True}
EAGER = "F.cross_entropy and F.kl_div of log_softmax in fp32"
COMPILED = "torch.compile(fullgraph=True, dynamic=False) of eager"

LOGITS = (
    Peer("eager", EAGER, of_logits(plain)),
    Peer("compile", COMPILED, of_logits(compiled()), compiles=True),
)
HIDDEN = (
    Peer("eager", EAGER, of_hidden(plain)),
    Peer("compile", COMPILED, of_hidden(compiled()), compiles=True),
    Peer(
        "compile auto-chunked",
        COMPILED,
        of_hidden(compiled(**CHUNKED)),
        settings=CHUNKED,
        compiles=True,
        devices=("cuda",),
        extra=True,
    ),
)
