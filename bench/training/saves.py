"""How long a checkpoint keeps training waiting: written at once, or in the background.

A student of 25 M parameters with AdamW and EMA, 16 bytes per parameter, on the quickstart's text.
In each round the same trainer saves three times, a step between them: at once (``async_save:
false``), in the background with new buffers, which a thread has prepared during a step, as the
first save of a run does, and in the background with buffers in use. Blocking is the time that
``Trainer.save`` takes; nothing is in flight when it is called. The ratios are taken within a round,
so that they hold on a machine that does other work, too. Besides: a step while a checkpoint is
being written, over one without.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from sad.checkpoint.atomic_files import tree_bytes
from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.snapshot import HostBuffers
from sad.config.load import load_config
from sad.config.schema import DistillConfig
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.report.log import RunLog
from sad.training.inputs import load_inputs
from sad.training.student import build_student
from sad.training.trainer import Trainer

WAYS = ("at once", "in the background, first", "in the background")


@dataclass(frozen=True)
class Setup:
    """Sizes of the student, of a step and of the measurement."""

    layers: int = 14
    hidden: int = 384
    intermediate: int = 1024
    batch_size: int = 2
    rounds: int = 7


def measure(setup: Setup | None = None) -> dict[str, Any]:
    """Seconds that a save blocks in each way, and the ratio to one at once: medians of rounds."""
    setup = setup or Setup()
    with tempfile.TemporaryDirectory() as folder:
        trainer, log = _trainer(setup, Path(folder))
        with log:
            return _measure(setup, trainer, log)


def _measure(setup: Setup, trainer: Trainer, log: RunLog) -> dict[str, Any]:
    blocked: dict[str, list[float]] = {way: [] for way in WAYS}
    steps: dict[str, list[float]] = {"alone": [], "while a checkpoint is written": []}
    alone = trainer.config
    for _ in range(setup.rounds + 1):
        for way in WAYS:
            trainer.config = replace(alone, async_save=way != "at once")
            if way.endswith("first"):
                trainer.buffers = HostBuffers(pinned=trainer.buffers.pinned)
                trainer.prepare_saves()  # as training does after its first window
            steps["alone"].append(_seconds(trainer.micro_batch))
            blocked[way].append(_seconds(lambda: trainer.save(log)))
            if trainer.config.async_save:
                steps["while a checkpoint is written"].append(_seconds(trainer.micro_batch))
            trainer.finish_save(log, wait=True)
    checkpoint = max((trainer.run_dir.path / "checkpoints").iterdir())
    at_once = blocked["at once"][1:]  # the first round warms up
    rows = []
    for way, values in blocked.items():
        ratios = [ours / theirs for ours, theirs in zip(values[1:], at_once, strict=True)]
        row = {"save": way, "blocked_seconds": statistics.median(values[1:])}
        rows.append(row | {"ratio": statistics.median(ratios), "ratios": ratios})
    return {
        "case": "saves",
        "parameters": sum(p.numel() for p in trainer.student.model.parameters()),
        "checkpoint_bytes": tree_bytes(checkpoint),
        "rows": rows,
        "step_seconds": {name: statistics.median(values[1:]) for name, values in steps.items()},
    }


def _trainer(setup: Setup, folder: Path) -> tuple[Trainer, RunLog]:
    config = _config(setup, folder)
    inputs = load_inputs(config)
    precision = Precision(config, inputs.device)
    student = build_student(config, load_student(config), inputs.valid_vocab, precision)
    trainer = Trainer(config, student, inputs, precision, RunDirectory(config.output_dir))
    trainer.student.train()
    log = RunLog(config.output_dir, total_batches=trainer.run_length.micro_batches)
    return trainer, log


def _config(setup: Setup, folder: Path) -> DistillConfig:
    """The quickstart without its teacher, with a larger student."""
    small = resources.files("sad.recipes") / "quickstart" / "student" / "config.json"
    sizes = {"num_hidden_layers": setup.layers, "hidden_size": setup.hidden}
    sizes |= {"intermediate_size": setup.intermediate, "head_dim": setup.hidden // 4}
    (folder / "student").mkdir()
    model = json.loads(small.read_text(encoding="utf-8")) | sizes
    (folder / "student" / "config.json").write_text(json.dumps(model), encoding="utf-8")
    words = {"student": folder / "student", "output_dir": folder / "run", "baseline": "false"}
    words |= {"teacher": "null", "kd_weight": 0, "per_device_train_batch_size": setup.batch_size}
    overrides = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return load_config("quickstart", overrides)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
