"""Memory extents of tensors, and the check that no two tensors overlap."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Extent(NamedTuple):
    """Device, dtypes, addresses and size of a shadow and its parameter."""

    device: torch.device
    shadow_dtype: torch.dtype
    param_dtype: torch.dtype
    shadow: int  # address
    param: int  # address
    numel: int


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of each dimension that has more than one element, in order."""
    if tensor.numel() == 0:
        return []
    return [(step, n) for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _is_dense(layout: list[tuple[int, int]]) -> bool:
    """Whether the elements fill their span of memory without holes or overlaps."""
    extent = 1
    for stride, size in sorted(layout):
        if stride != extent:
            return False
        extent *= size
    return True


@lru_cache(maxsize=8)
def _require_apart(extents: tuple[Extent, ...]) -> None:
    """Raise if two of these dense tensors overlap: written twice, or written while being read.

    Remembers the last sets of tensors that did not: with hundreds of them it is a millisecond.
    """
    spans = sorted(
        (str(device), start, start + numel * dtype.itemsize)
        for device, shadow_dtype, param_dtype, shadow, param, numel in extents
        for dtype, start in ((shadow_dtype, shadow), (param_dtype, param))
    )
    for (device, _, end), (next_device, start, _) in pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(
                "shadows and params must not share memory, got two tensors that overlap by "
                f"{end - start} bytes on {device}; list tied weights once"
            )
