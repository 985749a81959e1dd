"""Imports of other programs' targets in tests: what is configured, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.training.cache_teacher import cache_teacher


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
