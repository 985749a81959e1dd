"""Fault injection for the file operations of ``sad.checkpoint.atomic_files``.

``FaultyDisk`` works on the real disk up to operation number ``at`` and injects ``fault`` there:

* an errno name (``ENOSPC``): the operation fails once; with ``sticky`` every later one fails too;
* ``short write``: a write takes only half of its data, which is legal and must be continued;
* ``exit before``, ``exit after``, ``exit within`` (half of a write is done): the process dies.
  Dying is the exception ``Died``, and no later operation, of a clean-up for instance, reaches the
  disk.

``PowerCut`` shows a missing ``fsync``, which killing a process cannot: the page cache survives a
kill. It replays a recorded trace on a model of the disk that tracks which data were synced.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from sad.checkpoint import atomic_files as files

FAULTS = ("ENOSPC", "EIO", "short write", "exit before", "exit after", "exit within")


class Died(BaseException):
    """The simulated death of the process; a ``BaseException``, so that no handler catches it."""


class FaultyDisk:
    """The real disk with a fault at operation ``at``; without a fault, a recorder of operations.

    ``trace`` lists the operations done: name, arguments, result. ``fsync`` is only recorded, since
    these tests ask whether it is called and not whether the kernel obeys.
    """

    def __init__(self, fault: str = "none", at: int = -1, *, sticky: bool = False) -> None:
        self.fault = fault
        self.at = at
        self.sticky = sticky
        self.trace: list[tuple[str, tuple[Any, ...], Any]] = []
        self._count = 0
        self._dead = False

    @contextmanager
    def mounted(self) -> Iterator[FaultyDisk]:
        """Replace the file operations of ``atomic_files`` by this disk's inside the block."""
        names = [field.name for field in dataclasses.fields(files.FileOperations)]
        table = files.FileOperations(**{name: partial(self._do, name) for name in names})
        with mock.patch.object(files, "OPERATIONS", table):
            yield self

    def _do(self, name: str, *args: Any) -> Any:
        here = self._count == self.at or (self.sticky and self._count > self.at >= 0)
        self._count += 1
        if self._dead or (here and self.fault == "exit before"):
            self._die(name, args)
        if here and self.fault in errno.errorcode.values():
            if name == "close":
                os.close(args[0])  # the descriptor is gone even if close reports an error
            code = getattr(errno, self.fault)
            raise OSError(code, os.strerror(code))
        if here and name == "write" and self.fault in ("short write", "exit within"):
            args = (args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
        result = None if name == "fsync" else getattr(os, name)(*args)
        kept = tuple(bytes(arg) if isinstance(arg, memoryview) else arg for arg in args)
        self.trace.append((name, kept, result))
        if here and self.fault in ("exit after", "exit within"):
            self._dead = True
            raise Died(f"after operation {self.at}, {name}")
        return result

    def _die(self, name: str, args: tuple[Any, ...]) -> None:
        self._dead = True
        if name == "close":
            os.close(args[0])  # the system closes what a dead process had open
        raise Died(f"at operation {self.at}")


class File:
    """A file's content, and the part of it that is synced."""

    def __init__(self, content: bytes, *, synced: bool) -> None:
        self.content = content
        self.durable = content if synced else b""


class Directory:
    """A directory's entries, and those that are synced."""

    def __init__(self) -> None:
        self.names: dict[str, File | Directory] = {}
        self.durable: dict[str, File | Directory] = {}


class PowerCut:
    """A model of the disk: its state as programs see it, and as a power cut would leave it.

    It starts from the real directory ``root``; ``synced`` tells which of its files were synced
    before the trace begins.
    """

    def __init__(self, root: Path, synced: Callable[[Path], bool] = lambda path: True) -> None:
        self.root = root
        self._top = _read_directory(root, synced)
        self._descriptors: dict[int, File | Directory] = {}

    def replay(self, trace: list[tuple[str, tuple[Any, ...], Any]]) -> None:
        for name, args, result in trace:
            getattr(self, f"_{name}")(*args, result)

    def restore(self, target: Path, *, keep_names: bool) -> None:
        """Write the state after a power cut to ``target``.

        Data that were not synced are lost. Of directory changes (creations, renames, removals) that
        were not synced, either all reached the disk (``keep_names``) or none.
        """
        _write_directory(self._top, target, keep_names=keep_names)

    def restore_intact(self, target: Path) -> None:
        """Write the state that programs see, synced or not, to ``target``."""
        _write_directory(self._top, target, keep_names=True, keep_data=True)

    def _open(self, path: Any, flags: int, *mode_and_fd: int) -> None:
        parent, name = self._locate(path)
        if flags & os.O_CREAT and name not in parent.names:
            parent.names[name] = File(b"", synced=False)
        node = parent.names[name] if name else parent
        if flags & os.O_TRUNC and isinstance(node, File):
            node.content = b""
        self._descriptors[mode_and_fd[-1]] = node

    def _write(self, fd: int, data: bytes, written: int) -> None:
        node = self._descriptors[fd]
        assert isinstance(node, File)
        node.content += data[:written]

    def _fsync(self, fd: int, result: None) -> None:
        node = self._descriptors[fd]
        if isinstance(node, File):
            node.durable = node.content
        else:
            node.durable = dict(node.names)

    def _close(self, fd: int, result: None) -> None:
        del self._descriptors[fd]

    def _mkdir(self, path: Any, result: None) -> None:
        parent, name = self._locate(path)
        parent.names[name] = Directory()

    def _rename(self, old: Any, new: Any, result: None) -> None:
        parent, name = self._locate(old)
        new_parent, new_name = self._locate(new)
        new_parent.names[new_name] = parent.names.pop(name)

    def _unlink(self, path: Any, result: None) -> None:
        parent, name = self._locate(path)
        del parent.names[name]

    _rmdir = _unlink

    def _locate(self, path: Any) -> tuple[Directory, str]:
        """The parent directory of a path and its name there, which is empty for the root."""
        *parents, name = Path(path).relative_to(self.root).parts or ("",)
        node: File | Directory = self._top
        for part in parents:
            assert isinstance(node, Directory)
            node = node.names[part]
        assert isinstance(node, Directory)
        return node, name


def _read_directory(path: Path, synced: Callable[[Path], bool]) -> Directory:
    directory = Directory()
    for child in path.iterdir():
        directory.names[child.name] = (
            _read_directory(child, synced)
            if child.is_dir()
            else File(child.read_bytes(), synced=synced(child))
        )
    directory.durable = dict(directory.names)
    return directory


def _write_directory(
    directory: Directory, path: Path, *, keep_names: bool, keep_data: bool = False
) -> None:
    path.mkdir(parents=True)
    for name, node in (directory.names if keep_names else directory.durable).items():
        if isinstance(node, Directory):
            _write_directory(node, path / name, keep_names=keep_names, keep_data=keep_data)
        else:
            (path / name).write_bytes(node.content if keep_data else node.durable)


def cases(trace: list[tuple[str, tuple[Any, ...], Any]], fault: str) -> list[int]:
    """The indices of a trace's operations where the fault can be injected."""
    only_writes = fault in ("short write", "exit within")
    return [i for i, (name, _, _) in enumerate(trace) if name == "write" or not only_writes]


def tree(path: Path) -> dict[str, bytes | None]:
    """All files below ``path`` as relative path -> content, with None for a directory."""
    return {
        str(child.relative_to(path)): None if child.is_dir() else child.read_bytes()
        for child in sorted(path.rglob("*"))
    }
