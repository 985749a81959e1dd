"""The table of divergences: their names, and what every implementation has to know of each.

This module imports neither torch nor Triton, so that a configuration can be checked without them.
Each implementation keeps its own functions in a table by the names used here (``reference.py``,
``_divergence.py``, ``_triton/tile.py``) and raises ``missing`` for a name it has no function for: a
divergence works in a path, or fails there with an error, and is never left out of a sum.

To add a divergence ``D(p, q) = sum_v f(p_v, q_v)``:

1. here: a row, with ``kl_weights`` if it is a weighted sum of the two KLs, and its name in the type
   ``Divergence``; its formula in the docstring of ``Objective``;
2. ``reference.py``: its definition, a function of log-probabilities, in ``DEFINITIONS``;
3. ``_divergence.py``: its ``f`` and ``h``, a function in ``TERMS``, for all of the torch path;
4. ``_triton/tile.py``: a code in ``DIVERGENCE_CODES``, and the branches that are named there.

``tests/sad_kernels/test_divergence_table.py`` fails until none of them is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

Divergence = Literal[
    "forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"
]
"""The names of the table, for type checkers."""


class DivergenceInfo(NamedTuple):
    """Properties of a divergence between a teacher ``p`` and a student ``q``."""

    reads_beta: bool
    """Whether ``beta`` in (0, 1) is part of it: the share of a mixture, or the weight of a KL."""
    gradient_bound: Callable[[float], float]
    """``beta`` -> a bound on ``|h - q sum h|``, the gradient by one logit times T: fp16 gradients
    are scaled by it."""
    kl_weights: Callable[[float], tuple[float, float]] | None = None
    """``beta`` -> the weights of KL(p || q) and KL(q || p) whose sum it is; None: another one."""
    needs_full_support: bool = False
    """Whether it is infinite where p is 0 and q is not, as for a ``TeacherTopK`` with tail "zero",
    which is refused then."""

    @property
    def forward_passes(self) -> Literal[1, 2]:
        """Readings of dense logits in forward: 1 if running sums give the value (the KLs), 2 if
        both normalisers must be known before the first term can be formed."""
        return 2 if self.kl_weights is None else 1


def _one(beta: float) -> float:
    return 1.0


REVERSE_KL_BOUND = 32.0
"""Not bounded; 32 covers a student and teacher whose log-probabilities lie 128 nats apart."""

DIVERGENCES: dict[str, DivergenceInfo] = {
    "forward_kl": DivergenceInfo(
        reads_beta=False, gradient_bound=_one, kl_weights=lambda beta: (1.0, 0.0)
    ),
    "reverse_kl": DivergenceInfo(
        reads_beta=False,
        gradient_bound=lambda beta: REVERSE_KL_BOUND,
        kl_weights=lambda beta: (0.0, 1.0),
        needs_full_support=True,
    ),
    "jeffreys": DivergenceInfo(
        reads_beta=True,
        gradient_bound=lambda beta: beta + (1 - beta) * REVERSE_KL_BOUND,
        kl_weights=lambda beta: (beta, 1 - beta),
        needs_full_support=True,
    ),
    "jsd": DivergenceInfo(reads_beta=True, gradient_bound=_one),
    "skew_forward_kl": DivergenceInfo(reads_beta=True, gradient_bound=_one),
    "skew_reverse_kl": DivergenceInfo(
        reads_beta=True, gradient_bound=lambda beta: 2 - math.log(beta)
    ),
    "tvd": DivergenceInfo(reads_beta=False, gradient_bound=_one),
}


def missing(divergence: str, where: str) -> NotImplementedError:
    """The error for a divergence of the table that ``where`` has no function for."""
    return NotImplementedError(
        f"divergence must be one that {where} computes, got {divergence!r}, which is in the table "
        f"of divergences only; add its function to {where}"
    )
