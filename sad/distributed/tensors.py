"""Tensors that are split over ranks: this rank's part, the whole, and copies into them.

Of a tensor that is not split, part and whole are the tensor itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part; it shares the tensor's memory and has no graph."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered: every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(part: Tensor, split: Tensor) -> Tensor:
    """``part`` as this rank's part of a tensor that is split as ``split`` is."""
    if not isinstance(split, DTensor):
        return part
    return DTensor.from_local(
        part,
        split.device_mesh,
        split.placements,
        run_check=False,
        shape=split.shape,
        stride=split.stride(),
    )


@runtime_checkable
class Readable(Protocol):
    """Tensors by name of which a part can be read without the rest."""

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor: ...


def part_of(saved: Mapping[str, Tensor], name: str, live: Tensor) -> Tensor:
    """The part of the whole tensor ``saved[name]`` that this rank holds of ``live``."""
    if not isinstance(live, DTensor):
        return saved[name]
    shape, offsets = compute_local_shape_and_global_offset(
        live.shape, live.device_mesh, live.placements
    )
    if isinstance(saved, Readable):
        return saved.read(name, tuple(offsets), tuple(shape))
    part = saved[name]
    for dimension, (begin, size) in enumerate(zip(offsets, shape, strict=True)):
        # Of a dimension that has nothing for this rank, the offset may lie past its end.
        part = part.narrow(dimension, min(begin, part.shape[dimension]), size)
    return part


@torch.no_grad()
def copy_from(live: Tensor, saved: Mapping[str, Tensor], name: str) -> None:
    """Copy the whole tensor ``saved[name]`` into ``live``, of which this rank may hold a part."""
    local(live).copy_(part_of(saved, name, live))
