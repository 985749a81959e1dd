"""Writing caches: the same bits however often killed, by however many, and beside a student."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.caches import make_cache
from support.ranks import run_ranks
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import save_tiny, tiny_llama

from sad.checkpoint import atomic_files
from sad.checkpoint.store import load_latest
from sad.cli import main
from sad.config.schema import DistillConfig
from sad.environment import StopSignals
from sad.errors import OutputError, StoppedError, UnfitError, UsageError
from sad.teachers.cache.files import COMPLETE, HEAD, READER, WRITER
from sad.teachers.cache.writer import CacheWriter
from sad.training import cache_teacher as command
from sad.training.inputs import load_inputs
from sad.training.run import distill

Make = Callable[..., DistillConfig]


def hashes(folder: Path) -> dict[str, str]:
    """What ``complete.json`` says of every file; the bits of a cache."""
    return json.loads((folder / COMPLETE).read_text())["files"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up."""


def test_a_head_that_another_teacher_left_is_not_taken(
    make_config: Make, sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    folder = tmp_path / "cache"
    other = save_tiny(tmp_path / "other", tiny_llama(seed=7, vocab_size=520))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(command, "_begin", killed)  # as while the teacher is scored
        make_cache(make_config(teacher=other), folder, "hidden", codec="bf16")
    make_cache(make_config(), folder, "hidden", codec="bf16")
    whole = make_cache(make_config(), tmp_path / "whole", "hidden", codec="bf16")
    assert hashes(folder)[HEAD] == hashes(whole)[HEAD]


@pytest.mark.parametrize("kind", ["sampled", "hidden"])
def test_a_kill_at_any_batch_changes_no_bit(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = make_config()
    whole = hashes(make_cache(config, tmp_path / "whole", kind, all_rows=True))
    assert len(whole) > 4
    write = CacheWriter.write
    made: list[str] = []

    def counted(self: CacheWriter, section: Any, number: int) -> None:
        write(self, section, number)
        made.append(self.sections[section].shards.name(number))

    left = 0

    def killing(self: CacheWriter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    monkeypatch.setattr(CacheWriter, "write", counted)
    monkeypatch.setattr(CacheWriter, "beat", killing)
    folder, kills = tmp_path / "killed", 0
    while not (folder / COMPLETE).exists():
        left = kills  # batches until the next one
        try:
            make_cache(config, folder, kind, all_rows=True)
        except Killed:
            kills += 1
    assert kills > 3
    assert hashes(folder) == whole
    assert len(made) == len(set(made)), "a shard that is there is left alone"
    assert not list(folder.glob(".tmp-*"))


def on_ranks(config: DistillConfig, folder: str) -> None:
    make_cache(config, Path(folder), "sampled", all_rows=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes_makes_the_same_bits(
    make_config: Make, tmp_path: Path, ranks: int
) -> None:
    config = make_config()
    whole = make_cache(config, tmp_path / "whole", "sampled", all_rows=True)
    run_ranks(ranks, on_ranks, config, str(tmp_path / "ranks"))
    assert hashes(tmp_path / "ranks") == hashes(whole)


def test_a_cache_of_other_facts_is_left_alone(make_config: Make, tmp_path: Path) -> None:
    folder = make_cache(make_config(), tmp_path / "cache", "topk")
    before = hashes(folder)
    with pytest.raises(UsageError, match="cache with top_k 16 where 8 is asked for"):
        make_cache(make_config(), folder, "topk", top_k=8)
    assert hashes(folder) == before


def test_a_full_disk_is_refused_before_the_teacher_runs(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.files, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(command, "evaluate_teacher", lambda *_: pytest.fail("it ran"))
    with pytest.raises(OutputError, match="output must have room for"):
        make_cache(make_config(), tmp_path / "cache")


def test_a_disk_that_fills_up_leaves_whole_shards(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    whole = make_cache(config, tmp_path / "whole", all_rows=True)
    real, left = os.write, 12_000

    def write(fd: int, data: Any) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    full = atomic_files.FileOperations(write=write)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "OPERATIONS", full)
        with pytest.raises(OutputError, match="ENOSPC"):
            make_cache(config, tmp_path / "cache", all_rows=True)
    make_cache(config, tmp_path / "cache", all_rows=True)
    assert hashes(tmp_path / "cache") == hashes(whole)


def test_a_check_knows_the_teacher_from_another(
    make_config: Make, caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("sampled", "sampled"), ("int8", "hidden"), ("bf16", "hidden")):
        options = {"codec": name} if kind == "hidden" else {}
        make_cache(make_config(), caches[name], kind, check=True, all_rows=True, **options)
    said = capsys.readouterr().out
    assert "100.0 % of the ids of 8 batches are the same" in said
    assert "hidden states of 8 batches err by 0, relative" in said


# A window, for one run that reads meanwhile


def windowed(config: DistillConfig, folder: Path) -> threading.Thread:
    """A teacher that fills ``folder`` in a thread; signals stay with the main one."""

    def fill() -> None:
        with suppress(Killed):
            make_cache(config, folder, "hidden", window=4, wait_for_reader=True)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    return thread


def trained(config: DistillConfig) -> Any:
    trainer = make_trainer(config, load_inputs(config))
    with run_log(config, trainer) as log, StopSignals() as signals:
        trainer.train(log, signals)
    return trainer


LONG = {"max_steps": 24, "save_steps": 3, "eval_steps": 12, "teacher_wait": 20}


def test_a_student_reads_what_its_teacher_writes_meanwhile(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sad.environment.StopSignals.__enter__", lambda self: self)
    config = make_config(**LONG)
    folder = tmp_path / "window"
    folder.mkdir()
    most = 0
    write = CacheWriter.write

    def counted(self: CacheWriter, section: Any, number: int) -> None:
        nonlocal most
        write(self, section, number)
        most = max(most, len(list(self.folder.glob("shard-*"))))

    monkeypatch.setattr(CacheWriter, "write", counted)
    teacher = windowed(config, folder)
    reading = make_config(**LONG, teacher=None, teacher_cache=str(folder))
    trainer = trained(reading)
    teacher.join(timeout=30)
    assert not teacher.is_alive(), "it ends when nothing is needed any more"
    assert 1 < most <= 4
    assert not list(folder.glob("shard-*"))
    live = trained(make_config(**LONG, output_dir=str(tmp_path / "live")))
    for name in ("eval/nll", "eval/kl"):
        ours, theirs = trainer.counters.metrics[name], live.counters.metrics[name]
        assert ours == pytest.approx(theirs, abs=2e-3)


def test_a_teacher_that_begins_takes_nothing_that_its_student_is_writing(
    make_config: Make, tmp_path: Path
) -> None:
    """Seen once in fifty pairs: the student ended with 73, its reader.json swept before its name
    was given."""
    writing, left = (tmp_path / f".tmp-{name}-{'0' * 16}" for name in (READER, WRITER))
    writing.touch()
    left.touch()
    make_cache(make_config(), tmp_path, "sampled")
    assert writing.exists() and not left.exists()


@pytest.mark.slow
def test_a_baseline_uses_up_no_targets(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained before the student, without the teacher, who waits for the student."""
    monkeypatch.setattr("sad.environment.StopSignals.__enter__", lambda self: self)
    monkeypatch.setattr("sad.teachers.cache.reader.OPEN_SHARDS", 2)  # none outlives the baseline
    keys = LONG | {"teacher_wait": 3}
    folder = tmp_path / "window"
    folder.mkdir()
    teacher = windowed(make_config(**keys), folder)
    reading = make_config(**keys, teacher=None, teacher_cache=str(folder), baseline=True)
    result = distill(reading)
    assert next(row["name"] for row in result.results) == "teacher" and len(result.results) == 3
    teacher.join(timeout=30)
    assert not teacher.is_alive() and not list(folder.glob("shard-*"))


def test_a_student_whose_teacher_dies_saves_and_goes_on_with_the_next(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sad.environment.StopSignals.__enter__", lambda self: self)
    quick = LONG | {"teacher_wait": 2}
    config = make_config(**quick)
    folder = tmp_path / "cache"
    reading = make_config(**quick | {"teacher": None, "teacher_cache": str(folder)})
    folder.mkdir()
    teacher = windowed(config, folder)
    straight = everything(trained(reading))
    teacher.join(timeout=30)
    for path in (folder, Path(reading.output_dir)):
        shutil.rmtree(path)
    folder.mkdir()

    write = CacheWriter.write
    shards = 0

    def dying(self: CacheWriter, section: Any, number: int) -> None:
        nonlocal shards
        shards += section == "train"
        if shards == 3:
            raise Killed
        write(self, section, number)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", dying)
        windowed(config, folder)
        trainer = make_trainer(reading, load_inputs(reading))
        gone = pytest.raises(StoppedError, match=r"no sign of life for .*the state is saved")
        with run_log(reading, trainer) as log, StopSignals() as signals, gone as end:
            trainer.train(log, signals)
    assert end.value.exit_code == 75 and "\n" not in str(end.value)
    assert 0 < trainer.counters.micro_step < 24
    assert json.loads((folder / READER).read_text())["next"] > 0

    teacher = windowed(config, folder)
    again = make_trainer(reading, load_inputs(reading))
    newest = load_latest(reading.output_dir)
    assert newest is not None
    again.restore(newest, warn=pytest.fail)
    with run_log(reading, again) as log, StopSignals() as signals:
        again.train(log, signals)
    teacher.join(timeout=30)
    assert_same_bits(everything(again), straight)


def test_a_window_that_both_would_wait_for_is_refused(make_config: Make, tmp_path: Path) -> None:
    """The student reads six shards between two checkpoints, and the teacher keeps two."""
    folder = tmp_path / "cache"
    config = make_config(**LONG | {"save_steps": 8, "teacher_wait": 1})
    with pytest.raises(StoppedError, match=r"a student must read .* got no word of one for 1 s"):
        make_cache(config, folder, "hidden", window=2)
    reading = make_config(
        **LONG | {"save_steps": 8, "teacher_wait": 1}, teacher=None, teacher_cache=str(folder)
    )
    with pytest.raises(UnfitError, match="keep the 6 shards that may be read between two") as end:
        load_inputs(reading)
    assert "--window 6" in str(end.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "output must be given"),
        (["--output", "x", "--kind", "dense"], "kind must be one of sampled, topk, hidden"),
        (["--output", "x", "--kind", "topk", "--codec", "int8"], "codec must be left out"),
        (["--output", "x", "--temperatures", "1,2"], "temperatures must be one with --kind sam"),
        (["--output", "x", "--temperatures", "zero"], "temperatures must be numbers above 0"),
        (["--output", "x", "--kind", "hidden", "--temperatures", "2"], "hidden states serve any"),
        (["--output", "x", "--window", "3"], "window must be 0 with --kind sampled"),
        (["--output", "x", "--wait_for_reader"], "must be left out without a window"),
        (["--output", "x", "--top_k", "0"], "top_k must be a positive integer"),
        (["--output", "x", "--teacher", "none", "--kd_weight", "0"], "teacher must be given to"),
    ],
)
def test_wrong_words_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cache-teacher", "quickstart", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sad: error: ") and message in error
