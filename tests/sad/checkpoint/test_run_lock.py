"""One process per run directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sad.checkpoint.run_lock import LOCK, run_lock
from sad.errors import OutputError, UsageError

HOLD = """
import sys, time
from pathlib import Path
from sad.checkpoint.run_lock import run_lock

with run_lock(Path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(60)
"""

FORK = HOLD.replace(
    "    time.sleep(60)",
    """
    import os
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
""",
)


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process, which has the directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_refused_with_pid_and_host(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    with other:
        before = (tmp_path / LOCK).read_bytes()
        with (
            pytest.raises(UsageError, match=rf"process {other.pid} on {socket.gethostname()}"),
            run_lock(tmp_path, pytest.fail),
        ):
            pytest.fail("not refused")
        assert (tmp_path / LOCK).read_bytes() == before
        other.kill()


def test_a_dead_processs_lock_is_taken_over(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with other:
        other.send_signal(signal.SIGKILL)
    lines: list[str] = []
    with run_lock(tmp_path, lines.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    (line,) = lines
    assert f"process {other.pid}" in line and "taking over" in line
    with run_lock(tmp_path, pytest.fail):  # one that was given back needs no line
        pass
    assert not (tmp_path / LOCK).exists()


def test_another_hosts_lock_is_never_taken_over(tmp_path: Path) -> None:
    """Its process may live where no lock of this host is seen."""
    record = {"pid": 7, "host": "elsewhere", "start": "2026-01-01T00:00:00Z"}
    (tmp_path / LOCK).write_text(json.dumps(record))
    before = (tmp_path / LOCK).read_bytes()
    with (
        pytest.raises(UsageError, match=f"elsewhere.*delete {tmp_path / LOCK}"),
        run_lock(tmp_path, pytest.fail),
    ):
        pytest.fail("not refused")
    assert (tmp_path / LOCK).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b'{"pid": 1}'])
def test_a_damaged_file_counts_as_unsigned(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with run_lock(tmp_path, pytest.fail):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LOCK
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "precious").write_text("x")
        path.symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(path)
    with pytest.raises(OutputError), run_lock(tmp_path, pytest.fail):
        pytest.fail("not refused")
    assert kind != "link" or (tmp_path / "precious").read_text() == "x"


def test_a_child_that_outlives_its_parent_locks_nobody_out(tmp_path: Path) -> None:
    """Processes that tokenize are forked, and share what their parent has open."""
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "locked\n"
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            os.kill(child, 0)  # it lives
            with run_lock(tmp_path, lambda _: None):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
