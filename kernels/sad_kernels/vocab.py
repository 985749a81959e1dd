"""A vocabulary split over processes: which columns of the logits, rows of a head, are whose.

Each process of a group holds some neighbouring rows of the head's weight and computes the logits of
these columns for *all* rows of hidden states. A loss then takes one exchange in forward, of a few
numbers per row: maxima, sums relative to them, and the logits that are read by their column. Every
process puts them together in the order of the vocabulary, by the rules that put together the tiles
of one process, so all have the same loss to the bit. In backward the gradient of the hidden states
is summed up over the group, in fp32; those of weight and bias are whole where their rows are.

This module imports torch where it is needed, and ``torch.distributed`` with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class VocabShard:
    """Columns ``start`` to ``stop`` of a vocabulary, held by one process of a group.

    ``bounds`` are those of all processes in the order of their ranks in ``group`` (None: the
    default group): ``bounds[i] = (start_i, stop_i)``, the first from 0, each from where the one
    before ends. A shard may be empty, and have columns past ``valid_vocab``, which do not count.

    All processes of the group call a loss with the same rows, labels and objective, each with its
    own columns; forward and backward wait for each other. With ``sum_dhidden=False`` the gradient
    of the hidden states is left to the caller to sum up over the group, as by a reduce-scatter
    where the rows have been gathered.

    Raises ``TypeError`` and ``ValueError`` for bounds that do not follow each other, or among which
    ``(start, stop)`` is not.
    """

    start: int
    stop: int
    bounds: Bounds
    group: ProcessGroup | None = None
    sum_dhidden: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(tuple(pair) for pair in self.bounds))
        for name, value in (("start", self.start), ("stop", self.stop), *self._named_bounds()):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}; pass a column's number")
        end = 0
        for start, stop in self.bounds:
            if start != end or stop < start:
                raise ValueError(
                    f"bounds must be neighbouring ranges of columns from 0, got {self.bounds}; "
                    "pass (start, stop) of each rank, in the order of the vocabulary"
                )
            end = stop
        if (self.start, self.stop) not in self.bounds:
            raise ValueError(
                f"start and stop must be those of one rank in bounds {self.bounds}, got "
                f"{(self.start, self.stop)}; pass bounds[rank]"
            )

    def _named_bounds(self) -> list[tuple[str, object]]:
        for pair in self.bounds:
            if len(pair) != 2:
                raise TypeError(f"bounds must hold pairs (start, stop), got {pair}; pass two ints")
        return [("bounds", value) for pair in self.bounds for value in pair]

    @classmethod
    def of(cls, weight: Tensor) -> VocabShard:
        """The shard that a head's DTensor has here: a ``Shard(0)`` over a mesh of one dimension.

        Beside it the head takes ``weight.to_local()``, through which the gradient finds its way
        back into the DTensor. Raises ``TypeError`` for a tensor of any other kind, ``ValueError``
        for a DTensor that is placed in any other way.
        """
        from torch.distributed.tensor import DTensor, Shard

        if not isinstance(weight, DTensor):
            raise TypeError(
                f"weight must be a DTensor, got {type(weight).__name__}; give the columns of a "
                "plain tensor as VocabShard(start, stop, bounds, group)"
            )
        placements = weight.placements
        if len(placements) != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
            raise ValueError(
                f"weight must have one placement, Shard(0), got {placements}; redistribute it over "
                "a mesh of one dimension"
            )
        mesh, V = weight.device_mesh, weight.shape[0]
        # Shard(0) cuts as torch.chunk does: pieces of one length, a shorter one, empty ones.
        length = -(-V // mesh.size())
        ends = [min(rank * length, V) for rank in range(mesh.size() + 1)]
        bounds = tuple(pairwise(ends))
        return cls(*bounds[mesh.get_local_rank()], bounds, mesh.get_group())

    @property
    def vocab_size(self) -> int:
        """The number of columns of all shards."""
        return self.bounds[-1][1]

    @property
    def width(self) -> int:
        """The number of columns that are here."""
        return self.stop - self.start


def require_shard(name: str, shard: object) -> None:
    """Require a ``VocabShard`` or None."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(
            f"{name} must be a VocabShard or None, got {type(shard).__name__}; pass "
            "VocabShard(start, stop, bounds, group)"
        )


def rank_and_group(name: str, shard: VocabShard) -> tuple[int, str]:
    """This process's rank in the shard's group, and the group's name, by which operators find it.

    Raises ``RuntimeError`` without a process group and ``ValueError`` for one that does not fit the
    bounds.
    """
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{name} must have a process group, got none that is initialised; call "
            "torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if shard.group is None else shard.group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size != len(shard.bounds) or shard.bounds[rank] != (shard.start, shard.stop):
        raise ValueError(
            f"{name} must have the bounds of the {size} rank(s) of its group, of which this is "
            f"{rank}, got {(shard.start, shard.stop)} in {shard.bounds}; pass one (start, stop) "
            "per rank, in their order"
        )
    assert group is not None
    return rank, group.group_name


def gathered(x: Tensor, group: str) -> Tensor:  # [...] -> [ranks, ...]
    """``x`` of every rank of the group of that name, in their order."""
    from torch import distributed as dist

    of_name = _group(group)
    out = x.new_empty(dist.get_world_size(of_name), *x.shape)
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=of_name)
    return out


def sum_(x: Tensor, group: str) -> Tensor:
    """Sum ``x`` over the group of that name, in place."""
    from torch import distributed as dist

    dist.all_reduce(x, group=_group(group))
    return x


def _group(name: str) -> Any:
    from torch.distributed import distributed_c10d

    resolve: Any = getattr(distributed_c10d, "_resolve_process_group")  # noqa: B009  # not exported
    return resolve(name)
