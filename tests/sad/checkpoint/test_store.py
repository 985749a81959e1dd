"""Checkpoints: exact round trips, every fault, crash, power cut and corruption, and rotation."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.faulty_disk import FAULTS, Died, FaultyDisk, PowerCut, cases, tree
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint import store as checkpoint_module
from sad.checkpoint.store import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside,
    sweep_stale,
)
from sad.errors import CheckpointError


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves follow. Whether fsync is called is tested by replaying recordings."""
    monkeypatch.setattr(files, "OPERATIONS", files.FileOperations(fsync=lambda fd: None))


DIGITS = "0123456789abcdef"  # of a name of ours

Tensors = Mapping[str, Mapping[str, Tensor]]


def content(seed: int) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A state that tells which save it belongs to, in every file."""
    state = {"global_step": seed, "lr": seed / 3, "names": ["a", "b"]}
    b = torch.arange(4, dtype=torch.bfloat16) + seed
    model = {"w": torch.full((3, 5), float(seed)), "b": b}
    rng = {"torch": torch.full((7,), seed % 256, dtype=torch.uint8)}
    return state, {"model": model, "rng": rng}


def save(run_dir: Path, micro_step: int, *, seed: int | None = None, limit: int = 2) -> Path:
    state, tensors = content(micro_step if seed is None else seed)
    return save_checkpoint(run_dir, micro_step, state, tensors, save_total_limit=limit)


def holds(checkpoint: Checkpoint, seed: int) -> bool:
    """Whether a checkpoint is exactly what was saved from ``seed``."""
    state, tensors = content(seed)
    return checkpoint.state == state and same_bits(checkpoint.tensors, tensors)


def same_bits(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[group].keys() == right[group].keys()
        and all(_bits(left[group][name]) == _bits(right[group][name]) for name in left[group])
        for group in left
    )


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def complete(run_dir: Path) -> list[int]:
    """The micro-steps of the checkpoints that load."""
    steps = []
    for name in names(run_dir):
        try:
            steps.append(load_checkpoint(run_dir / "checkpoints" / name).micro_step)
        except CheckpointError:
            pass
    return steps


# Round trips


def test_layout(tmp_path: Path) -> None:
    path = save(tmp_path, 12345)
    assert path == tmp_path / "checkpoints" / "batch-000012345"
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "model.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    loaded = load_checkpoint(str(path))
    assert (loaded.path, loaded.micro_step) == (path, 12345)
    assert holds(loaded, 12345)
    assert latest_checkpoint(str(tmp_path)) == path


def test_floats_and_plain_values_survive_exactly(tmp_path: Path) -> None:
    state = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.inf, -math.inf],
        "ints": [0, -1, 2**70],
        "mixed": [True, False, None, 1, 1.0, "", "\u00e9 \ud800 \x00"],
        "nested": {"": {"a/b": [[], {}]}},
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, state, {}, save_total_limit=2)).state
    assert repr(loaded) == repr(state)  # tells 1 from 1.0 and True, and -0.0 from 0.0


def test_nan_is_saved_as_nan(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 0, {"nll": math.nan}, {}, save_total_limit=2)
    assert math.isnan(load_checkpoint(path).state["nll"])


class Color(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": np.float64(1.0)}]}, r"state\['a'\]\[1\]\['b'\].*numpy.float64"),
        ({"a": np.int64(1)}, r"numpy.int64"),
        ({"a": (1, 2)}, r"builtins.tuple"),
        ({"a": Color.RED}, r"Color"),
        ({"a": torch.tensor(1.0)}, r"torch.Tensor"),
        ({"a": Path("x")}, r"PosixPath"),
        ({"a": {1: 2}}, r"keys of state\['a'\] must be plain str, got 1"),
    ],
)
def test_values_that_would_come_back_changed_are_refused(
    tmp_path: Path, value: dict, where: str
) -> None:
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path, 0, value, {}, save_total_limit=2)
    assert not (tmp_path / "checkpoints").exists()


def test_tensors_of_every_dtype_and_layout_survive_exactly(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (6, 8, 8), dtype=torch.uint8, generator=draw)  # NaNs among them
    upcast = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {str(dtype): bits.view(dtype).clone() for dtype in upcast + whole}
    base = torch.randn(4, 6, generator=draw)
    tensors |= {
        "bool": bits > 100,
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "none": torch.empty(2, 0, dtype=torch.int64),
        "parameter": torch.nn.Parameter(base.clone()),
        "transposed": base.clone().t(),
        "every second": base.clone()[:, ::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "dots.and/slashes \u00e9": torch.ones(1),
    }
    path = save_checkpoint(tmp_path, 0, {}, {"model": tensors, "grads": {}}, save_total_limit=2)
    assert same_bits(load_checkpoint(path).tensors, {"model": tensors, "grads": {}})


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Byte for byte, so that every other reader of the format reads them, aligned."""
    tensors = {
        "b": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.arange(2),
        "c": torch.ones(2, 2),
        "d": torch.ones(5, dtype=torch.bool),
    }
    path = save_checkpoint(tmp_path, 0, {}, {"model": tensors}, save_total_limit=2)
    assert (path / "model.safetensors").read_bytes() == safetensors.torch.save(tensors)


def test_loaded_tensors_outlive_their_file_and_never_change_it(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    loaded = load_checkpoint(path)
    loaded.tensors["model"]["w"].zero_()
    assert holds(load_checkpoint(path), 7)
    again = load_checkpoint(path)
    shutil.rmtree(path)
    assert holds(again, 7)


def test_tensors_that_share_memory_are_refused(tmp_path: Path) -> None:
    """Tied weights saved under both names would come back as two tensors."""
    w = torch.randn(4, 4)
    for other in (w, w.view(16), w[1:3], w.t()):
        with pytest.raises(ValueError, match="model tensors must not share memory, got"):
            save_checkpoint(tmp_path, 0, {}, {"model": {"a": w, "z": other}}, save_total_limit=2)
    assert not (tmp_path / "checkpoints").exists()

    halves = {"a": w[:2], "z": w[2:]}  # views into one buffer that share no element
    path = save_checkpoint(tmp_path, 0, {}, {"grads": halves}, save_total_limit=2)
    assert same_bits(load_checkpoint(path).tensors, {"grads": halves})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.ones(2, dtype=torch.complex64),
    ],
)
def test_tensors_the_format_cannot_hold_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="model tensor 'a' must be dense"):
        save_checkpoint(tmp_path, 0, {}, {"model": {"a": tensor}}, save_total_limit=2)


@pytest.mark.parametrize("group", ["../model", "a/b", "", ".hidden", "Model", "model.x", "1st"])
def test_group_names_are_plain_file_names(tmp_path: Path, group: str) -> None:
    with pytest.raises(ValueError, match="tensor group must be named"):
        save_checkpoint(tmp_path, 0, {}, {group: {}}, save_total_limit=2)


def test_other_mistakes_of_the_caller_are_refused(tmp_path: Path) -> None:
    ones = torch.ones(1)
    with pytest.raises(ValueError, match="save_total_limit must be at least 2, got 1"):
        save(tmp_path, 1, limit=1)
    for micro_step in (-1, 1.0, np.int64(3), True):
        with pytest.raises(ValueError, match="micro_step must be an int"):
            save_checkpoint(tmp_path, micro_step, {}, {}, save_total_limit=2)  # pyright: ignore
    with pytest.raises(ValueError, match="__metadata__"):
        save_checkpoint(tmp_path, 1, {}, {"m": {"__metadata__": ones}}, save_total_limit=2)


# Rotation, and saving the same position again


def test_the_newest_remain(tmp_path: Path) -> None:
    for micro_step in (1, 20, 300, 4000):
        save(tmp_path, micro_step)
    assert complete(tmp_path) == [300, 4000]
    for micro_step in (5000, 1_000_000_000, 10_000_000_000):  # longer names sort as numbers
        save(tmp_path, micro_step, limit=3)
    assert complete(tmp_path) == [5000, 1_000_000_000, 10_000_000_000]


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    mine = tmp_path / "checkpoints" / "batch-000000001-mine"
    shutil.copytree(tmp_path / "checkpoints" / "batch-000000001", mine)
    (tmp_path / "checkpoints" / "notes.txt").write_text("keep")
    for micro_step in (2, 3, 4):
        save(tmp_path, micro_step)
    assert names(tmp_path) == [
        "batch-000000001-mine",
        "batch-000000003",
        "batch-000000004",
        "notes.txt",
    ]


def test_what_was_just_saved_remains_even_if_others_are_ahead(tmp_path: Path) -> None:
    """After going back to an older checkpoint, training passes the newer ones again."""
    for micro_step in (10, 20, 30):
        save(tmp_path, micro_step, limit=3)
    save(tmp_path, 15)
    assert complete(tmp_path) == [15, 20, 30]
    save(tmp_path, 16)
    assert complete(tmp_path) == [16, 20, 30]


def test_broken_checkpoints_do_not_count_and_go_when_they_are_old(tmp_path: Path) -> None:
    for micro_step in (10, 20, 30, 40):
        save(tmp_path, micro_step, limit=4)
    (tmp_path / "checkpoints" / "batch-000000040" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "batch-000000030" / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoints" / "batch-000000010" / "state.json").write_text("{}")

    save(tmp_path, 50)
    assert names(tmp_path) == [f"batch-0000000{step}" for step in (20, 30, 40, 50)]
    save(tmp_path, 60)
    assert names(tmp_path) == ["batch-000000050", "batch-000000060"]


def test_trouble_with_removing_is_reported_and_fails_nothing(tmp_path: Path) -> None:
    for micro_step in (10, 20):
        save(tmp_path, micro_step)
    trace = trace_of(tmp_path / "trace", (10, 20), 30)
    removal = next(i for i, (name, *_) in enumerate(trace) if name == "unlink")
    lines: list[str] = []
    with FaultyDisk("EIO", removal).mounted():
        state, tensors = content(30)
        save_checkpoint(tmp_path, 30, state, tensors, save_total_limit=2, report=lines.append)
    assert len(lines) == 1 and "could not remove old checkpoints" in lines[0] and "EIO" in lines[0]
    assert complete(tmp_path)[-2:] == [20, 30]

    save(tmp_path, 40)  # the next attempt goes on as if nothing had happened
    assert complete(tmp_path)[-2:] == [30, 40]


def test_what_is_set_aside_is_found_by_its_path_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, limit=9)
    newest = tmp_path / "checkpoints" / "batch-000000003"
    set_aside([newest], report=pytest.fail)
    assert names(tmp_path) == ["batch-000000001", "batch-000000002", "set-aside"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "batch-000000002"
    # The same number again: neither replaces the other.
    save(tmp_path, 3, seed=30, limit=9)
    set_aside([newest], report=pytest.fail)
    aside = tmp_path / "checkpoints" / "set-aside"
    assert sorted(os.listdir(aside)) == ["batch-000000003", "batch-000000003-2"]
    assert holds(load_checkpoint(aside / "batch-000000003"), 3)
    assert holds(load_checkpoint(aside / "batch-000000003-2"), 30)
    save(tmp_path, 4)
    save(tmp_path, 5)
    sweep_stale(tmp_path)
    assert names(tmp_path) == ["batch-000000004", "batch-000000005", "set-aside"]
    assert len(os.listdir(aside)) == 2


def test_trouble_with_setting_aside_is_reported_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "OPERATIONS", files.FileOperations(rename=refuse))
    reports: list[str] = []
    set_aside([path], report=reports.append)
    (report,) = reports
    assert "could not set" in report and "EROFS" in report
    assert latest_checkpoint(tmp_path) == path


def test_an_equal_checkpoint_is_kept_and_another_replaced(tmp_path: Path) -> None:
    """https://github.com/huggingface/transformers/issues/35782: a rename onto a full directory."""
    path = save(tmp_path, 5)
    inode = path.stat().st_ino
    save(tmp_path, 5)
    assert path.stat().st_ino == inode, "an equal checkpoint was written again"

    save(tmp_path, 5, seed=6)
    assert holds(load_checkpoint(path), 6)
    assert names(tmp_path) == ["batch-000000005"]

    (path / "model.safetensors").write_bytes(b"broken")
    save(tmp_path, 5, seed=6)
    assert holds(load_checkpoint(path), 6)
    assert names(tmp_path) == ["batch-000000005"]


# Faults, crashes, power cuts

Scenario = tuple[tuple[int, ...], int, int]
SCENARIOS: dict[str, Scenario] = {
    "first": ((), 30, 30),  # nothing there yet
    "third": ((10, 20), 30, 30),  # and one must go
    "again": ((10, 20), 20, 21),  # same position, other content
}
"""Name -> checkpoints that are there, micro-step to save, seed of its content."""


Trace = list[tuple[str, tuple[Any, ...], Any]]


def trace_of(
    run_dir: Path, before: tuple[int, ...], micro_step: int, seed: int | None = None
) -> Trace:
    """The operations of one undisturbed save."""
    for step in before:
        save(run_dir, step)
    run_dir.mkdir(exist_ok=True)
    with FaultyDisk().mounted() as disk:
        save(run_dir, micro_step, seed=seed)
    return disk.trace


@pytest.mark.few(8)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    ("fault", "sticky"), [(fault, False) for fault in FAULTS] + [("ENOSPC", True), ("EIO", True)]
)
def test_no_fault_costs_a_complete_checkpoint(
    tmp_path: Path, fault: str, sticky: bool, scenario: str
) -> None:
    """One fault at every file operation. https://github.com/huggingface/transformers/pull/27820"""
    before, micro_step, seed = SCENARIOS[scenario]
    trace = trace_of(tmp_path / "trace", before, micro_step, seed)
    template = tmp_path / "template"
    template.mkdir()
    for step in before:
        save(template, step)
    outcomes = set()

    for at in cases(trace, fault):
        where = f"{fault} at operation {at}, {trace[at][0]} {trace[at][1][0]}"
        run_dir = tmp_path / "run"
        shutil.copytree(template, run_dir)
        reports: list[str] = []
        with FaultyDisk(fault, at, sticky=sticky).mounted():
            state, tensors = content(seed)
            try:
                save_checkpoint(
                    run_dir, micro_step, state, tensors, save_total_limit=2, report=reports.append
                )
                outcome = "saved"
            except CheckpointError as error:
                assert fault in str(error) and "earlier checkpoints are intact" in str(error), where
                outcome = "refused"
            except Died:
                outcome = "died"
        outcomes.add(outcome)

        if outcome == "refused":
            leftovers = [name for name in _names(run_dir) if name.startswith(".tmp-")]
            assert sticky or not leftovers, where
        shutil.copytree(run_dir, tmp_path / "restarted")
        _assert_newest_is_whole(tmp_path / "restarted", before, micro_step, seed, outcome, where)
        if outcome != "died":  # the same process tries again, at once and at its next cadence
            for step in (micro_step, 99):
                assert holds(load_checkpoint(save(run_dir, step, seed=seed)), seed), where
        shutil.rmtree(run_dir)
        shutil.rmtree(tmp_path / "restarted")

    if fault.startswith("exit"):
        assert outcomes == {"died"}
    elif fault == "short write":
        assert outcomes == {"saved"}
    else:  # what only fails to tidy up afterwards is no failure; the first save removes nothing
        assert outcomes == ({"refused"} if scenario == "first" else {"refused", "saved"})


def _names(run_dir: Path) -> list[str]:
    return names(run_dir) if (run_dir / "checkpoints").exists() else []


def _assert_newest_is_whole(
    run_dir: Path, before: tuple[int, ...], micro_step: int, seed: int, outcome: str, where: str
) -> None:
    """What a restart finds: sweep, then the newest that verifies, which is the old or the new."""
    sweep_stale(run_dir)
    lines: list[str] = []
    latest = latest_checkpoint(run_dir, lines.append)
    assert not lines, f"{where}: {lines}"
    assert not [name for name in _names(run_dir) if not name.startswith("batch-")], where
    if latest is None:
        assert not before and outcome != "saved", where
        return
    found = load_checkpoint(latest)
    is_new = found.micro_step == micro_step and holds(found, seed)
    is_old = bool(before) and found.micro_step == before[-1] and holds(found, before[-1])
    assert is_new if outcome == "saved" else (is_new or is_old), where
    there = complete(run_dir)
    assert len(there) >= min(2, len(before)), where
    assert len(there) == len(_names(run_dir)), f"{where}: something half removed"
    assert before[-1] in there if before else True, where
    assert outcome != "refused" or set(before) <= set(there), where


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, scenario: str) -> None:
    """A kill cannot show a missing fsync: the page cache survives it."""
    before, micro_step, seed = SCENARIOS[scenario]
    template = tmp_path / "template"
    template.mkdir()
    for step in before:
        save(template, step)
    recorded = tmp_path / "run"
    shutil.copytree(template, recorded)
    with FaultyDisk().mounted() as disk:
        save(recorded, micro_step, seed=seed)

    for length in range(len(disk.trace) + 1):
        for keep_names in (False, True):
            model = PowerCut(template)
            model.root = recorded
            model.replay(disk.trace[:length])
            left = tmp_path / "left"
            model.restore(left, keep_names=keep_names)
            outcome = "saved" if length == len(disk.trace) else "cut"
            where = f"power cut after {length} operations, names kept: {keep_names}"
            _assert_newest_is_whole(left, before, micro_step, seed, outcome, where)
            shutil.rmtree(left)


def test_everything_is_written_through_the_table(tmp_path: Path) -> None:
    """The replayed trace equals the real directory; otherwise the tests above would miss writes."""
    model = PowerCut(tmp_path)
    with FaultyDisk().mounted() as disk:
        for micro_step in (10, 20, 30):
            save(tmp_path / "run", micro_step)
        save(tmp_path / "run", 30, seed=31)
    model.replay(disk.trace)
    model.restore_intact(tmp_path / "replayed")
    assert tree(tmp_path / "replayed" / "run") == tree(tmp_path / "run")


def test_manifest_is_written_after_every_other_file_is_on_disk(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "run", (), 1)
    opened = [str(args[0]).rpartition("/")[2] for name, args, _ in trace if name == "open"]
    manifest = opened.index("manifest.json")
    assert set(opened[:manifest]) >= {"state.json", "model.safetensors", "rng.safetensors"}
    before = [name for name, *_ in trace[: [name for name, *_ in trace].index("rename")]]
    assert before.count("fsync") >= 4


REAL_DISK = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from sad.checkpoint.store import latest_checkpoint, load_checkpoint, save_checkpoint, sweep_stale
from sad.errors import CheckpointError

def save(run_dir, step):
    tensors = {"model": {"w": torch.full((500, 500), float(step))}, "rng": {"r": torch.ones(9)}}
    save_checkpoint(run_dir, step, {"step": step}, tensors, save_total_limit=2)

def check(run_dir):
    found = load_checkpoint(latest_checkpoint(run_dir))
    step, w = found.micro_step, found.tensors["model"]["w"]
    assert found.state == {"step": step} and torch.equal(w, torch.full_like(w, step))
    return step

def limits(run_dir):
    save(run_dir, 1)
    for step, limit in enumerate((0, 1, 50, 400, 1000, 500_000, 999_999, 1_000_050), start=2):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(run_dir, step)
        except CheckpointError as error:
            assert "EFBIG" in str(error), error
        else:
            raise AssertionError(f"saved within {limit} bytes")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(run_dir / "checkpoints") == ["batch-000000001"]
        assert check(run_dir) == 1
    save(run_dir, 2)
    assert check(run_dir) == 2

def kills(run_dir, rounds):
    draw, latest, interrupted = random.Random(0), 0, 0
    save(run_dir, 0)
    while interrupted < rounds:
        saved, to_parent = os.pipe()
        child = os.fork()
        if not child:
            step = check(run_dir)
            while True:
                step += 1
                save(run_dir, step)
                os.write(to_parent, b"!")
        os.close(to_parent)
        assert os.read(saved, 1) == b"!", "the child failed"
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(saved)
        interrupted += any(name.startswith(".tmp-") for name in os.listdir(run_dir / "checkpoints"))
        sweep_stale(run_dir)
        assert check(run_dir) > latest
        latest = check(run_dir)

def memory(run_dir):
    tensors = {str(i): torch.ones(1_000_000) for i in range(25)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_checkpoint(run_dir, 0, {}, {"model": tensors}, save_total_limit=2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 20_000, f"100 MB of tensors took {grown} kB more to save"

root = Path(sys.argv[1])
memory(root / "memory")
limits(root / "limits")
kills(root / "kills", int(sys.argv[2]))
print("done")
"""


@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_real_limits_and_kills(tmp_path: Path, rounds: int) -> None:
    """In a process of its own: files cut by RLIMIT_FSIZE, SIGKILL at random moments, memory."""
    run = subprocess.run(
        [sys.executable, "-c", REAL_DISK, str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr


# Corruption


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run directory with checkpoints 10 and 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "batch-000000020"


def assert_falls_back(run_dir: Path, named: str) -> None:
    """The newest checkpoint is refused by an error with ``named`` in it, and 10 is used instead."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(newest(run_dir))
    assert named in str(caught.value)
    lines: list[str] = []
    latest = latest_checkpoint(run_dir, lines.append)
    assert latest is not None and holds(load_checkpoint(latest), 10)
    assert lines == [f"skipping a checkpoint: {caught.value}"]


def _flip(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        i = at(len(data))
        return data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :]

    return flip


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "cut by one": lambda data: data[:-1],
    "grown by one": lambda data: data + b" ",
    "zeroed": lambda data: bytes(len(data)),
    "first byte flipped": _flip(lambda size: 0),
    "middle byte flipped": _flip(lambda size: size // 2),
    "last byte flipped": _flip(lambda size: size - 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "rng.safetensors"])
def test_a_damaged_file_is_noticed_and_named(two: Path, name: str, damage: str) -> None:
    file = newest(two) / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert_falls_back(two, str(file))


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", "rng.safetensors", "manifest.json"]
)
def test_a_missing_file_is_noticed_and_named(two: Path, name: str) -> None:
    (newest(two) / name).unlink()
    assert_falls_back(two, f"{newest(two) / name} must exist")


def test_no_flipped_byte_of_a_manifest_changes_what_is_loaded(two: Path) -> None:
    """A flip is refused, unless it leaves the meaning alone (white space)."""
    file = newest(two) / "manifest.json"
    data = file.read_bytes()
    refused = 0
    for i in range(len(data)):
        file.write_bytes(_flip(lambda size, i=i: i)(data))
        try:
            assert holds(load_checkpoint(newest(two)), 20), f"byte {i}"
        except CheckpointError:
            refused += 1
    assert refused > len(data) // 2


def _edited(run_dir: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = newest(run_dir) / "manifest.json"
    manifest = json.loads(file.read_bytes())
    edit(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{}", '{"schema": 1}', "[" * 100_000, "\xff", '{"files": {}}'],
    ids=lambda text: text[:10],
)
def test_a_manifest_that_is_none_is_refused(two: Path, text: str) -> None:
    (newest(two) / "manifest.json").write_bytes(text.encode("latin-1"))
    assert_falls_back(two, "manifest.json")


@pytest.mark.parametrize("schema", [0, -1, "1", True, None, 1.0])
def test_a_schema_that_is_none_is_refused(two: Path, schema: object) -> None:
    _edited(two, lambda manifest: manifest.update(schema=schema))
    assert_falls_back(two, f"got {schema!r}")


def test_a_newer_schema_is_refused_with_the_remedy(two: Path) -> None:
    _edited(two, lambda manifest: manifest.update(schema=checkpoint_module.SHARDED_SCHEMA + 1))
    assert_falls_back(two, "written by a newer version of sad: update, or take another")


@pytest.mark.parametrize(
    "files",
    [
        [],
        {},
        {"model.safetensors": {"bytes": 1, "sha256": "0" * 64}},
        {"state.json": None},
        {"state.json": {"bytes": "1", "sha256": "0" * 64}},
        {"state.json": {"bytes": 1, "sha256": "0" * 63}},
        {"state.json": {"bytes": 1, "sha256": None}},
        {"state.json": {}},
    ],
)
def test_a_list_of_files_that_is_none_is_refused(two: Path, files: object) -> None:
    _edited(two, lambda manifest: manifest.update(files=files))
    assert_falls_back(two, "must")


def test_state_of_another_form_is_refused(two: Path) -> None:
    _replace(two, "state.json", b'[{"micro_step": 20}]')
    assert_falls_back(two, "state.json must hold an object with micro_step and state")


@pytest.mark.parametrize(
    "where", ["../outside", "../../outside", "{absolute}", "sub/outside", "./m"]
)
def test_a_file_outside_the_checkpoint_is_never_read(two: Path, where: str) -> None:
    """The file is there, and its size and hash are right: only its place is wrong."""
    for folder in (two, newest(two).parent, newest(two), newest(two) / "sub"):
        folder.mkdir(exist_ok=True)
        shutil.copy(newest(two) / "model.safetensors", folder / "outside.safetensors")
        shutil.copy(newest(two) / "model.safetensors", folder / "m.safetensors")
    name = where.format(absolute=two / "outside") + ".safetensors"
    assert (newest(two) / name).is_file()

    def move(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("model.safetensors")

    _edited(two, move)
    assert_falls_back(two, repr(name))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_symbolic_link_is_never_followed(two: Path, name: str) -> None:
    file = newest(two) / name
    outside = two / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)
    assert_falls_back(two, f"{file} must be an ordinary file, got l")


def test_a_checkpoint_that_is_a_link_or_a_file_is_refused(two: Path) -> None:
    outside = two / "outside"
    shutil.move(newest(two), outside)
    newest(two).symlink_to(outside)
    assert_falls_back(two, "must be a directory")
    newest(two).unlink()
    newest(two).write_text("")
    assert_falls_back(two, "must be a directory")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_unopened(two: Path) -> None:
    file = newest(two) / "manifest.json"
    file.unlink()
    os.mkfifo(file)
    assert_falls_back(two, "must be an ordinary file, got p")


def test_a_pickle_is_refused_and_not_executed(two: Path, tmp_path: Path) -> None:
    """Named .safetensors, with a manifest that vouches for it."""
    marker = tmp_path / "executed"
    bait = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    _replace(two, "model.safetensors", bait)
    assert_falls_back(two, str(newest(two) / "model.safetensors"))
    assert not marker.exists()

    subprocess.run([sys.executable, "-m", "pickle", newest(two) / "model.safetensors"], check=True)
    assert marker.exists(), "the bait is dead: this test proves nothing"


def _replace(run_dir: Path, name: str, data: bytes) -> None:
    """Replace a file together with its entry in the manifest."""
    (newest(run_dir) / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _edited(run_dir, lambda manifest: manifest["files"].update({name: entry}))


def test_an_unreadable_disk_is_a_checkpoint_error(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", broken)
    with pytest.raises(CheckpointError, match=r"must be readable, got EIO") as caught:
        load_checkpoint(newest(two))
    assert caught.value.exit_code == 74


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match="must be a directory"):
        load_checkpoint(tmp_path / "missing")


def test_every_broken_checkpoint_is_reported(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (two / "checkpoints").iterdir():
        (path / "state.json").unlink()
    assert latest_checkpoint(two) is None
    lines = capsys.readouterr().out.splitlines()
    assert ["batch-000000020" in lines[0], "batch-000000010" in lines[1]] == [True, True]


def test_sweeping_touches_leftovers_only(two: Path) -> None:
    shutil.copytree(newest(two), two / "checkpoints" / f".tmp-batch-000000030-{DIGITS}")
    (two / f".tmp-best-{DIGITS}").mkdir()
    (two / "log.jsonl").write_text("{}")
    sweep_stale(two)
    assert complete(two) == [10, 20]
    assert sorted(os.listdir(two)) == ["checkpoints", "log.jsonl"]
    sweep_stale(two / "missing")


def test_a_checkpoint_that_stepped_aside_is_put_back(two: Path) -> None:
    """A process died between the two renames that replace a checkpoint."""
    newest(two).rename(newest(two).with_name(f".replaced-batch-000000020-{DIGITS}"))
    sweep_stale(two)
    assert latest_checkpoint(two) == newest(two)
    assert holds(load_checkpoint(newest(two)), 20)


def test_an_interrupt_during_a_save_leaves_nothing_half_written(two: Path) -> None:
    def interrupted(path: Any, *args: Any) -> int:
        if str(path).endswith("rng.safetensors"):
            raise KeyboardInterrupt
        return os.open(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "OPERATIONS", files.FileOperations(open=interrupted))
        with pytest.raises(KeyboardInterrupt):
            save(two, 30)
    assert names(two) == ["batch-000000010", "batch-000000020"]


# Damaged ones


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_good_one_is_not_dropped_while_a_damaged_newer_one_is_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, limit=3)
    flip_last_byte(tmp_path / "checkpoints" / "batch-000000030" / "model.safetensors")
    save(tmp_path, 25, limit=2)
    assert complete(tmp_path) == [20, 25]
    save(tmp_path, 30, limit=2)  # the course arrives at the damaged one, and replaces it
    assert complete(tmp_path) == [25, 30]


def test_a_checkpoint_under_another_ones_name_is_refused(two: Path) -> None:
    shutil.rmtree(newest(two))
    shutil.copytree(two / "checkpoints" / "batch-000000010", newest(two))
    with pytest.raises(CheckpointError, match="be named by its micro-batches, got micro_step = 10"):
        load_checkpoint(newest(two))
    found = latest_checkpoint(two)
    assert found is not None and found.name == "batch-000000010"


def test_what_was_verified_once_is_not_hashed_again(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    verify = checkpoint_module._verify_hash

    def noted(path: Path, expected: str) -> None:
        hashed.append(path.parent.name)
        verify(path, expected)

    monkeypatch.setattr(checkpoint_module, "_verify_hash", noted)
    save(two, 30)
    assert not hashed
    flip_last_byte(two / "checkpoints" / "batch-000000030" / "model.safetensors")
    save(two, 40)
    assert "batch-000000030" in hashed
    assert complete(two) == [20, 40]
