"""Registry of the implementations that the benchmark compares, ours among them.

One module per package, which may hold three tuples of ``Peer``: ``LOGITS`` (losses of logits),
``HIDDEN`` (losses of hidden states and a head) and ``EMA`` (moving averages). To add a peer, write
its module and name it in ``MODULES``.

Every peer gets every case of its kind. What it does not support stays in the results as a row with
the reason; no peer gets an easier problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from bench.peers.base import Peer, Unsupported
from bench.problems.cases import Case, EmaCase

MODULES = (  # in the order of the results' rows
    "ours",
    "eager",
    "liger",
    "trl",
    "unsloth",
    "torch_linear",
    "cce",
    "quack",
    "fla",
    "speculators",
    "ema",
)


def for_case(case: Case) -> tuple[Peer, ...]:
    """Every peer of the case's kind, in the order of ``MODULES``."""
    if isinstance(case, EmaCase):
        return tuple(_peers("EMA"))
    return tuple(_peers("HIDDEN" if case.linear else "LOGITS"))


def packages() -> list[str]:
    """The distributions whose versions are recorded: torch's and every peer's."""
    found = ["torch", "triton", "transformers"]
    found += [peer.package for peer in _peers("LOGITS", "HIDDEN", "EMA") if peer.package]
    return list(dict.fromkeys(found))


def _peers(*kinds: str) -> Iterator[Peer]:
    for name in MODULES:
        module = import_module(f"{__name__}.{name}")
        for kind in kinds:
            yield from getattr(module, kind, ())


__all__ = ["Peer", "Unsupported", "for_case", "packages"]
