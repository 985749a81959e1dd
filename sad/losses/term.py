"""What every structural loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossTerm(NamedTuple):
    """A differentiable sum over a micro-batch and the number of units in it.

    The trainer adds sums and counts over the whole accumulation window before it divides, so the
    gradient does not depend on how the window was split.
    """

    sum: Tensor  # [] differentiable
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """Targets, tokens or sequences in it, known before the forward pass."""
