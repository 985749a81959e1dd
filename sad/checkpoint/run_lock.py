"""One process per run directory: a lock that ends with the process, and a file that says whose.

The lock is the operating system's (``flock``): it is gone when its process is, however that ended.
The file that carries it names process, host and start for whoever is refused. Hosts that share a
directory may not see each other's locks, so a file that another host left is never taken over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sad.checkpoint.atomic_files import output_errors
from sad.errors import UsageError

LOCK = ".sad-lock"

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""What a file system answers that has no locks."""


@contextmanager
def run_lock(run_dir: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Within, no other process may write to this run directory, which exists.

    ``report`` hears of a lock that a dead process left. Raises ``UsageError``, which names process
    and host, if another process has the directory, and ``OutputError`` if it cannot be written.
    """
    path = run_dir / LOCK
    with output_errors(run_dir):
        fd = _locked(path)
    signed = False
    try:
        left = _holder(fd)
        if left and left["host"] != socket.gethostname():
            raise UsageError(
                f"a directory must be used by one process, got {run_dir}, which {_said(left)} left "
                f"locked; if it runs no more, delete {path}"
            )
        if left:
            report(f"taking over {run_dir}: {_said(left)} ended without unlocking it")
        with output_errors(run_dir):
            _sign(fd)
        signed = True
        yield
    finally:
        if signed:
            with suppress(OSError):
                os.unlink(path)
        _held.discard(fd)
        os.close(fd)


def _locked(path: Path) -> int:
    """A descriptor of the file at ``path``, which nobody else has locked."""
    while True:
        fd = _open(path)
        try:
            _lock(fd, path)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                _held.add(fd)
                return fd
        except FileNotFoundError:
            pass  # whoever held the lock has just removed its file
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _open(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{path.name} is not an ordinary file")
    return fd


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return  # the file alone says who has the directory
        holder = _holder(fd)
        who = _said(holder) if holder else "another process"
        raise UsageError(
            f"a directory must be used by one process, got {path.parent}, which {who} is using; "
            "wait for it, or choose another directory"
        ) from error


def _holder(fd: int) -> dict[str, Any]:
    """``pid``, ``host`` and ``start`` of who signed last; empty if nobody did, or unreadably."""
    try:
        content = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    known = isinstance(content, dict) and {"pid", "host", "start"} <= content.keys()
    return content if known else {}


def _said(holder: dict[str, Any]) -> str:
    pid, host, start = (str(holder[key])[:64] for key in ("pid", "host", "start"))
    return f"process {pid} on {host} (since {start})"


def _sign(fd: int) -> None:
    start = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    record = {"pid": os.getpid(), "host": socket.gethostname(), "start": start}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(record).encode() + b"\n", 0)


_held: set[int] = set()


def _release_in_child() -> None:
    """A forked child shares the lock, and must not hold it longer than its parent lives."""
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
