"""Checkpoints of a run on several processes (*ranks*): each writes its shards, any number reads.

::

    RUN_DIR/checkpoints/batch-000012345/     schema 2
        <group>.<rank>.safetensors           the chunks that one rank wrote of a group of tensors
        state.json                           plain values: those of all, and those of each rank
        tensors.json                         where the chunks of every tensor lie
        manifest.json                        schema, size and SHA-256 of every file; written last

Which rank writes which chunk, and which chunks a rank reads into the shards that it has now, is
planned by ``torch.distributed.checkpoint``: what several ranks hold is written once, and a
checkpoint of one number of ranks is read on another. The files are ours: no pickle, hashed as they
are written, and by the protocol of ``sad.checkpoint.store``: into a temporary directory, which gets
its name only after every rank has succeeded.

``live_snapshot``, ``write_shards`` and ``load_shards`` are to be called on all ranks together, and
what one of them raises is raised on all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sad.checkpoint import atomic_files as files
from sad.checkpoint.chunks import (
    INDEX,
    Chunk,
    ChunkedTensor,
    ChunkedTensors,
    ShardFiles,
    chunk_key,
    in_one_chunk,
    index_as_json,
    shard_name,
)
from sad.checkpoint.placement import Shard, with_local_part
from sad.checkpoint.snapshot import Snapshot, write
from sad.checkpoint.store import (
    SHARDED_SCHEMA,
    Checkpoint,
    Manifest,
    Report,
    Tensors,
    after_save,
    checkpoint_path,
    is_same,
    json_bytes,
    name_of_rank,
    open_verified,
    read_manifest,
    readable,
    remember_verified,
    require_saveable,
    verify_hashes,
    write_hashed,
)
from sad.checkpoint.tensor_files import FileTensors, safetensors_chunks
from sad.distributed.loading import read_parts
from sad.distributed.tensors import local_part
from sad.distributed.world import WAIT_FOR_MAIN, World
from sad.errors import CheckpointError, RankLostError, SadError, with_type

T = TypeVar("T")

PER_RANK = ("rng",)
"""Entries of the state and groups of tensors that every rank has for itself."""


# Saving


def live_snapshot(
    micro_step: int, state: dict[str, Any], tensors: Tensors, world: World
) -> Snapshot:
    """What ``snapshot`` copies, as it is: to be written before training goes on.

    ``state`` and ``tensors`` are as in ``save_checkpoint``; of a ``DTensor`` it has the ``Shard``
    that this rank has. Raises ``TypeError`` or ``ValueError`` for what cannot be restored; other
    ranks then raise ``RankLostError``.
    """

    def own() -> Snapshot:
        require_saveable(micro_step, state, tensors)
        parts = {
            group: {name: with_local_part(t, local_part(t).detach()) for name, t in named.items()}
            for group, named in tensors.items()
        }
        return Snapshot(micro_step, state, parts)

    return world.agree(own)


def write_shards(
    run_dir: str | Path,
    taken: Snapshot,
    world: World,
    *,
    save_total_limit: int,
    report: Report = print,
    per_rank: Collection[str] = PER_RANK,
) -> Path:
    """Write a snapshot on all ranks as ``RUN_DIR/checkpoints/batch-<micro_step>``; return its path.

    Of a ``Shard`` every rank writes its part. What several ranks hold is written by one of them.
    Entries of the state and groups named in ``per_rank`` are saved of every rank, all other entries
    of the first alone. One rank on its own writes what ``save_checkpoint`` writes.

    In a thread, ``world`` must be a ``background_world``. Raises ``CheckpointError`` on all ranks
    when a disk refuses on one of them, or when they do not share the directory.
    """
    if world.size == 1:
        return write(run_dir, taken, save_total_limit=save_total_limit, report=report)
    if save_total_limit < 2:
        raise ValueError(
            f"save_total_limit must be at least 2, got {save_total_limit}; one is to fall back to"
        )
    target = checkpoint_path(run_dir, taken.micro_step)
    own = {key: value for key, value in taken.state.items() if key in per_rank}
    content = {
        "micro_step": taken.micro_step,
        "state": {key: value for key, value in taken.state.items() if key not in per_rank},
        "per_rank": sorted(per_rank),
        "ranks": world.gather(own),
    }
    named = {
        _full_name(group, name_of_rank(world.rank, name) if group in per_rank else name): tensor
        for group, tensors in taken.tensors.items()
        for name, tensor in tensors.items()
    }
    tmp = world.from_main(lambda: _begin(target))
    writer = ShardWriter(tmp, target, world.rank, json_bytes(content), list(taken.tensors))
    try:
        save(
            named,
            storage_writer=writer,
            planner=_ShardPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=world.hosts,
        )
    except CheckpointException as error:  # a BaseException: no other handler would see it
        raise _of_this_rank(error, world.rank) from error
    finally:
        # Every rank has ended its part, or is lost.
        if world.main:
            with suppress(OSError):  # the next start sweeps what cannot be removed now
                if tmp.exists():
                    files.remove_tree(tmp)
    if world.main:
        after_save(target, save_total_limit, report)
    return target


def background_world(world: World) -> World:
    """The same ranks with a group of their own, for saves that go on while training talks, too.

    To be called on all ranks together, once.
    """
    if world.size == 1:
        return world
    return replace(world, hosts=dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN))


def _begin(target: Path) -> Path:
    """Make the temporary directory of a checkpoint."""
    tmp = files.temporary(target)
    with _disk_errors(target, rank=0):
        files.make_directories(target.parent)
        files.OPERATIONS.mkdir(tmp)
    return tmp


class _ShardPlanner(DefaultSavePlanner):
    """The planner of torch, for values that are tensors or ``Shard``s."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, Shard) else found


class _Written(NamedTuple):
    """A chunk on disk, as a rank tells the first one of it."""

    chunk: Chunk
    entry: dict[str, Any]  # of its file in the manifest


class ShardWriter(StorageWriter):
    """Writes what torch's planner assigns to this rank, and on the first rank publishes it all.

    ``state`` is the content of ``state.json``; ``groups`` names the groups of tensors, in order.
    """

    def __init__(
        self, tmp: Path, target: Path, rank: int, state: bytes, groups: Collection[str]
    ) -> None:
        self.tmp = tmp
        self.target = target
        self.rank = rank
        self.state = state
        self.groups = groups

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the directory has been made."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is made for one checkpoint

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write one file for each group of which this rank has chunks."""
        if not self.tmp.is_dir():
            raise _not_shared(f"no {self.tmp} on rank {self.rank}")
        groups: dict[str, dict[str, Tensor]] = {}
        chunks: list[tuple[MetadataIndex, Chunk]] = []
        for item in plan.items:
            tensor: Any = planner.resolve_data(item)
            if not tensor.numel():  # nothing to write, and nothing to read
                continue
            group, name = _split_name(item.index.fqn)
            offsets = tuple(item.index.offset or ())
            key, file = chunk_key(name, offsets), shard_name(group, self.rank)
            groups.setdefault(group, {})[key] = tensor
            chunks.append((item.index, Chunk(offsets, tuple(tensor.shape), file, key)))
        entries = {}
        with _disk_errors(self.target, self.rank):
            for group, named in groups.items():
                file = shard_name(group, self.rank)
                entries[file] = write_hashed(self.tmp / file, safetensors_chunks(named))
        written: Future[list[WriteResult]] = Future()
        written.set_result(
            [WriteResult(index, 0, _Written(chunk, entries[chunk.file])) for index, chunk in chunks]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, after all have written: write the rest and publish the checkpoint."""
        with _disk_errors(self.target, self.rank):
            self._finish(metadata, results)

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = {}
        entries: dict[str, dict[str, Any]] = {}
        for result in (result for of_rank in results for result in of_rank):
            written: _Written = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(written.chunk)
            entries[written.chunk.file] = written.entry
        for file, entry in sorted(entries.items()):
            self._require_here(file, entry["bytes"])
        index: dict[str, dict[str, ChunkedTensor]] = {group: {} for group in self.groups}
        for full_name, form in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(form, TensorStorageMetadata)
            group, name = _split_name(full_name)
            of_tensor = tuple(sorted(chunks.get(full_name, ())))
            index[group][name] = ChunkedTensor(form.properties.dtype, tuple(form.size), of_tensor)
        listed = {
            "state.json": write_hashed(self.tmp / "state.json", [self.state]),
            INDEX: write_hashed(self.tmp / INDEX, [json_bytes(index_as_json(index))]),
        } | dict(sorted(entries.items()))
        manifest = json_bytes({"schema": SHARDED_SCHEMA, "files": listed})
        files.write_file(self.tmp / "manifest.json", [manifest])
        if not is_same(self.tmp, self.target):
            files.publish_directory(self.tmp, self.target)

    def _require_here(self, file: str, size: int) -> None:
        """Refuse a file that another rank has written where this one does not see it whole."""
        path = self.tmp / file
        found = path.stat().st_size if path.exists() else None
        if found != size:
            got = "nothing" if found is None else f"{found:,} bytes"
            raise _not_shared(f"{got} as {path} on rank 0 in place of {size:,}")


def _full_name(group: str, name: str) -> str:
    return f"{group}/{name}"


def _split_name(full_name: str) -> tuple[str, str]:
    group, _, name = full_name.partition("/")  # no group has a slash in its name
    return group, name


def _not_shared(got: str) -> CheckpointError:
    return CheckpointError(
        f"output_dir must be shared by all ranks, got {got}; choose a directory on a file "
        "system that every machine mounts"
    )


@contextmanager
def _disk_errors(target: Path, rank: int) -> Iterator[None]:
    """Turn an ``OSError`` of the disk that refuses into ours, which every rank hears of."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target} must be written completely, got {files.describe(error)} on rank "
            f"{rank}; free space on that file system; earlier checkpoints are intact"
        ) from error


def _of_this_rank(error: CheckpointException, rank: int) -> BaseException:
    """The error to raise on this rank: its own, or what another one's says to it."""
    failures = error.failures
    first = rank if rank in failures else min(failures)
    found = failures[first][0]
    if isinstance(found, SadError) or first == rank:
        return found
    return RankLostError(f"all ranks must go on, got {with_type(found)} on rank {first}")


# Loading


def load_shards(path: str | Path, world: World) -> Checkpoint:
    """Read a checkpoint of either schema on all ranks, after verifying all of it together.

    Every rank hashes a share of the files. Groups of ``Checkpoint.tensors`` give whole tensors, and
    ``like(name, live)`` the shard of one that fits a live ``DTensor``. What each rank has for
    itself is there if as many ranks saved it (``Checkpoint.ranks``).

    Raises ``CheckpointError`` on all ranks if anything is missing, altered or made up, or if the
    ranks see different files.
    """
    path = Path(path)
    manifest, digest = _agree(
        world, path, lambda: (read_manifest(path), files.sha256(path / "manifest.json"))
    )
    if len({*world.gather(digest)}) > 1:
        raise _not_shared(f"different manifests of {path}")
    share = _share(manifest, world)
    _agree(world, path, lambda: verify_hashes(path, manifest, share))
    checkpoint = _agree(
        world, path, lambda: open_verified(path, manifest, world.rank, world.size, share=share)
    )
    remember_verified(path)
    tensors: dict[str, Mapping[str, Tensor]] = {
        group: _sharded(path, group, named) for group, named in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


class ShardedTensors(ChunkedTensors):
    """Saved tensors of one group by name: whole, or split over the ranks as a live one is."""

    def like(self, name: str, live: Tensor) -> Tensor:
        """A tensor with the saved dtype that is split as ``live`` is.

        This rank reads its own shard and waits for no other.
        """
        dtype, _ = self.form(name)
        target = torch.empty_like(live, dtype=dtype, requires_grad=False)
        full_name = _full_name("", name)
        try:
            read_parts({full_name: target}, ShardReader({full_name: self}))
        except CheckpointException as error:  # a BaseException: no other handler would see it
            raise _of_this_rank(error, rank=0) from error  # it has read alone
        return target


class ShardReader(StorageReader):
    """Reads the chunks, or parts of chunks, that torch's planner wants, from verified files.

    ``wanted`` maps the planner's names, ``<group>/<name>``, to the group that holds the tensor.
    """

    def __init__(self, wanted: Mapping[str, ChunkedTensors]) -> None:
        self.wanted = wanted
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is, in the planner's form."""
        forms: dict[str, Any] = {}
        for full_name, saved in self.wanted.items():
            tensor = saved.tensors[_split_name(full_name)[1]]
            chunks = []
            for chunk in tensor.chunks:
                offsets = torch.Size(chunk.offsets)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
                self._chunks[MetadataIndex(full_name, offsets)] = chunk
            properties = TensorProperties(dtype=tensor.dtype)
            forms[full_name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(forms)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the files have been verified."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is made for one checkpoint

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every part that the plan names into the live tensors, one at a time."""
        for item in plan.items:
            source = self.wanted[item.storage_index.fqn].source
            chunk = self._chunks[item.storage_index]
            part = source.part(chunk, item.storage_offsets, item.lengths)
            live = planner.resolve_tensor(item).detach()
            live.copy_(part)
            planner.commit_tensor(item, live)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _agree(world: World, path: Path, function: Callable[[], T]) -> T:
    """``function()`` on every rank; a disk that one of them cannot read is an error on all."""

    def explained() -> T:
        with readable(path):
            return function()

    return world.agree(explained)


def _share(manifest: Manifest, world: World) -> list[str]:
    """The files that this rank verifies: about the same number of bytes on every rank."""
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name]["bytes"], name))
    return largest_first[world.rank :: world.size]


def _sharded(path: Path, group: str, named: Mapping[str, Tensor]) -> ShardedTensors:
    """A group of a checkpoint of either schema; in schema 1 a tensor has one chunk."""
    if isinstance(named, FileTensors):
        file = f"{group}.safetensors"
        named = ChunkedTensors(ShardFiles(path), in_one_chunk(file, named))
    assert isinstance(named, ChunkedTensors)
    return ShardedTensors(named.source, named.tensors)
