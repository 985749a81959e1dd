"""Small caches of a small teacher's targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.training.cache_teacher import cache_teacher

SMALL_SHARDS = 6_000
"""Bytes of a shard: the text fills several."""


def config_in(sources: dict[str, Any], folder: Path, **overrides: Any) -> DistillConfig:
    """A short run on ``sources`` whose directory lies in ``folder``."""
    defaults: dict[str, Any] = sources | {
        "output_dir": str(folder / "run"),
        "max_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_eval_rows": 4,
        "temperature": 1.0,
        "learning_rate": 1e-2,
        "label_smoothing": 0.0,
    }
    return DistillConfig(**(defaults | overrides))


def make_cache(config: DistillConfig, folder: Path, kind: str = "sampled", **options: Any) -> Path:
    """The cache that ``sad cache-teacher`` makes, in small shards."""
    given: dict[str, Any] = {"output": str(folder), "kind": kind} | options
    if kind != "hidden":
        given = {"top_k": 16} | given
    return cache_teacher(config, CacheOptions(**given), shard_bytes=SMALL_SHARDS)
