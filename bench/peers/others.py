"""Cut Cross-Entropy, QuACK and flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.peers.base import Peer, Unable, kept_rows, module, only
from bench.problems.inputs import Hidden, Logits

CCE, QUACK, FLA = "cut-cross-entropy", "quack-kernels", "flash-linear-attention"


def cut(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        only(problem, "ce", what="has no divergence")
        function = module("cut_cross_entropy", CCE).linear_cross_entropy
        h, w, labels = problem.hidden, problem.weight, problem.labels
        return lambda: function(h, w, labels, **settings)

    return build


def quack_logits(problem: Logits) -> Callable[[], Tensor]:
    only(problem, "ce", what="has no divergence")
    function = module("quack.cross_entropy", QUACK).cross_entropy
    return lambda: function(problem.logits, problem.labels)


def quack_hidden(problem: Hidden) -> Callable[[], Tensor]:
    only(problem, "ce", what="has no divergence")
    quack = module("quack.linear_cross_entropy", QUACK)
    h, w, labels = problem.hidden, problem.weight, problem.labels
    return lambda: quack.chunked_linear_cross_entropy(h, w, labels, chunk_size=4096)


def fla_logits(problem: Logits) -> Callable[[], Tensor]:
    only(problem, "ce", what="has no divergence")
    function = module("fla.modules.fused_cross_entropy.ops", FLA).cross_entropy_loss
    valid = problem.case.valid
    return lambda: function(problem.logits, problem.labels)[0].sum() / valid


def fla_hidden(problem: Hidden) -> Callable[[], Tensor]:
    """Its KL knows neither ignored rows nor a temperature."""
    only(problem, "ce", "kd", what="has no cross-entropy and KL together")
    h, w, labels = problem.hidden, problem.weight, problem.labels
    if problem.case.kind == "ce":
        ce = module("fla.modules.fused_linear_cross_entropy.ops", FLA)
        return lambda: ce.fused_linear_cross_entropy_loss(h, labels, w, None, num_chunks=8)
    objective = problem.case.objective
    if objective.divergence != "forward_kl" or objective.temperature != 1.0:
        raise Unable("has the forward KL at temperature 1 only")
    kl = module("fla.modules.fused_kl_div.ops", FLA).fused_kl_div_loss
    wt, ignored = problem.cut_teacher_weight, problem.case.ignored

    def loss() -> Tensor:
        _, h, ht = kept_rows(labels, ignored, problem.hidden, problem.teacher_hidden)
        return kl(h, ht, w, wt)

    return loss


def _cut(name: str, devices: tuple[str, ...], extra: bool = False, **settings: Any) -> Peer:
    call, compiles = "cut_cross_entropy.linear_cross_entropy", "cpu" in devices
    return Peer(
        name, call, cut(**settings), CCE, settings, compiles=compiles, devices=devices, extra=extra
    )


LOGITS = (
    Peer("quack", "quack.cross_entropy", quack_logits, QUACK, devices=("cuda",)),
    Peer("fla", "fla cross_entropy_loss", fla_logits, FLA, devices=("cuda",)),
)
HIDDEN = (
    _cut("cce", ("cuda",), impl="cce"),
    _cut("cce unfiltered", ("cuda",), impl="cce", filter_eps=None, extra=True),
    _cut("cce compiled", ("cuda", "cpu"), impl="torch_compile", extra=True),
    Peer(
        "quack",
        "chunked_linear_cross_entropy",
        quack_hidden,
        QUACK,
        {"chunk_size": 4096},
        devices=("cuda",),
    ),
    Peer(
        "fla",
        "fused_linear_cross_entropy_loss, fused_kl_div_loss",
        fla_hidden,
        FLA,
        {"num_chunks": 8},
        devices=("cuda",),
    ),
)
