"""Rows to what a caller gets: the loss, the count and the sums of the parts, in one launch.

In torch these are a dozen kernels, each of which takes longer to start than to run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sad_kernels._triton.launch import on_device
from sad_kernels._triton.rows import to_fp32

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def reduce_kernel(
    loss_ptr, parts_ptr, labels_ptr, ignore_index, items_ptr,
    mean_ptr, divisor_ptr, sums_ptr, N,
    BLOCK: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_ITEMS: tl.constexpr,
):  # fmt: skip
    """The first program: ``sum(loss) / max(items, 1)``. The others: a part's sum each."""
    part = tl.program_id(0)
    of = loss_ptr
    if part > 0:
        of = parts_ptr + (part - 1).to(tl.int64) * N
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(of + rows, mask=rows < N, other=0.0)
        if HAS_LABELS:
            label = tl.load(labels_ptr + rows, mask=rows < N, other=ignore_index)
            count += (label != ignore_index).to(tl.int32)
    total = tl.sum(total, 0)
    if part > 0:
        tl.store(sums_ptr + part, total)
    else:
        number = to_fp32(N)
        if HAS_LABELS:
            number = tl.sum(count, 0).to(tl.float32)
        items = number
        if HAS_ITEMS:
            items = tl.load(items_ptr).to(tl.float32)
        items = tl.where(items < 1, 1.0, items)
        tl.store(mean_ptr, total / items)
        tl.store(divisor_ptr, items)
        tl.store(sums_ptr, number)


class Reduced(NamedTuple):
    mean: Tensor  # [] sum of the losses over the divisor
    divisor: Tensor  # [] at least 1
    sums: Tensor  # [1 + P] rows that count, parts


def reduced(
    loss: Tensor,  # [N]
    parts: Tensor,  # [P, N]
    labels: Tensor | None,  # [N]; None: all rows count
    ignore_index: int,
    items: Tensor | None = None,  # [], of any dtype; None: the rows that count
) -> Reduced:
    N, P = len(loss), len(parts)
    result = Reduced(loss.new_empty(()), loss.new_empty(()), loss.new_empty(1 + P))
    y = loss if labels is None else labels.contiguous()
    with on_device(loss.device):
        reduce_kernel[(1 + P,)](
            loss.contiguous(), parts.contiguous(), y, ignore_index,
            loss if items is None else items, *result, N,
            BLOCK=BLOCK, HAS_LABELS=labels is not None, HAS_ITEMS=items is not None,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return result
