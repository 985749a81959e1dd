"""What runs by default of long grids."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from mutations import MUTATIONS
from support.default_set import spread, thin_out


@pytest.mark.parametrize("sides", [(3, 3), (9, 4), (5, 3, 3), (3, 4, 2), (2, 8), (16, 2), (12, 3)])
def test_a_quarter_runs_and_its_values_are_spread(sides: tuple[int, ...]) -> None:
    cases = list(product(*map(range, sides)))
    count = -(-len(cases) // 4)
    kept = spread(cases, count)
    assert len(kept) == count
    for side, length in enumerate(sides):
        found = [sum(cases[at][side] == value for at in kept) for value in range(length)]
        assert max(found) - min(found) <= 2
        assert all(found) or len(kept) < length


def test_the_share_of_an_uneven_grid() -> None:
    assert spread([(0, 0)], 1) == spread([(0, 0)], 2) == {0}
    assert spread([(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)], 2) == {0, 3}


class Case:
    """What is read of a collected case, and what is written to it."""

    def __init__(self, nodeid: str, position: int, impl: str, *marks: pytest.MarkDecorator) -> None:
        self.nodeid = nodeid
        self.callspec = SimpleNamespace(indices={"x": position}, params={"impl": impl})
        self.marks = {mark.name: mark.mark for mark in marks}

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks[mark.name] = mark.mark

    @property
    def runs(self) -> bool:
        return "slow" not in self.marks


def left_of(impl: str, *marks: pytest.MarkDecorator, interpreted: bool = True) -> list[bool]:
    cases: list[Any] = [Case(f"test_a[{n}]", n, impl, *marks) for n in range(12)]
    thin_out(cases, interpreted=interpreted)
    return [case.runs for case in cases]


def test_which_grids_are_thinned() -> None:
    few = pytest.mark.few(2)
    assert sum(left_of("torch")) == sum(left_of("triton", interpreted=False)) == 12
    assert sum(left_of("triton")) == 3
    assert sum(left_of("torch", few)) == sum(left_of("torch", few, interpreted=False)) == 2
    assert sum(left_of("triton", few)) == 2


def test_a_case_that_a_planted_fault_needs_runs() -> None:
    guard = MUTATIONS[0].red[0]
    cases: list[Any] = [Case(f"test_a[{n}]", n, "torch", pytest.mark.few(2)) for n in range(12)]
    cases[7].nodeid, other = guard, [case for case in cases if case is not cases[7]]
    for case in other:
        case.nodeid = f"{guard.partition('[')[0]}[{case.nodeid}]"
    thin_out(cases, interpreted=False)
    assert cases[7].runs and 2 <= sum(case.runs for case in cases) <= 3
