"""A disk that refuses once: changes of the disk fail, one at a time.

Every operation of a save fails with each of five errors, and every third one of a whole run with
one of them. The run goes on, or ends in one line with its state saved; resumed, it ends in the same
bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.faulty_disk import FaultyDisk

from campaign.report import Tally
from campaign.runs import EXPECTED_CODES, Workshop, digest, in_child, is_one_line, run
from sad.checkpoint import atomic_files as files
from sad.checkpoint.store import load_latest, save_checkpoint, sweep_stale
from sad.errors import CheckpointError
from sad.training.run import distill

ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")
NAME = "accumulation, with a baseline"


def fail_once(
    workshop: Workshop, folder: Path, share: float = 1.0, seed: int = 0
) -> Iterator[Tally]:
    """Fail every operation, one at a time, or a random ``share`` of these cases."""
    draw = random.Random(seed)
    yield from _in_saves(folder, partial(_sampled, share=share, draw=draw))
    yield from _in_runs(workshop, folder, partial(_sampled, share=share, draw=draw))


Cases = list[tuple[int, str]]
"""Number of the operation that fails, name of the error."""


def _sampled(cases: Cases, share: float, draw: random.Random) -> Cases:
    return cases if share == 1 else draw.sample(cases, max(round(share * len(cases)), 1))


def _in_saves(folder: Path, sampled: Callable[[Cases], Cases]) -> Iterator[Tally]:
    """Fail a save: it is there or it is not, and the one before it is, whole."""

    def save(run_dir: Path, step: int) -> None:
        tensors = {"model": {"w": torch.full((300,), float(step))}, "rng": {"r": torch.ones(3)}}
        save_checkpoint(
            run_dir, step, {"step": step}, tensors, save_total_limit=2, report=lambda _: None
        )

    whole = folder / "saves"
    for step in (1, 2):
        save(whole, step)
    with FaultyDisk().mounted() as disk:
        save(whole, 3)
    for at, error in sampled([(at, error) for at in range(len(disk.trace)) for error in ERRORS]):
        run_dir = folder / f"save-{at}-{error}"
        for step in (1, 2):
            save(run_dir, step)
        problem, saved = "", True
        try:
            with FaultyDisk(error, at).mounted():
                save(run_dir, 3)
        except CheckpointError as refused:
            saved = False
            problem = "" if is_one_line(str(refused)) else "more than one line"
        except Exception as other:
            problem = repr(other)
        sweep_stale(run_dir)
        newest = load_latest(run_dir, report=lambda _: None)
        allowed = (3,) if saved else (2, 3)
        if newest is None or newest.micro_step not in allowed:
            problem = problem or f"the newest is {newest and newest.path.name}"
        example = f"a save with {error} at operation {at}: {problem}" if problem else ""
        yield Tally(inflicted=1, lost=int(bool(problem)), example=example)
        files.remove_tree(run_dir)


def _in_runs(
    workshop: Workshop, folder: Path, sampled: Callable[[Cases], Cases]
) -> Iterator[Tally]:
    # In the background, operations would have no order.
    changes = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "async_save": False}
    changes |= {"baseline": False, "gradient_accumulation_steps": 1}
    whole = folder / "whole-disk"
    if run(workshop.config(NAME, whole, **changes), folder / "disk.log").code:
        raise RuntimeError("a run on a disk that works must finish")
    expected = digest(whole)
    count = _operations(workshop, folder, changes)
    cases = [(at, ERRORS[at % len(ERRORS)]) for at in range(0, count, 3)]
    for at, error in sampled(cases):
        run_dir, log = folder / f"disk-{at}-{error}", folder / "disk.log"
        config = workshop.config(NAME, run_dir, **changes)

        def failing(config: Any = config, at: int = at, error: str = error) -> None:
            with FaultyDisk(error, at).mounted():
                distill(config)

        first = in_child(failing, log)
        honest = first.code == 0 or (first.code in EXPECTED_CODES and is_one_line(first.message))
        last = run(config, log) if first.code else first
        fair = honest and last.code == 0 and digest(run_dir) == expected
        example = "" if fair else f"a run with {error} at operation {at}: {first}, then {last}"
        yield Tally(inflicted=1, lost=int(not fair), example=example)
        if run_dir.exists():
            files.remove_tree(run_dir)


def _operations(workshop: Workshop, folder: Path, changes: dict[str, Any]) -> int:
    """How many changes of the disk such a run makes."""
    config, note = workshop.config(NAME, folder / "counted", **changes), folder / "operations"

    def counting() -> None:
        with FaultyDisk().mounted() as disk:
            distill(config)
        note.write_text(str(len(disk.trace)))

    in_child(counting, folder / "disk.log")
    return int(note.read_text())
