"""Checkpoints on disk: written completely or not at all, and verified before they are used.

::

    RUN_DIR/checkpoints/batch-000012345/     named by micro-batches consumed
        state.json                           plain numbers, strings, lists
        <group>.safetensors                  tensors: model, optimizer, ema, rng, grads ...
        manifest.json                        schema, size and SHA-256 of every file; written last
    RUN_DIR/checkpoints/set-aside/           those that a resumption has overtaken: read if they are
                                             named, never removed

A run on several processes writes the same directory in another layout, schema 2: every process its
own chunks of tensors, in files ``<group>.<rank>.safetensors``, and ``tensors.json`` says where each
of them lies (see ``sad.checkpoint.chunks`` and ``sad.distributed.shards``). Both are read here.

Writing: into ``.tmp-<name>-<16 hex digits>`` next to the target, each file forced to disk, the
manifest last, then the directory, then one rename, then the parent directory. So a process killed
at any moment, a full disk or a power cut costs the one being written and no other. Older ones are
removed only after all this has succeeded.

Reading: nothing is used before the manifest, all sizes and all hashes agree. The formats are JSON
and safetensors, which hold data and no code; a file that a manifest names must lie in the
checkpoint's own directory.

Two kinds of failure are kept apart. A disk that refuses raises ``CheckpointError``, and training
may go on. A state that could not be restored exactly (a numpy scalar, a tuple, tensors that share
memory) raises ``TypeError`` or ``ValueError`` before the disk is touched: a bug of the caller.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.chunks import (
    INDEX,
    SHARD_NAME,
    ChunkedTensors,
    Index,
    ShardFiles,
    check_shards,
    read_index,
)
from sad.checkpoint.tensor_files import (
    DTYPE_NAMES,
    read_json,
    read_tensors,
    safetensors_chunks,
    unusable,
)
from sad.distributed.tensors import local_part
from sad.errors import CheckpointError, quoted

SCHEMA = 1
"""Version of the layout that one process writes."""

SHARDED_SCHEMA = 2
"""Version of the layout that several write. A reader refuses a higher one."""

SET_ASIDE = "set-aside"
"""The folder of checkpoints that ``auto`` and ``save_total_limit`` pass over."""

Tensors = Mapping[str, Mapping[str, Tensor]]
Report = Callable[[str], object]

_CHECKPOINT_NAME = re.compile(r"batch-(\d{9,})")
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_GROUP_FILE = re.compile(r"[a-z][a-z0-9_]*\.safetensors")
_RANK_NAME = re.compile(r"(0|[1-9]\d{0,9})/(.*)", re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. The tensors lie on the CPU and are read from the files as they are used."""

    # A resumed run must not need more memory than one that was never stopped: while one tensor is
    # copied into its place, no other is in memory.

    path: Path
    micro_step: int
    state: dict[str, Any]
    tensors: dict[str, Mapping[str, Tensor]]
    ranks: int = 1
    """Processes that saved it. What each of them has for itself, such as random generators, is in
    ``state`` and ``tensors`` only if as many read it: then each gets its own."""


def save_checkpoint(
    run_dir: str | Path,
    micro_step: int,
    state: dict[str, Any],
    tensors: Tensors,
    *,
    save_total_limit: int,
    report: Report = print,
) -> Path:
    """Write ``RUN_DIR/checkpoints/batch-<micro_step>`` and return its path.

    ``state`` holds dicts with string keys, lists, and plain None, bool, int, float, str. Floats
    survive exactly, NaN and infinities included. ``tensors`` maps group -> name -> tensor; tensors
    may be on any device and have any strides. Extra memory: one tensor at a time on the CPU.

    Saving a ``micro_step`` again keeps the checkpoint that is there if it is equal, and otherwise
    replaces it. Afterwards the newest ``save_total_limit`` remain (at least 2: one to fall back
    to); trouble with removing the others goes to ``report`` and fails nothing.

    Raises ``CheckpointError`` when the disk refuses: nothing of the attempt stays, and earlier
    checkpoints are intact. Raises ``TypeError`` or ``ValueError`` for what cannot be restored.
    """
    if save_total_limit < 2:
        raise ValueError(
            f"save_total_limit must be at least 2, got {save_total_limit}; one is to fall back to"
        )
    contents = _serialised(micro_step, state, tensors)
    target = checkpoint_path(run_dir, micro_step)
    tmp = files.temporary(target)
    try:
        files.make_directories(target.parent)
        _write(tmp, contents)
        if not is_same(tmp, target):
            files.publish_directory(tmp, target)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target} must be written completely, got {files.describe(error)}; "
            "free space on that file system; earlier checkpoints are intact"
        ) from error
    finally:
        with suppress(OSError):  # the next start sweeps what cannot be removed now
            if tmp.exists():
                files.remove_tree(tmp)
    after_save(target, save_total_limit, report)
    return target


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of either schema after verifying all of it.

    Of one that several processes saved, tensors are put together from their chunks, each when it is
    asked for.

    Raises ``CheckpointError`` if anything is missing, altered, newer than this program, or points
    out of the directory.
    """
    path = Path(path)
    with readable(path):
        return open_verified(path, _verify(path))


def latest_checkpoint(run_dir: str | Path, report: Report = print) -> Path | None:
    """The newest checkpoint that verifies, or None. ``report`` hears what was skipped and why."""
    checkpoint = load_latest(run_dir, report)
    return None if checkpoint is None else checkpoint.path


def load_latest(run_dir: str | Path, report: Report = print) -> Checkpoint | None:
    """Read the newest checkpoint that verifies, if any; its hashes are computed this once."""
    for path in _newest_first(Path(run_dir) / "checkpoints"):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            report(f"skipping a checkpoint: {error}")
    return None


def checkpoints_of(run_dir: str | Path) -> list[Path]:
    """The directories of a run's checkpoints, complete or not, the newest first."""
    return _newest_first(Path(run_dir) / "checkpoints")


def checkpoint_path(run_dir: str | Path, micro_step: int) -> Path:
    """The directory of the checkpoint of a position."""
    return Path(run_dir) / "checkpoints" / f"batch-{micro_step:09d}"


def position_of(path: Path) -> int:
    """The micro-batches in the name of a checkpoint's directory."""
    return int(path.name.removeprefix("batch-"))


def set_aside(paths: Iterable[Path], report: Report = print) -> None:
    """Move checkpoints to ``set-aside`` beside them, where only who names them finds them.

    Neither ``latest_checkpoint`` nor ``save_total_limit`` looks there, so nothing is removed from
    there either. Trouble goes to ``report``.
    """
    for path in paths:
        folder = path.parent / SET_ASIDE
        target, turn = folder / path.name, 1
        while target.exists():
            turn += 1
            target = folder / f"{path.name}-{turn}"
        try:
            files.make_directories(folder)
            files.OPERATIONS.rename(path, target)
            files.sync_directory(folder)
            files.sync_directory(path.parent)
        except OSError as error:
            report(f"could not set {path} aside: {files.describe(error)}")


def sweep_stale(run_dir: str | Path, *, remove: bool = True) -> None:
    """At start: finish what a killed process was replacing and, with ``remove``, remove what it
    left unfinished.

    Only for the process that owns the run directory. Raises ``OutputError``.
    """
    tidy = files.sweep_directory if remove else files.put_back
    for directory in (Path(run_dir), Path(run_dir) / "checkpoints"):
        if directory.is_dir() and not directory.is_symlink():
            with files.output_errors(directory):
                tidy(directory)


# Writing


def require_saveable(micro_step: int, state: dict[str, Any], tensors: Tensors) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what could not be read back exactly."""
    if type(micro_step) is not int or micro_step < 0:
        raise ValueError(
            f"micro_step must be an int of at least 0, got {micro_step!r}; count on the host"
        )
    _require_plain(state, "state")
    for group, named in tensors.items():
        if not _GROUP_NAME.fullmatch(group):
            raise ValueError(
                f"a tensor group must be named in lower-case letters, digits and _, got {group!r}; "
                "it becomes a file name"
            )
        _require_tensors(named, group)
        _require_disjoint(named, group)


def _serialised(
    micro_step: int, state: dict[str, Any], tensors: Tensors
) -> dict[str, Iterable[files.Chunk]]:
    """File name -> content in chunks, after checking that all of it can be read back exactly."""
    require_saveable(micro_step, state, tensors)
    contents: dict[str, Iterable[files.Chunk]] = {
        "state.json": [json_bytes({"micro_step": micro_step, "state": state})]
    }
    return contents | {
        f"{group}.safetensors": safetensors_chunks(named) for group, named in tensors.items()
    }


def _require_plain(value: object, where: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"keys of {where} must be plain str, got {key!r}; convert them")
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for i, item in enumerate(value):
            _require_plain(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{where} must be a plain None, bool, int, float, str, list or dict, got "
            f"{type(value).__module__}.{type(value).__qualname__}; convert it or make it a tensor"
        )


def _require_tensors(named: Mapping[str, Tensor], group: str) -> None:
    for name, tensor in named.items():
        if type(name) is not str or name == "__metadata__":  # reserved by the format
            raise ValueError(f"tensor names of {group} must be str, got {name!r}; rename it")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{group} tensor {name!r} must be dense and of one of the dtypes "
                f"{', '.join(map(str, DTYPE_NAMES))}, got {tensor.dtype}, {tensor.layout} on "
                f"{tensor.device}; convert it"
            )


def _require_disjoint(named: Mapping[str, Tensor], group: str) -> None:
    """A tied tensor saved under two names would come back untied."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, whole in named.items()
        if (tensor := local_part(whole)).numel()
    )
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(
                f"{group} tensors must not share memory, got {name!r} and {next_name!r}; save a "
                "tied tensor under one name"
            )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


def _write(tmp: Path, contents: Mapping[str, Iterable[files.Chunk]]) -> None:
    files.OPERATIONS.mkdir(tmp)
    entries = {name: write_hashed(tmp / name, chunks) for name, chunks in contents.items()}
    files.write_file(tmp / "manifest.json", [json_bytes({"schema": SCHEMA, "files": entries})])


def write_hashed(path: Path, chunks: Iterable[files.Chunk]) -> dict[str, Any]:
    """Write a new file and return its entry of the manifest: ``bytes`` and ``sha256``."""
    digest, size = hashlib.sha256(), 0

    def tallied() -> Iterator[files.Chunk]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    files.write_file(path, tallied())
    return {"bytes": size, "sha256": digest.hexdigest()}


def json_bytes(value: object) -> bytes:
    """A value as the content of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def is_same(tmp: Path, target: Path) -> bool:
    """Whether ``target`` already is, whole, what ``tmp`` holds: manifests name every byte."""
    if not target.exists():
        return False
    try:
        load_checkpoint(target)
    except CheckpointError:
        return False
    return (tmp / "manifest.json").read_bytes() == (target / "manifest.json").read_bytes()


def after_save(saved: Path, save_total_limit: int, report: Report) -> None:
    """Remember that a new checkpoint is whole, and drop those that are too many now."""
    remember_verified(saved)
    _rotate(saved, save_total_limit, report)


def _rotate(saved: Path, limit: int, report: Report) -> None:
    """Keep the newest ``limit`` usable checkpoints and the one just saved; drop what is older.

    Damaged ones do not count, so that none is kept in the place of a good one.
    """
    try:
        paths = _newest_first(saved.parent)
        if len(paths) <= limit:
            return
        kept: list[Path] = []
        for path in paths:
            if len(kept) < limit and (path == saved or _is_usable(path)):
                kept.append(path)
        for path in paths[paths.index(kept[-1]) + 1 :]:
            if path != saved:
                files.discard(path)
    except OSError as error:
        report(f"could not remove old checkpoints in {saved.parent}: {files.describe(error)}")


# Reading


def _newest_first(directory: Path) -> list[Path]:
    """Entries with the name of a checkpoint, complete or not; none in the place of a link."""
    if directory.is_symlink() or not directory.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := _CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


_verified: dict[Path, tuple[tuple[str, int, int, int], ...]] = {}
"""Checkpoints that this process has written or verified, and how their files looked then: hashing
gigabytes again at every save would take longer than the save."""


def remember_verified(path: Path) -> None:
    """Do not hash the files of this checkpoint again as long as they look as they do now."""
    with suppress(OSError):
        _verified[path.absolute()] = _look(path)


def _look(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Name, size, inode and time of change of every file."""
    stats = {child.name: child.lstat() for child in path.iterdir()}
    return tuple((name, s.st_size, s.st_ino, s.st_mtime_ns) for name, s in sorted(stats.items()))


def _is_usable(path: Path) -> bool:
    """Whether it verifies; one that looks as it did when it last did is not read again."""
    try:
        if _verified.get(path.absolute()) != _look(path):
            _verify(path)
            remember_verified(path)
    except (CheckpointError, OSError):
        return False
    return True


class Manifest(NamedTuple):
    """What ``manifest.json`` says."""

    schema: int
    files: dict[str, dict[str, Any]]  # name -> ``bytes`` and ``sha256``


def _verify(path: Path) -> Manifest:
    """The manifest of a checkpoint, after checking it, all sizes and all hashes."""
    manifest = read_manifest(path)
    verify_hashes(path, manifest, manifest.files)
    return manifest


def verify_hashes(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raise ``CheckpointError`` unless these files have the hashes that the manifest names."""
    for name in names:
        _verify_hash(path / name, manifest.files[name]["sha256"])


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of a disk that does not let a checkpoint be read into ours."""
    try:
        yield
    except OSError as error:
        raise unusable(path, "be readable", files.describe(error)) from error


def open_verified(
    path: Path, manifest: Manifest, rank: int = 0, ranks: int = 1, *, share: Iterable[str] = ()
) -> Checkpoint:
    """Read a checkpoint for one of ``ranks`` processes; its files have the hashes of ``manifest``.

    Of the files of chunks, this process compares those in ``share`` with ``tensors.json``, the only
    one all.
    """
    sharded = manifest.schema == SHARDED_SCHEMA
    keys = ("micro_step", "state", "per_rank", "ranks") if sharded else ("micro_step", "state")
    saved = read_json(path / "state.json", keys)
    _require_position(path, saved["micro_step"])
    if not sharded:
        groups = [n.removesuffix(".safetensors") for n in manifest.files if n != "state.json"]
        whole = {group: read_tensors(path / f"{group}.safetensors") for group in groups}
        return Checkpoint(path, saved["micro_step"], saved["state"], {**whole})
    index = read_index(path, manifest.files)
    names = [name for name in (manifest.files if ranks == 1 else share) if SHARD_NAME.match(name)]
    check_shards(path, index, names)
    _require_ranks(path, saved, index)
    state, source, tensors = saved["state"], ShardFiles(path), {}
    as_many = ranks == len(saved["ranks"])
    if as_many:
        state |= saved["ranks"][rank]
    for group, named in index.items():
        if group not in saved["per_rank"]:
            tensors[group] = ChunkedTensors(source, named)
        elif as_many:
            tensors[group] = ChunkedTensors(source, _of_rank(named, rank))
    return Checkpoint(path, saved["micro_step"], state, tensors, len(saved["ranks"]))


def _require_ranks(path: Path, saved: dict[str, Any], index: Index) -> None:
    """Refuse a ``state.json`` that does not say of each process what it alone has."""
    file, state, per_rank = path / "state.json", saved["state"], saved["per_rank"]
    if type(state) is not dict:
        raise unusable(file, "hold an object as state", quoted(state))
    if type(per_rank) is not list or not all(type(name) is str for name in per_rank):
        raise unusable(file, "list the names of what each process has", quoted(per_rank))
    ranks = saved["ranks"]
    if type(ranks) is not list or not ranks:
        raise unusable(file, "hold the values of each process", quoted(ranks))
    for values in ranks:
        if type(values) is not dict or not values.keys() <= {*per_rank} - state.keys():
            raise unusable(file, f"hold {quoted(per_rank)} of each process", quoted(values))
    for group in set(per_rank) & index.keys():
        for name in index[group]:
            named = _RANK_NAME.fullmatch(name)
            if named is None or int(named[1]) >= len(ranks):
                raise unusable(
                    path / INDEX,
                    f"name tensors of {group} by one of {len(ranks)} processes",
                    quoted(name),
                )


def name_of_rank(rank: int, name: str) -> str:
    """The name under which a process saves a tensor that it has for itself."""
    return f"{rank}/{name}"


def _of_rank(named: Mapping[str, Any], rank: int) -> dict[str, Any]:
    prefix = name_of_rank(rank, "")
    return {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}


def _require_position(path: Path, micro_step: Any) -> None:
    if type(micro_step) is not int or micro_step < 0:
        raise unusable(path, "count its micro-batches", f"micro_step = {str(micro_step)[:40]}")
    named = _CHECKPOINT_NAME.fullmatch(path.name)
    if named and int(named[1]) != micro_step:
        raise unusable(path, "be named by its micro-batches", f"micro_step = {micro_step:,}")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, after checking all but the hashes."""
    if path.is_symlink() or not path.is_dir():
        raise unusable(path, "be a directory", "a symbolic link or nothing of the kind")
    _require_regular(path / "manifest.json")
    manifest = read_json(path / "manifest.json", ("schema", "files"))
    schema, entries = manifest["schema"], manifest["files"]
    if type(schema) is not int or not 1 <= schema <= SHARDED_SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} must have a schema from 1 to {SHARDED_SCHEMA}, got {schema!r}; a "
            "higher one was written by a newer version of sad: update, or take another "
            "checkpoint"
        )
    if type(entries) is not dict or "state.json" not in entries:
        raise unusable(path, "list state.json in its manifest", f"files = {str(entries)[:80]}")
    if schema == SHARDED_SCHEMA and INDEX not in entries:
        raise unusable(path, f"list {INDEX} in its manifest", f"files = {str(entries)[:80]}")
    for name, entry in entries.items():
        _require_entry(path, schema, name, entry)
    return Manifest(schema, entries)


def _require_entry(path: Path, schema: int, name: str, entry: Any) -> None:
    # The name's form rules out '..', '/' and absolute paths: the file lies in this directory.
    sharded = schema == SHARDED_SCHEMA
    listed = ("state.json", INDEX) if sharded else ("state.json",)
    form = SHARD_NAME if sharded else _GROUP_FILE
    if name not in listed and not form.fullmatch(name):
        tensors = "<group>.<rank>.safetensors" if sharded else "<group>.safetensors"
        raise unusable(path, f"list {', '.join(listed)} and {tensors} only", repr(name))
    if type(entry) is not dict or not (
        type(entry.get("bytes")) is int and _SHA256.fullmatch(str(entry.get("sha256")))
    ):
        raise unusable(path / name, "have its size and SHA-256 in the manifest", f"{entry!r}")
    size = _require_regular(path / name)
    if size != entry["bytes"]:
        raise unusable(path / name, f"have {entry['bytes']:,} bytes", f"{size:,}")


def _require_regular(path: Path) -> int:
    """The size of an ordinary file; anything else (absent, a link, a pipe) is refused unopened."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise unusable(path, "exist", "no such file") from error
    if not stat.S_ISREG(status.st_mode):
        raise unusable(path, "be an ordinary file", stat.filemode(status.st_mode))
    return status.st_size


def _verify_hash(path: Path, expected: str) -> None:
    found = files.sha256(path)
    if found != expected:
        raise unusable(path, f"have SHA-256 {expected[:12]}...", f"{found[:12]}...")
