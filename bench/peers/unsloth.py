"""Unsloth's fused linear losses (unsloth_zoo), from the user's own installation.

That package is under the AGPL, and its ``__init__`` patches transformers and looks for a GPU: the
one file is loaded by itself where the package is installed, and is no part of this repository
(``pip install --no-deps unsloth_zoo`` is enough).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.base import Peer, Unsupported, beta_of, require_file
from bench.problems.inputs import IGNORED, Hidden

PACKAGE = "unsloth_zoo"
FILE = "unsloth_zoo.fused_losses.fused_linear"


def of_hidden(problem: Hidden) -> Callable[[], Tensor]:
    """Cross-entropy or a divergence; a joint loss calls both functions, one after the other."""
    if problem.case.top_k:
        raise Unsupported("takes no top-k teacher")
    fused = require_file(FILE, PACKAGE)
    o, labels, beta = problem.case.objective, problem.labels, beta_of(problem)
    h, w, ht, wt = (
        problem.hidden, problem.weight, problem.teacher_hidden, problem.cut_teacher_weight
    )  # fmt: skip

    def ce() -> Tensor:
        count = (labels != IGNORED).sum()
        return fused.fused_linear_cross_entropy(h, w, None, labels, divisor=count)

    def kd() -> Tensor:
        T = o.temperature
        return fused.fused_linear_jsd(h, w, ht, wt, labels=labels, beta=beta, temperature=T)

    calls = {"ce": ce, "kd": kd, "joint": lambda: o.ce_weight * ce() + o.kd_weight * kd()}
    return calls[problem.case.kind]


HIDDEN = (Peer("unsloth", "fused_linear_cross_entropy, fused_linear_jsd", of_hidden, PACKAGE),)
