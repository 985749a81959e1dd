"""What every structural loss shares: its inputs, its outputs, its projector."""

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


Terms = dict[str, LossTerm]


LayerPairs = tuple[tuple[int, int], ...]


class AttentionInputs(NamedTuple):
    """What one layer's attention maps are made of: H query heads, H_kv divides H."""

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
    """The decoder layers, counted from 0, at which each kind is wanted."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    projections: tuple[int, ...] = ()
    routers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Activations:
    """What one forward pass left behind, by layer."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """[B, L, D] as the layer returns it. ``output_hidden_states[i + 1]`` is the same, but for the
    last layer, where that list has it after the final norm."""
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    projections: dict[int, Projections] = field(default_factory=dict)
    routers: dict[int, Tensor] = field(default_factory=dict)
    """Logits [B * L, E] over experts."""


class View(NamedTuple):
    """What there is to compare, of one micro-batch; everything of the teacher is detached."""

    student_hidden: Tensor  # [B, L, D_s] after the final norm
    teacher_hidden: Tensor  # [B, L, D_t]
    student: Activations
    teacher: Activations
    layout: Layout


class StructuralLoss(nn.Module):
    """One of them. ``name`` is its section in the configuration and its term, ``unit`` what its sum
    is divided by."""

    name: str
    unit = "tokens"
    student_spec = CaptureSpec()
    teacher_spec = CaptureSpec()

    def __call__(self, view: View) -> Terms:
        return super().__call__(view)

    def weights(self, weight: float) -> dict[str, float]:
        """The weight of each term while the loss has ``weight``."""
        return {self.name: weight}


def mean_of(terms: Sequence[LossTerm]) -> LossTerm:
    """Of terms over the same units."""
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


def projected(projector: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the teacher's width, the product in the dtype of ``x``."""
    return F.linear(x, projector.weight.to(x.dtype)) if isinstance(projector, nn.Linear) else x


def resolved(
    pairs: Pairs, loss: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> LayerPairs:
    """Layers counted from 0; ``UnfitError`` for one that does not exist."""
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
    """The width of hidden states."""
    return _text(model).hidden_size


def heads_of(model: PreTrainedModel) -> int:
    return _text(model).num_attention_heads


def _text(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()
