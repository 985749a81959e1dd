"""QuACK's CuTe DSL kernels (quack-kernels)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.base import Peer, Unsupported, require_attribute, require_kind, require_module
from bench.problems.inputs import Hidden, Logits

PACKAGE = "quack-kernels"
CHUNK_SIZE = 4096  # rows
ALIGNMENT = 8  # of rows, columns and widths: its chunked losses load by TMA


def of_logits(problem: Logits) -> Callable[[], Tensor]:
    require_kind(problem, "ce", what="has no divergence")
    function = require_module("quack.cross_entropy", PACKAGE).cross_entropy
    return lambda: function(problem.logits, problem.labels)


def of_hidden(scaled_exp: bool) -> Callable[[Hidden], Callable[[], Tensor]]:
    """The chunked loss: of 16-bit logits, or of exponentials with powers of two (sm_90 only)."""

    def build(problem: Hidden) -> Callable[[], Tensor]:
        require_kind(problem, "ce", what="has no divergence")
        quack = require_module("quack.linear_cross_entropy", PACKAGE)
        # Asked for both: a version without it has one pipeline only, and no such argument.
        supports = require_attribute(quack, "scaled_exp_lce_supported", PACKAGE)
        h, w, labels = problem.hidden, problem.weight, problem.labels
        if any(size % ALIGNMENT for size in (*h.shape, *w.shape)):
            raise Unsupported(f"takes multiples of {ALIGNMENT} rows, columns and widths only")
        if scaled_exp and not supports(h, w, CHUNK_SIZE, "mean"):
            raise Unsupported("takes bf16 on sm_90 only, and only some vocabularies")
        return lambda: quack.chunked_linear_cross_entropy(
            h, w, labels, chunk_size=CHUNK_SIZE, use_scaled_exp=scaled_exp
        )

    return build


def _linear(name: str, scaled_exp: bool) -> Peer:
    settings = {"chunk_size": CHUNK_SIZE, "use_scaled_exp": scaled_exp}
    build, call = of_hidden(scaled_exp), "chunked_linear_cross_entropy"
    return Peer(name, call, build, PACKAGE, settings, devices=("cuda",))


LOGITS = (Peer("quack", "quack.cross_entropy", of_logits, PACKAGE, devices=("cuda",)),)
HIDDEN = (_linear("quack", scaled_exp=False), _linear("quack scaled exp", scaled_exp=True))
