"""The structural losses of a run: what each looks at, trains and remembers.

A loss here is one small module: the layers that it wants to see of student and teacher
(``CaptureSpec``), its own parameters (projectors, on the student's side) and buffers (a queue), and
a ``forward`` that turns what was seen into ``LossTerm``s. The mathematics is in ``sad.losses``.

Nothing is captured, computed or kept for a loss whose weight is 0 at the moment. What is trained
here is in checkpoints and never in an exported student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.losses.attention import AttentionLoss
from sad.losses.base import CaptureSpec, LossInputs, LossTerms, StructuralLoss
from sad.losses.capture import Capture
from sad.losses.contrastive import ContrastiveLoss
from sad.losses.feature import FeatureLoss
from sad.losses.layerwise import (
    LayerwiseLoss,
)
from sad.losses.relations import RelationLoss
from sad.losses.router import RouterLoss

LOSSES: dict[str, type[Any]] = {
    loss.name: loss
    for loss in (
        FeatureLoss,
        AttentionLoss,
        RelationLoss,
        LayerwiseLoss,
        ContrastiveLoss,
        RouterLoss,
    )
}
"""By the name of their section in the configuration."""


class StructuralLosses(nn.Module):
    """All structural losses of a run that have a weight.

    Raises ``UnfitError`` for a loss that the models cannot supply, in one line that names the loss,
    the model and the remedy.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
    ) -> None:
        super().__init__()
        self.models = [student, teacher]  # a list: their parameters are not ours
        with torch.random.fork_rng(devices=[]):  # a student with them starts as one without
            torch.manual_seed(config.seed)
            self.losses = nn.ModuleDict(
                {name: LOSSES[name](config, student, teacher) for name in config.structural_weights}
            )
        self.to(next(student.parameters()).device)
        self._captures: dict[tuple[str, ...], tuple[Capture, Capture]] = {}
        self._capture(tuple(self.losses))  # to complain now

    @property
    def names(self) -> tuple[str, ...]:
        """Every term of the total loss that can come up."""
        return tuple(name for loss in self._all() for name in loss.weights(1.0))

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """Every term that can come up for the log alone."""
        return tuple(name for loss in self._all() for name in loss.diagnostics)

    def weights(self, of_losses: Mapping[str, float]) -> dict[str, float]:
        """Term -> weight, of the losses that are on."""
        on = {name: of_losses.get(name, 0.0) for name in self.losses}
        return {
            term: weight
            for name, full in on.items()
            if full > 0
            for term, weight in self._loss(name).weights(full).items()
        }

    def active(self, of_losses: Mapping[str, float]) -> tuple[str, ...]:
        """The losses that are on."""
        return tuple(name for name in self.losses if of_losses.get(name, 0.0) > 0)

    def teacher_capture(self, names: Sequence[str]) -> Capture:
        return self._capture(tuple(names))[1]

    def student_capture(self, names: Sequence[str]) -> Capture:
        return self._capture(tuple(names))[0]

    def terms(self, names: Iterable[str], inputs: LossInputs) -> LossTerms:
        """The terms of these losses: sums over the micro-batch, and their counts."""
        terms: LossTerms = {}
        for name in names:
            terms |= self._loss(name)(inputs)
        return terms

    def unit_of(self, term: str) -> str:
        """``tokens`` or ``sequences``."""
        return next(loss.unit for loss in self._all() if term in loss.weights(1.0))

    def _loss(self, name: str) -> StructuralLoss:
        return cast(StructuralLoss, self.losses[name])

    def _all(self) -> list[StructuralLoss]:
        return [self._loss(name) for name in self.losses]

    def _capture(self, names: tuple[str, ...]) -> tuple[Capture, Capture]:
        if names not in self._captures:
            losses = [self._loss(name) for name in names]
            student, teacher = self.models
            self._captures[names] = (
                Capture(
                    student, union(x.student_spec for x in losses), role="student", detach=False
                ),
                Capture(
                    teacher, union(x.teacher_spec for x in losses), role="teacher", detach=True
                ),
            )
        return self._captures[names]


# Details


def union(spec: Iterable[CaptureSpec]) -> CaptureSpec:
    """Every layer that one of them names, once."""
    parts = list(spec)

    def merged(name: str) -> tuple[int, ...]:
        return tuple(sorted({layer for part in parts for layer in getattr(part, name)}))

    return CaptureSpec(
        *(merged(name) for name in ("hidden", "attention", "projections", "routers"))
    )
