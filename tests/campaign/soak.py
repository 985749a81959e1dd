"""A long run takes no more memory and no more open files at its end than at its beginning."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from campaign.report import Tally
from campaign.runs import HANGS_AFTER, Workshop, in_child
from sad.training.run import distill
from sad.training.trainer import Trainer

NAME = "accumulation, with a baseline"
SLACK = 24 << 20  # bytes: what an allocator may keep more or less


def soak(workshop: Workshop, folder: Path, steps: int) -> Iterator[Tally]:
    """Train for ``steps`` optimizer steps, with evaluations and saves; one tally."""
    note = folder / "soak.json"
    config = workshop.config(
        NAME,
        folder / "soak",
        max_steps=steps,
        baseline=False,
        eval_steps=max(steps // 40, 1),
        save_steps=max(steps // 40, 1),
        logging_steps=max(steps // 100, 1),
    )
    work = partial(_watched, config, note, every=max(steps // 20, 1))
    outcome = in_child(work, folder / "log", hangs_after=HANGS_AFTER + steps)
    if outcome.code:
        yield Tally(inflicted=steps, lost=steps, example=f"{steps} steps: {outcome}")
        return
    samples = json.loads(note.read_text())
    settled = samples[len(samples) // 4 :]  # after the first saves and evaluations
    grown = [settled[-1][key] - settled[0][key] for key in ("rss", "descriptors")]
    fair = len(samples) >= 19 and grown[0] <= SLACK and grown[1] <= 0
    grew = f"{grown[0]:,} bytes and {grown[1]} files more"
    example = "" if fair else f"{steps} steps: {outcome}, {grew}"
    yield Tally(inflicted=steps, lost=0 if fair else steps, example=example)


def _watched(config: Any, note: Path, every: int) -> None:
    samples: list[dict[str, int]] = []
    micro_batch, process = Trainer.micro_batch, psutil.Process()

    def watching(self: Trainer) -> bool:
        closed = micro_batch(self)
        if closed and self.counters.global_step % every == 0:
            descriptors = len(os.listdir("/proc/self/fd"))
            samples.append({"rss": process.memory_info().rss, "descriptors": descriptors})
        return closed

    Trainer.micro_batch = watching
    distill(config)
    note.write_text(json.dumps(samples))
