"""A disk that refuses once: changes of the disk in a run fail, one at a time.

Every operation of a save fails with each of five errors, every other one of the run with one of
them. The run goes on, or ends in one line with its state saved; resumed, it ends in the same bits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.faulty_disk import FaultyDisk

from campaign.report import Tally
from campaign.runs import EXPECTED_CODES, Workshop, digest, in_child, is_one_line, run
from sad.checkpoint import atomic_files as files
from sad.checkpoint import snapshot
from sad.checkpoint.store import save_checkpoint
from sad.training.run import distill

ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")
NAME = "accumulation, with a baseline"


def fail_once(
    workshop: Workshop, folder: Path, share: float = 1.0, seed: int = 0
) -> Iterator[Tally]:
    """Fail the file operations of a run, one at a time, or a random ``share`` of these cases."""
    # In the background, operations would have no order.
    changes = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "async_save": False}
    changes |= {"baseline": False, "gradient_accumulation_steps": 1}
    whole = folder / "whole-disk"
    if run(workshop.config(NAME, whole, **changes), folder / "disk.log").code:
        raise RuntimeError("a run on a disk that works must finish")
    expected = digest(whole)
    count, saving = _operations(workshop, folder, changes)
    cases = [
        (at, error)
        for at in range(count)
        for error in (ERRORS if at in saving else ERRORS[at % 5 : at % 5 + 1])
    ]
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
        fair = honest and last.code == 0 and digest(run_dir) == expected
        example = "" if fair else f"{error} at operation {at}: {first}, then {last}"
        yield Tally(inflicted=1, lost=int(not fair), example=example)
        if run_dir.exists():
            files.remove_tree(run_dir)


def _operations(workshop: Workshop, folder: Path, changes: dict[str, Any]) -> tuple[int, range]:
    """How many changes of the disk such a run makes, and which of them are those of a save that
    removes an older checkpoint."""
    config, note = workshop.config(NAME, folder / "counted", **changes), folder / "operations"

    def counting() -> None:
        saves: list[tuple[int, int]] = []
        with FaultyDisk().mounted() as disk:

            def counted(*args: Any, **options: Any) -> Path:
                begin = len(disk.trace)
                path = save_checkpoint(*args, **options)
                saves.append((begin, len(disk.trace)))
                return path

            snapshot.save_checkpoint = counted
            distill(config)
        note.write_text(json.dumps([len(disk.trace), *saves[-1]]))

    in_child(counting, folder / "disk.log")
    count, begin, end = json.loads(note.read_text())
    return count, range(begin, end)
