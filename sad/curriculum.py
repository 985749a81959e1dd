"""The curriculum: which distillation losses are on, and how strongly, at each point of training.

With ``x = min(1, step / total_steps)``, each weight is its full value times

    kd                        1
    feature, attention        clamp((x - 0.3) / 0.3, 0, 1)
    router                    as feature
    layerwise, contrastive    clamp((x - 0.6) / 0.4, 0, 1)

so the student first learns what the teacher says, then how its layers arrive at it. Cross-entropy
is on throughout and not in this table. A weight of 0 means that the term need not be computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

RAMPS: dict[str, tuple[float, float] | None] = {
    "kd": None,
    "feature": (0.3, 0.6),
    "attention": (0.3, 0.6),
    "router": (0.3, 0.6),
    "layerwise": (0.6, 1.0),
    "contrastive": (0.6, 1.0),
}
"""Where each loss begins to be phased in and where it is fully on, as shares of training."""


class Curriculum:
    """Scales the full ``weights`` by the phase of training; see the table of this module.

    The clock is the number of micro-batches consumed, of ``total_steps`` planned. Read it once per
    window, at its first micro-batch, so that a window has one objective.

    Raises ``ValueError`` for a loss that has no phase, for a weight that is negative or not finite
    and for ``total_steps`` below 1; ``TypeError`` for other types.
    """

    def __init__(self, weights: Mapping[str, float], total_steps: int) -> None:
        self._full = _checked_weights(weights)
        self.total_steps = _checked_total(total_steps)

    def weights(self, step: int | None = None) -> dict[str, float]:
        """The weights after ``step`` micro-batches; ``None`` gives the full ones."""
        if step is None:
            return dict(self._full)
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}; count micro-batches from 0")
        x = min(1.0, step / self.total_steps)
        return {name: full * _share(name, x) for name, full in self._full.items()}

    def state_dict(self) -> dict[str, Any]:
        """Full weights and length: the position is the trainer's micro-batch counter."""
        return {"weights": dict(self._full), "total_steps": self.total_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights and the length of ``state``, checked as in the constructor."""
        full, total_steps = _checked_weights(state["weights"]), _checked_total(state["total_steps"])
        self._full, self.total_steps = full, total_steps


def _share(name: str, x: float) -> float:
    ramp = RAMPS[name]
    if ramp is None:
        return 1.0
    start, end = ramp
    return min(1.0, max(0.0, (x - start) / (end - start)))


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in RAMPS:
            raise ValueError(
                f"curriculum weights must be of {', '.join(RAMPS)}, got {name!r}; "
                "cross-entropy is always on and has no place here"
            )
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
