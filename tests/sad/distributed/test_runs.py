"""``distill`` on several ranks against the same run on one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.rank_runs import CASES, Material
from support.ranks import run_ranks
from support.runs import make_trainer, run_log
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from sad.checkpoint.store import checkpoints_of, latest_checkpoint, load_checkpoint
from sad.config.schema import DistillConfig
from sad.distributed.world import World, whole_world
from sad.errors import StoppedError, UsageError
from sad.models import load
from sad.report.log import read_log
from sad.training import ranks
from sad.training.inputs import load_inputs
from sad.training.ranks import FORCE_SUM, check_ranks
from sad.training.run import distill
from sad.training.trainer import Trainer


def metrics_of(config: DistillConfig) -> dict[str, float]:
    return distill(config).metrics


def curve(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_log(run_dir) if record["kind"] == "train"]


@pytest.fixture(scope="session")
def alone(
    material: Material, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[float], dict[str, float]]]:
    """The losses and metrics of a case on one process."""
    done: dict[str, tuple[list[float], dict[str, float]]] = {}

    def run(case: str) -> tuple[list[float], dict[str, float]]:
        if case not in done:
            run_dir = tmp_path_factory.mktemp("alone") / "run"
            metrics = run_ranks(1, metrics_of, material.config(case, run_dir))[0]
            done[case] = curve(run_dir), metrics
        return done[case]

    return run


BY_DEFAULT = {
    ("structural", 2, 1),
    ("kd", 2, 1),
    ("conversations", 4, 2),
}

SIZES = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 4), (4, 2))
"""Ranks, and the replicas of the model among them."""

GRID = [
    pytest.param(case, *size, marks=() if (case, *size) in BY_DEFAULT else pytest.mark.slow)
    for case in CASES
    for size in SIZES
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("case", "ranks", "replicas"), GRID)
def test_a_run_on_ranks_is_the_run_of_one_process(
    material: Material,
    alone: Callable[[str], tuple[list[float], dict[str, float]]],
    tmp_path: Path,
    case: str,
    ranks: int,
    replicas: int,
) -> None:
    run_dir = tmp_path / "run"
    config = material.config(case, run_dir, dp_replicate_size=replicas)
    found, *others = run_ranks(ranks, metrics_of, config)
    losses, metrics = alone(case)
    assert curve(run_dir) == pytest.approx(losses, abs=1e-5)
    assert found == pytest.approx(metrics, rel=1e-5)
    assert all(other == found for other in others)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["checkpoint"]) == ("finished", "batch-000000012")
    student = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    saved = load_file(run_dir / "final" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in saved.values())
    assert sum(p.numel() for p in student.parameters()) > 0


def metrics_without_whole_models(config: DistillConfig) -> dict[str, float]:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded whole")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_pretrained_model", refuse)
        return distill(config).metrics


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"baseline": True}, marks=pytest.mark.slow),
        {"bf16": True, "gradient_checkpointing": True},
    ],
)
def test_a_run_without_losses_on_inner_layers_never_loads_a_model_whole(
    material: Material, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = material.config("kd", tmp_path / "run", **keys)
    found, other = run_ranks(2, metrics_without_whole_models, config)
    assert found == other and found["eval/nll"] > 0


def halt_after(config: DistillConfig, windows: int) -> None:
    """Train until so many windows are closed; a signal to the first rank then stops the run."""
    closing = Trainer._close_window

    def close(self: Trainer, *, empty: bool) -> None:
        closing(self, empty=empty)
        if self.counters.global_step == windows and self.world.main:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._close_window = close  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        distill(config)


def resumed(config: DistillConfig) -> dict[str, float]:
    return distill(replace(config, resume_from_checkpoint="auto")).metrics


def state_of(checkpoint: Path) -> dict[str, Any]:
    loaded = load_checkpoint(checkpoint)
    return {
        f"{group}/{name}": tensors[name]
        for group, tensors in loaded.tensors.items()
        for name in tensors
    }


@pytest.mark.parametrize("student", [pytest.param("student", marks=pytest.mark.slow), "dropout"])
def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_to_the_bit(
    material: Material, tmp_path: Path, student: str
) -> None:
    whole = material.config("kd", tmp_path / "whole", student=student)
    halves = replace(whole, output_dir=str(tmp_path / "halves"))
    run_ranks(2, metrics_of, whole)
    run_ranks(2, halt_after, halves, 2)
    stopped = latest_checkpoint(tmp_path / "halves")
    assert stopped is not None and stopped.name == "batch-000000006"  # at the next window's end
    status = json.loads((tmp_path / "halves" / "status.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 75)
    run_ranks(2, resumed, halves)
    ours, theirs = (latest_checkpoint(config.output_dir) for config in (halves, whole))
    assert ours is not None and theirs is not None
    found, expected = state_of(ours), state_of(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_another_number_of_ranks(
    material: Material,
    alone: Callable[[str], tuple[list[float], dict[str, float]]],
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    config = material.config("kd", tmp_path / "run")
    run_ranks(before, halt_after, config, 2)
    run_ranks(after, resumed, config)
    losses, _ = alone("kd")
    assert curve(tmp_path / "run") == pytest.approx(losses, abs=1e-5)
    (warning,) = (
        r["message"]
        for r in read_log(tmp_path / "run")
        if "not bit for bit" in str(r.get("message"))
    )
    assert f"on {after} processes in place of {before}" in warning


def save_a_tensor_twice(config: DistillConfig) -> None:
    """Save, in the foreground, one tensor under two names."""
    with whole_world("cpu", timeout_seconds=30) as world:
        trainer = make_trainer(config, load_inputs(config, world=world))
        state, tensors = trainer.capture()
        model = tensors["model"]
        tensors["model"] = {**model, "again": next(iter(model.values()))}
        trainer.capture = lambda: (state, tensors)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="model tensors must not share memory"):
            trainer.save(run_log(config, trainer))


@pytest.mark.parametrize("background", [False, True])
def test_what_could_not_be_restored_is_not_saved(
    material: Material, tmp_path: Path, background: bool
) -> None:
    """Two tensors that were one would come back as two."""
    run_ranks(2, save_a_tensor_twice, material.config("kd", tmp_path, async_save=background))
    assert not checkpoints_of(tmp_path)


def test_sums_between_two_log_lines_survive_another_number_of_ranks(
    material: Material, tmp_path: Path
) -> None:
    config = material.config("kd", tmp_path / "run", logging_steps=2)
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    run_ranks(1, metrics_of, whole)
    run_ranks(2, halt_after, config, 2)  # stops after the third window
    run_ranks(3, resumed, config)
    assert curve(tmp_path / "run") == pytest.approx(curve(tmp_path / "whole"), abs=1e-5)


def refused(config: DistillConfig) -> str:
    with pytest.raises(UsageError) as caught:
        distill(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"contrastive": {"weight": 0.1}}, "contrastive.weight must be 0 on several processes"),
        ({"peft": {"r": 2}}, "peft must be empty"),
        ({"torch_compile": True}, "torch_compile must be false"),
        ({"ema_device": "cpu"}, "ema_device must be left out"),
        ({"dp_shard_size": 3}, "dp_replicate_size x dp_shard_size must be the number of processes"),
    ],
)
def test_what_ranks_cannot_do_is_one_line(
    material: Material, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    lines = run_ranks(2, refused, material.config("kd", tmp_path / "run", **keys))
    assert all(line.startswith(said) and "\n" not in line for line in lines)
    assert not checkpoints_of(tmp_path / "run")


def test_a_torch_without_what_a_run_on_ranks_needs_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DistillConfig(student="student", teacher="teacher")
    check_ranks(config, World(size=2))
    monkeypatch.delattr(FSDPModule, FORCE_SUM)
    check_ranks(config, World())
    with pytest.raises(UsageError) as caught:
        check_ranks(config, World(size=2))
    line = str(caught.value)
    assert line.startswith("torch must be 2.10 or newer on several processes") and FORCE_SUM in line
    monkeypatch.setattr(ranks, "fully_shard", lambda module, mesh: None)
    with pytest.raises(UsageError, match=r"without fully_shard\(ignored_params"):
        check_ranks(config, World(size=2))
    assert caught.value.exit_code == 2


def test_another_batch_on_more_ranks_is_another_course(material: Material, tmp_path: Path) -> None:
    """Without ``global_batch_size`` twice the ranks are twice the rows per step."""
    keys = {"global_batch_size": None, "per_device_train_batch_size": 2}
    config = material.config("kd", tmp_path / "run", **keys)
    run_ranks(1, halt_after, config, 2)
    again = replace(config, resume_from_checkpoint="auto")
    (line, _) = run_ranks(2, refused, again)
    assert "per_device_train_batch_size: 2 -> 4" in line
    # Half the rows on each of two ranks are the same micro-batches.
    run_ranks(2, resumed, replace(config, per_device_train_batch_size=1))
