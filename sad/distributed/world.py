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
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sad.environment import processes, stop_if_requested
from sad.errors import RankLostError, SadError, UsageError, quoted, with_type

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

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` things in a row, of which some ranks may get none."""
        size = -(-count // self.size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))

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
            raise _heard(shared[1])
        return shared[0]  # pyright: ignore[reportReturnType]

    def main_first(self, function: Callable[[], T]) -> T:
        """``function()`` on the first rank, then on the others, which find what it left on disk."""
        if self.main:
            return self.agree(function)
        self._raise_first(self.gather(None))
        return function()

    def stop_if_requested(self, doing: str) -> None:
        """Raise ``StoppedError`` on all ranks if one of them was asked to stop."""
        if self.size == 1:
            stop_if_requested(doing)
            return
        self.agree(partial(stop_if_requested, doing))

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
        if isinstance(error, SadError):  # the first of them says it
            error.spoken = not any(errors[: self.rank])
        if error is not None:
            raise error
        self._raise_first(errors)
        return result[0]

    def _raise_first(self, errors: list[BaseException | None]) -> None:
        """Raise what another rank has raised, and says itself."""
        for error in errors:
            if error is not None:
                raise _heard(error)

    def same(self, compute: Callable[[], object], what: str) -> None:
        """Raise ``UsageError`` on all ranks unless ``compute()`` is equal on all of them.

        Of mappings the error names the items that differ. With one process nothing is computed.
        """
        if self.size == 1:
            return
        values = self.gather(compute())
        for rank, other in enumerate(values):
            if other != values[0]:
                ours, theirs = _differing(values[0], other)
                raise UsageError(
                    f"{what} must be the same on all ranks, got {ours} on rank 0 and {theirs} "
                    f"on rank {rank}; install and copy the same to every machine"
                )


def _differing(one: object, other: object) -> tuple[object, object]:
    """Two values that are not equal, or of two mappings the items that are not, as text."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    keys = [k for k in one | other if k not in one or k not in other or one[k] != other[k]]
    first, second = (
        ", ".join(f"{k}: {quoted(m[k])}" if k in m else f"no {k}" for k in keys)
        for m in (one, other)
    )
    return first, second


def _travelling(error: BaseException | None) -> BaseException | None:
    """An error as other ranks are told of it."""
    if error is None or isinstance(error, SadError):
        return error
    return RankLostError(f"all ranks must go on, got {with_type(error)} on one of them")


ALONE = World()
"""The world of a process that is a run of its own."""


def _heard(error: BaseException) -> BaseException:
    """An error of another rank, which says it."""
    if isinstance(error, SadError):
        error.spoken = False
    return error


def mesh_sizes(
    ranks: int, replicas: int | None = None, shard_size: int | None = None
) -> tuple[int, int]:
    """The copies of each model, and the ranks that each copy is split over.

    Of the two, what is None follows from the other; without both there is one copy. Raises
    ``UsageError`` where they do not make up the number of ``ranks``.
    """
    if replicas is None:
        replicas = 1 if shard_size is None else max(ranks // shard_size, 1)
    if shard_size is None:
        shard_size = max(ranks // replicas, 1)
    if replicas * shard_size != ranks:
        raise UsageError(
            f"dp_replicate_size x dp_shard_size must be the number of processes, {ranks}, got "
            f"{replicas} x {shard_size}; leave one of the two out, or both to split over all"
        )
    return replicas, shard_size


@contextmanager
def whole_world(
    device_type: str,
    *,
    timeout_seconds: int,
    replicas: int | None = None,
    shard_size: int | None = None,
) -> Iterator[World]:
    """The world that torchrun has announced in the environment, or the one process there is.

    ``replicas`` and ``shard_size`` are as in ``mesh_sizes``. Initialises the process group, if
    nobody has, and destroys it then. Raises ``UsageError`` for ranks that cannot find one another
    or do not make up the mesh.
    """
    _, size = processes()
    if dist.is_initialized():
        size = dist.get_world_size()
    if size == 1:
        yield ALONE
        return
    begun = not dist.is_initialized()
    if begun:
        rank = os.environ.get("RANK", "")
        if rank.isdecimal() and int(rank) >= size:  # torch would wait for it until the timeout
            raise UsageError(
                f"RANK must be less than WORLD_SIZE, {size}, got {rank}; start processes with "
                "torchrun"
            )
        backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:nccl"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        except (ValueError, RuntimeError) as error:  # no address, or nobody there
            raise UsageError(
                f"{size} processes (WORLD_SIZE) must find one another, got {with_type(error)}; "
                "start them with torchrun"
            ) from error
    try:
        sizes = mesh_sizes(size, replicas, shard_size)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
        hosts = dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN)
        assert isinstance(hosts, dist.ProcessGroup)  # of which every rank is a member
        yield World(dist.get_rank(), size, mesh, hosts)
    finally:
        if begun and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def lost_ranks_explained(
    world: World,
    where: Callable[[], str] = lambda: "",
    remedy: str = "resume with --resume_from_checkpoint auto, on any number of processes",
) -> Iterator[None]:
    """Within, an error of a transfer whose other end is gone is a ``RankLostError``; ``where`` says
    how far the run had come, ``remedy`` what to do."""
    try:
        yield
    except Exception as error:
        if world.size == 1 or not is_lost_rank(error):
            raise
        raise RankLostError(
            f"all {world.size} processes must answer, got {with_type(error)}{where()}: a rank was "
            f"lost; {remedy}"
        ) from error


def use_own_device() -> None:
    """Make this rank's GPU the current one, if it is one of several processes with GPUs."""
    if processes()[1] > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


LOST = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl")


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank no longer answers."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "gloo" in text and any(w in text for w in LOST)
