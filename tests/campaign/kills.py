"""A process that is killed at any moment loses nothing: the run ends in the same bits.

Half of the kills come after a random time, wherever the run is then: loading, training, evaluating,
saving, exporting. The other half come right before a change of the disk, in turn the first, the
second ... of the process: between two of them lies every state that a disk can be left in.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from campaign.report import Tally
from campaign.runs import CONFIGURATIONS, Outcome, Workshop, digest, in_child, run
from sad.checkpoint import atomic_files as files
from sad.training.run import distill


def kill_at_random(
    workshop: Workshop,
    folder: Path,
    kills: int,
    seed: int = 0,
    names: Sequence[str] = tuple(CONFIGURATIONS),
) -> Iterator[Tally]:
    """Kill runs of these configurations, in turn, ``kills`` times in all; each ends as if it had
    never been killed. One tally per run that came to its end."""
    draw = random.Random(seed)
    whole = {name: _whole(workshop, folder, name) for name in names}
    inflicted = turn = 0
    while inflicted < kills:
        name = names[turn % len(names)]
        run_dir = folder / f"killed-{turn}"
        config, log = workshop.config(name, run_dir), folder / f"killed-{turn}.log"
        expected, seconds = whole[name]
        deaths, events, outcome = 0, draw.randrange(400), Outcome(-signal.SIGKILL)
        for _ in range(16):  # then it is left alone
            if draw.random() < 0.5:
                outcome = run(config, log, kill_after=draw.uniform(0.2, 1.1) * seconds)
            else:
                resumed = replace(config, resume_from_checkpoint="auto")
                outcome = in_child(partial(_die_at_event, resumed, events), log)
                events = draw.randrange(400)
            if outcome.code != -signal.SIGKILL:
                break  # it came to its end, or went wrong
            deaths += 1
            if inflicted + deaths >= kills:
                break
        if outcome.code in (0, -signal.SIGKILL):
            outcome = run(config, log)
        found = digest(run_dir) if outcome.code == 0 else {}
        survived = outcome.code == 0 and found == expected
        inflicted += deaths
        example = "" if survived else f"{name}: code {outcome.code} {outcome.message[:200]}"
        yield Tally(inflicted=deaths, lost=0 if survived else 1, example=example)
        if survived:
            files.remove_tree(run_dir)
        turn += 1


def _whole(workshop: Workshop, folder: Path, name: str) -> tuple[dict[str, str], float]:
    """Digest and seconds of a run that nobody interrupts."""
    run_dir = folder / f"whole-{list(CONFIGURATIONS).index(name)}"
    begin = time.monotonic()
    outcome = run(workshop.config(name, run_dir), folder / "whole.log")
    if outcome.code:
        raise RuntimeError(f"{name} must finish where nobody interrupts it, got {outcome}")
    return digest(run_dir), time.monotonic() - begin


def _die_at_event(config: Any, at: int) -> None:
    """Run, and die right before change number ``at`` of the disk."""
    count = 0

    def counted(operation: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args)

        return call

    table = {field.name: counted(getattr(os, field.name)) for field in fields(files.FileOperations)}
    files.OPERATIONS = files.FileOperations(**table)
    distill(config)
