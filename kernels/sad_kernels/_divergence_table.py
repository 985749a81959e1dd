"""The table of divergences: what every implementation has to know of each one.

This module imports neither torch nor Triton, so that a configuration can be checked without them.
Each implementation keeps a table of its own functions by the names used here (``reference.py``,
``_divergence.py``, ``_triton/tile.py``) and refuses, by ``missing``, a name it has no function for.

To add a divergence: a row here, its name in ``objective.Divergence``, its definition in
``reference.py``, its ``f`` and ``h`` in ``_divergence.py``, and for Triton a code in
``_triton/tile.py`` with a branch in ``divergence_terms`` there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class DivergenceInfo(NamedTuple):
    """Properties of a divergence between a teacher ``p`` and a student ``q``."""

    reads_beta: bool
    """Whether it compares with a mixture of both sides, whose share is ``beta`` in (0, 1)."""
    forward_passes: int
    """Readings of dense logits in forward: 1 if running sums give the value (the two KLs), 2 if
    both normalisers must be known first."""
    gradient_bound: Callable[[float], float]
    """``beta`` -> a bound on ``|h - q sum h|``, the gradient by one logit times T: fp16 gradients
    are scaled by it."""


def _one(beta: float) -> float:
    return 1.0


DIVERGENCES: dict[str, DivergenceInfo] = {
    "forward_kl": DivergenceInfo(reads_beta=False, forward_passes=1, gradient_bound=_one),
    # Not bounded; 32 covers a student and teacher whose log-probabilities lie 128 nats apart.
    "reverse_kl": DivergenceInfo(
        reads_beta=False, forward_passes=1, gradient_bound=lambda beta: 32.0
    ),
    "jsd": DivergenceInfo(reads_beta=True, forward_passes=2, gradient_bound=_one),
    "skew_forward_kl": DivergenceInfo(reads_beta=True, forward_passes=2, gradient_bound=_one),
    "skew_reverse_kl": DivergenceInfo(
        reads_beta=True, forward_passes=2, gradient_bound=lambda beta: 2 - math.log(beta)
    ),
}


def missing(divergence: str, where: str) -> NotImplementedError:
    """The error for a divergence of the table that ``where`` has no function for."""
    return NotImplementedError(
        f"divergence must be one that {where} computes, got {divergence!r}, which is in the table "
        f"of divergences only; add its function to {where}"
    )
