"""What tells one model's files from those of another under the same name.

A model of the Hub is told by its commit. Of a folder every file is hashed that decides what the
model computes, with BLAKE2b; hashes are remembered by path, size and time of the last change, so
that a later run on the same files does not read them again:

    fingerprint_model("runs/teacher/best", commit=None, memory=cache / "hashes.json")
    {"config.json": "712 9f86d081884c7d659a2feaa0c55ad015",
     "model.safetensors": "99630640 60303ae22b998861bce3b28f33eec1be"}
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sad.checkpoint.atomic_files import describe, make_directories, read_object, write_atomic
from sad.errors import OutputError, UsageError
from sad.expected import UnexpectedValueError, integer, mapping, sequence, string

HASHES = "hashes.json"
"""Where hashes are remembered, beside the packed rows."""

_PATTERNS = ("config.json", "*.safetensors", "pytorch_model*.bin", "*.py")
"""Files of a model's folder that decide its outputs: weights, architecture, code of its own."""

_SETTLED_NS = 2_000_000_000
"""A file that has changed more recently may change again without another time: it is hashed, and
not remembered."""

_MEMORY = mapping(sequence(integer(0), integer(), integer(), string))

Stamp = list[int]
"""Size in bytes, and when content and status changed last (ns)."""


def fingerprint_model(name: str, *, commit: str | None, memory: Path) -> dict[str, str]:
    """The fingerprint of a model by its parts: ``commit`` of a model of the Hub, else its files.

    ``memory`` is as in ``fingerprint_files``. Raises ``UsageError`` for a file that cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return {"commit": commit or "unknown"}
    files = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
    try:
        hashes = fingerprint_files([path for path in files if path.is_file()], memory)
    except OSError as error:
        raise UsageError(
            f"the files of a model must be readable, got {describe(error)} in {folder}; correct "
            "their permissions, or name another model"
        ) from error
    return {path.name: fingerprint for path, fingerprint in hashes.items()}


def known_fingerprints(name: str, memory: Path) -> dict[str, str] | None:
    """What can be said of a model's files without reading them: ``"<size> <hash>"`` of those whose
    hash is remembered, else the size alone. None for a model that is no readable folder.
    """
    folder = Path(name).expanduser()
    known, found = _remembered(memory), {}
    try:
        for path in sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)}):
            if path.is_file():
                stamp = _stamp(path.stat())
                *before, digest = known.get(os.path.abspath(path), [None])
                found[path.name] = f"{stamp[0]} {digest}" if before == stamp else str(stamp[0])
    except OSError:
        return None
    return found or None


def fingerprint_files(files: Iterable[Path], memory: Path) -> dict[Path, str]:
    """Size and BLAKE2b hash (16 bytes) of each file, as ``"<size> <hash>"``.

    ``memory`` is a JSON file of what was hashed before: absolute path -> size, times of the last
    change of content and status, hash. One that is damaged counts as absent, and one that cannot be
    written costs only the time to hash again. Raises ``OSError`` for a file that cannot be read.
    """
    known = _remembered(memory)
    found, learned = {}, {}
    for path in files:
        key, stamp = os.path.abspath(path), _stamp(path.stat())
        *before, digest = known.get(key, [None])
        if before != stamp or digest is None:
            digest, stamp = _hashed(path)
            if time.time_ns() - max(stamp[1:]) > _SETTLED_NS:
                learned[key] = [*stamp, digest]
        found[path] = f"{stamp[0]} {digest}"
    if learned:
        kept = {key: entry for key, entry in known.items() if os.path.exists(key)}
        with suppress(OutputError, OSError):
            make_directories(memory.parent)
            write_atomic(memory, json.dumps(kept | learned, indent=1) + "\n")
    return found


def fingerprint_file(path: Path) -> str:
    """As ``fingerprint_files``, for one file that is hashed now."""
    digest, stamp = _hashed(path)
    return f"{stamp[0]} {digest}"


def _remembered(memory: Path) -> dict[str, list]:
    content = read_object(memory) or {}
    try:
        _MEMORY(content, str(memory))
    except UnexpectedValueError:
        return {}
    return content


def _hashed(path: Path) -> tuple[str, Stamp]:
    """The hash of a file, and its stamp while it was hashed."""
    with path.open("rb") as file:
        while True:
            stamp = _stamp(os.fstat(file.fileno()))
            file.seek(0)
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            if _stamp(os.fstat(file.fileno())) == stamp:
                return digest.hexdigest(), stamp


def _stamp(status: os.stat_result) -> Stamp:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
