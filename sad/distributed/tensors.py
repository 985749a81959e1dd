"""Tensors that are split over ranks (``DTensor``): this rank's part, the whole, copies into them.

Of a tensor that is not split, part and whole are the tensor itself. torch's module of ``DTensor``
takes long to import and is looked up only where somebody has imported it: without it there are
none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class PlacedTensors(Protocol):
    """Saved tensors by name that can be read as they are split over the ranks now."""

    def like(self, name: str, live: Tensor) -> Tensor: ...


def is_split(tensor: object) -> bool:
    """Whether it is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a ``DTensor`` its shard, the live one."""
    split: Any = tensor
    return split.to_local() if is_split(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered: every rank has to ask for it."""
    split: Any = tensor
    return split.full_tensor() if is_split(tensor) else tensor


def placed_like(part: Tensor, live: Tensor) -> Tensor:
    """``part`` as what this rank holds of a tensor that is split as ``live`` is."""
    if not is_split(live):
        return part
    split: Any = live
    return type(split).from_local(
        part,
        split.device_mesh,
        split.placements,
        run_check=False,
        shape=split.shape,
        stride=split.stride(),
    )


def read_like(saved: Mapping[str, Tensor], name: str, live: Tensor) -> Tensor:
    """``saved[name]``, split over the ranks as ``live`` is.

    Of a file only this rank's part is read, if it can be; no rank waits for another.
    """
    if not is_split(live):
        return saved[name]
    if isinstance(saved, PlacedTensors):
        return saved.like(name, live)
    from torch.distributed.tensor import distribute_tensor

    split: Any = live
    complete = saved[name].to(live.device)
    # Every rank has read the same: each keeps its part, and none sends anything.
    return distribute_tensor(complete, split.device_mesh, split.placements, src_data_rank=None)
