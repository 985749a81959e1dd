"""TRL's fused losses (trl), called as its trainer does on GPUs: on the valid rows only."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.base import (
    Peer,
    Unsupported,
    beta_of,
    require_kind,
    require_module,
    select_valid_rows,
)
from bench.problems.inputs import Hidden, Logits

PACKAGE = "trl"


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    require_kind(problem, "ce", what="has no divergence of logits")
    function = require_module(
        "trl.kernels.logprob_entropy", PACKAGE
    ).selective_log_softmax_and_entropy

    def loss() -> Tensor:
        labels, z = select_valid_rows(problem.labels, problem.case.ignored, problem.logits)
        log_p, _entropy = function(z, labels, 1.0, None)
        return -log_p.mean()

    return loss


def of_hidden(problem: Hidden) -> Callable[[], Tensor]:
    """Cross-entropy or a divergence; a joint loss calls both functions, one after the other."""
    if problem.case.top_k:
        raise Unsupported("takes no top-k teacher")
    log_prob = require_module("trl.kernels.chunked_logprob", PACKAGE).ChunkedLogProbFunction
    divergence = require_module("trl.kernels.chunked_divergence", PACKAGE).ChunkedDivergenceFunction
    o, ignored = problem.case.objective, problem.case.ignored
    w, wt, beta = problem.weight, problem.cut_teacher_weight, beta_of(problem)

    def ce(h: Tensor, labels: Tensor) -> Tensor:
        return -log_prob.apply(h, w, None, labels, 1.0, 32768, None, 1.0, ())[0].mean()

    def kd(h: Tensor, ht: Tensor) -> Tensor:
        scales = (1.0, None, 1.0, None)
        rows, _ = divergence.apply(h, w, None, ht, wt, None, beta, o.temperature, *scales)
        return rows.mean()

    def loss() -> Tensor:
        if problem.case.kind == "ce":
            labels, h = select_valid_rows(problem.labels, ignored, problem.hidden)
            return ce(h, labels)
        labels, h, ht = select_valid_rows(
            problem.labels, ignored, problem.hidden, problem.teacher_hidden
        )
        if problem.case.kind == "kd":
            return kd(h, ht)
        return o.ce_weight * ce(h, labels) + o.kd_weight * kd(h, ht)

    return loss


LOGITS = (Peer("trl", "selective_log_softmax_and_entropy", of_logits, PACKAGE, devices=("cuda",)),)
HIDDEN = (Peer("trl", "ChunkedLogProbFunction, ChunkedDivergenceFunction", of_hidden, PACKAGE),)
