"""Kernel: row losses to their mean, the number of rows that count, and the sums of their parts.

One launch in place of a dozen of torch's, each of which takes longer to start than to run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sad_kernels._triton.launch import on_device
from sad_kernels._triton.rows import PARTS
from sad_kernels._triton.tile import to_fp32

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def reduce_kernel(
    loss_ptr,  # [N]
    parts_ptr,  # [PARTS, N]
    labels_ptr,  # [N], read if HAS_LABELS
    ignore_index,
    items_ptr,  # [], read if HAS_ITEMS
    N,
    mean_ptr, divisor_ptr, num_tokens_ptr,  # [] each, written
    ce_ptr, kd_ptr, z_ptr, correct_ptr, agree_ptr, entropy_ptr,  # [] each, written
    lse_ptr,  # [N], written
    BLOCK: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_ITEMS: tl.constexpr,
):  # fmt: skip
    """Program 0 computes ``sum(loss) / max(items, 1)``, program i the sum of part i - 1.

    The last part is not summed up but copied, to be a tensor of its own.
    """
    part = tl.program_id(0)
    of = loss_ptr
    if part > 0:
        of = parts_ptr + (part - 1).to(tl.int64) * N
    # Each lane sums up its own rows; the lanes are added in the end, so the order is fixed.
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = tl.load(of + rows, mask=rows < N, other=0.0)
        total += x
        if part == 7:
            tl.store(lse_ptr + rows, x, mask=rows < N)
        if HAS_LABELS:
            label = tl.load(labels_ptr + rows, mask=rows < N, other=ignore_index)
            count += (label != ignore_index).to(tl.int32)
    total = tl.sum(total, 0)
    # The divisor: the given items, or the rows that count; at least 1, so that no rows give 0.
    if part == 0:
        num_tokens = to_fp32(N)
        if HAS_LABELS:
            num_tokens = tl.sum(count, 0).to(tl.float32)
        divisor = num_tokens
        if HAS_ITEMS:
            divisor = tl.load(items_ptr).to(tl.float32)
        divisor = tl.where(divisor < 1, 1.0, divisor)
        tl.store(mean_ptr, total / divisor)
        tl.store(divisor_ptr, divisor)
        tl.store(num_tokens_ptr, num_tokens)
    tl.store(ce_ptr, total, mask=part == 1)
    tl.store(kd_ptr, total, mask=part == 2)
    tl.store(z_ptr, total, mask=part == 3)
    tl.store(correct_ptr, total, mask=part == 4)
    tl.store(agree_ptr, total, mask=part == 5)
    tl.store(entropy_ptr, total, mask=part == 6)


class Reduced(NamedTuple):
    """Sums over rows: 0-d fp32 tensors, each of its own storage, because callers add in place.

    All but ``lse``, the last part as it is.
    """

    mean: Tensor  # the losses' sum over the divisor
    divisor: Tensor  # at least 1
    num_tokens: Tensor  # rows that count
    ce: Tensor  # sums, as all that follow
    kd: Tensor
    z: Tensor
    correct: Tensor
    agree: Tensor
    entropy: Tensor
    lse: Tensor  # [N]


def reduced(
    loss: Tensor,  # [N], 0 in rows that do not count
    parts: Tensor,  # [PARTS, N]
    labels: Tensor | None,  # [N]; None: all rows count
    ignore_index: int,
    items: Tensor | None = None,  # [], of any dtype; None: the rows that count
) -> Reduced:
    """Reduce row losses and their parts, in one launch."""
    result = Reduced(*(loss.new_empty(()) for _ in Reduced._fields))
    result = result._replace(lse=loss.new_empty(len(loss)))
    y = loss if labels is None else labels.contiguous()
    with on_device(loss.device):
        reduce_kernel[(1 + PARTS,)](
            loss.contiguous(), parts.contiguous(), y, ignore_index,
            loss if items is None else items, len(loss), *result,
            BLOCK=BLOCK, HAS_LABELS=labels is not None, HAS_ITEMS=items is not None,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return result
