"""The sizes of a teacher that is read from a cache of its targets, for plans of memory.

Nothing of its body is loaded. Of hidden states its head is, whose product with them gives logits;
of sparse targets there are K ids and log-probabilities per token, and no logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.models.heads import output_embedding
from sad.models.load import build_model, teacher_dtype

ID_AND_LOG_PROB = 8 + 4
"""Bytes of one of a token's K targets while the loss reads them: int64 and float32."""

DECODING = 24
"""Bytes per id that decoding takes besides: three numbers in float64."""

STATES_DECODING = 2
"""Tensors of fp32 hidden states that decoding takes besides what it returns."""


@dataclass(frozen=True)
class CachedTargets:
    """What a run reads in place of a teacher: a head and hidden states, or ``top_k`` ids per token;
    0 of them where a token has a number alone.

    ``bytes_per_position`` is the size of a stored record.
    """

    bytes_per_position: int
    top_k: int | None = None
    head_rows: int = 0
    width: int = 0
    head_dtype: torch.dtype = torch.float32
    head_bias: bool = False

    @property
    def head(self) -> nn.Linear | None:
        """The head, without data; None for sparse targets."""
        if self.top_k is not None:
            return None
        keys = {"bias": self.head_bias, "dtype": self.head_dtype, "device": "meta"}
        return nn.Linear(self.width, self.head_rows, **keys)

    @property
    def token_bytes(self) -> int:
        """Of a token's targets, from reading them to the end of the loss."""
        if self.top_k is not None:
            return ID_AND_LOG_PROB * self.top_k or self.bytes_per_position
        return self.width * self.head_dtype.itemsize

    @property
    def reading_bytes(self) -> int:
        """Of a token while its record is read and decoded: record, temporaries and targets."""
        passing = DECODING * self.top_k if self.top_k is not None else 4 * self.width
        passing *= 1 if self.top_k is not None else STATES_DECODING
        return self.bytes_per_position + passing + self.token_bytes


PlannedTeacher = PreTrainedModel | CachedTargets
"""A teacher as plans see it: a model without data, or its cache."""


def teacher_head(teacher: PlannedTeacher) -> nn.Linear | None:
    """The head that a teacher's logits are made with; None where none are."""
    return teacher.head if isinstance(teacher, CachedTargets) else output_embedding(teacher)


def planned_teacher(config: DistillConfig, cached: CachedTargets | None) -> PlannedTeacher | None:
    """The teacher without data, what its cache holds, or None; built on the device of the
    context."""
    if cached is not None:
        return cached
    if not config.loads_teacher:
        return None
    return build_model(config, "teacher", teacher_dtype(config))


def cached_head_items(cached: CachedTargets) -> list[tuple[str, int]]:
    """The head that is read with hidden states."""
    head = cached.head
    return [] if head is None else [("teacher head", sum(p.nbytes for p in head.parameters()))]


def sparse(teacher: PlannedTeacher | None) -> bool:
    """Whether a teacher's targets are a few ids per token."""
    return isinstance(teacher, CachedTargets) and teacher.top_k is not None
