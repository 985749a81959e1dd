"""Trainers built as ``distill`` builds them, and bitwise comparison of their states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sad.checkpoint.run_directory import RunDirectory
from sad.config.schema import DistillConfig
from sad.environment import seed_everything
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.report.log import RunLog
from sad.training.inputs import RunInputs, load_inputs
from sad.training.ranks import (
    SharedRunDirectory,
    shard_student,
    sharded_config,
    with_sharded_teacher,
)
from sad.training.student import build_student
from sad.training.trainer import Trainer


def make_trainer(config: DistillConfig, inputs: RunInputs | None = None) -> Trainer:
    """A fresh trainer, built and seeded as ``distill`` does it, on as many processes."""
    inputs = inputs or load_inputs(config)
    seed_everything(config.seed, deterministic=config.deterministic)
    world = inputs.world
    loaded = config if world.size == 1 else sharded_config(config)
    precision = Precision(loaded, inputs.device, sharded=world.size > 1)
    model = load_student(loaded)
    teacher = None if inputs.teacher is None else inputs.teacher.model
    student = build_student(
        config, model, inputs.valid_vocab, precision, teacher, inputs.comparison
    )
    if world.size == 1:
        return Trainer(config, student, inputs, precision, RunDirectory(config.output_dir))
    shard_student(student, config, precision, world)
    run_dir = SharedRunDirectory(config.output_dir, world)
    return Trainer(config, student, with_sharded_teacher(inputs), precision, run_dir)


def run_log(config: DistillConfig, trainer: Trainer) -> RunLog:
    """The log of a run that ``trainer`` begins."""
    return RunLog(config.output_dir, total_batches=trainer.run_length.micro_batches)


def everything(trainer: Trainer) -> dict[str, Any]:
    """A copy of the whole state: plain values, and tensors by group and name."""
    state, tensors = trainer.capture()
    named = {
        f"{g}/{n}": t.detach().clone() for g, group in tensors.items() for n, t in group.items()
    }
    return {"state": state, **named}


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = (
            torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        )
        assert same, f"{name} differs"
