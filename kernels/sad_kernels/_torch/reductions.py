"""Sums and maxima along the columns of a block, of the same bits for one row as for many."""

from __future__ import annotations

import torch
from torch import Tensor

ARGMAX_PIECE = 64  # columns whose maximum is taken at once where a row's maximum is looked for


def row_sum(x: Tensor) -> Tensor:  # [rows, columns] -> [rows]
    """The sum of each row, of the same bits for one row as for many."""
    return _as_two(x).sum(1)[: len(x)]


def row_nansum(x: Tensor) -> Tensor:  # [rows, columns] -> [rows]
    """The same with 0 for NaN."""
    return _as_two(x).nansum(1)[: len(x)]


def _as_two(x: Tensor) -> Tensor:
    """A single row twice: torch would split its sum between threads."""
    return x.expand(2, -1) if len(x) == 1 else x


def max_and_first(x: Tensor) -> tuple[Tensor, Tensor]:  # [rows, columns] -> [rows] both
    """The maximum of each row, and the first column that holds it.

    In two steps, pieces and then one piece, because torch's argmax is slow on a CPU.
    """
    rows, columns = x.shape
    whole = columns // ARGMAX_PIECE * ARGMAX_PIECE
    if x.device.type != "cpu" or whole == 0:
        return x.amax(1), x.argmax(1)
    tops = x[:, :whole].view(rows, whole // ARGMAX_PIECE, ARGMAX_PIECE).amax(2)
    if whole < columns:
        tops = torch.cat((tops, x[:, whole:].amax(1, keepdim=True)), 1)
    start = tops.argmax(1, keepdim=True).mul_(ARGMAX_PIECE)
    inside = start + torch.arange(ARGMAX_PIECE, device=x.device)
    found = x.gather(1, inside.clamp_(max=columns - 1)).argmax(1, keepdim=True)
    return tops.amax(1), start.add_(found).squeeze(1)
