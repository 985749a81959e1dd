"""Kernel: a finished gradient times a number on the device, cast to another dtype.

One read and one write, and no host sync for the number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sad_kernels._triton.launch import ceil_div, on_device
from sad_kernels._triton.tile import to_dtype

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def scaled_kernel(
    x_ptr,  # [n]
    factor_ptr,  # [] fp32
    out_ptr,  # [n], written in its own dtype
    n,
    BLOCK: tl.constexpr,
):
    """``out = x * factor`` of one block; whole blocks go without a mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr)
    if start + BLOCK <= n:
        x = tl.load(x_ptr + start + offsets).to(tl.float32)
        tl.store(out_ptr + start + offsets, to_dtype(x * factor, out_ptr.dtype.element_ty))
    else:
        mask = start + offsets < n
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        scaled = to_dtype(x * factor, out_ptr.dtype.element_ty)  # not x: both branches name it
        tl.store(out_ptr + start + offsets, scaled, mask=mask)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:  # factor: [] fp32
    """``x * factor`` in ``dtype``, computed in fp32 and rounded once."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        with on_device(x.device):
            scaled_kernel[(ceil_div(x.numel(), BLOCK),)](
                x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
            )
    return out
