"""What remains of a run when one of its processes fails."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from support.rank_runs import Material
from support.ranks import ends_of_ranks, run_ranks

from sad.checkpoint.store import checkpoints_of, latest_checkpoint
from sad.config.schema import DistillConfig
from sad.report.log import read_log
from sad.training.run import distill
from sad.training.trainer import Trainer


def at_window(window: int, rank: int, happens: Callable[[], object]) -> None:
    """Let something happen to a rank when it closes a window, before it saves."""
    closing = Trainer._close_window

    def close(self: Trainer, *, empty: bool) -> None:
        if self.counters.global_step == window and self.world.rank == rank:
            happens()
        closing(self, empty=empty)

    Trainer._close_window = close  # type: ignore[method-assign]


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing() -> None:
    raise ArithmeticError("a fault of one rank")


def run_until(config: DistillConfig, window: int, rank: int, happens: Callable[[], object]) -> None:
    at_window(window, rank, happens)
    distill(config)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_log(run_dir) if record["kind"] == "train"]


def resume(config: DistillConfig) -> None:
    distill(replace(config, resume_from_checkpoint="auto"))


@pytest.fixture(scope="session")
def unbroken(material: Material, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    run_ranks(1, resume, material.config("kd", run_dir))
    return losses(run_dir)


@pytest.mark.parametrize(
    ("ranks", "lost", "after"), [pytest.param(3, 2, 2, marks=pytest.mark.slow), (2, 0, 1)]
)
def test_a_lost_rank_ends_the_others_with_76(
    material: Material, tmp_path: Path, unbroken: list[float], ranks: int, lost: int, after: int
) -> None:
    config = material.config("kd", tmp_path / "run")
    ends = ends_of_ranks(ranks, partial(run_until, config, 4, lost, killed))
    assert ends[lost].code == -signal.SIGKILL
    for rank, end in enumerate(ends):
        if rank != lost:
            assert end.code == 76, end
            assert "a rank was lost" in end.message and "window 5" in end.message
    if lost != 0:  # the first rank says so
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["state"], status["code"]) == ("failed", 76)
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None and found.name in ("batch-000000004", "batch-000000008")
    run_ranks(after, resume, config)
    assert losses(tmp_path / "run") == pytest.approx(unbroken, abs=1e-5)


def test_a_fault_of_one_rank_ends_the_others_with_76(material: Material, tmp_path: Path) -> None:
    config = material.config("kd", tmp_path / "run")
    ends = ends_of_ranks(2, partial(run_until, config, 3, 1, failing))
    assert ends[0].code == 76
    assert "a fault of one rank" in ends[1].message  # a traceback, for whoever has to mend it


def test_a_survivor_that_was_asked_to_stop_still_says_76(
    material: Material, tmp_path: Path
) -> None:
    """torchrun sends SIGTERM to the others once one is lost; nothing was saved for that."""

    def lost_and_told() -> None:
        at_window(3, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_until(config, 3, 1, killed)

    config = material.config("kd", tmp_path / "run")
    ends = ends_of_ranks(2, lost_and_told)
    assert ends[0].code == 76, ends[0]


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(material: Material, tmp_path: Path) -> None:
    config = material.config("kd", tmp_path / "run")
    happens = partial(time.sleep, 1000)
    ends = ends_of_ranks(2, partial(run_until, config, 3, 1, happens), answers=5, timeout=30)
    assert ends[0].code == 76


@pytest.mark.parametrize(
    ("key", "values"), [("learning_rate", (1e-3, 0.5)), ("save_steps", (2, 3))]
)
def test_ranks_with_other_configurations_are_refused(
    material: Material, tmp_path: Path, key: str, values: tuple[float, float]
) -> None:
    """Also where only the moments differ at which all must meet."""
    config = material.config("kd", tmp_path / "run")

    def differing() -> None:
        distill(replace(config, **{key: values[int(os.environ["RANK"])]}))

    ends = ends_of_ranks(2, differing)
    assert [end.code for end in ends] == [2, 2]
    said = f"got {key}: {values[0]} on rank 0 and {key}: {values[1]} on rank 1"
    assert f"the configuration must be the same on all ranks, {said}" in ends[0].message
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_not_shared_is_refused(material: Material, tmp_path: Path) -> None:
    def apart() -> None:
        distill(material.config("kd", tmp_path / os.environ["RANK"]))

    ends = ends_of_ranks(2, apart)
    assert [end.code for end in ends] == [73, 73]
    assert "output_dir must be on a file system that all processes share" in ends[0].message


MOMENTS = [pytest.param(seed, marks=() if seed < 1 else pytest.mark.slow) for seed in range(30)]


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_rank_killed_at_any_moment_loses_nothing(
    material: Material, tmp_path: Path, unbroken: list[float], seed: int
) -> None:
    """After a while, whatever it does then: loading, training, saving, exporting."""
    draw = random.Random(seed)
    before, after = draw.choice([2, 3, 4]), draw.choice([1, 2, 3, 4])
    lost, moment = draw.randrange(before), draw.uniform(0.3, 6.0)
    config = material.config("kd", tmp_path / "run")

    def killed_later() -> None:
        if int(os.environ["RANK"]) == lost:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, moment)
        resume(config)

    ends = ends_of_ranks(before, killed_later)
    codes = {end.code for rank, end in enumerate(ends) if rank != lost}
    assert codes <= {0, 76}, ends
    run_ranks(after, resume, config)
    assert losses(tmp_path / "run") == pytest.approx(unbroken, abs=1e-5)
    assert len(checkpoints_of(tmp_path / "run")) == 2
