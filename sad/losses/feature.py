"""Feature loss: distance between projected student and teacher hidden states.

Per token, y the student's projected state and h the teacher's, D elements each:

    cosine        1 - cos(y, h), computed as |y/|y| - h/|h||^2 / 2, which loses no digits near 0
    relative_mse  mean (y - h)^2 / mean h^2

The mean square of the difference of RMS-normalised vectors is 2 (1 - cos), hence no third kind. A
plain mean square would follow the few channels that are hundreds of times larger than the others
(massive activations, arXiv 2402.17762). Sources: FitNets (arXiv 1412.6550), DistilBERT (arXiv
1910.01108).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.losses._rows import normalize, require_no_grad, upcast
from sad.losses.base import (
    LossInputs,
    LossTerm,
    LossTerms,
    StructuralLoss,
    make_projector,
    project,
    width_of,
)
from sad.losses.layout import Layout

Distance = Literal["cosine", "relative_mse"]


def distances(
    student: Tensor,  # [..., D]
    teacher: Tensor,  # [..., D]
    kind: Distance,
) -> Tensor:
    """Distance between each pair of vectors, [...], fp32 (float64 if an input is).

    A vector of zeros has no direction: its cosine distance to another is 0, to any other vector
    1/2. A teacher of zeros has no scale: ``relative_mse`` is then the mean square of the student.
    Raises ``ValueError`` for a teacher that requires a gradient.
    """
    require_no_grad(teacher)
    student, teacher = upcast(student), upcast(teacher)
    if kind == "cosine":
        return (normalize(student) - normalize(teacher)).square().sum(-1) / 2
    # Divided by the largest element, a square neither overflows nor vanishes.
    largest = teacher.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest)
    power = (teacher / scale).square().mean(-1)
    error = ((student - teacher) / scale).square().mean(-1)
    return error / torch.where(power == 0, 1.0, power)


def feature_loss(
    student: Tensor,  # [B, L, D], projected
    teacher: Tensor,  # [B, L, D]
    layout: Layout,
    kind: Distance = "cosine",
) -> LossTerm:
    """Feature loss: sum over tokens of ``distances``. Unit: tokens.

    Other positions may hold anything. Memory: a few tensors [B, L, D] in fp32. Raises what
    ``distances`` raises.
    """
    other = ~layout.tokens[..., None]  # zeros on both sides there: their distance is 0
    per_token = distances(student.masked_fill(other, 0.0), teacher.masked_fill(other, 0.0), kind)
    return LossTerm(per_token.sum(), layout.units.tokens)


class FeatureLoss(StructuralLoss):
    """``feature_loss`` of the last hidden states; the section ``feature``."""

    name = "feature"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.distance: Distance = config.feature.distance
        self.projector = make_projector(width_of(student), width_of(teacher))

    def forward(self, inputs: LossInputs) -> LossTerms:
        y = project(self.projector, inputs.student_hidden)
        return {"feature": feature_loss(y, inputs.teacher_hidden, inputs.layout, self.distance)}
