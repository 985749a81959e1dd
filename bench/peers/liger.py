"""Liger's Triton kernels (liger-kernel)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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

PACKAGE = "liger-kernel"


def functional() -> Any:
    return require_module("liger_kernel.transformers.functional", PACKAGE)


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    require_kind(problem, "ce", "kd", what="has no cross-entropy and KL of one pass over logits")
    liger, objective, labels = functional(), problem.case.objective, problem.labels
    if problem.case.kind == "ce":
        return lambda: liger.liger_cross_entropy(problem.logits, labels)
    T = objective.temperature

    def kl() -> Tensor:
        _, z, t = select_valid_rows(labels, problem.case.ignored, problem.logits, problem.teacher)
        log_q, p = F.log_softmax(z.float() / T, -1), F.softmax(t.float() / T, -1)
        return liger.liger_kl_div(log_q, p, reduction="batchmean")

    def jsd() -> Tensor:
        log_q = F.log_softmax(problem.logits.float() / T, -1)
        log_p = F.log_softmax(problem.teacher.float() / T, -1)
        return liger.liger_jsd(log_q, log_p, shift_labels=labels, beta=beta_of(problem))

    return kl if objective.divergence == "forward_kl" else jsd


def linear_ce(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "ce", what="has no divergence")
        liger, (h, w, labels) = functional(), (problem.hidden, problem.weight, problem.labels)
        return lambda: liger.liger_fused_linear_cross_entropy(h, w, labels, **settings)

    return build


def linear_jsd(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "kd", what="has no cross-entropy")
        liger, T = functional(), problem.case.objective.temperature
        return lambda: liger.liger_fused_linear_jsd(
            problem.hidden,
            problem.weight,
            problem.teacher_hidden,
            problem.cut_teacher_weight,
            shift_labels=problem.labels,
            jsd_beta=beta_of(problem),
            temperature=T,
            **settings,
        )

    return build


def linear_kl(problem: Hidden) -> Callable[[], Tensor]:
    """Forward KL. Liger takes the teacher's probabilities, which the call computes."""
    require_kind(problem, "kd", what="has no cross-entropy")
    objective = problem.case.objective
    if objective.divergence != "forward_kl":
        raise Unsupported("has the forward KL only")
    liger, T = functional(), objective.temperature
    h, w, labels = problem.hidden, problem.weight, problem.labels

    def loss() -> Tensor:
        with torch.no_grad():
            t = problem.teacher_hidden @ problem.cut_teacher_weight.T
            p = F.softmax(t.float() / T, -1)
        return liger.liger_fused_linear_kl_div(h, w, p, shift_labels=labels, temperature=T)

    return loss


def chunked(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "kd", "joint", what="has no cross-entropy without a divergence")
        objective = problem.case.objective
        loss = require_module("liger_kernel.chunked_loss", PACKAGE).LigerFusedLinearJSDLoss(
            weight_hard_loss=objective.ce_weight,
            weight_soft_loss=objective.kd_weight,
            beta=beta_of(problem),
            temperature=objective.temperature,
            **settings,
        )
        return lambda: loss(
            problem.hidden,
            problem.weight,
            problem.teacher_hidden,
            problem.cut_teacher_weight,
            problem.labels,
        )

    return build


def _linear(
    name: str, call: str, build: Callable[..., Any], extra: bool = False, **settings: Any
) -> Peer:
    shown = {k: str(v).removeprefix("torch.") for k, v in settings.items()}
    compiles, on_cpu = bool(settings.get("compiled")), call.startswith("LigerFusedLinearJSDLoss")
    devices = ("cuda", "cpu") if on_cpu else ("cuda",)
    built = build(**settings)
    return Peer(name, call, built, PACKAGE, shown, compiles=compiles, devices=devices, extra=extra)


FLCE, FLJSD = "liger_fused_linear_cross_entropy", "liger_fused_linear_jsd"
CHUNKED = "LigerFusedLinearJSDLoss"
FP32 = torch.float32

LOGITS = (
    Peer(
        "liger",
        "liger_cross_entropy, liger_kl_div, liger_jsd",
        of_logits,
        PACKAGE,
        overwrites=True,
        devices=("cuda",),
    ),
)
HIDDEN = (
    _linear("liger flce", FLCE, linear_ce),
    _linear("liger flce 16", FLCE, linear_ce, chunk_mem_const=16),
    _linear("liger flce 16 fp32", FLCE, linear_ce, chunk_mem_const=16, accum_dtype=FP32),
    _linear("liger flce fp32", FLCE, linear_ce, accum_dtype=FP32, extra=True),
    _linear("liger fljsd", FLJSD, linear_jsd),
    _linear("liger fljsd fp32", FLJSD, linear_jsd, accum_dtype=FP32, extra=True),
    _linear("liger chunked", CHUNKED, chunked, compiled=False, chunk_size=1024),
    _linear("liger chunked compiled", CHUNKED, chunked, compiled=True, chunk_size=1024),
    Peer(
        "liger flkl",
        "liger_fused_linear_kl_div of softmax",
        linear_kl,
        PACKAGE,
        devices=("cuda",),
    ),
)
