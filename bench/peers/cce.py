"""Apple's Cut Cross-Entropy (cut-cross-entropy)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.peers.base import Peer, require_kind, require_module
from bench.problems.inputs import Hidden

PACKAGE = "cut-cross-entropy"


def of_hidden(**settings: Any) -> Callable[[Hidden], Callable[[], Tensor]]:
    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "ce", what="has no divergence")
        function = require_module("cut_cross_entropy", PACKAGE).linear_cross_entropy
        h, w, labels = problem.hidden, problem.weight, problem.labels
        return lambda: function(h, w, labels, **settings)

    return build


def _peer(name: str, devices: tuple[str, ...], extra: bool = False, **settings: Any) -> Peer:
    return Peer(
        name,
        "cut_cross_entropy.linear_cross_entropy",
        of_hidden(**settings),
        PACKAGE,
        settings,
        compiles="cpu" in devices,  # there it is torch.compile
        devices=devices,
        extra=extra,
    )


HIDDEN = (
    _peer("cce", ("cuda",), impl="cce"),
    _peer("cce unfiltered", ("cuda",), impl="cce", filter_eps=None, extra=True),
    _peer("cce compiled", ("cuda", "cpu"), impl="torch_compile", extra=True),
)
