"""The interface of structural losses: what they are given, what they return, their projector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.sections import Pairs
from sad.errors import UnfitError
from sad.losses.layout import Layout
from sad.models.heads import decoder_layers


class LossTerm(NamedTuple):
    """A differentiable sum over a micro-batch and the number of units in it.

    The trainer adds sums and counts over the whole accumulation window before it divides, so the
    gradient does not depend on how the window was split.
    """

    sum: Tensor  # [] differentiable
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """Targets, tokens or sequences in it, known before the forward pass."""


LossTerms = dict[str, LossTerm]
"""Terms by the name under which they are logged."""

LayerPairs = tuple[tuple[int, int], ...]
"""(student layer, teacher layer), both counted from 0."""


class AttentionInputs(NamedTuple):
    """Queries and keys of one layer, and how its attention scores follow; H_kv divides H."""

    query: Tensor  # [B, H, L, d], after rotary embedding
    key: Tensor  # [B, H_kv, L, d], after rotary embedding
    scaling: float
    window: int | None  # how many positions a query sees, itself included; None is all of them
    softcap: float | None  # scores become softcap * tanh(scores / softcap)


class Projections(NamedTuple):
    """A layer's projections, heads concatenated, before rotary embedding (after q and k norm)."""

    query: Tensor  # [B, L, H d]
    key: Tensor  # [B, L, H_kv d]
    value: Tensor  # [B, L, H_kv d]


@dataclass(frozen=True)
class CaptureSpec:
    """Which activations to capture: for each kind the decoder layers, counted from 0."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    projections: tuple[int, ...] = ()
    routers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Activations:
    """Activations captured in one forward pass, by decoder layer."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """[B, L, D] as the layer returns it. ``output_hidden_states[i + 1]`` is the same, but for the
    last layer, where that list has it after the final norm."""
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    projections: dict[int, Projections] = field(default_factory=dict)
    routers: dict[int, Tensor] = field(default_factory=dict)
    """Logits [B * L, E] over experts."""


class LossInputs(NamedTuple):
    """The tensors of one micro-batch that structural losses compare; the teacher's are detached."""

    student_hidden: Tensor  # [B, L, D_s] after the final norm
    teacher_hidden: Tensor  # [B, L, D_t]
    student: Activations
    teacher: Activations
    layout: Layout


class StructuralLoss(nn.Module):
    """Base of the structural losses: a module that turns ``LossInputs`` into ``LossTerms``.

    Subclasses are constructed with ``(config, student, teacher)`` and registered in
    ``sad.losses.structural.LOSSES``. Their parameters (projectors) are trained with the student,
    and their buffers (queues) are saved in checkpoints.
    """

    name: str
    """Section of the configuration, and name of the main term."""
    unit = "tokens"
    """Field of ``LossCounts`` that the terms are divided by."""
    diagnostics: tuple[str, ...] = ()
    """Terms that ``forward`` returns for the log alone: they have no weight and no gradient."""
    student_spec = CaptureSpec()
    teacher_spec = CaptureSpec()
    """Which activations ``forward`` needs from inside the two models."""

    def __call__(self, inputs: LossInputs) -> LossTerms:
        return super().__call__(inputs)

    def weights(self, weight: float) -> dict[str, float]:
        """The weight of each term of the total loss while the whole loss has ``weight``."""
        return {self.name: weight}


def mean_term(terms: Sequence[LossTerm]) -> LossTerm:
    """The mean of terms that have the same units."""
    return LossTerm(torch.stack([term.sum for term in terms]).mean(), terms[0].count)


def make_projector(student_width: int, teacher_width: int) -> nn.Module:
    """``y = W h`` without bias, W [D_t, D_s]; the identity, without parameters, if widths agree.

    W starts orthogonal, drawn from the global generator: projected states have the norm of the
    state (orthonormal columns), or where the teacher is narrower, have it in the root mean square
    over directions (orthonormal rows, times ``sqrt(D_s / D_t)``).
    """
    if student_width == teacher_width:
        return nn.Identity()
    projector = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projector.weight, gain=max(1.0, math.sqrt(student_width / teacher_width)))
    return projector


def project(projector: nn.Module, x: Tensor) -> Tensor:
    """Apply a projector of ``make_projector`` to ``x`` [..., D_s], in the dtype of ``x``."""
    return F.linear(x, projector.weight.to(x.dtype)) if isinstance(projector, nn.Linear) else x


def resolve_layer_pairs(
    pairs: Pairs, loss: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> LayerPairs:
    """Turn configured pairs, which may count from the end, into layers counted from 0.

    ``loss`` names the section in errors. Raises ``UnfitError`` for a layer that does not exist.
    """
    models = (("student", student), ("teacher", teacher))
    result = []
    for pair in pairs:
        layers = []
        for (role, model), layer in zip(models, pair, strict=True):
            depth = len(decoder_layers(model))
            if not -depth <= layer < depth:
                raise UnfitError(
                    f"{loss}.layers must name layers that the {role} {type(model).__name__} has, "
                    f"{-depth} to {depth - 1}, got {layer}; choose one of these"
                )
            layers.append(layer % depth)
        result.append(tuple(layers))
    return tuple(result)


def width_of(model: PreTrainedModel) -> int:
    """The width of a model's hidden states."""
    return _text_config(model).hidden_size


def heads_of(model: PreTrainedModel) -> int:
    """The number of a model's query heads."""
    return _text_config(model).num_attention_heads


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()
