"""What runs by default of the grids of interpreted kernels."""

from __future__ import annotations

from itertools import product

import pytest
from support.default_set import spread


@pytest.mark.parametrize("sides", [(3, 3), (9, 4), (5, 3, 3), (3, 4, 2), (2, 8), (16, 2), (12, 3)])
def test_a_quarter_runs_and_its_values_are_spread(sides: tuple[int, ...]) -> None:
    cases = list(product(*map(range, sides)))
    kept = spread(cases)
    assert len(kept) == -(-len(cases) // 4)
    for side, length in enumerate(sides):
        found = [sum(cases[at][side] == value for at in kept) for value in range(length)]
        assert max(found) - min(found) <= 2
        assert all(found) or len(kept) < length


def test_the_share_of_an_uneven_grid() -> None:
    assert spread([(0, 0)]) == {0}
    assert spread([(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]) == {0, 3}
