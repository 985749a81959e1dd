"""The projector: widths, norms at the start, and whose random numbers it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sad.losses.base import make_projector


def test_equal_widths_need_none() -> None:
    projector = make_projector(8, 8)
    assert isinstance(projector, nn.Identity) and not list(projector.parameters())


def test_a_wider_teacher_leaves_every_norm() -> None:
    states = torch.randn(50, 24)
    projector = make_projector(24, 40)
    assert list(dict(projector.named_parameters())) == ["weight"]
    torch.testing.assert_close(projector(states).norm(dim=-1), states.norm(dim=-1))


def test_a_narrower_teacher_leaves_the_norm_on_average() -> None:
    states = torch.randn(2000, 40)
    squares = make_projector(40, 24)(states).square().sum(-1).mean()
    assert squares.item() == pytest.approx(states.square().sum(-1).mean().item(), rel=0.03)


@pytest.mark.parametrize("widths", [(24, 40), (40, 24)])
def test_all_directions_are_kept_apart(widths: tuple[int, int]) -> None:
    projector = make_projector(*widths)
    singular = torch.linalg.svdvals(projector.get_parameter("weight"))
    torch.testing.assert_close(singular, singular[:1].expand(24))


def test_the_seed_decides() -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(make_projector(8, 12).get_parameter("weight"))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
