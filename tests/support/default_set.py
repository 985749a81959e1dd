"""Which cases of a long grid run by default: an interpreted kernel takes seconds, torch none.

Of a test with many cases of interpreted Triton a quarter runs by default, spread evenly, and every
case that a planted fault needs (``tests/mutations``); the others are marked ``slow``. torch's cases
all run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from mutations import MUTATIONS

FEW = 4  # cases that all run
SHARE = 4  # of more, one of so many does


def thin_out(items: Sequence[pytest.Item]) -> None:
    """Mark the cases ``slow`` that are left out."""
    guards = {node_id for mutation in MUTATIONS for node_id in mutation.red}
    grids: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        if is_interpreted(item) and item.get_closest_marker("slow") is None:
            grids[item.nodeid.partition("[")[0]].append(item)
    for cases in grids.values():
        if len(cases) <= FEW:
            continue
        kept = spread([tuple(item.callspec.indices.values()) for item in cases])
        for position, item in enumerate(cases):
            if position not in kept and item.nodeid not in guards:
                item.add_marker(pytest.mark.slow)


def is_interpreted(item: pytest.Item) -> bool:
    """Whether the test is one of a grid over implementations, and this case is Triton's."""
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("impl") == "triton"


def spread(cases: Sequence[tuple[int, ...]]) -> set[int]:
    """The positions of a quarter of the cases, given by the index of each parameter's value: one
    after the other, that whose values were met least often so far."""
    met: Counter[tuple[int, int]] = Counter()
    left = dict(enumerate(cases))
    for _ in range(-(-len(cases) // SHARE)):
        chosen = min(left, key=lambda at: sum(met[value] for value in enumerate(left[at])))
        met.update(enumerate(left.pop(chosen)))
    return set(range(len(cases))) - left.keys()
