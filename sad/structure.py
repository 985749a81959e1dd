"""The structural losses of a run: what each looks at, trains and remembers.

A loss here is one small module: the layers that it wants to see of student and teacher (``Sites``),
its own parameters (projectors, on the student's side) and buffers (a queue), and a ``forward`` that
turns what was seen into ``LossTerm``s. The mathematics is in ``sad.losses``.

Nothing is captured, computed or kept for a loss whose weight is 0 at the moment. What is trained
here is in checkpoints and never in an exported student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from sad_kernels import DistillOutput, Objective
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.capture import Capture, Captured, Sites, decoder_layers
from sad.config import DistillConfig
from sad.data import Batch, Units
from sad.distillation import Seen, StudentWithLoss
from sad.errors import UnfitError
from sad.experts import MoeBlock, require_moe
from sad.losses.attention import LearnedHeadMap, attention_loss, head_map
from sad.losses.contrastive import TeacherQueue, contrastive_loss, mean_pool
from sad.losses.feature import Distance, feature_loss
from sad.losses.layerwise import PairWeights, check_layer_map, layer_pairs, layerwise_loss
from sad.losses.layout import Layout, layout_of
from sad.losses.projector import make_projector
from sad.losses.relations import relation_loss
from sad.losses.router import balance_loss, router_loss, router_z_loss
from sad.losses.term import LossTerm
from sad.sections import Pairs

Terms = dict[str, LossTerm]
LayerPairs = tuple[tuple[int, int], ...]


class View(NamedTuple):
    """What there is to compare, of one micro-batch; everything of the teacher is detached."""

    student_hidden: Tensor  # [B, L, D_s] after the final norm
    teacher_hidden: Tensor  # [B, L, D_t]
    student: Captured
    teacher: Captured
    layout: Layout


class StructuralLoss(nn.Module):
    """One of them. ``name`` is its section in the configuration and its term, ``unit`` what its sum
    is divided by."""

    name: str
    unit = "tokens"
    student_sites = Sites()
    teacher_sites = Sites()

    def __call__(self, view: View) -> Terms:
        return super().__call__(view)

    def weights(self, weight: float) -> dict[str, float]:
        """The weight of each term while the loss has ``weight``."""
        return {self.name: weight}


class FeatureLoss(StructuralLoss):
    """Last hidden states."""

    name = "feature"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.distance: Distance = config.feature.distance
        self.projector = make_projector(width_of(student), width_of(teacher))

    def forward(self, view: View) -> Terms:
        y = projected(self.projector, view.student_hidden)
        return {"feature": feature_loss(y, view.teacher_hidden, view.layout, self.distance)}


class LayerwiseLoss(StructuralLoss):
    """Outputs of paired decoder layers."""

    name = "layerwise"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        section = config.layerwise
        depths = len(decoder_layers(student)), len(decoder_layers(teacher))
        if section.layers is None:
            self.pairs = layer_pairs(*depths, section.num_pairs)
        else:
            self.pairs = resolved(section.layers, "layerwise", student, teacher)
            try:
                check_layer_map(self.pairs, *depths)
            except ValueError as error:
                raise UnfitError(f"layerwise.layers: {error}") from None
        self.distance: Distance = section.distance
        self.pair_weights: PairWeights = section.pair_weights
        widths = width_of(student), width_of(teacher)
        self.projectors = nn.ModuleList(make_projector(*widths) for _ in self.pairs)
        self.student_sites, self.teacher_sites = (
            Sites(hidden=layers) for layers in zip(*self.pairs, strict=True)
        )

    def forward(self, view: View) -> Terms:
        students = [
            projected(projector, view.student.hidden[layer])
            for projector, (layer, _) in zip(self.projectors, self.pairs, strict=True)
        ]
        teachers = [view.teacher.hidden[layer] for _, layer in self.pairs]
        term = layerwise_loss(students, teachers, view.layout, self.distance, self.pair_weights)
        return {"layerwise": term}


class AttentionLoss(StructuralLoss):
    """Attention maps of paired layers; the mean over pairs."""

    name = "attention"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        section = config.attention
        self.pairs = resolved(section.layers, "attention", student, teacher)
        self.block = section.query_block
        self.student_sites, self.teacher_sites = (
            Sites(attention=layers) for layers in zip(*self.pairs, strict=True)
        )
        heads = heads_of(student), heads_of(teacher)
        self.learned = section.head_map == "learned"
        self.maps = nn.ModuleList(LearnedHeadMap(*heads) for _ in self.pairs if self.learned)
        self.register_buffer("fixed", head_map(*heads), persistent=False)

    def forward(self, view: View) -> Terms:
        terms, regular = [], []
        for i, (s, t) in enumerate(self.pairs):
            P = cast(Tensor, self.maps[i]() if self.learned else self.fixed)
            inputs = view.student.attention[s], view.teacher.attention[t]
            terms.append(attention_loss(*inputs, view.layout, P, self.block))
            if self.learned:
                regular.append(cast(LearnedHeadMap, self.maps[i]).regularizer())
        result = {"attention": mean_of(terms)}
        if self.learned:  # one number per step: times the tokens, it is that after the division
            count = view.layout.units.tokens
            result["head_map"] = LossTerm(torch.stack(regular).mean() * count, count)
        return result

    def weights(self, weight: float) -> dict[str, float]:
        return {"attention": weight} | ({"head_map": weight} if self.learned else {})


class RelationLoss(StructuralLoss):
    """Relations among queries, keys and values of paired layers; the mean over pairs."""

    name = "relations"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.pairs = resolved(config.relations.layers, "relations", student, teacher)
        self.block = config.relations.query_block
        self.student_sites, self.teacher_sites = (
            Sites(projections=layers) for layers in zip(*self.pairs, strict=True)
        )

    def forward(self, view: View) -> Terms:
        terms = [
            relation_loss(
                view.student.projections[s], view.teacher.projections[t], view.layout, self.block
            )
            for s, t in self.pairs
        ]
        return {"relations": mean_of(terms)}


class ContrastiveLoss(StructuralLoss):
    """Pooled segments, told apart from those of this micro-batch and of a queue."""

    name = "contrastive"
    unit = "sequences"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.temperature = config.contrastive.temperature
        self.projector = make_projector(width_of(student), width_of(teacher))
        size = config.contrastive.queue_size
        self.queue = TeacherQueue(size, width_of(teacher)) if size else None

    def forward(self, view: View) -> Terms:
        pooled, valid = mean_pool(view.student_hidden, view.layout)
        teacher, _ = mean_pool(view.teacher_hidden, view.layout)
        result = contrastive_loss(
            projected(self.projector, pooled).flatten(0, 1),
            teacher.flatten(0, 1),
            valid.flatten(),
            self.queue,
            count=view.layout.units.sequences,
            temperature=self.temperature,
        )
        if self.training and self.queue is not None:  # the loss holds a copy of what was in it
            self.queue.enqueue(teacher.flatten(0, 1), valid.flatten())
        return {"contrastive": result.term}


class RouterLoss(StructuralLoss):
    """Gates of paired mixture-of-experts layers, and what keeps the student's from collapsing."""

    name = "router"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        section = config.router
        ours, theirs = (require_moe(m, "router.weight") for m in (student, teacher))
        if section.layers is not None:
            self.pairs = resolved(section.layers, "router", student, teacher)
        elif len(ours) == len(theirs):
            self.pairs = tuple(zip(ours, theirs, strict=True))
        else:
            raise UnfitError(
                "router.layers must be given where student and teacher differ in their numbers of "
                f"layers with experts, got {len(ours)} and {len(theirs)}; pair them"
            )
        self.student_blocks = [_block(ours, s, student) for s, _ in self.pairs]
        self.teacher_blocks = [_block(theirs, t, teacher) for _, t in self.pairs]
        for s, t in zip(self.student_blocks, self.teacher_blocks, strict=True):
            if s.num_experts != t.num_experts:
                raise UnfitError(
                    "router.weight must be 0 unless paired layers have equally many experts, got "
                    f"{s.num_experts} in student layer {s.layer} and {t.num_experts} in teacher "
                    f"layer {t.layer}; turn it off or pair others"
                )
        self.factors = {
            "router": 1.0,
            "router_balance": section.balance_weight / section.weight,
            "router_z": section.z_weight / section.weight,
        }
        self.student_sites, self.teacher_sites = (
            Sites(routers=layers) for layers in zip(*self.pairs, strict=True)
        )

    def forward(self, view: View) -> Terms:
        ours = [view.student.routers[s] for s, _ in self.pairs]
        theirs = [view.teacher.routers[t] for _, t in self.pairs]
        student, teacher = self.student_blocks[0], self.teacher_blocks[0]
        terms = {"router": router_loss(ours, theirs, view.layout, student.kind, teacher.kind)}
        if self.factors["router_balance"]:
            terms["router_balance"] = balance_loss(ours, view.layout, student.top_k, student.kind)
        if self.factors["router_z"]:
            terms["router_z"] = router_z_loss(ours, view.layout)
        return terms

    def weights(self, weight: float) -> dict[str, float]:
        return {name: weight * factor for name, factor in self.factors.items() if factor}


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


class Structure(nn.Module):
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
        """Every term that can come up."""
        return tuple(name for loss in self._all() for name in loss.weights(1.0))

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

    def terms(self, names: Iterable[str], view: View) -> Terms:
        """The terms of these losses: sums over the micro-batch, and their counts."""
        terms: Terms = {}
        for name in names:
            terms |= self._loss(name)(view)
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
                    student, union(x.student_sites for x in losses), role="student", detach=False
                ),
                Capture(
                    teacher, union(x.teacher_sites for x in losses), role="teacher", detach=True
                ),
            )
        return self._captures[names]


class Structured(NamedTuple):
    """A micro-batch's loss and what it is made of."""

    loss: Tensor  # [] differentiable; the window's sum of these is its loss
    distill: DistillOutput
    terms: Terms


class StructuredStudent(nn.Module):
    """A student whose forward pass returns all of its loss, structural terms included.

    The root module of a run, like ``StudentWithLoss``, which it calls.
    """

    def __init__(self, student: StudentWithLoss, structure: Structure) -> None:
        super().__init__()
        self.student = student
        self.structure = structure

    def forward(
        self,
        batch: Batch,
        seen: Seen,
        objective: Objective,
        weights: Mapping[str, float],  # of the structural losses
        units: Units,  # of the whole accumulation window
    ) -> Structured:
        """Each term is divided by the number of its units in the window."""
        structure = self.structure
        names = structure.active(weights)
        with structure.student_capture(names).armed() as captured:
            hidden = self.student.hidden(batch)
        teacher = seen.teacher if objective.kd_weight else None
        out = self.student.loss(hidden, batch, teacher, objective, max(units.targets, 1))
        view = View(hidden, seen.targets[0].hidden, captured, seen.captured, layout_of(batch))
        terms = structure.terms(names, view)
        loss = out.loss
        for name, weight in structure.weights(weights).items():
            count = max(getattr(units, structure.unit_of(name)), 1)
            loss = loss + weight * (terms[name].sum / count)
        return Structured(loss, out, terms)


# Details


def width_of(model: PreTrainedModel) -> int:
    """The width of hidden states."""
    return _text(model).hidden_size


def heads_of(model: PreTrainedModel) -> int:
    return _text(model).num_attention_heads


def _text(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


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


def union(sites: Iterable[Sites]) -> Sites:
    """Every layer that one of them names, once."""
    parts = list(sites)

    def merged(name: str) -> tuple[int, ...]:
        return tuple(sorted({layer for part in parts for layer in getattr(part, name)}))

    return Sites(*(merged(name) for name in ("hidden", "attention", "projections", "routers")))


def mean_of(terms: Sequence[LossTerm]) -> LossTerm:
    """Of terms over the same units."""
    return LossTerm(torch.stack([term.sum for term in terms]).mean(), terms[0].count)


def _block(blocks: Mapping[int, MoeBlock], layer: int, model: PreTrainedModel) -> MoeBlock:
    if layer not in blocks:
        raise UnfitError(
            f"router.layers must name layers with experts, got {layer} of {type(model).__name__}, "
            f"which has them in {', '.join(map(str, blocks))}; choose one of these"
        )
    return blocks[layer]
