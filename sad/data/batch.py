"""A micro-batch of packed rows, and the counts that losses are divided by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class Batch(NamedTuple):
    """B rows of L tokens; ``labels[b, i]`` is what follows ``input_ids[b, i]``."""

    input_ids: Tensor  # int64 [B, L]
    labels: Tensor  # int64 [B, L]; -100 where the document ends, and on padding
    position_ids: Tensor  # int64 [B, L]; from 0 at the start of a row and of a document
    lengths: Tensor  # int64 [B]; what follows in a row is padding
    counts: LossCounts
    target_bytes: int  # length of the targets' text in UTF-8

    @property
    def num_targets(self) -> int:
        return self.counts.targets

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        return self._replace(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            lengths=self.lengths.to(device),
        )


class LossCounts(NamedTuple):
    """What losses are divided by, counted on the host before any forward pass.

    A *segment* is what a row holds of one document. Its first position is a token that every other
    one may attend to and many do for want of anything better: it is no unit of a structural loss.
    """

    targets: int  # labels that are not -100
    tokens: int  # positions that are no padding and not the first of their segment
    sequences: int  # segments with such a token
    max_segments: int = 1  # in one row
