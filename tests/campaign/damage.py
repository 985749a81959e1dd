"""Every file of a stopped run, damaged in every way: it is passed over or refused, never believed.

A run is stopped half-way. Then one file of its directory is damaged, and it goes on. It ends in the
bits of the run that was never stopped, or is refused in one line; a traceback, other bits, or a
process that waits for ever are faults.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from campaign.report import Tally
from campaign.runs import EXPECTED_CODES, Workshop, digest, in_child, is_one_line, run
from sad.training.run import distill
from sad.training.trainer import Trainer

NAME = "accumulation, with a baseline"


def _truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def _flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _swap(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _link(path: Path, other: Path) -> None:
    target = path.with_name("moved-away")
    path.rename(target)
    path.symlink_to(target)


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def _pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "cut in half": _truncate,
    "emptied": _empty,
    "a bit flipped": _flip,
    "deleted": _delete,
    "swapped with another": _swap,
    "made a link": _link,
    "made a folder": _folder,
    "made a pipe": _pipe,
}


def damage_every_file(
    workshop: Workshop,
    folder: Path,
    share: float = 1.0,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    ways: Iterable[str] = tuple(DAMAGE),
) -> Iterator[Tally]:
    """Damage every file of a stopped run in every way, or a random ``share`` of these cases."""
    whole, stopped = folder / "whole-damage", folder / "stopped"
    log = folder / "damage.log"
    if run(workshop.config(NAME, whole), log).code:
        raise RuntimeError("a run that nobody damages must finish")
    expected = _without_baselines_checkpoint(digest(whole))
    outcome = in_child(lambda: _stop_after(workshop.config(NAME, stopped), 14), log)
    if outcome.code != 1:
        raise RuntimeError(f"the run must stop half-way, got {outcome}")
    paths = [path for path in sorted(stopped.rglob("*")) if path.is_file()]
    found = [str(p.relative_to(stopped)) for p in paths if names is None or p.name in names]
    cases = [(name, how) for name in found for how in ways]
    if share < 1:
        cases = random.Random(seed).sample(cases, max(round(share * len(cases)), 1))
    for i, (name, how) in enumerate(cases):
        run_dir = folder / f"damaged-{i}"
        shutil.copytree(stopped, run_dir)
        other = found[(found.index(name) + 1) % len(found)]
        DAMAGE[how](run_dir / name, run_dir / other)
        outcome = run(workshop.config(NAME, run_dir), log)
        if outcome.code == 0:
            fair = _without_baselines_checkpoint(digest(run_dir)) == expected
        else:
            fair = outcome.code in EXPECTED_CODES and is_one_line(outcome.message)
        example = "" if fair else f"{name} {how}: {outcome}"
        yield Tally(inflicted=1, lost=int(not fair), example=example)
        shutil.rmtree(run_dir)


def _without_baselines_checkpoint(found: dict[str, str]) -> dict[str, str]:
    """What users get: nobody needs the checkpoints of a baseline that is finished."""
    return {name: d for name, d in found.items() if not name.startswith("baseline/checkpoints")}


def _stop_after(config: Any, micro_batches: int) -> None:
    """Run, and fail in the second student's training, when it has checkpoints of its own."""
    micro_batch = Trainer.micro_batch

    def failing(self: Trainer) -> bool:
        if self.counters.micro_step == micro_batches and not self.config.output_dir.endswith(
            "baseline"
        ):
            raise RuntimeError("half-way")
        return micro_batch(self)

    Trainer.micro_batch = failing
    distill(config)
