"""Relation transfer: KL between self-relations of queries, keys and values (MiniLMv2).

For X in queries, keys and values of a layer, heads are concatenated and split again into A_r
relation heads, as many on both sides, of width d_r:

    R = softmax(X X^T / sqrt(d_r) + mask),    L = sum_X sum over rows of mean_heads KL(R_t || R_s)

with the mask of attention (causal, within the document, no padding, no window). Neither the number
of heads nor their width need be the same. Projections are taken before rotary embedding: splitting
rotated heads would separate rotary pairs and make R depend on absolute positions. Source: arXiv
2012.15828.
"""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.losses._rows import require_no_grad, sum_of_row_kl, upcast
from sad.losses.attention import attention_maps
from sad.losses.base import (
    AttentionInputs,
    CaptureSpec,
    LossInputs,
    LossTerm,
    LossTerms,
    Projections,
    StructuralLoss,
    mean_term,
    resolve_layer_pairs,
)
from sad.losses.layout import Layout

MIN_HEAD_WIDTH = 16


def relation_heads(student_width: int, teacher_width: int) -> int:
    """Number of relation heads A_r: the largest common divisor that leaves heads 16 wide or more.

    Raises ``ValueError`` for a width below 16.
    """
    narrow = min(student_width, teacher_width)
    if narrow < MIN_HEAD_WIDTH:
        raise ValueError(
            f"projections must be at least {MIN_HEAD_WIDTH} wide to be compared by relations, got "
            f"{student_width} in the student and {teacher_width} in the teacher; use attention "
            "maps instead"
        )
    common = math.gcd(student_width, teacher_width)
    return max(a for a in range(1, narrow // MIN_HEAD_WIDTH + 1) if common % a == 0)


def relation_loss(
    student: Projections,
    teacher: Projections,
    layout: Layout,
    block: int = 256,
) -> LossTerm:
    """Relation loss: sum over Q, K, V and queries of the mean over heads of ``KL(R_t || R_s)``.

       Unit: tokens.
    The gradient reaches a position as a query and as a key. Memory as ``attention_loss``. Raises
       what ``relation_heads`` raises, and ``ValueError`` for a teacher that requires a gradient.
    """
    require_no_grad(*teacher)
    sums = []
    for student_x, teacher_x in zip(student, teacher, strict=True):
        heads = relation_heads(student_x.shape[-1], teacher_x.shape[-1])
        s, t = _relation(upcast(student_x), heads), _relation(teacher_x, heads)

        def student_rows(rows: slice, s: AttentionInputs = s) -> Tensor:
            return attention_maps(s, layout, rows)

        def teacher_rows(rows: slice, t: AttentionInputs = t) -> tuple[Tensor, Tensor]:
            log_p = attention_maps(t, layout, rows)
            return log_p.exp(), log_p

        sums.append(sum_of_row_kl(student_rows, teacher_rows, layout, block))
    return LossTerm(sums[0] + sums[1] + sums[2], layout.units.tokens)


def _relation(x: Tensor, heads: int) -> AttentionInputs:
    """The relation R as an attention map: X [B, L, W] attends to itself with ``heads`` heads."""
    x = rearrange(x, "b l (heads d) -> b heads l d", heads=heads)
    return AttentionInputs(x, x, scaling=x.shape[-1] ** -0.5, window=None, softcap=None)


class RelationLoss(StructuralLoss):
    """``relation_loss`` of paired layers, the mean over pairs; the section ``relations``."""

    name = "relations"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.pairs = resolve_layer_pairs(config.relations.layers, "relations", student, teacher)
        self.block = config.relations.query_block
        self.student_spec, self.teacher_spec = (
            CaptureSpec(projections=layers) for layers in zip(*self.pairs, strict=True)
        )

    def forward(self, inputs: LossInputs) -> LossTerms:
        student, teacher = inputs.student.projections, inputs.teacher.projections
        terms = [
            relation_loss(student[s], teacher[t], inputs.layout, self.block) for s, t in self.pairs
        ]
        return {"relations": mean_term(terms)}
