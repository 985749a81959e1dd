"""Tensors split over processes (``DTensor``), as a checkpoint sees them: this process's part.

torch's module of ``DTensor`` takes long to import and is looked up only where somebody has imported
it: without it there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class PlacedTensors(Protocol):
    """Saved tensors by name that can be read as they are split over the processes now."""

    def like(self, name: str, live: Tensor) -> Tensor: ...


def is_split(tensor: object) -> bool:
    """Whether it is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of a ``DTensor`` its shard, the live one."""
    split: Any = tensor
    return split.to_local() if is_split(tensor) else tensor


@dataclass(frozen=True)
class Shard:
    """What one process saves of a tensor that is split over several.

    torch's planner of checkpoints asks it, as it asks a ``DTensor``; unlike there, ``part`` may lie
    on the host while the devices of the others compute.
    """

    part: Tensor
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]

    def __create_write_items__(self, name: str, shard: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
        )
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        offsets = torch.Size(self.offsets)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, self.part.shape),
            properties=TensorProperties(dtype=self.part.dtype),
            size=torch.Size(self.shape),
        )
        item = WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)
        return [item]


def with_local_part(tensor: Tensor, part: Tensor) -> Any:
    """``part`` in the place of what this process holds of ``tensor``: a ``Shard`` of a ``DTensor``.

    Raises ``ValueError`` for one whose parts are still to be added up.
    """
    if not is_split(tensor):
        return part
    split: Any = tensor
    if any(placement.is_partial() for placement in split.placements):
        raise ValueError(
            f"tensors to save must be whole or in shards, got placements {split.placements}; add "
            "the parts up first"
        )
    (chunk,) = split.__create_chunk_list__()
    return Shard(part, tuple(split.shape), tuple(chunk.offsets))


def read_like(saved: Mapping[str, Tensor], name: str, live: Tensor) -> Tensor:
    """``saved[name]``, split over the processes as ``live`` is.

    Of a file only this process's part is read, if it can be; no process waits for another.
    """
    if not is_split(live):
        return saved[name]
    if isinstance(saved, PlacedTensors):
        return saved.like(name, live)
    from torch.distributed.tensor import distribute_tensor

    split: Any = live
    whole = saved[name].to(live.device)
    # Every process has read the same: each keeps its part, and none sends anything.
    return distribute_tensor(whole, split.device_mesh, split.placements, src_data_rank=None)
