"""A bound on what one step of AdamW changes, known before the step is taken.

Per element the step is ``lr * m / (sqrt(v) + eps)``, with the moments ``m`` and ``v`` corrected for
their bias. Two bounds hold, of which the smaller counts:

* By Cauchy-Schwarz ``|m| / sqrt(v)`` is at most ``1 / sqrt((1 - beta2) * (1 - beta1^2 / beta2))``
  if ``beta1^2 < beta2``, whatever the gradients were.
* ``|m|`` is at most the largest gradient there was, and the denominator at least ``eps``.

Below ``LARGEST_UPDATE`` no sum of an fp32 weight and an update is infinite: near the largest finite
number, 2^128, numbers lie 2^104 apart, and what is less than half of that is rounded away.
"""

from __future__ import annotations

import math

LARGEST_UPDATE = 2.0**100
"""An eighth of what could carry an fp32 weight to infinity: room for the moments' rounding."""

_LARGEST_GRADIENT = 2.0**64
"""One whose square is finite in fp32: another makes the gradient's norm infinite."""


def update_bound(
    lr: float, betas: tuple[float, float], eps: float, *, max_grad_norm: float = 0.0
) -> float:
    """What a step changes of a weight at most, weight decay left out. ``max_grad_norm`` 0: the
    gradient is not clipped."""
    largest_gradient = max_grad_norm if 0 < max_grad_norm < math.inf else _LARGEST_GRADIENT
    return abs(lr) * min(_largest_ratio(*betas), largest_gradient / eps if eps else math.inf)


def update_is_finite(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    *,
    max_grad_norm: float = 0.0,
) -> bool:
    """Whether no step of this kind makes a finite weight infinite or NaN, its decay included."""
    bound = update_bound(lr, betas, eps, max_grad_norm=max_grad_norm)
    return bound < LARGEST_UPDATE and abs(lr * weight_decay) <= 1  # False if one is NaN


def _largest_ratio(beta1: float, beta2: float) -> float:
    if beta1 == 0:
        return 1 / math.sqrt(1 - beta2)
    ratio = beta1**2 / beta2 if beta2 else math.inf
    return 1 / math.sqrt((1 - beta2) * (1 - ratio)) if ratio < 1 else math.inf
