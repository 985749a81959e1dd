"""Checkpoints of live tensors, written on all ranks as a trainer does that waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sad.checkpoint.store import Tensors
from sad.distributed.shards import live_snapshot, write_shards
from sad.distributed.world import World


def save_shards(
    run_dir: Path,
    micro_step: int,
    state: dict[str, Any],
    tensors: Tensors,
    world: World,
    *,
    save_total_limit: int,
) -> Path:
    """``RUN_DIR/checkpoints/batch-<micro_step>``, of what each rank has now."""
    taken = live_snapshot(micro_step, state, tensors, world)
    return write_shards(run_dir, taken, world, save_total_limit=save_total_limit)
