"""What the trainer adds to a step: its loop against the bare one, with the quickstart's models.

The bare loop does what cannot be left out: teacher, student and loss, backward, one fused AdamW
step. The trainer's does the same and draws batches, counts targets, clips, checks, averages, steps
the scheduler, keeps sums and logs. Both run in turn on the same batches in one process, and the
median of the rounds' ratios counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from sad.checkpoint.run_directory import RunDirectory
from sad.config.load import load_config
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.report.log import RunLog
from sad.training.inputs import load_inputs
from sad.training.meters import ThroughputMeter
from sad.training.student import build_student
from sad.training.trainer import Trainer


def measure(rounds: int = 9, steps: int = 8) -> dict[str, Any]:
    """Seconds per step of both loops, and the trainer's overhead as a share of the bare step."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(folder, rounds, steps)


def _measure(folder: str, rounds: int, steps: int) -> dict[str, Any]:
    overrides = ("--output_dir", folder, "--max_steps", str((rounds + 1) * steps))
    quiet = ("--eval_steps", "null", "--save_steps", "null", "--baseline", "false")
    config = load_config("quickstart", (*overrides, *quiet))
    inputs = load_inputs(config)
    precision = Precision(config, inputs.device)

    def student() -> Any:
        return build_student(config, load_student(config), inputs.valid_vocab, precision)

    trainer = Trainer(config, student(), inputs, precision, RunDirectory(folder))
    bare_student = student().train()
    optimizer = torch.optim.AdamW(bare_student.parameters(), config.learning_rate, fused=True)
    batches = [inputs.train_rows.batch(range(8 * i, 8 * i + 8)) for i in range(steps)]
    objective = config.objective()

    def bare() -> None:
        for batch in batches:
            assert inputs.teacher is not None
            target = inputs.teacher.forward(batch)
            out = bare_student(batch, target, objective, batch.counts)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with RunLog(folder, total_batches=trainer.run_length.micro_batches) as log:

        def ours() -> None:
            throughput = ThroughputMeter(trainer.counters.tokens)
            for _ in range(steps):
                trainer.micro_batch()
                log.advance()
            trainer.log_progress(log, throughput)

        times: dict[str, list[float]] = {"bare": [], "trainer": []}
        for round_ in range(rounds + 1):
            pair = [("bare", bare), ("trainer", ours)]
            for name, loop in pair if round_ % 2 else reversed(pair):
                times[name].append(_seconds(loop) / steps)
    ratios = [t / b for t, b in zip(times["trainer"][1:], times["bare"][1:], strict=True)]
    return {
        "case": "trainer overhead",
        "steps_per_round": steps,
        "seconds_per_step": {name: statistics.median(values[1:]) for name, values in times.items()},
        "overhead": statistics.median(ratios) - 1,
        "overhead_per_round": [ratio - 1 for ratio in ratios],
    }


def _seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
