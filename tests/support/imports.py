"""Imports of other programs' targets in tests: what is configured, and the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.teachers.cached import CachedTeacher
from sad.training.cache_teacher import cache_teacher
from sad.training.inputs import load_inputs


def import_config(folder: Path, **overrides: Any) -> DistillConfig:
    """A short run from a cache in ``folder``, of documents that are rows; its student is there."""
    defaults: dict[str, Any] = {
        "student": str(folder / "student"),
        "teacher_cache": str(folder / "cache"),
        "data": {"eval_fraction": 0.3},
        "output_dir": str(folder / "run"),
        "packing": False,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
    }
    return DistillConfig(**(defaults | overrides))


def run_import(config: DistillConfig, path: Path, **options: Any) -> Path:
    """Import the files at ``path`` into small shards; return the cache's folder."""
    given: dict[str, Any] = {"import_path": str(path)} | options
    output = given.pop("output", config.teacher_cache)
    return cache_teacher(config, CacheOptions(output=output, **given), shard_bytes=10_000)


def targets_read(config: DistillConfig) -> Iterator[tuple[Batch, Any]]:
    """Each row of a run from a cache, training rows first, and the target that is read for it."""
    inputs = load_inputs(config)
    for teacher, rows, numbers in (
        (inputs.teacher, inputs.train_rows, range(len(inputs.train_rows))),
        (inputs.eval_teacher, inputs.eval_rows, inputs.eval_row_numbers(config)),
    ):
        assert isinstance(teacher, CachedTeacher)
        for place, number in enumerate(numbers):
            batch = rows.batch([number])._replace(places=torch.tensor([place]))
            (target,) = teacher.forward(batch).targets
            yield batch, target
