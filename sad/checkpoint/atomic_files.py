"""Files that are whole or absent, whatever happens while they are written.

Everything that must survive a crash, a full disk or a power cut is written through one table of
file operations, ``OPERATIONS``; tests replace it to make any single operation fail. Two rules do
the work:

* Data are written under a name ``.tmp-<name>-<16 hex digits>``, forced to disk with ``fsync``, and
  only then renamed. A rename within a directory is atomic, so a reader sees the old content or the
  new, never a part.
* A rename is itself durable only once the directory that holds the name is forced to disk.

Nobody can tell the digits beforehand, and a file is only ever made anew, never opened where a link
lies: what is written goes nowhere else.

Functions raise ``OSError`` unless they say otherwise.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sad.errors import OutputError, SadError

TEMPORARY = ".tmp-"
"""Prefix of what is being written or removed. Nobody reads it; the next start sweeps it away."""

REPLACED = ".replaced-"
"""Prefix of a directory that makes way for its successor. The next start puts it back, unless the
successor has arrived."""

_OWN_NAME = re.compile(r"\.(tmp|replaced)-(?P<name>\w[\w.-]*)-[0-9a-f]{16}")

StrPath = str | os.PathLike[str]
Chunk = bytes | memoryview


@dataclass(frozen=True)
class FileOperations:
    """Every call that changes the disk, with the signatures of ``os``."""

    open: Callable[..., int] = os.open
    write: Callable[[int, Chunk], int] = os.write
    fsync: Callable[[int], None] = os.fsync
    close: Callable[[int], None] = os.close
    mkdir: Callable[[StrPath], None] = os.mkdir
    rename: Callable[[StrPath, StrPath], None] = os.rename
    unlink: Callable[[StrPath], None] = os.unlink
    rmdir: Callable[[StrPath], None] = os.rmdir


OPERATIONS = FileOperations()


# What the trainer calls


def write_atomic(path: StrPath, content: bytes | str) -> None:
    """Replace a small file durably: a crash leaves the old content or the new.

    Text is written as UTF-8. Raises ``OutputError``.
    """
    write_atomic_chunks(path, [content.encode() if isinstance(content, str) else content])


def write_atomic_chunks(path: StrPath, chunks: Iterable[Chunk]) -> None:
    """As ``write_atomic``, for a file of any size that comes in pieces."""
    path = Path(path)
    tmp = temporary(path)
    with output_errors(path):
        try:
            write_file(tmp, chunks)
            OPERATIONS.rename(tmp, path)
        except FileExistsError:  # not ours
            raise
        except OSError:
            with suppress(OSError):
                OPERATIONS.unlink(tmp)
            raise
        sync_directory(path.parent)


def publish_directory(tmp: Path, final: Path) -> None:
    """Give a finished temporary directory its name, durably, whoever wrote the files in it.

    Both lie in the same directory. If ``final`` exists it steps aside first (a rename onto a full
    directory fails) and is removed last, so one complete version is on disk at every moment; a
    crash in between is repaired by ``sweep_directory``.
    """
    sync_tree(tmp)
    aside = _hidden(REPLACED, final)
    if final.exists():
        OPERATIONS.rename(final, aside)
    try:
        OPERATIONS.rename(tmp, final)
    except OSError:
        if aside.exists():
            OPERATIONS.rename(aside, final)
        raise
    sync_directory(final.parent)
    if aside.exists():
        with suppress(OSError):  # the next start sweeps what is left of it
            remove_tree(aside)


def put_back(directory: Path) -> None:
    """Give back its name to what had stepped aside when a process died, if it was not replaced."""
    for path, name in _own(directory):
        final = path.with_name(name)
        if path.name.startswith(REPLACED) and not final.exists():
            OPERATIONS.rename(path, final)
            sync_directory(directory)


def sweep_directory(directory: Path, *, except_for: Collection[str] = ()) -> None:
    """Tidy up after a process that died: ``put_back``, then remove what it had begun to write.

    Other files, whatever their names begin with, are left alone. Only for a directory of ours that
    no other process is writing to, but for files ``except_for`` these, which it may be writing now.
    """
    put_back(directory)
    for path, name in _own(directory):
        if name not in except_for:
            with suppress(OSError):  # an unreadable leftover harms nobody
                _remove(path)


def _own(directory: Path) -> list[tuple[Path, str]]:
    """What lies here under a hidden name of ours, and for which name."""
    found = ((path, _OWN_NAME.fullmatch(path.name)) for path in sorted(directory.iterdir()))
    return [(path, match["name"]) for path, match in found if match]


def probe_writable(directory: StrPath) -> None:
    """Create the directory if need be and try to write a file into it. Raises ``OutputError``."""
    directory = Path(directory)
    probe = temporary(directory / "probe")
    with output_errors(directory):
        make_directories(directory)
        write_file(probe, [b"probe"])
        OPERATIONS.unlink(probe)


def free_bytes(path: StrPath) -> int | None:
    """Bytes an ordinary user can still write where ``path`` is, or would be created.

    None if the file system does not tell, as some on a network do not.
    """
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.free if usage.total else None


def tree_bytes(path: StrPath) -> int:
    """The sizes of all files under a directory, added up; 0 if there is no such directory."""
    return sum(
        os.lstat(os.path.join(parent, name)).st_size
        for parent, _, names in os.walk(path)
        for name in names
    )


@contextmanager
def output_errors(what: object, kind: type[SadError] = OutputError) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into the error a user can act on."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{what} must be writable, got {describe(error)}; free space or choose another "
            "directory"
        ) from error


def describe(error: OSError) -> str:
    """``ENOSPC (No space left on device)``: the name to search for and the words to read."""
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"{name} ({error.strerror or error})"


# What they are built from


def temporary(path: Path) -> Path:
    """A new hidden name, on the same file system, under which ``path`` is written or removed."""
    return _hidden(TEMPORARY, path)


def _hidden(prefix: str, path: Path) -> Path:
    return path.with_name(f"{prefix}{path.name}-{secrets.token_hex(8)}")


def write_file(path: Path, chunks: Iterable[Chunk]) -> None:
    """Write a new file and force it to disk. The name is durable only once its directory is.

    Whatever has the name already, a link that leads nowhere included, is an error.
    """
    fd = OPERATIONS.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        for chunk in chunks:
            _write_all(fd, memoryview(chunk))
        OPERATIONS.fsync(fd)
    finally:
        OPERATIONS.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    # One call may write less than asked: Linux stops at 2 GiB, and a disk about to be full earlier.
    while data:
        data = data[OPERATIONS.write(fd, data) :]


def sync_directory(path: Path) -> None:
    """Force the names in a directory to disk."""
    fd = OPERATIONS.open(path, os.O_RDONLY)
    try:
        OPERATIONS.fsync(fd)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory: nothing more can be done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        OPERATIONS.close(fd)


def sync_tree(path: Path) -> None:
    """Force a directory and everything in it to disk."""
    for child in sorted(path.iterdir()):
        if child.is_dir():
            sync_tree(child)
        else:
            _sync_file(child)
    sync_directory(path)


def _sync_file(path: Path) -> None:
    fd = OPERATIONS.open(path, os.O_RDONLY)
    try:
        OPERATIONS.fsync(fd)
    finally:
        OPERATIONS.close(fd)


def make_directories(path: Path) -> None:
    """``mkdir -p``, durably."""
    if path.is_dir():
        return
    make_directories(path.parent)
    try:
        OPERATIONS.mkdir(path)
    except FileExistsError:  # a file, unless another process has just made the directory
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path} is not a directory") from None
    sync_directory(path.parent)


def is_file(path: Path) -> bool:
    """Whether this is an ordinary file: no link, folder or pipe, which would wait for a writer."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read_text(path: Path) -> str | None:
    """The text of an ordinary file; None if there is none that can be read."""
    if not is_file(path):
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def read_object(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any] | None:
    """The JSON object in an ordinary file; None if there is none that can be read."""
    try:
        content = parse(read_text(path) or "")
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Remove a directory so that it is never seen half removed."""
    tmp = temporary(path)
    OPERATIONS.rename(path, tmp)
    remove_tree(tmp)


def remove_file(path: Path) -> None:
    """Remove a file, or a symbolic link itself."""
    OPERATIONS.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, without following symbolic links."""
    for child in sorted(path.iterdir()):
        _remove(child)
    OPERATIONS.rmdir(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        OPERATIONS.unlink(path)
