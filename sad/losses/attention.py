"""Attention transfer: KL divergence between the attention maps of teacher and student, per query.

A map is ``A = softmax(scaling * q k^T + mask)``, rebuilt from queries and keys; the mask is ours
(``visible``): causal, within the document, no padding, within the layer's window. The teacher's
heads are mixed into as many as the student has, by a matrix P [h_s, h_t] whose rows are
distributions and which acts on the head axis only, so that rows of A' are distributions too:

    A'[s] = sum_t P[s, t] A_t[t],        L = sum over rows of mean_s KL(A'[s] || A_s[s])

The gradient by the student's scores is ``(A_s - A') / h_s`` per row. Sources: attention transfer in
MiniLM (arXiv 2002.10957) and TinyBERT (arXiv 1909.10351).
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.errors import UnfitError
from sad.losses._rows import no_autocast, require_no_grad, sum_of_row_kl, upcast
from sad.losses.base import (
    AttentionInputs,
    CaptureSpec,
    LossInputs,
    LossTerm,
    LossTerms,
    StructuralLoss,
    heads_of,
    mean_term,
    resolve_layer_pairs,
)
from sad.losses.layout import Layout, visible

START_LOGIT = 4.0
"""By how much a learned head map starts in favour of the fixed one."""

SPREAD_WEIGHT = 0.1
"""Weight of the penalty that keeps a learned head map from leaving teacher heads unread."""


# Head maps


def head_map(student_heads: int, teacher_heads: int) -> Tensor:
    """The fixed head map P, fp32 [h_s, h_t]: each student head averages neighbouring teacher heads.

    Teacher head t serves student head ``floor(t h_s / h_t)``; with fewer teacher heads, student
    head s reads teacher head ``floor(s h_t / h_s)``. Rows sum to 1.
    """
    serves = torch.zeros(student_heads, teacher_heads)
    if teacher_heads >= student_heads:
        teacher = torch.arange(teacher_heads)
        serves[teacher * student_heads // teacher_heads, teacher] = 1.0
    else:
        student = torch.arange(student_heads)
        serves[student, student * teacher_heads // student_heads] = 1.0
    return serves / serves.sum(1, keepdim=True)


class LearnedHeadMap(nn.Module):
    """A trainable head map: P = softmax of logits [h_s, h_t] over teacher heads, near ``head_map``.

    It stands on the teacher's side of the loss: mixing keeps A' in the hull of real maps, but the
    loss alone would drift to whatever heads are easiest. Add ``regularizer()`` to it.
    """

    def __init__(self, student_heads: int, teacher_heads: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(START_LOGIT * (head_map(student_heads, teacher_heads) > 0))

    def forward(self) -> Tensor:
        """The head map P [h_s, h_t], whose rows sum to 1."""
        return self.logits.softmax(dim=-1)

    def regularizer(self) -> Tensor:
        """Penalty for teacher heads left unread: ``0.1 (h_t sum_t c_t^2 - 1)``, [].

        ``c_t = mean_s P[s, t]`` is how much head t is read; 0 if all are read alike.

        A penalty per optimizer step, not per token.
        """
        column = self().mean(0)
        return SPREAD_WEIGHT * (len(column) * column.square().sum() - 1)


def project_heads(
    maps: Tensor,  # [B, h_t, s1, s2]
    P: Tensor,  # [h_s, h_t]
) -> Tensor:
    """Mix the head axis by P: [B, h_s, s1, s2]. Commutes with permutations of s1 and s2."""
    with no_autocast(maps):
        mixed = rearrange(maps, "b h s1 s2 -> b s1 s2 h") @ P.to(maps.dtype).T
    return rearrange(mixed, "b s1 s2 h -> b h s1 s2")


# Maps and loss


def attention_maps(inputs: AttentionInputs, layout: Layout, rows: slice) -> Tensor:
    """Attention maps of the queries ``rows`` as log-probabilities over all keys, [B, H, rows, L].

    fp32 (float64 if the inputs are); -inf where a query may not look. Rows and keys of padding are
    zeros before any product, so what they held reaches neither a value nor a gradient.
    """
    padding = ~layout.real[:, None, :, None]
    query = upcast(inputs.query[:, :, rows].masked_fill(padding[:, :, rows], 0.0))
    key = upcast(inputs.key.masked_fill(padding, 0.0))
    # Query heads that share a key head become rows of one product: keys are not repeated.
    group = query.shape[1] // key.shape[1]
    query = rearrange(query, "b (kv group) rows d -> b kv (group rows) d", group=group)
    with no_autocast(key):
        scores = (inputs.scaling * query) @ key.mT
    scores = rearrange(scores, "b kv (group rows) l -> b (kv group) rows l", group=group)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    mask = visible(layout, rows, inputs.window)[:, None]
    return scores.masked_fill(~mask, -torch.inf).log_softmax(-1)


def attention_loss(
    student: AttentionInputs,
    teacher: AttentionInputs,
    layout: Layout,
    P: Tensor,  # [h_s, h_t]
    block: int = 256,
) -> LossTerm:
    """Attention loss: sum over queries of the mean over student heads of ``KL(A' || A_s)``.

    Unit: tokens.

    Memory beyond the inputs: the student's in fp32 and, made again in backward, a few tensors
    [B, h, block, L] a side. P may require a gradient. Raises ``ValueError`` for layers whose
    windows differ (their rows are distributions over different keys), for a P of another shape and
    for a teacher that requires a gradient.
    """
    require_no_grad(teacher.query, teacher.key)
    if student.window != teacher.window:
        raise ValueError(
            "layers paired for attention transfer must have the same window, got "
            f"{student.window} in the student and {teacher.window} in the teacher; pair layers "
            "of one kind"
        )
    heads = student.query.shape[1], teacher.query.shape[1]
    if P.shape != heads:
        raise ValueError(
            f"the head map must be [student heads, teacher heads] = {list(heads)}, got "
            f"{list(P.shape)}; make it with head_map or LearnedHeadMap"
        )

    # Upcast here: inside the blocks, their gradients would be added up in 16 bits.
    student = student._replace(query=upcast(student.query), key=upcast(student.key))
    P = upcast(P)

    def student_rows(rows: slice) -> Tensor:
        return attention_maps(student, layout, rows)

    def teacher_rows(rows: slice) -> tuple[Tensor, Tensor]:
        mixed = project_heads(attention_maps(teacher, layout, rows).exp(), P)
        return mixed, torch.where(mixed == 0, 1.0, mixed).log()

    return LossTerm(sum_of_row_kl(student_rows, teacher_rows, layout, block), layout.units.tokens)


class AttentionLoss(StructuralLoss):
    """``attention_loss`` of paired layers, the mean over pairs; the section ``attention``."""

    name = "attention"

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        section = config.attention
        self.pairs = resolve_layer_pairs(section.layers, "attention", student, teacher)
        self.block = section.query_block
        self.student_spec, self.teacher_spec = (
            CaptureSpec(attention=layers) for layers in zip(*self.pairs, strict=True)
        )
        self.remedy = _remedy(student, teacher)
        heads = heads_of(student), heads_of(teacher)
        self.learned = section.head_map == "learned"
        self.maps = nn.ModuleList(LearnedHeadMap(*heads) for _ in self.pairs if self.learned)
        self.register_buffer("fixed", head_map(*heads), persistent=False)

    def forward(self, inputs: LossInputs) -> LossTerms:
        terms, penalties = [], []
        for i, (s, t) in enumerate(self.pairs):
            P = cast(Tensor, self.maps[i]() if self.learned else self.fixed)
            student, teacher = inputs.student.attention[s], inputs.teacher.attention[t]
            if student.window != teacher.window:
                raise UnfitError(
                    "attention.layers must pair layers that see as many positions back, got a "
                    f"window of {student.window or 'all'} in student layer {s} and of "
                    f"{teacher.window or 'all'} in teacher layer {t}; "
                    f"{self.remedy}set attention.weight: 0"
                )
            terms.append(attention_loss(student, teacher, inputs.layout, P, self.block))
            if self.learned:
                penalties.append(cast(LearnedHeadMap, self.maps[i]).regularizer())
        result = {"attention": mean_term(terms)}
        if self.learned:  # one number per step: times the tokens, it is that after the division
            count = inputs.layout.units.tokens
            result["head_map"] = LossTerm(torch.stack(penalties).mean() * count, count)
        return result

    def weights(self, weight: float) -> dict[str, float]:
        return {"attention": weight} | ({"head_map": weight} if self.learned else {})


def _remedy(student: PreTrainedModel, teacher: PreTrainedModel) -> str:
    """The last layers of both that see every position back, as a pair to write; or nothing."""
    kinds = [getattr(m.config.get_text_config(), "layer_types", None) for m in (student, teacher)]
    full = [[i for i, kind in enumerate(k or ()) if kind == "full_attention"] for k in kinds]
    if not all(full):
        return "pair others, or "
    return f"write attention.layers: [[{full[0][-1]}, {full[1][-1]}]], or "
