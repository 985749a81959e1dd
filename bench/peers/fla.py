"""flash-linear-attention's fused losses (flash-linear-attention)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.base import Peer, Unsupported, require_kind, require_module, select_valid_rows
from bench.problems.inputs import Hidden, Logits

PACKAGE = "flash-linear-attention"
NUM_CHUNKS = 8


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    require_kind(problem, "ce", what="has no divergence")
    function = require_module("fla.modules.fused_cross_entropy.ops", PACKAGE).cross_entropy_loss
    valid = problem.case.valid
    return lambda: function(problem.logits, problem.labels)[0].sum() / valid


def of_hidden(problem: Hidden) -> Callable[[], Tensor]:
    """Cross-entropy, or forward KL at temperature 1 of the valid rows, selected inside the call."""
    require_kind(problem, "ce", "kd", what="has no cross-entropy and KL together")
    h, w, labels = problem.hidden, problem.weight, problem.labels
    if problem.case.kind == "ce":
        ce = require_module("fla.modules.fused_linear_cross_entropy.ops", PACKAGE)
        return lambda: ce.fused_linear_cross_entropy_loss(h, labels, w, None, num_chunks=NUM_CHUNKS)
    objective = problem.case.objective
    if objective.divergence != "forward_kl" or objective.temperature != 1.0:
        raise Unsupported("has the forward KL at temperature 1 only")
    kl = require_module("fla.modules.fused_kl_div.ops", PACKAGE).fused_kl_div_loss
    wt, ignored = problem.cut_teacher_weight, problem.case.ignored

    def loss() -> Tensor:
        _, h, ht = select_valid_rows(labels, ignored, problem.hidden, problem.teacher_hidden)
        return kl(h, ht, w, wt)

    return loss


LOGITS = (Peer("fla", "fla cross_entropy_loss", of_logits, PACKAGE, devices=("cuda",)),)
HIDDEN = (
    Peer(
        "fla",
        "fused_linear_cross_entropy_loss, fused_kl_div_loss",
        of_hidden,
        PACKAGE,
        {"num_chunks": NUM_CHUNKS},
        devices=("cuda",),
    ),
)
