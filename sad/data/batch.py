"""A micro-batch of packed rows, and the counts that losses are divided by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class Batch(NamedTuple):
    """B rows of L tokens; ``labels[b, i]`` is the token that follows ``input_ids[b, i]``."""

    input_ids: Tensor  # int64 [B, L]
    labels: Tensor  # int64 [B, L]; -100 where the document ends, and on padding
    position_ids: Tensor  # int64 [B, L]; from 0 at the start of a row and of a document
    lengths: Tensor  # int64 [B]; tokens of a row before its padding
    counts: LossCounts
    target_bytes: int  # length of the targets' text in UTF-8
    rows: Tensor | None = None  # int64 [B], on the host: their numbers among the packed rows
    places: Tensor | None = None  # int64 [B], on the host: their places in the order of the run
    theirs: TeacherTokens | None = None  # the same text for a teacher with another tokenizer

    @property
    def num_targets(self) -> int:
        """Labels that are not -100."""
        return self.counts.targets

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        return self._replace(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            lengths=self.lengths.to(device),
            theirs=None if self.theirs is None else self.theirs.to(device),
        )

    def without_targets(self) -> Batch:
        """The same tokens as padding: a forward pass that adds nothing to any loss."""
        return self._replace(
            labels=torch.full_like(self.labels, IGNORE_INDEX),
            lengths=torch.zeros_like(self.lengths),
            counts=LossCounts(targets=0, tokens=0, sequences=0),
            target_bytes=0,
            theirs=None if self.theirs is None else self.theirs.without_targets(),
        )


class TeacherTokens(NamedTuple):
    """A batch's text in the tokens of a teacher with another tokenizer, and where the two meet.

    A *boundary* is a place that both have read up to the same byte, a *group* the tokens of either
    side from one boundary to the next.
    """

    batch: Batch  # its own rows: [B, L_t]
    positions: Tensor  # int64 [B, L]: where the teacher has read the same bytes; -1 for nowhere
    groups: Tensor  # int64 [B, L]: the group of each target, below B * L; -1 for none
    teacher_groups: Tensor  # int64 [B, L_t]: the same of the teacher's targets

    @property
    def boundaries(self) -> Tensor:  # bool [B, L]
        """Where teacher and student can be compared: both go on from the same text."""
        return self.positions >= 0

    def at_students(self, states: Tensor) -> Tensor:
        """The teacher's states [B, L_t, D] as [B, L, D] at the student's positions; anywhere but at
        boundaries they mean nothing."""
        at = self.positions.clamp(min=0)[..., None]
        return states.gather(1, at.expand(*at.shape[:2], states.shape[-1]))

    def to(self, device: torch.device) -> TeacherTokens:
        """The same with its tensors on ``device``."""
        return TeacherTokens(self.batch.to(device), *(part.to(device) for part in self[1:]))

    def without_targets(self) -> TeacherTokens:
        """The same tokens, nowhere to be compared."""
        nowhere = (torch.full_like(part, -1) for part in self[1:])
        return TeacherTokens(self.batch.without_targets(), *nowhere)


class LossCounts(NamedTuple):
    """Denominators of the losses, counted on the host before any forward pass.

    A *segment* is the part of one document that lies in a row. Its first position is an attention
    sink (every later one may attend to it, and many do for want of anything better), so structural
    losses leave it out.
    """

    targets: int  # labels that are not -100
    tokens: int  # positions that are neither padding nor the first of their segment
    sequences: int  # segments of at least two tokens
    max_segments: int = 1  # largest number of segments in one row
