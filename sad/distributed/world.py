"""The processes of one run, and what they agree on.

Started by ``torchrun``, a run is one process (*rank*) per device. A ``World`` says which of them
this is, and gathers, sums and broadcasts; with one process it does nothing and needs no process
group. Plain values travel over the hosts' group (gloo), tensors over that of their device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sad.errors import RankLostError, SadError, UsageError, with_type

T = TypeVar("T")

WAIT_FOR_MAIN = timedelta(hours=24)
"""How long ranks wait for what the first one does alone, such as packing text."""


@dataclass(frozen=True)
class World:
    """This process among those of a run; by default the only one.

    ``mesh`` has the dimensions ``dp_replicate`` and ``dp_shard``: a model is split over the ranks
    of the second, and each of the first has a copy. ``hosts`` is a gloo group of all ranks.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    hosts: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    # Tensors, over their device's group

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor``, replaced by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    # Plain values, over the hosts' group

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return self.begin_any(flag)()

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """As ``any``, without waiting: the result is that of the function that is returned."""
        if self.size == 1:
            return lambda: flag
        shared = torch.tensor(int(flag), dtype=torch.int32)
        work = dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.hosts, async_op=True)
        assert work is not None

        def result() -> bool:
            work.wait()
            return bool(shared)

        return result

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of the ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def from_main(self, function: Callable[[], T]) -> T:
        """``function()``, done on the first rank alone; the others get its result.

        What it raises is raised on all ranks: a ``SadError`` as it is, others as ``RankLostError``
        on the other ranks.
        """
        if self.size == 1:
            return function()
        outcome: list[T | None] = [None]
        error: BaseException | None = None
        if self.main:
            try:
                outcome = [function()]
            except BaseException as raised:
                error = raised
        shared = [outcome[0], _travelling(error)]
        dist.broadcast_object_list(shared, src=0, group=self.hosts)
        if error is not None:
            raise error
        if isinstance(shared[1], BaseException):
            raise shared[1]
        return shared[0]  # pyright: ignore[reportReturnType]

    def agree(self, function: Callable[[], T]) -> T:
        """``function()`` on every rank; what one of them raises is raised on all."""
        if self.size == 1:
            return function()
        error: BaseException | None = None
        result: list[T] = []
        try:
            result = [function()]
        except BaseException as raised:
            error = raised
        errors = self.gather(_travelling(error))
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise other
        return result[0]

    def same(self, value: object, what: str) -> None:
        """Raise ``UsageError`` on all ranks unless ``value`` is equal on all of them."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UsageError(
                    f"{what} must be the same on all ranks, got {values[0]} on rank 0 and {other} "
                    f"on rank {rank}; install and copy the same to every machine"
                )


def _travelling(error: BaseException | None) -> BaseException | None:
    """An error as other ranks are told of it."""
    if error is None or isinstance(error, SadError):
        return error
    return RankLostError(f"all ranks must go on, got {with_type(error)} on one of them")


@contextmanager
def whole_world(
    device_type: str, *, timeout_seconds: int, shard_size: int | None = None
) -> Iterator[World]:
    """The world that torchrun has announced in the environment, or the one process there is.

    ``shard_size`` ranks hold a model together, by default all. Initialises the process group, if
    nobody has, and destroys it then. Raises ``UsageError`` where the ranks do not divide.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not dist.is_initialized():
        yield World()
        return
    begun = not dist.is_initialized()
    if begun:
        backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        size = dist.get_world_size()
        shards = size if shard_size is None else shard_size
        if shards < 1 or size % shards:
            raise UsageError(
                f"dp_shard_size must divide the number of processes, got {shards} for {size}; "
                "leave it out to split the model over all of them"
            )
        mesh = init_device_mesh(
            device_type, (size // shards, shards), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        hosts = dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN)
        yield World(dist.get_rank(), size, mesh, hosts)
    finally:
        if begun and dist.is_initialized():
            dist.destroy_process_group()


LOST = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl")


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank no longer answers."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "gloo" in text and any(w in text for w in LOST)
