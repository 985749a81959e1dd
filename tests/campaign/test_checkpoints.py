"""Crafted checkpoints: a sample of the campaign, and the whole of it in the slow suite."""

from __future__ import annotations

import pytest

from campaign.checkpoints import KINDS, run


def test_a_crafted_checkpoint_is_refused_in_one_line_or_restores_the_same() -> None:
    result = run(count=80, kinds=("everything at once",))
    assert result.wrong == []
    assert result.inflicted == 80 and result.refused > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_crafted_checkpoint_is_refused_in_one_line_or_restores_the_same(kind: str) -> None:
    result = run(kinds=(kind,))
    assert result.wrong == []
    assert result.inflicted > 1000
