"""Whom we measure beside ourselves: one file per package, one adapter per call.

Every peer gets every case of its kind. What it cannot do stays in the results as a row that says
why; it never gets an easier problem.
"""

from __future__ import annotations

from bench.peers import eager, ema, liger, others, ours, torch_linear, trl
from bench.peers.base import Peer, Unable
from bench.problems.cases import Case, EmaCase

LOGITS: tuple[Peer, ...] = (
    *ours.LOGITS,
    *eager.LOGITS,
    *liger.LOGITS,
    *trl.LOGITS,
    *others.LOGITS,
)
HIDDEN: tuple[Peer, ...] = (
    *ours.HIDDEN,
    *eager.HIDDEN,
    *liger.HIDDEN,
    *trl.HIDDEN,
    *torch_linear.HIDDEN,
    *others.HIDDEN,
)
EMA: tuple[Peer, ...] = (*ours.EMA, *ema.EMA)
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-linear-attention",
    "timm",
    "ema-pytorch",
    "diffusers",
)
"""Distributions whose versions are kept with the results."""


def for_case(case: Case) -> tuple[Peer, ...]:
    if isinstance(case, EmaCase):
        return EMA
    return HIDDEN if case.linear else LOGITS


__all__ = ["PACKAGES", "Peer", "Unable", "for_case"]
