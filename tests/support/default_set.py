"""Which cases of a long grid run by default, so that the default run takes minutes.

* Of a test with many cases of interpreted Triton, which takes seconds where torch takes none, a
  quarter runs; torch's cases all run.
* Of a test that is marked ``few(n)``, n cases run.

Both may hold for one test: of the n cases that are Triton's a quarter is left. What runs is spread
evenly over the values of each parameter. Every case that a planted fault needs
(``tests/mutations``) runs as well; the others are marked ``slow``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from mutations import MUTATIONS

FEW = 4  # cases that all run
SHARE = 4  # of more, one of so many does


def thin_out(items: Sequence[pytest.Item], *, interpreted: bool) -> None:
    """Mark the cases ``slow`` that are left out; ``interpreted``: Triton's kernels are."""
    guards = {node_id for mutation in MUTATIONS for node_id in mutation.red}
    marked = grids(items, lambda item: item.get_closest_marker("few") is not None)
    for cases in marked:
        leave_out(cases, cases[0].get_closest_marker("few").args[0], guards)
    if interpreted:
        for cases in grids(items, is_interpreted):
            if len(cases) > FEW:
                leave_out(cases, -(-len(cases) // SHARE), guards)


def grids(items: Sequence[pytest.Item], wanted: Callable[[pytest.Item], bool]) -> list[list[Any]]:
    """The cases of each test that are ``wanted`` and not slow already."""
    found: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        if wanted(item) and item.get_closest_marker("slow") is None:
            found[item.nodeid.partition("[")[0]].append(item)
    return list(found.values())


def leave_out(cases: Sequence[Any], count: int, guards: set[str]) -> None:
    """Mark all cases slow but ``count`` of them and the ``guards``."""
    kept = spread([tuple(item.callspec.indices.values()) for item in cases], count)
    for position, item in enumerate(cases):
        if position not in kept and item.nodeid not in guards:
            item.add_marker(pytest.mark.slow)


def is_interpreted(item: pytest.Item) -> bool:
    """Whether the test is one of a grid over implementations, and this case is Triton's."""
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("impl") == "triton"


def spread(cases: Sequence[tuple[int, ...]], count: int) -> set[int]:
    """The positions of ``count`` of the cases, given by the index of each parameter's value: one
    after the other, that whose values were met least often so far."""
    met: Counter[tuple[int, int]] = Counter()
    left = dict(enumerate(cases))
    for _ in range(min(count, len(cases))):
        chosen = min(left, key=lambda at: sum(met[value] for value in enumerate(left[at])))
        met.update(enumerate(left.pop(chosen)))
    return set(range(len(cases))) - left.keys()
