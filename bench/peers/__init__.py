"""The implementations that are measured side by side: one file per package, one ``Peer`` per call.

A file defines some of ``LOGITS``, ``HIDDEN`` and ``EMA``: its peers for losses of given logits, for
losses from hidden states, and for moving averages. To add a package, write such a file and add its
name to ``MODULES``.

Every peer gets every case of its kind. What it cannot do stays in the results as a row that says
why; it never gets an easier problem.
"""

from __future__ import annotations

from importlib import import_module

from bench.peers.base import Peer, Unable
from bench.problems.cases import Case, EmaCase

MODULES = (
    "ours",
    "eager",
    "liger",
    "trl",
    "torch_linear",
    "others",
    "ema",
)
"""Files of this folder, in the order in which their peers are measured and listed."""


def _collect(kind: str) -> tuple[Peer, ...]:
    modules = (import_module(f"bench.peers.{name}") for name in MODULES)
    return tuple(peer for module in modules for peer in getattr(module, kind, ()))


LOGITS, HIDDEN, EMA = _collect("LOGITS"), _collect("HIDDEN"), _collect("EMA")

PACKAGES: tuple[str, ...] = tuple(
    dict.fromkeys(
        ["torch", "triton", "transformers"]
        + [peer.package for peer in (*LOGITS, *HIDDEN, *EMA) if peer.package]
    )
)
"""Distributions whose versions are kept with the results."""


def for_case(case: Case) -> tuple[Peer, ...]:
    """The peers that a case is given to."""
    if isinstance(case, EmaCase):
        return EMA
    return HIDDEN if case.linear else LOGITS


__all__ = ["PACKAGES", "Peer", "Unable", "for_case"]
