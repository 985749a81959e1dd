"""What one process saves of a tensor that is split over several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sad.distributed.tensors import is_split


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
