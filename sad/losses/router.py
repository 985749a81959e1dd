"""Router losses of mixture-of-experts layers, on the gates of all E experts, chosen or not.

    router_loss     KL(g_t || g_s), the student's gate follows the teacher's
    balance_loss    E sum_e f_e P_e (Switch, arXiv 2101.03961): f_e tokens sent to e per token,
                    P_e the mean gate; top_k where all are alike, and its gradient evens P out
    router_z_loss   (logsumexp of the router's logits)^2 (ST-MoE, arXiv 2202.08906)
    gate_variation  var / mean^2 of the experts' total gates (arXiv 1701.06538)

All are means over layers and leave out positions that do not count, whatever those hold. Matching
gates means something only if the student's experts descend from the teacher's, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.errors import UnfitError
from sad.losses._rows import require_no_grad, row_kl, upcast
from sad.losses.base import (
    CaptureSpec,
    LossInputs,
    LossTerm,
    LossTerms,
    StructuralLoss,
    resolve_layer_pairs,
)
from sad.losses.layout import Layout
from sad.models.experts import GateKind, MoeBlock, require_moe


def gates(
    logits: Tensor,  # [..., E]
    kind: GateKind,
) -> Tensor:
    """Gates as distributions over experts, [..., E], fp32 at least; sigmoids are normalised."""
    return _log_gates(logits, kind).exp()


def router_loss(
    student_logits: Sequence[Tensor],  # of [B L, E]
    teacher_logits: Sequence[Tensor],  # of [B L, E]
    layout: Layout,
    student_kind: GateKind,
    teacher_kind: GateKind,
) -> LossTerm:
    """Router loss: sum over tokens of the mean over layers of ``KL(g_t || g_s)``. Unit: tokens.

    Raises ``ValueError`` for layers with different numbers of experts and for a teacher that
    requires a gradient.
    """
    require_no_grad(*teacher_logits)
    tokens = layout.tokens.flatten()
    sums = []
    for student, teacher in zip(student_logits, teacher_logits, strict=True):
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                "the student's router must choose among as many experts as the teacher's, got "
                f"{student.shape[-1]} and {teacher.shape[-1]}; map layers with equal numbers"
            )
        log_q = _log_gates(_only(tokens, student), student_kind)
        log_p = _log_gates(_only(tokens, teacher), teacher_kind)
        sums.append(torch.where(tokens, row_kl(log_p.exp(), log_p, log_q), 0.0).sum())
    return LossTerm(torch.stack(sums).mean(), layout.units.tokens)


def balance_loss(
    logits: Sequence[Tensor],  # of [B L, E]
    layout: Layout,
    top_k: int,
    kind: GateKind = "softmax",
) -> LossTerm:
    """Load-balance loss ``E sum_e f_e P_e``, mean over layers, times the tokens. Unit: tokens.

    A function of the micro-batch as a whole: after division by the window's tokens it is the mean
    of the micro-batches' values by their tokens, and depends on how the window is split. Tokens
    count as sent to the k largest gates, without groups or selection biases. No gradient passes
    through f; with ``top_k = E`` the value is E and there is none at all.
    """
    tokens, count = layout.tokens.flatten(), layout.units.tokens
    values = []
    for layer in logits:
        g = gates(_only(tokens, layer), kind)
        chosen = torch.zeros_like(g).scatter(-1, g.topk(top_k, dim=-1).indices, 1.0)
        f, P = (_sum_over(tokens, x) / max(1, count) for x in (chosen, g))
        values.append(g.shape[-1] * (f * P).sum())
    return LossTerm(torch.stack(values).mean() * count, count)


def router_z_loss(
    logits: Sequence[Tensor],  # of [B L, E]
    layout: Layout,
) -> LossTerm:
    """Router z-loss: sum over tokens of the mean over layers of ``logsumexp(logits)^2``.

    Unit: tokens.
    """
    tokens = layout.tokens.flatten()
    squares = torch.stack([upcast(_only(tokens, x)).logsumexp(-1).square() for x in logits])
    return LossTerm(torch.where(tokens, squares.mean(0), 0.0).sum(), layout.units.tokens)


def gate_variation(
    gates: Sequence[Tensor],  # of [N, E], probabilities
    mask: Tensor,  # bool [N]
) -> Tensor:
    """Squared coefficient of variation of the experts' gates summed over tokens, mean over layers.

    ``var / mean^2`` with the variance of a population (divided by E): 0 where all experts carry
    the same, E - 1 where one carries all. Works with all experts active, where ``balance_loss`` is
    constant. A function of the micro-batch as a whole, not a sum over tokens; without tokens 0.
    """
    values = []
    for layer in gates:
        load = _sum_over(mask, upcast(layer))
        mean = load.mean()
        values.append((load - mean).square().mean() / torch.where(mean == 0, 1.0, mean).square())
    return torch.stack(values).mean()


def _log_gates(logits: Tensor, kind: GateKind) -> Tensor:
    match kind:
        case "softmax":
            return upcast(logits).log_softmax(-1)
        case "sigmoid":  # log of s / sum(s): the softmax of log s
            return F.logsigmoid(upcast(logits)).log_softmax(-1)
        case _:
            assert_never(kind)


def _only(tokens: Tensor, values: Tensor) -> Tensor:
    """Zero the rows of [N, E] that do not count: they may hold NaN."""
    return values.masked_fill(~tokens[:, None], 0.0)


def _sum_over(tokens: Tensor, values: Tensor) -> Tensor:
    """Sum of ``values`` [N, E] over the rows that count, [E]."""
    return torch.where(tokens[:, None], values, 0.0).sum(0)


class RouterLoss(StructuralLoss):
    """``router_loss`` of paired layers, with balance and z-loss; the section ``router``."""

    name = "router"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        section = config.router
        ours, theirs = (require_moe(m, "router.weight") for m in (student, teacher))
        if section.layers is not None:
            self.pairs = resolve_layer_pairs(section.layers, "router", student, teacher)
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
        self.student_spec, self.teacher_spec = (
            CaptureSpec(routers=layers) for layers in zip(*self.pairs, strict=True)
        )

    def forward(self, inputs: LossInputs) -> LossTerms:
        ours = [inputs.student.routers[s] for s, _ in self.pairs]
        theirs = [inputs.teacher.routers[t] for _, t in self.pairs]
        student, teacher = self.student_blocks[0], self.teacher_blocks[0]
        terms = {"router": router_loss(ours, theirs, inputs.layout, student.kind, teacher.kind)}
        if self.factors["router_balance"]:
            terms["router_balance"] = balance_loss(ours, inputs.layout, student.top_k, student.kind)
        if self.factors["router_z"]:
            terms["router_z"] = router_z_loss(ours, inputs.layout)
        return terms

    def weights(self, weight: float) -> dict[str, float]:
        return {name: weight * factor for name, factor in self.factors.items() if factor}


def _block(blocks: Mapping[int, MoeBlock], layer: int, model: PreTrainedModel) -> MoeBlock:
    if layer not in blocks:
        raise UnfitError(
            f"router.layers must name layers with experts, got {layer} of {type(model).__name__}, "
            f"which has them in {', '.join(map(str, blocks))}; choose one of these"
        )
    return blocks[layer]
