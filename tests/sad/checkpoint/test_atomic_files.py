"""Whole or absent: small files and directories under every fault, crash and power cut."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from support.faulty_disk import FAULTS, Died, FaultyDisk, PowerCut, cases, tree

from sad.checkpoint import atomic_files as files
from sad.errors import CheckpointError, OutputError

OLD, NEW = b"old content\n", b"new content, a little longer\n"
DIGITS = "0123456789abcdef"  # of a name of ours


# write_atomic


@pytest.mark.parametrize(
    "content", [b"\x00\xff bytes", "text: \u00e9 \u2713\n", b"", "x" * 100_000]
)
def test_write_atomic_writes_and_replaces(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(OLD)

    files.write_atomic(path, content)

    expected = content.encode() if isinstance(content, str) else content
    assert tree(tmp_path) == {"status.json": expected}


@pytest.mark.parametrize("fault", FAULTS)
def test_write_atomic_leaves_old_or_new(tmp_path: Path, fault: str) -> None:
    for at in cases(_trace_of_write_atomic(tmp_path / "trace"), fault):
        run_dir = tmp_path / str(at)
        run_dir.mkdir()
        path = run_dir / "config.yaml"
        path.write_bytes(OLD)

        with FaultyDisk(fault, at).mounted():
            try:
                files.write_atomic(path, NEW)
                saved = True
            except OutputError as error:
                assert fault in str(error) and str(path) in str(error)
                assert os.listdir(run_dir) == ["config.yaml"], f"leftover after operation {at}"
                saved = False
            except Died:
                saved = False

        assert path.read_bytes() in ((NEW,) if saved else (OLD, NEW)), f"operation {at}"
        assert saved or fault != "short write"


def test_write_atomic_survives_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    trace = _trace_of_write_atomic(tmp_path / "run")
    for length in range(len(trace) + 1):
        for keep_names in (False, True):
            before = tmp_path / f"before-{length}-{keep_names}"
            before.mkdir()
            (before / "config.yaml").write_bytes(OLD)
            left = _after_power_cut(before, trace[:length], tmp_path / "run", keep_names=keep_names)

            allowed = (NEW,) if length == len(trace) else (OLD, NEW)
            assert (left / "config.yaml").read_bytes() in allowed, (length, keep_names)


def _trace_of_write_atomic(run_dir: Path) -> list:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_bytes(OLD)
    with FaultyDisk().mounted() as disk:
        files.write_atomic(run_dir / "config.yaml", NEW)
    return disk.trace


# publish_directory


def test_publish_directory_replaces_a_full_directory(tmp_path: Path) -> None:
    """A rename onto a directory with content fails, so the old one has to step aside.

    https://github.com/huggingface/transformers/issues/35782
    """
    tmp, final = _export(tmp_path)
    files.publish_directory(tmp, final)
    assert tree(tmp_path) == {"best": None, "best/w": NEW, "best/sub": None, "best/sub/w": NEW}


@pytest.mark.parametrize("fault", FAULTS)
def test_publish_directory_leaves_old_or_new(tmp_path: Path, fault: str) -> None:
    for at in cases(_trace_of_publish(tmp_path / "trace"), fault):
        run_dir = tmp_path / str(at)
        tmp, final = _export(run_dir)

        with FaultyDisk(fault, at).mounted():
            try:
                files.publish_directory(tmp, final)
                allowed = (NEW,)
            except OSError:
                allowed = (OLD, NEW)
                assert final.exists(), f"operation {at}: neither version has its name"
            except Died:
                allowed = (OLD, NEW)

        files.sweep_directory(run_dir)
        assert os.listdir(run_dir) == ["best"], f"operation {at}"
        assert _version(final) in allowed, f"operation {at}"


def test_publish_directory_survives_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    """The exporting library does not sync its files, so publishing has to."""
    trace = _trace_of_publish(tmp_path / "run")
    for length in range(len(trace) + 1):
        for keep_names in (False, True):
            before = tmp_path / f"before-{length}-{keep_names}"
            _export(before)
            left = _after_power_cut(before, trace[:length], tmp_path / "run", keep_names=keep_names)

            files.sweep_directory(left)
            allowed = (NEW,) if length == len(trace) else (OLD, NEW)
            assert _version(left / "best") in allowed, (length, keep_names)


def _export(run_dir: Path) -> tuple[Path, Path]:
    """A finished new version under a temporary name next to the old one."""
    tmp, final = run_dir / f".tmp-best-{DIGITS}", run_dir / "best"
    for directory, content in ((tmp, NEW), (final, OLD)):
        (directory / "sub").mkdir(parents=True)
        (directory / "w").write_bytes(content)
        (directory / "sub" / "w").write_bytes(content)
    return tmp, final


def _version(directory: Path) -> bytes:
    """The content of both files of a version, which must belong together."""
    content = (directory / "w").read_bytes()
    assert (directory / "sub" / "w").read_bytes() == content
    return content


def _trace_of_publish(run_dir: Path) -> list:
    tmp, final = _export(run_dir)
    with FaultyDisk().mounted() as disk:
        files.publish_directory(tmp, final)
    return disk.trace


def _after_power_cut(before: Path, trace: list, run_dir: Path, *, keep_names: bool) -> Path:
    """What is left of ``before`` when the power goes after ``trace``, recorded in ``run_dir``.

    What lies in a temporary directory was written by others, who do not sync.
    """
    disk = PowerCut(before, synced=lambda path: ".tmp-" not in str(path))
    disk.root = run_dir  # the paths of the trace are those of the recording
    disk.replay(trace)
    left = before.with_name(f"{before.name}-left")
    disk.restore(left, keep_names=keep_names)
    return left


# sweep_directory


def test_sweep_removes_leftovers_and_restores_what_stepped_aside(tmp_path: Path) -> None:
    aside = {name: f".replaced-{name}-{DIGITS}" for name in ("best", "final")}
    for name in (f".tmp-best-{DIGITS}", aside["final"], "best", aside["best"], "plots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    (tmp_path / f".tmp-status.json-{DIGITS}").write_text("half")
    (tmp_path / "log.jsonl").write_text("{}")

    files.sweep_directory(tmp_path)

    assert tree(tmp_path) == {
        "best": None,
        "best/f": b"best",
        "final": None,
        "final/f": aside["final"].encode(),
        "log.jsonl": b"{}",
        "plots": None,
        "plots/f": b"plots",
    }


def test_sweep_leaves_what_another_process_may_be_writing(tmp_path: Path) -> None:
    theirs, left = (tmp_path / f".tmp-{name}-{DIGITS}" for name in ("reader.json", "other.json"))
    theirs.touch()
    left.touch()
    files.sweep_directory(tmp_path, except_for=("reader.json",))
    assert list(tmp_path.iterdir()) == [theirs]


def test_removal_does_not_follow_symbolic_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tmp = tmp_path / "run" / f".tmp-x-{DIGITS}"
    tmp.mkdir(parents=True)
    (tmp / "link").symlink_to(outside)

    files.sweep_directory(tmp_path / "run")

    assert not tmp.exists()
    assert (outside / "precious").read_text() == "x"


# The rest


def test_probe_creates_the_directory_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    files.probe_writable(tmp_path / "a" / "b")
    assert tree(tmp_path) == {"a": None, "a/b": None}


def test_probe_refuses_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"run must be writable, got ENOTDIR") as caught:
        files.probe_writable(tmp_path / "file" / "run")
    assert caught.value.exit_code == 73


@pytest.mark.parametrize("fault", ["EROFS", "ENOSPC", "EACCES"])
@pytest.mark.parametrize("at", range(4))  # make the directory, ..., write
def test_probe_refuses_a_directory_that_cannot_be_written(
    tmp_path: Path, fault: str, at: int
) -> None:
    with FaultyDisk(fault, at, sticky=True).mounted(), pytest.raises(OutputError, match=fault):
        files.probe_writable(tmp_path / "run")


def test_free_bytes_asks_the_file_system_of_the_nearest_existing_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = {tmp_path: 123, tmp_path / "a": 456}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, usage[path])
    )
    assert files.free_bytes(tmp_path) == 123
    assert files.free_bytes(tmp_path / "not" / "yet") == 123
    (tmp_path / "a").mkdir()
    assert files.free_bytes(tmp_path / "a" / "run") == 456


def test_a_file_system_that_does_not_tell_its_size_is_not_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    assert files.free_bytes(tmp_path) is None


def test_tree_bytes_adds_up_files_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path, size in ((tmp_path / "x", 3), (tmp_path / "a" / "y", 20), (tmp_path / "a/b/z", 100)):
        path.write_bytes(bytes(size))
    (tmp_path / "a" / "link").symlink_to(tmp_path / "gone")
    assert files.tree_bytes(tmp_path) == 123 + len(str(tmp_path / "gone"))
    assert files.tree_bytes(tmp_path / "absent") == 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_usable(tmp_path: Path, code: int) -> None:
    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(code, os.strerror(code))

    table = files.FileOperations(fsync=fsync)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "OPERATIONS", table)
        files.write_atomic(tmp_path / "f", NEW)
    assert (tmp_path / "f").read_bytes() == NEW


def test_errors_are_turned_into_the_kind_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"^best must be writable, got EIO \(Input/output"):
        with files.output_errors("best", CheckpointError):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_the_recorder_sees_every_change(tmp_path: Path) -> None:
    """The replayed trace equals the real directory: nothing was written behind the table's back."""
    tmp, final = _export(tmp_path / "run")
    model = PowerCut(tmp_path / "run")
    with FaultyDisk().mounted() as disk:
        files.publish_directory(tmp, final)
        files.write_atomic(tmp_path / "run" / "status.json", NEW)
        files.probe_writable(tmp_path / "run" / "deeper" / "run")
    model.replay(disk.trace)
    model.restore_intact(tmp_path / "replayed")
    assert tree(tmp_path / "replayed") == tree(tmp_path / "run")
