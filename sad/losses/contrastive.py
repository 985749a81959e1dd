"""Contrastive loss: symmetric InfoNCE between pooled hidden states of student and teacher.

Each sequence is the mean of its tokens' states after the final norm, the student's then projected;
z are those vectors divided by their norms. A student's sequence has to be told apart from all
others by the teacher's embedding of it, in nats, with targets on the diagonal:

    L = (CE(z_s [z_t; queue]^T / tau) + CE(z_t z_s^T / tau)) / 2

The queue holds earlier embeddings of the teacher, which is frozen: they never go stale, and no
momentum encoder is needed. What else is in the micro-batch decides how hard a sequence is, so this
sum does depend on how a window is split. Sources: CPC (arXiv 1807.03748), CRD (arXiv 1910.10699).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.losses._rows import no_autocast, normalize, require_no_grad, upcast
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


class ContrastiveResult(NamedTuple):
    """The loss term, and two detached numbers without which its value cannot be judged."""

    term: LossTerm  # unit: sequences
    accuracy: Tensor  # [] share of sequences whose own teacher embedding is the nearest
    chance: Tensor  # [] nats per sequence if all candidates look alike


class TeacherQueue(nn.Module):
    """FIFO queue of the last ``size`` teacher embeddings, fp32 unit vectors of ``width``.

    All state is in buffers: ``embeddings`` [size, width], ``position`` where the next one goes,
    ``filled`` how many there are.
    """

    embeddings: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(
        self,
        z: Tensor,  # [S, width]
        valid: Tensor,  # bool [S]
    ) -> None:
        """Append the valid rows, in order, in place of the oldest; call it after the loss.

        Of more than ``size`` rows the last ``size`` stay. Nothing waits for the device.
        """
        # Every row is written, so that no shape depends on data: rows that are invalid, or too old
        # to stay, into a spare slot that is cut off again.
        size = len(self.embeddings)
        rank = valid.cumsum(0)  # [S] from 1
        count = rank[-1:].sum()
        stays = valid & (rank > count - size)
        slot = torch.where(stays, (self.position + rank - 1) % size, size)
        spare = torch.cat([self.embeddings, self.embeddings.new_zeros(1, z.shape[1])])
        spare[slot] = normalize(upcast(z)).to(spare.dtype)
        self.embeddings.copy_(spare[:size])
        self.position.copy_((self.position + count) % size)
        self.filled.copy_((self.filled + count).clamp_max(size))

    def negatives(self) -> tuple[Tensor, Tensor]:
        """The embeddings [size, width], and which slots are filled, bool [size]."""
        slots = torch.arange(len(self.embeddings), device=self.embeddings.device)
        return self.embeddings, slots < self.filled


def mean_pool(
    hidden: Tensor,  # [B, L, D]
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of each segment, [B, K, D], and which segments have any, bool [B, K].

    K is ``layout.units.max_segments``. A segment without tokens has zeros. Other positions may hold
    anything; the first of a segment is one of them, whose norm would dominate the mean.
    """
    segments = torch.arange(layout.units.max_segments, device=hidden.device)
    member = (layout.segment[:, None, :] == segments[:, None]) & layout.tokens[:, None, :]
    tokens = upcast(hidden.masked_fill(~layout.tokens[..., None], 0.0))
    with no_autocast(hidden):
        sums = member.to(tokens.dtype) @ tokens  # a product: adding by index is not repeatable
    count = member.sum(-1)  # [B, K]
    return sums / count.clamp_min(1)[..., None], count > 0


def contrastive_loss(
    student_z: Tensor,  # [S, D], pooled and projected
    teacher_z: Tensor,  # [S, D], pooled
    valid: Tensor,  # bool [S]
    queue: TeacherQueue | None,
    *,
    count: int,
    temperature: float = 0.07,
    others: Tensor | None = None,  # [M, D]
) -> ContrastiveResult:
    """Contrastive loss: sum over valid rows of L; their number is ``count``. Unit: sequences.

    ``others`` are pooled teacher embeddings of other ranks, further negatives for the student; rows
    of zeros among them, ``mean_pool``'s segments without tokens, are left out. ``chance`` is
    ``(log(number of teacher embeddings) + log(count)) / 2``. At one sequence without a queue there
    is nothing to tell apart: loss and gradient are 0. Memory: [S, S + size + M] and [S, S] in fp32.
    Raises ``ValueError`` for a teacher that requires a gradient.
    """
    require_no_grad(teacher_z, *(() if others is None else (others,)))
    z_s, z_t = (
        normalize(upcast(z).masked_fill(~valid[:, None], 0.0)) for z in (student_z, teacher_z)
    )
    # Candidates for the student: its own micro-batch, the queue, and other ranks.
    candidates, known = [z_t], [valid]
    if queue is not None:
        embeddings, filled = queue.negatives()
        candidates.append(embeddings.to(z_t.dtype))
        known.append(filled)
    if others is not None:
        candidates.append(normalize(upcast(others)).to(z_t.dtype))
        known.append((others != 0).any(-1))
    teachers, exists = torch.cat(candidates), torch.cat(known)
    with no_autocast(z_s):
        to_teachers = z_s @ teachers.T / temperature  # [S, S + size + M]
        to_students = z_t @ z_s.T / temperature  # [S, S]

    target = torch.arange(len(valid), device=valid.device)
    own = target[:, None] == torch.arange(len(exists), device=valid.device)
    # A row keeps its own column even where it is no sequence: no softmax is over nothing.
    to_teachers = to_teachers.masked_fill(~(exists | own), -torch.inf)
    to_students = to_students.masked_fill(~(valid | own[:, : len(valid)]), -torch.inf)
    both = F.cross_entropy(to_teachers, target, reduction="none") + F.cross_entropy(
        to_students, target, reduction="none"
    )
    nearest = to_teachers.detach().argmax(-1) == target
    chance = exists.sum().clamp_min(1).log() + valid.sum().clamp_min(1).log()
    return ContrastiveResult(
        LossTerm(torch.where(valid, both, 0.0).sum() / 2, count),
        (nearest & valid).sum() / max(1, count),
        chance / 2,
    )


class ContrastiveLoss(StructuralLoss):
    """``contrastive_loss`` over the segments of a micro-batch; the section ``contrastive``."""

    name = "contrastive"
    unit = "sequences"
    diagnostics = ("contrastive_accuracy", "contrastive_chance")

    def __init__(self, config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.temperature = config.contrastive.temperature
        self.projector = make_projector(width_of(student), width_of(teacher))
        size = config.contrastive.queue_size
        self.queue = TeacherQueue(size, width_of(teacher)) if size else None

    def forward(self, inputs: LossInputs) -> LossTerms:
        pooled, valid = mean_pool(inputs.student_hidden, inputs.layout)
        teacher, _ = mean_pool(inputs.teacher_hidden, inputs.layout)
        result = contrastive_loss(
            project(self.projector, pooled).flatten(0, 1),
            teacher.flatten(0, 1),
            valid.flatten(),
            self.queue,
            count=inputs.layout.units.sequences,
            temperature=self.temperature,
        )
        if self.training and self.queue is not None:  # the loss holds a copy of what was in it
            self.queue.enqueue(teacher.flatten(0, 1), valid.flatten())
        count = result.term.count
        return {
            "contrastive": result.term,
            "contrastive_accuracy": LossTerm(result.accuracy * count, count),
            "contrastive_chance": LossTerm(result.chance * count, count),
        }
