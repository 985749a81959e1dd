"""What happens around the rows: leading dimensions are flattened, row losses are reduced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels.objective import DistillOutput, Objective


class RowLayout:
    """The leading dimensions of logits [..., V], in an order that flattens them without a copy.

    Logits laid out [s, b, V] and seen as [b, s, V] would otherwise be copied whole.
    """

    def __init__(self, x: Tensor) -> None:
        self.order = _by_falling_stride(x)
        self.shape = [x.shape[dim] for dim in self.order]

    def rows(self, x: Tensor) -> Tensor:  # [..., K] -> [N, K]
        return x.permute(*self.order, -1).reshape(-1, x.shape[-1])

    def flat(self, labels: Tensor | None) -> Tensor | None:  # [...] -> [N]
        return None if labels is None else labels.permute(self.order).flatten().long()

    def restore(self, rows: Tensor) -> Tensor:  # [N] -> [...]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.reshape(self.shape).permute(inverse)


def _by_falling_stride(x: Tensor) -> list[int]:
    """The leading dimensions, by insertion: torch.compile cannot sort by unknown strides."""
    order: list[int] = []
    for dim in range(x.ndim - 1):
        at = len(order)
        while at > 0 and x.stride(order[at - 1]) < x.stride(dim):
            at -= 1
        order.insert(at, dim)
    return order


def count_valid(labels: Tensor | None, ignore_index: int, x: Tensor) -> Tensor:  # x: [..., K]
    """The number of rows of ``x`` that count, in the dtype of their loss."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if labels is None:
        return x.new_full((), x[..., 0].numel(), dtype=dtype)
    return (labels != ignore_index).sum(dtype=dtype)


def reduce_rows(loss: Tensor, num_tokens: Tensor, reduction: str, layout: RowLayout) -> Tensor:
    if reduction == "none":
        return layout.restore(loss)
    return loss.sum() if reduction == "sum" else loss.sum() / num_tokens.clamp(min=1)


def divisor(num_tokens: Tensor, num_items: int | Tensor | None) -> Tensor:
    """What the sum over rows is divided by, at least 1, in the dtype of ``num_tokens``."""
    if isinstance(num_items, int):
        return torch.full_like(num_tokens, max(num_items, 1))
    items = num_tokens if num_items is None else num_items.to(num_tokens.dtype)
    return items.clamp(min=1)


def distill_output(loss: Tensor, rows: RowResults, num_tokens: Tensor) -> DistillOutput:
    return DistillOutput(
        loss=loss,
        ce=rows.ce.sum(),
        kd=rows.kd.sum(),
        z=rows.z.sum(),
        num_tokens=num_tokens,
        correct=rows.correct.sum(),
        agree=rows.agree.sum(),
        entropy=rows.entropy.sum(),
    )


class LossSpec(NamedTuple):
    """What is asked of the rows, without any tensor."""

    objective: Objective
    vocab: int
    ignore_index: int
    compute_ce: (
        bool  # labels name classes, so there is a CE; in kl_div they only say which rows count
    )
    compute_metrics: bool  # entropy, correct, agree


class RowResults(NamedTuple):
    """One number per row. ``loss`` is the weighted sum of the three that follow."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    z: Tensor
    correct: Tensor
    agree: Tensor
    entropy: Tensor
