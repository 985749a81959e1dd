"""Runs from a cache on several ranks: the run of one process, or one line on one rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from support.caches import config_in, make_cache
from support.ranks import End, ends_of_ranks, run_ranks
from tqdm import tqdm

from sad.config.schema import DistillConfig
from sad.errors import SadError, UnfitError, speaks_for_itself
from sad.report import page
from sad.report.log import read_log
from sad.teachers.cache.files import CACHE, COMPLETE
from sad.teachers.cache.writer import CacheWriter
from sad.teachers.cached import CachedTeacher
from sad.training import run as run_module
from sad.training.run import distill

Make = Callable[..., DistillConfig]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_draw_plots", lambda run_dir: None)
    monkeypatch.setattr(run_module, "predicted_peak", lambda *_: None)


SHARED: dict[str, Any] = {
    "global_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_eval_rows": 5,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 2,
    "learning_rate": 4e-3,
    "teacher": None,
}


def reading(make_config: Make, cache: Path, run_dir: Path, **keys: Any) -> DistillConfig:
    """A run from a cache that any number of ranks shares out alike."""
    return make_config(**SHARED | {"teacher_cache": str(cache), "output_dir": str(run_dir)} | keys)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_log(run_dir) if record["kind"] == "train"]


def metrics_of(config: DistillConfig) -> dict[str, float]:
    return distill(config).metrics


@pytest.fixture(scope="session")
def wide(sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches with one more held-out row than the ranks can share alike."""
    folder = tmp_path_factory.mktemp("wide")
    config = config_in(sources, folder, max_eval_rows=5)
    return {
        "sampled": make_cache(config, folder / "sampled", all_rows=True),
        "hidden": make_cache(config, folder / "hidden", "hidden", all_rows=True),
    }


@pytest.fixture(scope="session")
def alone() -> dict[str, tuple[list[float], dict[str, float]]]:
    """Losses and metrics of one process, by the kind of its cache."""
    return {}


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["sampled", "hidden"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_trains_the_same_student(
    make_config: Make,
    wide: dict[str, Path],
    alone: dict[str, tuple[list[float], dict[str, float]]],
    tmp_path: Path,
    kind: str,
    ranks: int,
) -> None:
    if kind not in alone:
        config = reading(make_config, wide[kind], tmp_path / "alone")
        metrics = run_ranks(1, metrics_of, config)[0]
        alone[kind] = losses(tmp_path / "alone"), metrics
    config = reading(make_config, wide[kind], tmp_path / "run")
    found, *others = run_ranks(ranks, metrics_of, config)
    curve, metrics = alone[kind]
    assert len(curve) == 4
    assert losses(tmp_path / "run") == pytest.approx(curve, abs=1e-5)
    assert found == pytest.approx(metrics, rel=1e-5)
    assert all(other == found for other in others)


# What one rank alone, or all of them, cannot read


def ends(config: DistillConfig, ranks: int = 2) -> list[End]:
    """How a run of several ranks ends; the message of a rank that does not say it is empty."""

    def run() -> None:
        rank = int(os.environ["RANK"])
        try:
            distill(config)
        except SadError as error:
            if not speaks_for_itself(error, first=rank == 0):
                error.args = ("",)
            raise

    return ends_of_ranks(ranks, run, answers=20)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda c: flip(c / "shard-00001.safetensors"), 65, "must be what was written"),
        (lambda c: (c / "shard-00001.safetensors").unlink(), 65, "got no shard-00001"),
        (lambda c: (c / COMPLETE).unlink(), 65, "must be finished"),
        (lambda c: (c / CACHE).unlink(), 65, "without cache.json for"),
        (shutil.rmtree, 2, "which is no folder"),
    ],
)
def test_what_no_rank_can_read_is_said_once(
    make_config: Make,
    caches: dict[str, Path],
    tmp_path: Path,
    spoil: Callable[[Path], object],
    code: int,
    message: str,
) -> None:
    cache = shutil.copytree(caches["sampled"], tmp_path / "cache")
    spoil(cache)
    first, second = ends(
        reading(make_config, cache, tmp_path / "run", max_eval_rows=4, teacher_wait=1)
    )
    assert (first.code, second.code) == (code, code), (first, second)
    assert message in first.message and "\n" not in first.message
    assert second.message == ""


def test_a_shard_that_is_lost_meanwhile_is_said_by_the_rank_that_misses_it(
    make_config: Make, caches: dict[str, Path], tmp_path: Path
) -> None:
    """The second rank alone finds it gone, in the middle of a window."""
    cache = shutil.copytree(caches["sampled"], tmp_path / "cache")
    config = reading(make_config, cache, tmp_path / "run", max_eval_rows=4)
    forward = CachedTeacher._targets

    def losing(self: CachedTeacher, batch: Any) -> Any:
        if os.environ["RANK"] == "1" and self.section == "train":
            for path in cache.glob("shard-*"):
                path.unlink(missing_ok=True)
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedTeacher, "_targets", losing)
        first, second = ends(config)
    assert second.code == 65 and "must be a file of the teacher's cache" in second.message
    assert first.code in (65, 76), first  # it may find it gone itself
    assert first.code == 65 or "a rank was lost" in first.message


# A window


WINDOW: dict[str, Any] = {"max_steps": 12, "save_steps": 3, "eval_steps": 6, "teacher_wait": 20}


def filled(config: DistillConfig, folder: Path) -> BaseProcess:
    """A teacher that fills ``folder`` in a process of its own, with a window for its reader."""

    def fill() -> None:
        torch.set_num_threads(1)
        tqdm.set_lock(RLock())
        make_cache(config, folder, "hidden", window=9, wait_for_reader=True)

    teacher = multiprocessing.get_context("fork").Process(target=fill)
    teacher.start()
    return teacher


def windowed(make_config: Make, folder: Path, run_dir: Path, **keys: Any) -> Any:
    """The configurations of a pair: teacher's and student's."""
    reads = reading(make_config, folder, run_dir, **WINDOW | keys)
    writes = make_config(**vars(reads) | {"teacher_cache": None, "teacher": make_config().teacher})
    return writes, reads


@pytest.mark.slow
def test_ranks_read_what_their_teacher_writes_meanwhile(make_config: Make, tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / f"window-{ranks}"
        folder.mkdir()
        writes, reads = windowed(make_config, folder, tmp_path / f"run-{ranks}")
        teacher = filled(writes, folder)
        try:
            found[ranks] = run_ranks(ranks, metrics_of, reads)[0]
            teacher.join(60)
            assert teacher.exitcode == 0, "it ends when nothing is needed any more"
        finally:
            teacher.kill()
        assert not list(folder.glob("shard-*"))
    assert losses(tmp_path / "run-2") == pytest.approx(losses(tmp_path / "run-1"), abs=1e-5)
    assert found[2] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_ranks_whose_teacher_dies_save_and_say_so_once(make_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "window"
    folder.mkdir()
    writes, reads = windowed(make_config, folder, tmp_path / "run", teacher_wait=2)
    write = CacheWriter.write

    def dying(self: CacheWriter, section: Any, number: int) -> None:
        if section == "train" and number == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, section, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", dying)
        teacher = filled(writes, folder)
    first, second = ends(reads)
    teacher.join(60)
    assert (first.code, second.code) == (75, 75), (first, second)
    assert "no sign of life" in first.message and "the state is saved" in first.message
    assert second.message == ""

    again = filled(writes, folder)
    run_ranks(2, metrics_of, replace(reads, resume_from_checkpoint="auto"))
    again.join(60)
    assert again.exitcode == 0
    assert len(losses(tmp_path / "run")) == 12


def test_a_damaged_shard_of_a_window_is_said_once(make_config: Make, tmp_path: Path) -> None:
    """All ranks verify a window's shards before any reads one."""
    folder = tmp_path / "window"
    folder.mkdir()
    writes, reads = windowed(make_config, folder, tmp_path / "run")
    write = CacheWriter.write

    def damaging(self: CacheWriter, section: Any, number: int) -> None:
        path = folder / self.sections[section].shards.name(number)
        if section == "train" and number == 12:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sad.teachers.cache.files.tensors_hash", lambda _: "0 0")
                write(self, section, number)
            assert path.exists()
            return
        write(self, section, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", damaging)
        teacher = filled(writes, folder)
    try:
        first, second = ends(reads)
    finally:
        teacher.kill()
    assert (first.code, second.code) == (65, 65), (first, second)
    assert "shard-00012.safetensors must hold what was written to it" in first.message
    assert second.message == ""


def dying_on(config: DistillConfig, folder: str, rank: int) -> None:
    """Make a cache on ranks of which one is killed at its third shard."""
    write, count = CacheWriter.write, 0

    def write_or_die(self: CacheWriter, section: Any, number: int) -> None:
        nonlocal count
        count += self.world.rank == rank
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, section, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", write_or_die)
        make_cache(config, Path(folder), all_rows=True)


def test_a_writer_that_is_lost_ends_the_others_with_76(
    make_config: Make, caches: dict[str, Path], tmp_path: Path
) -> None:
    cache, config = tmp_path / "cache", make_config()
    first, second = ends_of_ranks(2, partial(dying_on, config, str(cache), 1))
    assert second.code == -signal.SIGKILL
    assert first.code == 76 and "the same command goes on, on any number" in first.message
    make_cache(config, cache, all_rows=True)
    made, whole = (json.loads((c / COMPLETE).read_text()) for c in (cache, caches["sampled"]))
    assert made == whole


def failing_on(config: DistillConfig, folder: str, rank: int) -> None:
    """Make a cache on ranks of which one has a teacher that overflows."""
    write = CacheWriter.write

    def write_or_fail(self: CacheWriter, section: Any, number: int) -> None:
        if self.world.rank == rank and section == "train":
            raise UnfitError("teacher's logits must be finite, got NaN; check the teacher's dtype")
        write(self, section, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", write_or_fail)
        make_cache(config, Path(folder), all_rows=True)


def test_what_one_writer_cannot_make_ends_all_in_one_line(
    make_config: Make, tmp_path: Path
) -> None:
    folder = str(tmp_path / "cache")
    first, second, third = ends_of_ranks(3, partial(failing_on, make_config(), folder, 1))
    assert [end.code for end in (first, second, third)] == [65, 65, 65]
    assert "teacher's logits must be finite" in second.message
    assert not list((tmp_path / "cache").glob("shard-00003*")), "nobody went on alone"
