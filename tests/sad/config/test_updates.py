"""The bound on an update of AdamW holds, and says what overflows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import AdamW

from sad.config.updates import LARGEST_UPDATE, update_bound, update_is_finite

USUAL = ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.0, 0.0), (0.9, 0.95), (0.99, 0.5)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_no_step_is_longer_than_the_bound(betas: tuple[float, float], eps: float) -> None:
    """Gradients that grow, fall and stop are what makes steps long."""
    bound = update_bound(0.1, betas, eps, max_grad_norm=1.0)
    gradients = [1e-3, 1e-2, 0.1, 1.0, 1e-4, 0.0, *[1.0] * 20, *[1e-6] * 20, 0.5, *[0.0] * 20]
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([weight], lr=0.1, betas=betas, eps=eps, weight_decay=0)
    longest = 0.0
    for gradient in gradients:
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        longest = max(longest, abs(weight.item() - before))
    assert 0 < longest <= bound * (1 + 1e-9)


def test_the_first_step_is_the_learning_rate() -> None:
    assert update_bound(0.1, (0.0, 0.0), 1e-8) == pytest.approx(0.1)


def test_an_update_below_the_limit_makes_no_weight_infinite() -> None:
    largest = torch.tensor(torch.finfo(torch.float32).max)
    assert (largest + LARGEST_UPDATE).isfinite()
    assert (largest + 16 * LARGEST_UPDATE).isinf()


@pytest.mark.parametrize(
    ("lr", "weight_decay", "finite"),
    [
        (5e-5, 0.1, True),
        (1.0, 1.0, True),
        (0.0, 1e30, True),
        (1e28, 0.0, True),
        (1e30, 0.0, False),
        (1e38, 0.0, False),
        (-1e38, 0.0, False),
        (1.0, 1.5, False),
        (math.nan, 0.0, False),
        (math.inf, 0.0, False),
        (1.0, math.nan, False),
    ],
)
def test_what_is_finite(lr: float, weight_decay: float, finite: bool) -> None:
    assert update_is_finite(lr, *USUAL, weight_decay) == finite


def test_without_a_bound_by_the_moments_clipping_gives_one() -> None:
    """At beta1^2 >= beta2 a gradient that stops leaves a momentum without a denominator."""
    unbounded = ((0.9, 0.5), 1e-20)
    assert update_is_finite(5e-5, *unbounded, max_grad_norm=1.0)
    assert not update_is_finite(5e-5, *unbounded)
