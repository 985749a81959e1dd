"""The fused divergences of speculators, for drafts of speculative decoding.

Their file is loaded by itself: the package's ``__init__`` imports what no loss needs
(``pip install --no-deps speculators`` is enough).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.base import Peer, Unsupported, require_file, require_kind
from bench.problems.inputs import IGNORED, Logits

PACKAGE = "speculators"
FILE = "speculators.losses.fused"
FUNCTIONS = {
    "forward_kl": "fused_kl_div_loss",
    "reverse_kl": "fused_reverse_kl_div_loss",
    "jsd": "fused_js_div_loss",
}


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    """A divergence per row at temperature 1; the rows that count are averaged, as its users do."""
    require_kind(problem, "kd", what="has no cross-entropy with labels")
    objective, labels = problem.case.objective, problem.labels
    if objective.divergence == "jsd" and objective.beta != 0.5:
        raise Unsupported("has the JSD with beta 0.5 only")
    if objective.temperature != 1.0:
        raise Unsupported("has temperature 1 only")
    function = getattr(require_file(FILE, PACKAGE), FUNCTIONS[objective.divergence])

    def loss() -> Tensor:
        keep = labels != IGNORED
        rows = function(problem.logits[None], problem.teacher[None])[0]
        return (rows * keep).sum() / keep.sum()

    return loss


CALL = ", ".join(FUNCTIONS.values())
LOGITS = (Peer("speculators", CALL, of_logits, PACKAGE, devices=("cuda",)),)
