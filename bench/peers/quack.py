"""QuACK's CuTe DSL kernels (quack-kernels)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.base import Peer, require_kind, require_module
from bench.problems.inputs import Hidden, Logits

PACKAGE = "quack-kernels"
CHUNK_SIZE = 4096  # rows


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    require_kind(problem, "ce", what="has no divergence")
    function = require_module("quack.cross_entropy", PACKAGE).cross_entropy
    return lambda: function(problem.logits, problem.labels)


def of_hidden(problem: Hidden) -> Callable[[], Tensor]:
    require_kind(problem, "ce", what="has no divergence")
    quack = require_module("quack.linear_cross_entropy", PACKAGE)
    h, w, labels = problem.hidden, problem.weight, problem.labels
    return lambda: quack.chunked_linear_cross_entropy(h, w, labels, chunk_size=CHUNK_SIZE)


LOGITS = (Peer("quack", "quack.cross_entropy", of_logits, PACKAGE, devices=("cuda",)),)
HIDDEN = (
    Peer(
        "quack",
        "chunked_linear_cross_entropy",
        of_hidden,
        PACKAGE,
        {"chunk_size": CHUNK_SIZE},
        devices=("cuda",),
    ),
)
