"""Checkpoints in the background: the same bytes, one at a time, and nobody is told too early."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty_disk import tree
from support.runs import make_trainer, run_log
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.checkpoint import atomic_files as files
from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.snapshot import WRITER, HostBuffers
from sad.checkpoint.store import latest_checkpoint
from sad.config.schema import DistillConfig
from sad.environment import StopSignals
from sad.errors import CheckpointError, StoppedError
from sad.report.log import read_log
from sad.training import trainer as trainer_module
from sad.training.inputs import RunInputs, load_inputs
from sad.training.trainer import Trainer

MakeConfig = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "student": save_tiny(folder / "student", tiny_llama(seed=2)),
        "data": {"train": write_texts(folder / "texts", count=16), "eval_fraction": 0.2},
        "teacher": None,
        "kd_weight": 0.0,
        "max_length": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "max_eval_rows": 2,
        "save_steps": 1,
        "save_total_limit": 3,
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> MakeConfig:
    def make(**keys: Any) -> DistillConfig:
        settings: dict[str, Any] = sources | {"output_dir": str(tmp_path / "run")} | keys
        return DistillConfig(**settings)

    return make


@pytest.fixture(scope="module")
def inputs(sources: dict[str, Any]) -> RunInputs:
    return load_inputs(DistillConfig(**sources))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What the writer waits for before it touches the disk; opened at the end in any case."""
    event = threading.Event()
    write = trainer_module.write_shards

    def gated(*args: Any, **options: Any) -> Path:
        if threading.current_thread().name == WRITER:
            assert event.wait(60)
        return write(*args, **options)

    monkeypatch.setattr(trainer_module, "write_shards", gated)
    yield event
    event.set()


def run(trainer: Trainer, signals: StopSignals | None = None) -> None:
    with run_log(trainer.config, trainer) as log:
        trainer.train(log, signals or StopSignals())


def to_the_next_save(trainer: Trainer, log: Any) -> None:
    while not trainer.micro_batch():
        pass
    trainer.save(log)


def status(trainer: Trainer) -> str | None:
    return trainer.run_dir.read_status().get("checkpoint")


def test_the_bytes_are_those_of_a_save_at_once(
    make_config: MakeConfig, inputs: RunInputs, tmp_path: Path
) -> None:
    """Of all files of all checkpoints; the configuration in them is the same."""
    found = []
    for background in (True, False):
        trainer = make_trainer(make_config(save_total_limit=9), inputs)
        trainer.config = replace(trainer.config, async_save=background)
        run(trainer)
        found.append(tree(Path(trainer.run_dir.path, "checkpoints")))
        saves = [r["path"] for r in read_log(trainer.run_dir.path) if r["kind"] == "save"]
        assert saves == sorted(saves) and len(saves) == 6
        shutil.move(trainer.run_dir.path, tmp_path / f"kept-{background}")
    assert len(found[0]) > 6 and found[0] == found[1]


def test_training_goes_on_while_a_thread_writes(
    make_config: MakeConfig, inputs: RunInputs, gate: threading.Event
) -> None:
    trainer = make_trainer(make_config(), inputs)
    with run_log(trainer.config, trainer) as log:
        assert trainer.save(log) is None
        for _ in range(2):
            trainer.micro_batch()
            trainer.finish_save(log)
        folder = trainer.run_dir.path / "checkpoints"
        assert not folder.exists() and status(trainer) is None, "nothing is there yet"
        assert not [r for r in read_log(trainer.run_dir.path) if r["kind"] == "save"]
        gate.set()
        path = trainer.finish_save(log, wait=True)
        assert path is not None and status(trainer) == path.name == "batch-000000000"
        saves = [r for r in read_log(trainer.run_dir.path) if r["kind"] == "save"]
        assert [(r["micro_step"], r["path"]) for r in saves] == [(0, path.name)]


def test_everything_that_touches_the_disk_happens_in_the_writer(
    make_config: MakeConfig, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotation and the status among it, which comes when the checkpoint has its name."""
    seen: list[tuple[str, str]] = []
    working = files.OPERATIONS

    def rename(old: Any, new: Any) -> None:
        seen.append((threading.current_thread().name, Path(new).name))
        working.rename(old, new)

    monkeypatch.setattr(files, "OPERATIONS", replace(working, rename=rename))
    trainer = make_trainer(make_config(save_total_limit=2), inputs)
    with run_log(trainer.config, trainer) as log:
        for _ in range(3):
            to_the_next_save(trainer, log)
        trainer.finish_save(log, wait=True)
    assert {thread for thread, _ in seen} == {WRITER}
    names = [name for _, name in seen if not name.startswith(files.TEMPORARY)]
    steps = [f"batch-{step:09d}" for step in (2, 4, 6)]
    assert names == [name for step in steps for name in (step, "status.json")]
    kept = sorted(path.name for path in (trainer.run_dir.path / "checkpoints").iterdir())
    assert kept == steps[1:]


def test_one_save_is_in_flight_and_buffers_serve_again(
    make_config: MakeConfig, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, contents = 0, 0, []
    write = trainer_module.write_shards

    def counted(run_dir: Path, taken: Any, *world: Any, **options: Any) -> Path:
        nonlocal now, most
        now += 1
        most = max(most, now)
        contents.append(min(t.data_ptr() for t in taken.tensors["model"].values()))
        path = write(run_dir, taken, *world, **options)
        now -= 1
        return path

    monkeypatch.setattr(trainer_module, "write_shards", counted)
    trainer = make_trainer(make_config(), inputs)
    with run_log(trainer.config, trainer) as log:
        for _ in range(4):
            to_the_next_save(trainer, log)
        trainer.finish_save(log, wait=True)
    assert most == 1 and len(contents) == 4 and len(set(contents)) == 1


def test_what_a_kill_between_copy_and_rename_costs(
    make_config: MakeConfig, inputs: RunInputs, gate: threading.Event, tmp_path: Path
) -> None:
    """The save in flight, and nothing that was there before: its files are untouched."""
    trainer = make_trainer(make_config(), inputs)
    with run_log(trainer.config, trainer) as log:
        gate.set()
        to_the_next_save(trainer, log)
        trainer.finish_save(log, wait=True)
        gate.clear()
        before = tree(trainer.run_dir.path / "checkpoints")
        to_the_next_save(trainer, log)
        shutil.copytree(trainer.run_dir.path, tmp_path / "as-a-kill-leaves-it")
        gate.set()
        trainer.finish_save(log, wait=True)
    assert tree(tmp_path / "as-a-kill-leaves-it" / "checkpoints") == before
    left = RunDirectory(tmp_path / "as-a-kill-leaves-it")
    newest = latest_checkpoint(left.path, report=pytest.fail)
    assert newest is not None and newest.name == left.read_status()["checkpoint"]


def fail_saves(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A full disk for the checkpoints of these positions."""
    working = files.OPERATIONS

    def mkdir(path: Any) -> None:
        if any(f"batch-{step:09d}" in Path(path).name for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device")
        working.mkdir(path)

    monkeypatch.setattr(files, "OPERATIONS", replace(working, mkdir=mkdir))


@pytest.mark.parametrize("background", [True, False], ids=["background", "at-once"])
def test_a_failed_save_counts_at_the_next_boundary(
    make_config: MakeConfig,
    inputs: RunInputs,
    monkeypatch: pytest.MonkeyPatch,
    background: bool,
) -> None:
    """One is a warning, a success forgets it, two in a row end the run."""
    trainer = make_trainer(make_config(async_save=background, save_total_limit=9), inputs)
    fail_saves(monkeypatch, 2, 6, 8)
    with pytest.raises(CheckpointError, match="ENOSPC") as failed:
        run(trainer)
    assert failed.value.exit_code == 74
    assert 8 <= trainer.counters.micro_step <= 10
    records = read_log(trainer.run_dir.path)
    warnings = [r["message"] for r in records if r["kind"] == "warning"]
    assert len(warnings) == 2 and all("until the next save" in text for text in warnings)
    assert status(trainer) == "batch-000000004"


def test_an_error_waits_for_the_save_in_flight(
    make_config: MakeConfig, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the status of a run that has failed would be overwritten by its own writer."""
    trainer = make_trainer(make_config(), inputs)
    write, release = trainer_module.write_shards, threading.Event()

    def slow(*args: Any, **options: Any) -> Path:
        assert release.wait(60)
        return write(*args, **options)

    def broken(self: Trainer) -> bool:
        if self.counters.micro_step == 3:
            threading.Timer(0.3, release.set).start()
            raise RuntimeError("broken")
        return micro_batch(self)

    micro_batch = Trainer.micro_batch
    monkeypatch.setattr(trainer_module, "write_shards", slow)
    monkeypatch.setattr(Trainer, "micro_batch", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run(trainer)
    assert status(trainer) == "batch-000000002"
    assert [r["path"] for r in read_log(trainer.run_dir.path) if r["kind"] == "save"] == [
        "batch-000000002"
    ]


def test_a_failure_in_flight_does_not_hide_the_error(
    make_config: MakeConfig, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_config(), inputs)

    def fails(*args: Any, **options: Any) -> Path:
        raise OverflowError("in the writer")

    def evaluate(self: Trainer, log: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(trainer_module, "write_shards", fails)
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    monkeypatch.setattr(Trainer, "_save_is_due", lambda self, closed: False)
    with run_log(trainer.config, trainer) as log:
        trainer.save(log)
        trainer.config = replace(trainer.config, max_steps=1)
        with pytest.raises(RuntimeError, match="broken"), trainer._finishing_saves(log):
            trainer.evaluate(log)
    (warning,) = (r for r in read_log(trainer.run_dir.path) if r["kind"] == "warning")
    assert "OverflowError: in the writer" in warning["message"]


def test_a_signal_waits_and_saves_once(
    make_config: MakeConfig, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a window it saves anew; where a save has just begun it waits for that."""
    for stop, saved in ((3, [2, 3]), (4, [2, 4])):
        trainer = make_trainer(make_config(), inputs)
        micro_batch = Trainer.micro_batch

        def interrupted(self: Trainer, stop: int = stop, work: Any = micro_batch) -> bool:
            closed = work(self)
            if self.counters.micro_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return closed

        with monkeypatch.context() as patch, StopSignals() as signals:
            patch.setattr(Trainer, "micro_batch", interrupted)
            with pytest.raises(StoppedError, match=f"after micro-batch {stop}; the state is saved"):
                run(trainer, signals)
        records = [r for r in read_log(trainer.run_dir.path) if r["kind"] == "save"]
        assert [r["micro_step"] for r in records] == saved
        assert status(trainer) == f"batch-{stop:09d}"
        shutil.rmtree(trainer.run_dir.path)


def test_the_last_save_is_made_once(make_config: MakeConfig, inputs: RunInputs) -> None:
    trainer = make_trainer(make_config(async_save=False), inputs)
    run(trainer)
    total = trainer.run_length.micro_batches
    saves = [r["micro_step"] for r in read_log(trainer.run_dir.path) if r["kind"] == "save"]
    assert saves == [*range(2, total, 2), total]


@pytest.mark.parametrize(("keys", "prepares"), [({}, True), ({"save_steps": None}, False)], ids=str)
def test_buffers_are_made_ready_by_a_thread_after_the_first_window(
    make_config: MakeConfig,
    inputs: RunInputs,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    prepares: bool,
) -> None:
    seen: list[tuple[str, int]] = []
    prepare = HostBuffers.prepare

    def watched(self: HostBuffers, sizes: Any) -> None:
        seen.append((threading.current_thread().name, sizes["optimizer"]))
        prepare(self, sizes)

    monkeypatch.setattr(HostBuffers, "prepare", watched)
    trainer = make_trainer(make_config(max_steps=2, **keys), inputs)
    run(trainer)
    parameters = sum(p.numel() for p in trainer.student.model.parameters())
    assert len(seen) == prepares
    assert all(name == WRITER and size > 8 * parameters for name, size in seen)


def test_without_memory_for_a_copy_training_waits(
    make_config: MakeConfig, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(trainer_module, "snapshot", none_left)
    trainer = make_trainer(make_config(), inputs)
    with run_log(trainer.config, trainer) as log:
        path = trainer.save(log)
    assert path is not None and path.is_dir()
    (warning,) = (r for r in read_log(trainer.run_dir.path) if r["kind"] == "warning")
    assert warning["message"].startswith("no host memory for a copy of the state")


def test_the_weights_of_training_are_untouched(
    make_config: MakeConfig, inputs: RunInputs, gate: threading.Event
) -> None:
    """The copy is made before training goes on, and training never sees it."""
    trainer = make_trainer(make_config(), inputs)
    with run_log(trainer.config, trainer) as log:
        while not trainer.micro_batch():
            pass
        live = dict(trainer.student.model.named_parameters())
        before = {name: p.detach().clone() for name, p in live.items()}
        trainer.save(log)
        assert dict(trainer.student.model.named_parameters()).keys() == live.keys()
        for name, parameter in trainer.student.model.named_parameters():
            assert parameter is live[name] and torch.equal(parameter, before[name])
        gate.set()
