"""Layerwise (patient) loss: distance between outputs of paired student and teacher layers.

Layers are paired by relative depth, the last with the last; outputs are those of the decoder layers
themselves, before the final norm. The term is the mean over pairs of the feature loss. Pair weights
are uniform, or follow the losses under a bound on their entropy; free softmax weights would
collapse onto the easiest pair. Sources: patient distillation (arXiv 1908.09355), TinyBERT (arXiv
1909.10351).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.errors import UnfitError
from sad.losses._rows import upcast
from sad.losses.base import (
    CaptureSpec,
    LossInputs,
    LossTerm,
    LossTerms,
    StructuralLoss,
    make_projector,
    project,
    resolve_layer_pairs,
    width_of,
)
from sad.losses.feature import Distance, feature_loss
from sad.losses.layout import Layout
from sad.models.heads import decoder_layers

PairWeights = Literal["uniform", "adaptive"]

LEAST_ENTROPY = 0.9
"""Share of the largest possible entropy, ln n, that adaptive pair weights keep."""


def layer_pairs(
    student_layers: int, teacher_layers: int, num_pairs: int = 4
) -> tuple[tuple[int, int], ...]:
    """Pair (student layer, teacher layer) at equal relative depths, both counted from 0.

    With ``n = min(L_s, L_t, num_pairs)``, pair j is ``floor((2 (j+1) L + n) / (2 n)) - 1`` on each
    side: strictly increasing, the last pair (L_s - 1, L_t - 1).
    """
    n = min(student_layers, teacher_layers, num_pairs)

    def at(j: int, layers: int) -> int:
        return (2 * (j + 1) * layers + n) // (2 * n) - 1

    return tuple((at(j, student_layers), at(j, teacher_layers)) for j in range(n))


def check_layer_map(
    pairs: Sequence[tuple[int, int]], student_layers: int, teacher_layers: int
) -> None:
    """Check a layer map: both sides strictly increase from 0 on and end in the last layer.

    Pairs that cross, or a last pair short of the last layers, ask the student for what its depth
    cannot give. Raises ``ValueError``.
    """
    last = (student_layers - 1, teacher_layers - 1)
    if (
        pairs
        and tuple(pairs[-1]) == last
        and all(map(_strictly_increases, zip(*pairs, strict=True)))
    ):
        return
    proposal = layer_pairs(student_layers, teacher_layers, len(pairs) or 4)
    raise ValueError(
        "a layer map must hold pairs (student layer, teacher layer) that increase on both sides, "
        f"from 0 on, and end with the last layers {last}, got {_text(pairs)}; take for example "
        f"{_text(proposal)}"
    )


def layerwise_loss(
    students: Sequence[Tensor],  # of [B, L, D], projected, D the teacher's
    teachers: Sequence[Tensor],  # of [B, L, D]
    layout: Layout,
    kind: Distance = "cosine",
    pair_weights: PairWeights = "uniform",
) -> LossTerm:
    """Layerwise loss: sum over tokens of the mean over pairs of ``distances``. Unit: tokens.

    Adaptive weights come from the micro-batch's own losses, so with them the sum depends on how a
    window is split; with uniform ones it does not. Raises what ``feature_loss`` raises.
    """
    terms = [
        feature_loss(student, teacher, layout, kind)
        for student, teacher in zip(students, teachers, strict=True)
    ]
    sums, count = torch.stack([term.sum for term in terms]), layout.units.tokens
    if pair_weights == "uniform":
        return LossTerm(sums.mean(), count)
    return LossTerm((adaptive_pair_weights(sums / max(1, count)) * sums).sum(), count)


@torch.no_grad()
def adaptive_pair_weights(
    losses: Tensor,  # [n]
) -> Tensor:
    """Adaptive weights w [n] of pairs, in proportion to ``exp(-L / tau)``: closer pairs get more.

    They minimise ``sum w L - tau H(w)``, with the smallest tau for which the entropy H(w) is at
    least ``0.9 ln n``. No gradient passes through them. fp32; they sum to 1.
    """
    losses = upcast(losses)
    gaps = losses - losses.amin()
    widest = gaps.amax()
    gaps = gaps / torch.where(widest == 0, 1.0, widest)  # in [0, 1]: weights are softmax(-b gaps)
    floor = LEAST_ENTROPY * math.log(len(losses))

    # Bisection: H falls as b = (widest gap) / tau grows. At b = 1/2 it is above the floor for any
    # gaps; past 2^25 even neighbouring fp32 numbers are told apart. Halving log2 b 26 times leaves
    # an uncertainty of 4e-7.
    low, high = torch.full_like(widest, -1.0), torch.full_like(widest, 25.0)
    for _ in range(26):
        middle = (low + high) / 2
        log_w = torch.log_softmax(-gaps * middle.exp2(), dim=0)
        enough = -(log_w.exp() * log_w).sum() >= floor
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.softmax(-gaps * low.exp2(), dim=0)


def _strictly_increases(side: Sequence[int]) -> bool:
    return side[0] >= 0 and all(a < b for a, b in pairwise(side))


def _text(pairs: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"({student}, {teacher})" for student, teacher in pairs) or "none"


class LayerwiseLoss(StructuralLoss):
    """``layerwise_loss`` of paired decoder layers, each with a projector; section ``layerwise``."""

    name = "layerwise"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        section = config.layerwise
        depths = len(decoder_layers(student)), len(decoder_layers(teacher))
        if section.layers is None:
            self.pairs = layer_pairs(*depths, section.num_pairs)
        else:
            self.pairs = resolve_layer_pairs(section.layers, "layerwise", student, teacher)
            try:
                check_layer_map(self.pairs, *depths)
            except ValueError as error:
                raise UnfitError(f"layerwise.layers: {error}") from None
        self.distance: Distance = section.distance
        self.pair_weights: PairWeights = section.pair_weights
        widths = width_of(student), width_of(teacher)
        self.projectors = nn.ModuleList(make_projector(*widths) for _ in self.pairs)
        self.student_spec, self.teacher_spec = (
            CaptureSpec(hidden=layers) for layers in zip(*self.pairs, strict=True)
        )

    def forward(self, inputs: LossInputs) -> LossTerms:
        students = [
            project(projector, inputs.student.hidden[layer])
            for projector, (layer, _) in zip(self.projectors, self.pairs, strict=True)
        ]
        teachers = [inputs.teacher.hidden[layer] for _, layer in self.pairs]
        term = layerwise_loss(students, teachers, inputs.layout, self.distance, self.pair_weights)
        return {"layerwise": term}
