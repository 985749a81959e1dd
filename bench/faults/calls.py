"""Losses of peers, of ours, of eager torch and in float64, as functions of a ``Problem``.

All temperatures are 1. ``beta=0`` is the forward KL and ``beta=1`` the reverse, as peers have it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import sad_kernels
import torch
import torch.nn.functional as F
from sad_kernels import Head, Objective, TeacherHidden
from torch import Tensor

from bench.faults.problem import Heads, Loss, Rows
from bench.peers import fla, liger, trl
from bench.peers.base import require_attribute, require_module

LIGER, TRL, FLA = liger.PACKAGE, trl.PACKAGE, fla.PACKAGE
Settings = dict[str, Any] | None


class Call(NamedTuple):
    """A peer's function. ``kernels``: it runs in Triton, so it needs a GPU or the interpreter."""

    peer: str
    package: str
    call: str
    loss: Loss
    kernels: bool = False


# --- Ours, and float64 by ``library=reference`` ------------------------------------------------


def ce(p: Rows, library: Any = sad_kernels, **how: Any) -> Tensor:
    return library.cross_entropy(p.logits, p.labels, **how)


def kl(p: Rows, library: Any = sad_kernels, **how: Any) -> Tensor:
    o = _objective(p)
    return library.kl_div(
        p.logits, p.teacher_logits, divergence=o.divergence, beta=o.beta, scale_t2=False, **how
    )


def linear_ce(p: Heads, library: Any = sad_kernels, **how: Any) -> Tensor:
    """Linear cross-entropy in ``p.chunks`` chunks: 16-bit inputs take 3 bytes per logit."""
    if p.chunks and library is sad_kernels:
        how["chunk_bytes"] = 3 * len(p.hidden) * len(p.weight) // p.chunks
    return library.linear_cross_entropy(p.hidden, p.weight, p.labels, **how)


def linear_kl(p: Heads, library: Any = sad_kernels, **how: Any) -> Tensor:
    V = len(p.weight)
    teacher = TeacherHidden(p.teacher_hidden, Head(p.teacher_weight, p.teacher_bias, valid_vocab=V))
    head = Head(p.weight, p.bias)
    return library.linear_distill_loss(p.hidden, head, p.labels, teacher, _objective(p), **how).loss


def _objective(p: Rows | Heads) -> Objective:
    if p.beta == 0:
        return Objective(divergence="forward_kl")
    return Objective(divergence="reverse_kl" if p.beta == 1 else "jsd", beta=p.beta)


# --- torch ---------------------------------------------------------------------------------------


def _divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """A divergence by ``F.kl_div``, as a training loop writes it."""
    kl = partial(F.kl_div, log_target=True, reduction="batchmean")
    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)


def _eager_linear_kl(p: Heads) -> Tensor:
    s = F.linear(p.hidden, p.weight, p.bias)
    t = F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    return _divergence(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1), p.beta)


def _torch_linear_ce(p: Heads, settings: Settings) -> Tensor:
    function = require_attribute(F, "linear_cross_entropy", "torch")
    if settings is None:  # whole logits
        return function(p.hidden, p.weight, p.labels)
    options = require_attribute(torch.nn, "LinearCrossEntropyOptions", "torch")(**settings)
    return function(p.hidden, p.weight, p.labels, options=options)


eager_ce = Call(
    "eager",
    "torch",
    "F.cross_entropy(z.float(), y)",
    lambda p: F.cross_entropy(p.logits.float(), p.labels),
)
eager_linear_ce = Call(
    "eager",
    "torch",
    "F.cross_entropy((h @ W.T).float(), y)",
    lambda p: F.cross_entropy(F.linear(p.hidden, p.weight).float(), p.labels),
)
eager_linear_kl = Call(
    "eager", "torch", "F.kl_div of log_softmax((h @ W.T).float(), -1)", _eager_linear_kl
)


def torch_linear_ce(settings: Settings) -> Call:
    """``F.linear_cross_entropy``: whole logits for ``settings=None``, else chunked."""
    options = "" if settings is None else f", options=LinearCrossEntropyOptions({_words(settings)})"
    call = f"F.linear_cross_entropy(h, W, y{options})"
    return Call("torch", "torch", call, lambda p: _torch_linear_ce(p, settings))


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in settings.items())


# --- Liger ---------------------------------------------------------------------------------------


def _liger_linear_ce(p: Heads, **settings: Any) -> Tensor:
    if p.chunks:  # it makes V / (chunk_mem_const D) of them
        V, D = p.weight.shape
        settings["chunk_mem_const"] = V // (p.chunks * D)
    return liger.functional().liger_fused_linear_cross_entropy(
        p.hidden, p.weight, p.labels, **settings
    )


def _liger_jsd(p: Rows) -> Tensor:
    assert p.teacher_logits is not None
    return liger.functional().liger_jsd(p.logits, p.teacher_logits, beta=p.beta)


def _liger_linear_jsd(p: Heads) -> Tensor:
    return liger.functional().liger_fused_linear_jsd(
        p.hidden,
        p.weight,
        p.teacher_hidden,
        p.teacher_weight,
        shift_labels=p.labels,
        jsd_beta=p.beta,
    )


def _liger_linear_kl(p: Heads) -> Tensor:
    target = F.softmax(F.linear(p.teacher_hidden, p.teacher_weight), -1)
    return liger.functional().liger_fused_linear_kl_div(
        p.hidden, p.weight, target, shift_labels=p.labels
    )


def _liger_chunked(p: Heads) -> Tensor:
    loss = require_module("liger_kernel.chunked_loss", LIGER).LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=p.beta, compiled=False
    )
    teacher = p.teacher_hidden, p.teacher_weight
    return loss(p.hidden, p.weight, *teacher, p.labels, p.bias, p.teacher_bias)


liger_ce = Call(
    "Liger",
    LIGER,
    "liger_cross_entropy(z, y)",
    lambda p: liger.functional().liger_cross_entropy(p.logits, p.labels),
    kernels=True,
)
liger_jsd = Call("Liger", LIGER, "liger_jsd(log_q, log_p)", _liger_jsd, kernels=True)
liger_linear_jsd = Call(
    "Liger", LIGER, "liger_fused_linear_jsd(h, W, ht, Wt)", _liger_linear_jsd, kernels=True
)
liger_linear_kl = Call(
    "Liger", LIGER, "liger_fused_linear_kl_div(h, W, p)", _liger_linear_kl, kernels=True
)
liger_chunked = Call(
    "Liger chunked", LIGER, "LigerFusedLinearJSDLoss(0, 1, beta)(h, W, ht, Wt, y)", _liger_chunked
)


def liger_linear_ce(**settings: Any) -> Call:
    words = f", {_words(settings)}" if settings else ""
    call = f"liger_fused_linear_cross_entropy(h, W, y{words})"
    return Call("Liger", LIGER, call, lambda p: _liger_linear_ce(p, **settings), kernels=True)


# --- TRL and flash-linear-attention --------------------------------------------------------------


def _trl_rows(p: Rows) -> Tensor:
    function = require_module("trl.kernels.logprob_entropy", TRL).selective_log_softmax_and_entropy
    return -function(p.logits, p.labels, 1.0, None)[0].mean()


def _trl_linear_ce(p: Heads) -> Tensor:
    function = require_module("trl.kernels.chunked_logprob", TRL).ChunkedLogProbFunction
    rows = function.apply(p.hidden, p.weight, None, p.labels, 1.0, 32768, None, 1.0, ())[0]
    return -rows.mean()


def _trl_linear_kl(p: Heads) -> Tensor:
    function = require_module("trl.kernels.chunked_divergence", TRL).ChunkedDivergenceFunction
    student, teacher = (
        (p.hidden, p.weight, p.bias),
        (p.teacher_hidden, p.teacher_weight, p.teacher_bias),
    )
    rows, _ = function.apply(*student, *teacher, p.beta, 1.0, 1.0, None, 1.0, None)
    return rows.mean()


def _fla_ce(p: Rows) -> Tensor:
    function = require_module("fla.modules.fused_cross_entropy.ops", FLA).cross_entropy_loss
    return function(p.logits, p.labels)[0].mean()


def _fla_linear_ce(p: Heads) -> Tensor:
    ops = require_module("fla.modules.fused_linear_cross_entropy.ops", FLA)
    return ops.fused_linear_cross_entropy_loss(p.hidden, p.labels, p.weight, None, num_chunks=8)


def _fla_linear_kl(p: Heads) -> Tensor:
    ops = require_module("fla.modules.fused_kl_div.ops", FLA)
    return ops.fused_kl_div_loss(p.hidden, p.teacher_hidden, p.weight, p.teacher_weight)


trl_rows = Call("TRL", TRL, "selective_log_softmax_and_entropy(z, y)", _trl_rows, kernels=True)
trl_linear_ce = Call("TRL", TRL, "ChunkedLogProbFunction.apply(h, W, ...)", _trl_linear_ce)
trl_linear_kl = Call("TRL", TRL, "ChunkedDivergenceFunction.apply(h, W, ...)", _trl_linear_kl)
fla_ce = Call("FLA", FLA, "cross_entropy_loss(z, y)", _fla_ce, kernels=True)
fla_linear_ce = Call(
    "FLA", FLA, "fused_linear_cross_entropy_loss(h, y, W, None)", _fla_linear_ce, kernels=True
)
fla_linear_kl = Call("FLA", FLA, "fused_kl_div_loss(h, ht, W, Wt)", _fla_linear_kl, kernels=True)
