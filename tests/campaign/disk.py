"""A disk that refuses once: every change of the disk in a run fails, one at a time.

The run goes on, or ends in one line with its state saved; resumed, it ends in the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.faulty_disk import FaultyDisk

from campaign.report import Tally
from campaign.runs import EXPECTED_CODES, Workshop, digest, in_child, is_one_line, run
from sad.checkpoint import atomic_files as files
from sad.training.run import distill

ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")
NAME = "accumulation, with a baseline"


def fail_once(
    workshop: Workshop, folder: Path, share: float = 1.0, seed: int = 0
) -> Iterator[Tally]:
    """Fail every file operation of a run once with each error, or a random ``share`` of that."""
    changes = {"max_steps": 4, "eval_steps": 2, "baseline": False}
    whole = folder / "whole-disk"
    if run(workshop.config(NAME, whole, **changes), folder / "disk.log").code:
        raise RuntimeError("a run on a disk that works must finish")
    expected = digest(whole)
    count = _operations(workshop, folder, changes)
    cases = [(at, error) for at in range(count) for error in ERRORS]
    if share < 1:
        cases = random.Random(seed).sample(cases, max(round(share * len(cases)), 1))
    for at, error in cases:
        run_dir, log = folder / f"disk-{at}-{error}", folder / "disk.log"
        config = workshop.config(NAME, run_dir, **changes)

        def failing(config: Any = config, at: int = at, error: str = error) -> None:
            with FaultyDisk(error, at).mounted():
                distill(config)

        first = in_child(failing, log)
        honest = first.code == 0 or (first.code in EXPECTED_CODES and is_one_line(first.message))
        last = run(config, log) if first.code else first
        same = last.code == 0 and digest(run_dir) == expected
        fair = honest and same
        example = "" if fair else f"{error} at operation {at}: {first}, then {last}"
        yield Tally(inflicted=1, lost=int(not fair), example=example)
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
