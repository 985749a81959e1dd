"""The layout of a micro-batch: segments, padding, positions that count, the attention mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad.data.batch import Batch, LossCounts


class Layout(NamedTuple):
    """Layout of B rows of L positions: segments (parts of one document each), then padding.

    ``tokens`` leaves out padding and the first position of each segment, the attention sink.
    """

    segment: Tensor  # int64 [B, L]; numbered from 0 in each row; padding continues the last one
    real: Tensor  # bool [B, L]; False is padding
    tokens: Tensor  # bool [B, L]
    units: LossCounts


def layout_of(batch: Batch) -> Layout:
    """The layout of a batch, on its device, without waiting for it."""
    first = batch.position_ids == 0
    column = torch.arange(first.shape[1], device=first.device)
    real = column < batch.lengths[:, None]
    return Layout(first.cumsum(1) - 1, real, real & ~first, batch.counts)


def visible(layout: Layout, rows: slice, window: int | None = None) -> Tensor:
    """The attention mask of the queries ``rows``, bool [B, rows, L]: True where a key is seen.

    Keys that are no padding, of the query's segment, not later than it and, with a ``window``, less
    than so many positions before it. Every query sees itself, padding too: no row is empty.
    """
    length = layout.segment.shape[1]
    key = torch.arange(length, device=layout.segment.device)
    query = key[rows][:, None]
    near = key <= query
    if window is not None:
        near &= key > query - window
    same_segment = layout.segment[:, rows, None] == layout.segment[:, None, :]
    return (near & same_segment & layout.real[:, None, :]) | (key == query)
