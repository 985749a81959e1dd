"""Checkpoints on disk: written completely or not at all, and verified before they are used.

::

    RUN_DIR/checkpoints/batch-000012345/     named by micro-batches consumed
        state.json                           plain numbers, strings, lists
        <group>.safetensors                  tensors: model, optimizer, ema, rng, grads ...
        manifest.json                        schema, size and SHA-256 of every file; written last
    RUN_DIR/checkpoints/set-aside/           those that a resumption has overtaken: read if they are
                                             named, never removed

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
import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.errors import CheckpointError

SCHEMA = 1
"""Version of the layout. A reader refuses a higher one."""

SET_ASIDE = "set-aside"
"""The folder of checkpoints that ``auto`` and ``save_total_limit`` pass over."""

Tensors = Mapping[str, Mapping[str, Tensor]]
Report = Callable[[str], object]

_CHECKPOINT_NAME = re.compile(r"batch-(\d{9,})")
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FILE_NAME = re.compile(r"state\.json|[a-z][a-z0-9_]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes a checkpoint holds, as the safetensors format spells them."""

_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. The tensors lie on the CPU and are read from the files as they are used."""

    # A resumed run must not need more memory than one that was never stopped: while one tensor is
    # copied into its place, no other is in memory.

    path: Path
    micro_step: int
    state: dict[str, Any]
    tensors: dict[str, Mapping[str, Tensor]]


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
    target = Path(run_dir) / "checkpoints" / f"batch-{micro_step:09d}"
    tmp = files.temporary(target)
    try:
        files.make_directories(target.parent)
        _write(tmp, contents)
        if not _same(tmp, target):
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
    _remember(target)
    _rotate(target, save_total_limit, report)
    return target


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint after verifying all of it.

    Raises ``CheckpointError`` if anything is missing, altered, newer than this program, or points
    out of the directory.
    """
    path = Path(path)
    try:
        manifest = _verify(path)
        saved = _read_json(path / "state.json", ("micro_step", "state"))
        _require_position(path, saved["micro_step"])
        groups = [name.removesuffix(".safetensors") for name in manifest if name != "state.json"]
        return Checkpoint(
            path=path,
            micro_step=saved["micro_step"],
            state=saved["state"],
            tensors={group: _read_tensors(path / f"{group}.safetensors") for group in groups},
        )
    except OSError as error:
        raise _unusable(path, "be readable", files.describe(error)) from error


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
        "state.json": [_json({"micro_step": micro_step, "state": state})]
    }
    return contents | {
        f"{group}.safetensors": _safetensors(named) for group, named in tensors.items()
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
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"{group} tensor {name!r} must be dense and of one of the dtypes "
                f"{', '.join(map(str, _DTYPE_NAMES))}, got {tensor.dtype}, {tensor.layout} on "
                f"{tensor.device}; convert it"
            )


def _require_disjoint(named: Mapping[str, Tensor], group: str) -> None:
    """A tied tensor saved under two names would come back untied."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in named.items()
        if tensor.numel()
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


def file_order(named: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which a file holds their tensors: wide dtypes first."""
    return sorted(named, key=lambda name: (-named[name].element_size(), name))


class PackedTensors(dict[str, Tensor]):
    """Contiguous tensors on the CPU that lie without gaps, in ``file_order``, in ``content``.

    They are hashed and written as one piece.
    """

    def __init__(self, named: Mapping[str, Tensor], content: Tensor) -> None:
        super().__init__(named)
        self.content = content  # uint8


def _safetensors(named: Mapping[str, Tensor]) -> Iterator[files.Chunk]:
    """The safetensors format, one tensor at a time.

    A writer of our own because the bytes must pass through ``files.OPERATIONS``, where faults are
    injected and files forced to disk, and are hashed on the way; the library's ``save_file`` opens
    the file itself. It takes contiguous tensors only, and copies all tensors of a device to the
    host before it writes the first (tensors on the CPU it writes from where they lie); ``save``
    returns the whole file as bytes and holds it twice meanwhile (0.8.0: 763 MiB for 381 MiB).

    The format: length of the header as a little-endian u64, the header as JSON padded with spaces
    to 8 bytes, then the tensors without gaps; wide dtypes first, so that every one is aligned.
    """
    order = file_order(named)
    header, end = {}, 0
    for name in order:
        tensor = named[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    if isinstance(named, PackedTensors):
        yield _raw(named.content)
        return
    for name in order:
        yield _raw(named[name])


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(tmp: Path, contents: Mapping[str, Iterable[files.Chunk]]) -> None:
    files.OPERATIONS.mkdir(tmp)
    entries = {name: _write_hashed(tmp / name, chunks) for name, chunks in contents.items()}
    files.write_file(tmp / "manifest.json", [_json({"schema": SCHEMA, "files": entries})])


def _write_hashed(path: Path, chunks: Iterable[files.Chunk]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0

    def tallied() -> Iterator[files.Chunk]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    files.write_file(path, tallied())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _same(tmp: Path, target: Path) -> bool:
    """Whether ``target`` already is, whole, what ``tmp`` holds: manifests name every byte."""
    if not target.exists():
        return False
    try:
        load_checkpoint(target)
    except CheckpointError:
        return False
    return (tmp / "manifest.json").read_bytes() == (target / "manifest.json").read_bytes()


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


def _remember(path: Path) -> None:
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
            _remember(path)
    except (CheckpointError, OSError):
        return False
    return True


def _verify(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest of a checkpoint, after checking it, all sizes and all hashes."""
    manifest = _read_manifest(path)
    for name, entry in manifest.items():
        _verify_hash(path / name, entry["sha256"])
    return manifest


def _require_position(path: Path, micro_step: Any) -> None:
    if type(micro_step) is not int or micro_step < 0:
        raise _unusable(path, "count its micro-batches", f"micro_step = {str(micro_step)[:40]}")
    named = _CHECKPOINT_NAME.fullmatch(path.name)
    if named and int(named[1]) != micro_step:
        raise _unusable(path, "be named by its micro-batches", f"micro_step = {micro_step:,}")


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> ``bytes`` and ``sha256``, after checking all but the hashes."""
    if path.is_symlink() or not path.is_dir():
        raise _unusable(path, "be a directory", "a symbolic link or nothing of the kind")
    _require_regular(path / "manifest.json")
    manifest = _read_json(path / "manifest.json", ("schema", "files"))
    schema, entries = manifest["schema"], manifest["files"]
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} must have a schema from 1 to {SCHEMA}, got {schema!r}; a higher "
            "one was written by a newer version of sad: update, or resume from another checkpoint"
        )
    if type(entries) is not dict or "state.json" not in entries:
        raise _unusable(path, "list state.json in its manifest", f"files = {str(entries)[:80]}")
    for name, entry in entries.items():
        _require_entry(path, name, entry)
    return entries


def _require_entry(path: Path, name: str, entry: Any) -> None:
    # The name's form rules out '..', '/' and absolute paths: the file lies in this directory.
    if not _FILE_NAME.fullmatch(name):
        raise _unusable(path, "list state.json and <group>.safetensors only", repr(name))
    if type(entry) is not dict or not (
        type(entry.get("bytes")) is int and _SHA256.fullmatch(str(entry.get("sha256")))
    ):
        raise _unusable(path / name, "have its size and SHA-256 in the manifest", f"{entry!r}")
    size = _require_regular(path / name)
    if size != entry["bytes"]:
        raise _unusable(path / name, f"have {entry['bytes']:,} bytes", f"{size:,}")


def _require_regular(path: Path) -> int:
    """The size of an ordinary file; anything else (absent, a link, a pipe) is refused unopened."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise _unusable(path, "exist", "no such file") from error
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(path, "be an ordinary file", stat.filemode(status.st_mode))
    return status.st_size


def _read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _unusable(path, "hold JSON", repr(error)) from error
    if type(content) is not dict or not all(key in content for key in keys):
        raise _unusable(path, f"hold an object with {' and '.join(keys)}", f"{str(content)[:80]}")
    return content


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    Whoever drops a tensor drops its memory; ``load_file`` maps the whole file for as long as one of
    its tensors is in use, and all that was read of it counts as memory of the process. The file is
    kept open, so that tensors outlive its name.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):  # the library checks the format
            pass
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(self._read(0, 8), "little")
        self._header: dict[str, Any] = json.loads(self._read(8, length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        entry = self._header[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        content = self._read(self._start + begin, end - begin)
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, which is not read for that."""
        entry = self._header[name]
        return _DTYPES[entry["dtype"]], tuple(entry["shape"])

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def _read(self, offset: int, size: int) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:  # one call reads 2 GiB at most
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"a file of tensors ended {size - done} bytes early")
            done += count
        return content


def _read_tensors(path: Path) -> FileTensors:
    try:
        tensors = FileTensors(path)
        for name in tensors:
            tensors.form(name)
    except SafetensorError as error:
        raise _unusable(path, "hold tensors in the safetensors format", str(error)) from error
    except KeyError as error:
        raise _unusable(path, f"hold tensors of {', '.join(_DTYPES)}", str(error)) from error
    return tensors


def _verify_hash(path: Path, expected: str) -> None:
    found = files.sha256(path)
    if found != expected:
        raise _unusable(path, f"have SHA-256 {expected[:12]}...", f"{found[:12]}...")


def _unusable(path: Path, expectation: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} must {expectation}, got {value}; resume from another checkpoint"
    )
