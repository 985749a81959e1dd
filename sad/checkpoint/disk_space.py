"""Disk space: refuse a run that its disk cannot hold, before anything is loaded.

What a run leaves behind follows from the student's configuration: checkpoints (weights, the
optimizer's moments, EMA, the gradients of an open window) and the exported weights of ``best/`` and
``final/``. A disk that fills up later costs hours; one that is too small from the start should cost
none.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sad.checkpoint.atomic_files import free_bytes, tree_bytes
from sad.checkpoint.store import SET_ASIDE
from sad.config.schema import DistillConfig
from sad.errors import OutputError
from sad.models.load import build_student_model
from sad.models.memory_plan import frozen_bytes, gradient_bytes, student_states, weight_bytes

EXPORTS = ("best", "final")
RESULTS = ("checkpoints", "baseline", *EXPORTS)
"""Folders of a run directory, whose space a run uses again."""


def require_space(config: DistillConfig) -> None:
    """Raise ``OutputError`` if ``output_dir`` has too little room for what the run will write.

    A new checkpoint is complete before an old one goes, so there must be room for
    ``save_total_limit + 1``. A baseline keeps as many of its own. What an earlier attempt has
    written counts as room, but for checkpoints that were set aside. Raises what reading the
    student's configuration raises, too.
    """
    with torch.device("meta"):
        student = build_student_model(config)
    runs = 2 if config.baseline else 1
    checkpoints = runs * config.save_total_limit + 1
    exports = runs * len(EXPORTS)
    each, export = checkpoint_bytes(config, student), weight_bytes(student)
    if not config.merge_adapters:
        export -= frozen_bytes(student)
    needed = checkpoints * each + exports * export
    free = free_bytes(config.output_dir)
    kept = sum(tree_bytes(path) for path in Path(config.output_dir).glob(f"**/{SET_ASIDE}"))
    written = sum(tree_bytes(Path(config.output_dir) / name) for name in RESULTS)
    if free is not None and free + written - kept < needed:
        raise OutputError(
            f"output_dir must have room for {checkpoints} checkpoints of {_size(each)} and "
            f"{exports} exported students of {_size(export)}, {_size(needed)} together, got "
            f"{_size(free)} free for {config.output_dir}; free space, choose another --output_dir, "
            f"or lower save_total_limit (now {config.save_total_limit}, at least 2)"
        )


def checkpoint_bytes(config: DistillConfig, student: nn.Module) -> int:
    """The largest checkpoint of this student: one taken in the middle of a window.

    Exact but for a few KiB: names, plain numbers, random states, buffers that are not saved.
    """
    states = sum(size for _, size in student_states(config, student)) - frozen_bytes(student)
    mid_window = config.gradient_accumulation_steps > 1
    return states + (gradient_bytes(config, student.parameters()) if mid_window else 0)


def _size(count: int) -> str:
    gib = count / 2**30
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{count / 2**20:,.1f} MiB"
