"""Curriculum: the weight of each distillation loss as a function of training progress.

With ``x = min(1, step / total_steps)``, each weight is its full value times

    kd                        1
    feature, attention        clamp((x - 0.3) / 0.3, 0, 1)
    relations, router         as feature
    layerwise, contrastive    clamp((x - 0.6) / 0.4, 0, 1)

so the student first learns the teacher's outputs, then how its layers arrive at them. Cross-entropy
is on throughout and not in this table. A term of weight 0 need not be computed.

Any loss can have a schedule of its own instead: points ``(x, factor)``, joined by straight lines,
constant before the first and after the last. Of two points at one ``x`` the later holds from there
on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

RAMPS: dict[str, tuple[float, float] | None] = {
    "kd": None,
    "feature": (0.3, 0.6),
    "attention": (0.3, 0.6),
    "relations": (0.3, 0.6),
    "layerwise": (0.6, 1.0),
    "contrastive": (0.6, 1.0),
    "router": (0.3, 0.6),
}
"""Loss -> the shares of training at which it begins to be phased in and is fully on; None: always
on. These are all the losses that a curriculum knows; the configuration has a key for each."""

Points = Sequence[Sequence[float]]


class Curriculum:
    """Loss weights over training: the full ``weights`` times the factors of this module's table.

    Progress is counted in micro-batches consumed, of ``total_steps`` planned. Read the weights once
    per window, at its first micro-batch, so that a window has one objective.

    ``schedules`` replace the phases of the losses that they name.

    Raises ``ValueError`` for a loss that has no phase, for a weight that is negative or not finite,
    for points whose ``x`` do not rise from 0 to 1 at most and for ``total_steps`` below 1;
    ``TypeError`` for other types.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        total_steps: int,
        schedules: Mapping[str, Points] | None = None,
    ) -> None:
        self._full = _checked_weights(weights)
        self.total_steps = _checked_total(total_steps)
        self._schedules = _checked_schedules(schedules or {})

    def weights(self, step: int | None = None) -> dict[str, float]:
        """The weights after ``step`` micro-batches; for None the full ones."""
        if step is None:
            return dict(self._full)
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}; count micro-batches from 0")
        x = min(1.0, step / self.total_steps)
        return {name: full * self._factor(name, x) for name, full in self._full.items()}

    def _factor(self, name: str, x: float) -> float:
        points = self._schedules.get(name)
        return _ramp_factor(name, x) if points is None else _interpolated(points, x)

    def state_dict(self) -> dict[str, Any]:
        """``weights``, ``total_steps``, ``schedules``; the caller keeps the micro-batch counter."""
        schedules = {name: [list(p) for p in points] for name, points in self._schedules.items()}
        weights = dict(self._full)
        return {"weights": weights, "total_steps": self.total_steps, "schedules": schedules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over weights, length and schedules of ``state``, checked as in the constructor."""
        # All three are checked before one is assigned.
        full, total_steps = _checked_weights(state["weights"]), _checked_total(state["total_steps"])
        schedules = _checked_schedules(state["schedules"])
        self._full, self.total_steps, self._schedules = full, total_steps, schedules


def _ramp_factor(name: str, x: float) -> float:
    ramp = RAMPS[name]
    if ramp is None:
        return 1.0
    start, end = ramp
    return min(1.0, max(0.0, (x - start) / (end - start)))


def is_schedule(points: Points) -> bool:
    """Whether these are points (x, factor) with x rising from 0 to 1 at most and factors >= 0."""
    if not points or any(len(point) != 2 for point in points):
        return False
    rising = all(a <= b for a, b in pairwise([0.0, *(x for x, _ in points), 1.0]))
    return rising and all(math.isfinite(factor) and factor >= 0 for _, factor in points)


def _interpolated(points: tuple[tuple[float, float], ...], x: float) -> float:
    """The factor at ``x`` on the broken line through ``points``, constant beyond its ends."""
    if x < points[0][0]:
        return points[0][1]
    for before, after in pairwise(points):
        if before[0] <= x < after[0]:
            share = (x - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
    return points[-1][1]


def _checked_schedules(
    schedules: Mapping[str, Points],
) -> dict[str, tuple[tuple[float, float], ...]]:
    _require_known("schedules", schedules)
    for name, points in schedules.items():
        if not is_schedule(points):
            raise ValueError(
                f"the schedule of {name} must be points (x, factor) with x rising from 0 to 1 at "
                f"most and factors >= 0, got {points}; for example [[0, 0], [0.5, 1]]"
            )
    return {
        name: tuple((float(x), float(f)) for x, f in points) for name, points in schedules.items()
    }


def _require_known(what: str, losses: Iterable[str]) -> None:
    for name in losses:
        if name not in RAMPS:
            raise ValueError(
                f"curriculum {what} must be of {', '.join(RAMPS)}, got {name!r}; cross-entropy is "
                "always on and has no place here, another loss needs a row in "
                "sad.curriculum.RAMPS"
            )


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    _require_known("weights", weights)
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"the weight of {name} must be a number, got {weight!r}; pass a float")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"the weight of {name} must be a finite number >= 0, got {weight}; 0 turns it off"
            )
    return {name: float(weight) for name, weight in weights.items()}


def _checked_total(total_steps: int) -> int:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int):
        raise TypeError(f"total_steps must be an integer, got {total_steps!r}; pass an int")
    if total_steps < 1:
        raise ValueError(
            f"total_steps must be at least 1, got {total_steps}; pass the planned micro-batches"
        )
    return total_steps
