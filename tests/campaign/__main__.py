"""The campaign: ``scripts/campaign.sh``, which says beforehand how long it takes.

    scripts/campaign.sh                     everything
    scripts/campaign.sh --share 0.02        a fiftieth of it
    scripts/campaign.sh --only kills,disk   these parts

It prints the table that ``sad/README.md`` shows, and keeps what was done in full in
``bench/results/campaign.json``, part by part. The exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bench.report.readme import campaign_table
from campaign import checkpoints, configurations
from campaign.caches import kill_pairs, kill_readers, kill_writers
from campaign.damage import damage_every_file
from campaign.disk import fail_once
from campaign.kills import kill_at_random
from campaign.report import Promise, Tally
from campaign.runs import Workshop
from campaign.soak import soak

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "campaign.json"

Inflict = Callable[[Workshop, Path, float], Iterable[Tally]]


class Part(NamedTuple):
    """A promise, what puts it to the test, and minutes on two idle cores."""

    promise: str
    inflict: Inflict
    minutes: float


def _of(count: int, share: float) -> int:
    return max(round(count * share), 1)


def _kills(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return kill_at_random(workshop, folder, kills=_of(1000, share))


def _disk(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return fail_once(workshop, folder, share)


def _damage(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return damage_every_file(workshop, folder, share)


def _soak(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return soak(workshop, folder, steps=_of(20_000, share))


def _caching(workshop: Workshop, folder: Path, share: float) -> Iterator[Tally]:
    for name, count in (("forked", 40), ("real", 10)):  # which take half a minute each
        (folder / name).mkdir()
        yield from kill_writers(workshop, folder / name, _of(count, share), real=name == "real")


def _cached(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return kill_readers(workshop, folder, kills=_of(50, share))


def _windows(workshop: Workshop, folder: Path, share: float) -> Iterable[Tally]:
    return kill_pairs(workshop, folder, kills=_of(50, share))


def _checkpoints(workshop: Workshop, folder: Path, share: float) -> Iterator[Tally]:
    result = checkpoints.run(_of(250, share))
    yield Tally(result.inflicted, len(result.wrong), "; ".join(result.wrong[:3])[:500])


def _configurations(workshop: Workshop, folder: Path, share: float) -> Iterator[Tally]:
    result = configurations.run(_of(5000, share), seed=0)
    yield Tally(result.inflicted, result.lost, "; ".join(result.examples[:3])[:500])


PARTS = {
    "kills": Part("a run that is killed at any moment resumes to the same bits", _kills, 45),
    "disk": Part("a change of the disk that fails once costs nothing that was saved", _disk, 25),
    "damage": Part("a damaged file is passed over, replaced or refused, never used", _damage, 15),
    "caching": Part(
        "a teacher's cache that is killed and begun again has the bits of one that was not",
        _caching,
        6,
    ),
    "cached": Part(
        "a run from a teacher's cache that is killed resumes to the same bits", _cached, 3
    ),
    "windows": Part(
        "a student ends in the same bits if it or its teacher, who fills a window, is killed",
        _windows,
        3,
    ),
    "checkpoints": Part(
        "a crafted checkpoint is refused in one line, or restores what was saved", _checkpoints, 5
    ),
    "configurations": Part(
        "a configuration file is read, or refused in one line within a second", _configurations, 2
    ),
    "soak": Part("a step late in a run takes no more memory or files than an early one", _soak, 8),
}


def main(words: list[str] | None = None) -> int:
    summary = "Interrupt and damage runs in every way that they promise to survive."
    parser = argparse.ArgumentParser("scripts/campaign.sh", description=summary)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole, for a shorter one")
    parser.add_argument("--only", default=",".join(PARTS), help="parts (%(default)s)")
    args = parser.parse_args(words)
    names = args.only.split(",")
    minutes = sum(PARTS[name].minutes for name in names) * args.share
    print(f"this takes about {minutes:.0f} minutes where nothing else runs", flush=True)
    with tempfile.TemporaryDirectory(prefix="campaign-") as place:
        workshop = Workshop(Path(place))
        records = {name: _record(name, workshop, Path(place), args.share) for name in names}
    print("", *campaign_table(records.values()), sep="\n")
    if args.share == 1:
        _keep(records)
    return int(any(record["lost"] for record in records.values()))


def _record(name: str, workshop: Workshop, place: Path, share: float) -> dict[str, Any]:
    part, folder, begin = PARTS[name], place / name, time.monotonic()
    folder.mkdir()
    promise = Promise(part.promise).add(part.inflict(workshop, folder, share))
    took = (time.monotonic() - begin) / 60
    line = f"{name}: {promise.inflicted:,} inflicted, {promise.lost} lost, {took:.1f} minutes"
    print(line, flush=True)
    return promise.record() | {"date": datetime.now(UTC).date().isoformat()}


def _keep(records: dict[str, dict[str, Any]]) -> None:
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known |= records
    ordered = {name: known[name] for name in PARTS if name in known}
    RESULT.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
