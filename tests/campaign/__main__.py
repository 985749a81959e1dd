"""The whole campaign: ``scripts/campaign.sh``, which says beforehand how long it takes.

    scripts/campaign.sh                     everything, one and a half hours on two idle cores
    scripts/campaign.sh --share 0.02        a fiftieth of it
    scripts/campaign.sh --only kills,disk   these parts

It prints the table that ``sad/README.md`` shows and, when everything was done, keeps it in
``bench/results/campaign.json``. The exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from campaign import checkpoints, configurations
from campaign.damage import damage_every_file
from campaign.disk import fail_once
from campaign.kills import kill_at_random
from campaign.report import Promise, Tally, table
from campaign.runs import Workshop
from campaign.soak import soak

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "campaign.json"

Part = Callable[[Workshop, Path, float], Iterable[Tally]]

KILLS, CONFIGURATION_FILES, CRAFTED, STEPS = 1000, 5000, 2000, 20_000


def _kills(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return kill_at_random(workshop, folder, kills=_of(KILLS, share))


def _disk(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return fail_once(workshop, folder, most=None if share == 1 else _of(1500, share))


def _damage(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return damage_every_file(workshop, folder, most=None if share == 1 else _of(400, share))


def _soak(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return soak(workshop, folder, steps=_of(STEPS, share))


def _counted(run: Callable[..., Any], count: int) -> Part:
    def part(workshop: Workshop, folder: Path, share: float) -> Iterator[Tally]:
        inflicted, _, lost, examples = run(_of(count, share), 0)
        for example in examples[:lost]:
            yield Tally(0, 0, str(example)[:300])
        yield Tally(inflicted, lost)

    return part


def _of(count: int, share: float) -> int:
    return max(round(count * share), 1)


PARTS: dict[str, tuple[str, Part, float]] = {
    "kills": ("killed at any moment, a run resumes to the same bits", _kills, 45),
    "disk": ("a change of the disk that fails once costs no state", _disk, 30),
    "damage": ("a damaged file is passed over or refused, never believed", _damage, 20),
    "checkpoints": (
        "a crafted checkpoint is refused in one line, or changes nothing",
        _counted(checkpoints.run, CRAFTED),
        5,
    ),
    "configurations": (
        "any configuration file is read, or refused in one line within a second",
        _counted(configurations.run, CONFIGURATION_FILES),
        3,
    ),
    "soak": ("20,000 steps take no more memory or open files than the first", _soak, 8),
}
"""Name -> the promise, what tests it, minutes on two idle cores."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("scripts/campaign.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the whole, for a shorter one")
    parser.add_argument("--only", default=",".join(PARTS), help="names of parts: %(default)s")
    args = parser.parse_args(words)
    names = args.only.split(",")
    minutes = sum(PARTS[name][2] for name in names) * args.share
    print(f"this takes about {minutes:.0f} minutes on two idle cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="campaign-") as place:
        workshop = Workshop(Path(place))
        promises = [_inflict(name, workshop, Path(place), args.share) for name in names]
    records = [promise.record() for promise in promises]
    print(f"\n{table(records)}")
    if args.share == 1 and names == list(PARTS):
        RESULT.write_text(json.dumps({"promises": records}, indent=1) + "\n")
    return int(any(promise.lost for promise in promises))


def _inflict(name: str, workshop: Workshop, place: Path, share: float) -> Promise:
    text, part, _ = PARTS[name]
    folder, begin = place / name, time.monotonic()
    folder.mkdir()
    promise = Promise(text).add(part(workshop, folder, share))
    took = (time.monotonic() - begin) / 60
    print(
        f"{name}: {promise.inflicted:,} inflicted, {promise.lost} lost, {took:.1f} min", flush=True
    )
    return promise


if __name__ == "__main__":
    sys.exit(main())
