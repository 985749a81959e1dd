"""The structural losses of a run, as one module: their captures, terms, projectors and queues.

Each loss is a ``StructuralLoss`` in a file of its own: which activations of student and teacher it
needs (``CaptureSpec``), its parameters (projectors, on the student's side) and buffers (a queue),
and a ``forward`` from ``LossInputs`` to ``LossTerms``.

To add one: the file; its class in ``_CLASSES`` below; its section in ``sad.config``, under the same
name. Until all are there, a run that gives it a weight is refused.

Nothing is captured, computed or kept for a loss whose weight is 0 at the moment. What is trained
here is in checkpoints and never in an exported student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.errors import UnfitError
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

_CLASSES = (
    FeatureLoss,
    AttentionLoss,
    RelationLoss,
    LayerwiseLoss,
    ContrastiveLoss,
    RouterLoss,
)
LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in _CLASSES}
"""Name of the loss, which is that of its section in the configuration -> its class."""

assert len(LOSSES) == len(_CLASSES), "two structural losses bear one name"


class StructuralLosses(nn.Module):
    """All structural losses that have a weight in the configuration.

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
        # In a list, which registers no submodules: the models' parameters are not ours.
        self.models = [student, teacher]
        # Projectors draw their weights from a generator of their own: a student with structural
        # losses starts from the same weights, and draws the same dropout, as one without.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.losses = nn.ModuleDict(
                {
                    name: _class_of(name)(config, student, teacher)
                    for name in config.structural_weights
                }
            )
        self.to(next(student.parameters()).device)
        self._captures: dict[tuple[str, ...], tuple[Capture, Capture]] = {}
        self._capture(tuple(self.losses))  # so that models that cannot supply one are refused now

    @property
    def names(self) -> tuple[str, ...]:
        """Every term of the total loss that can come up."""
        return tuple(name for loss in self._all() for name in loss.weights(1.0))

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """Every term that can come up for the log alone."""
        return tuple(name for loss in self._all() for name in loss.diagnostics)

    def weights(self, of_losses: Mapping[str, float]) -> dict[str, float]:
        """Term -> weight in the total loss, of the losses whose weight is above 0."""
        on = {name: of_losses.get(name, 0.0) for name in self.losses}
        return {
            term: weight
            for name, full in on.items()
            if full > 0
            for term, weight in self._loss(name).weights(full).items()
        }

    def active(self, of_losses: Mapping[str, float]) -> tuple[str, ...]:
        """The losses whose weight is above 0."""
        return tuple(name for name in self.losses if of_losses.get(name, 0.0) > 0)

    def teacher_capture(self, names: Sequence[str]) -> Capture:
        """The capture of what these losses need from inside the teacher, detached."""
        return self._capture(tuple(names))[1]

    def student_capture(self, names: Sequence[str]) -> Capture:
        """The capture of what these losses need from inside the student, with its graph."""
        return self._capture(tuple(names))[0]

    def terms(self, names: Iterable[str], inputs: LossInputs) -> LossTerms:
        """The terms of these losses: sums over the micro-batch, and their counts.

        Raises ``UnfitError`` if a loss cannot compare what the two models have.
        """
        terms: LossTerms = {}
        for name in names:
            try:
                terms |= self._loss(name)(inputs)
            except ValueError as error:
                raise UnfitError(f"{error}, or set {name}.weight: 0") from error
        return terms

    def unit_of(self, term: str) -> str:
        """The field of ``LossCounts`` that a term is divided by: ``tokens`` or ``sequences``."""
        return next(loss.unit for loss in self._all() if term in loss.weights(1.0))

    def _loss(self, name: str) -> StructuralLoss:
        return cast(StructuralLoss, self.losses[name])

    def _all(self) -> list[StructuralLoss]:
        return [self._loss(name) for name in self.losses]

    def _capture(self, names: tuple[str, ...]) -> tuple[Capture, Capture]:
        if names not in self._captures:
            losses = [self._loss(name) for name in names]
            student, teacher = self.models
            ours, theirs = (
                union(loss.student_spec for loss in losses),
                union(loss.teacher_spec for loss in losses),
            )
            self._captures[names] = (
                Capture(student, ours, role="student", detach=False),
                Capture(teacher, theirs, role="teacher", detach=True),
            )
        return self._captures[names]


# Details


def _class_of(name: str) -> type[Any]:
    if name not in LOSSES:
        raise LookupError(
            f"every structural loss of the configuration must have its class in LOSSES, got none "
            f"for {name!r}; add it to the table in {__name__}"
        )
    return LOSSES[name]


def union(specs: Iterable[CaptureSpec]) -> CaptureSpec:
    """The layers that any of the ``specs`` names, each once, in order."""
    specs = list(specs)
    merged = {
        kind.name: tuple(sorted({layer for spec in specs for layer in getattr(spec, kind.name)}))
        for kind in fields(CaptureSpec)
    }
    return CaptureSpec(**merged)
