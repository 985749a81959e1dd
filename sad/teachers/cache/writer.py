"""Writing a cache: shard after shard, each whole or absent, the same bits however often killed.

The unit of work is a shard. Of W processes the one of rank r makes shards r, r + W, ...; where a
shard begins does not depend on W, nor do its samples, whose random numbers are drawn from
``(seed, shard)``. What is there already is left alone.

With a *window* the cache never holds all shards: the teacher makes the lowest missing one of
``[next, next + window)`` and deletes those below ``next``, the lowest shard that the student can
still need, which it says in ``reader.json``.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.data.rows import PackedRows
from sad.distributed.world import ALONE, World
from sad.environment import stop_if_requested
from sad.errors import StoppedError
from sad.expected import UnexpectedValueError, equal, integer, record
from sad.teachers.cache.facts import CacheFacts
from sad.teachers.cache.files import (
    COMPLETE,
    LENGTHS,
    READER,
    WRITER,
    Section,
    Shards,
    all_names,
    missing,
    write_json,
    write_shard,
)
from sad.teachers.cache.source import Record, Source
from sad.teachers.fingerprint import fingerprint_files

HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SectionRows:
    """The rows of a section: ``numbers(i)`` are those in its batch i."""

    shards: Shards
    rows: PackedRows
    numbers: Callable[[int], np.ndarray]

    def batches(self, shard: int) -> Iterator[tuple[int, np.ndarray]]:
        """The place of the first row, and the numbers of the rows, of each batch in a shard."""
        places, size = self.shards.of(shard), self.shards.batch_rows
        for first in range(places.start, places.stop, size):
            yield first, self.numbers(first // size)

    def positions(self, shard: int) -> int:
        """Inputs, and so records, in a shard."""
        return sum(int(self.rows.lengths[rows].sum()) for _, rows in self.batches(shard))


class CacheWriter:
    """Fills the folder of a cache with shards; ``advance`` hears of each batch's inputs.

    ``memory`` is where hashes of files are remembered.
    """

    def __init__(
        self,
        folder: Path,
        facts: CacheFacts,
        sections: dict[Section, SectionRows],
        source: Source,
        device: torch.device,
        *,
        memory: Path,
        world: World = ALONE,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.facts = facts
        self.sections = sections
        self.source = source
        self.device = device
        self.memory = memory
        self.world = world
        self.advance = advance
        self._seen = 0.0  # when the heartbeat was last written

    def write_all(self) -> None:
        """Make every shard of this rank that is missing; then the first rank says that all are
        there."""
        for section in ("eval", "train"):
            self.write_section(section)
        self.world.from_main(self.finish)

    def write_section(self, section: Section) -> None:
        """Make this rank's shards of a section that are missing.

        The ranks go from shard to shard together: what one of them raises ends all.
        """
        shards = self.sections[section].shards
        for first in range(0, len(shards), self.world.size):
            self.world.agree(partial(self._write_missing, section, first + self.world.rank))

    def _write_missing(self, section: Section, number: int) -> None:
        shards = self.sections[section].shards
        if number < len(shards) and missing(self.folder, [shards.name(number)]):
            self.write(section, number)

    def write_window(self, window: int, patience: float, *, wait_for_reader: bool) -> None:
        """Serve one run: keep ``window`` shards of training rows ahead of what it has saved.

        Returns when the student needs none any more. Without ``wait_for_reader`` a student that
        has said nothing for ``patience`` seconds ends this with ``StoppedError``.
        """
        self.write_section("eval")
        shards = self.sections["train"].shards
        heard: tuple[object, float] = (None, time.monotonic())
        while True:
            self.beat()
            said = files.read_object(self.folder / READER)
            if said != heard[0]:
                heard = said, time.monotonic()
            lowest = self._lowest_needed(said, len(shards))
            if lowest >= len(shards):
                self._delete(shards, range(len(shards)))
                return
            self._delete(shards, range(lowest))
            wanted = range(lowest, min(lowest + window, len(shards)))
            ours = (n for n in wanted if n % self.world.size == self.world.rank)
            lacking = [n for n in ours if missing(self.folder, [shards.name(n)])]
            if lacking:
                self.write("train", lacking[0])
                heard = heard[0], time.monotonic()
                continue
            stop_if_requested("the teacher's cache", again="")
            if not wait_for_reader and time.monotonic() - heard[1] > patience:
                raise StoppedError(
                    f"a student must read {self.folder} while the teacher fills it, got no word "
                    f"of one for {patience:.0f} s (teacher_wait); start it and run this again, or "
                    "wait for it with --wait_for_reader"
                )
            time.sleep(POLL_SECONDS)

    def _lowest_needed(self, said: object, count: int) -> int:
        """The lowest shard that the student can still need; 0 before it says so, or if what is
        there is not what a student of this cache writes."""
        try:
            record({"next": integer(0, count), "plan": equal(self.facts.plan)})(said, READER)
        except UnexpectedValueError:
            return 0
        assert isinstance(said, dict)
        return said["next"]

    def write(self, section: Section, number: int) -> None:
        """Make one shard."""
        rows = self.sections[section]
        places = rows.shards.of(number)
        uniform = uniform_numbers(self.facts.seed, rows.shards.name(number), rows.positions(number))
        lengths = torch.zeros(len(places), dtype=torch.int32)
        parts: list[Record] = []
        done = 0
        for first, numbers in rows.batches(number):
            stop_if_requested("the teacher's cache", again="")
            batch = rows.rows.batch(numbers)
            inputs = int(batch.lengths.sum())
            at = first - places.start
            lengths[at : at + len(numbers)] = batch.lengths.to(torch.int32)
            batch = batch.to(self.device)
            parts.append(
                self.source.records(batch, rows.shards.kind, uniform[done : done + inputs])
            )
            done += inputs
            self.beat()
            self.advance(inputs)
        records = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        path = self.folder / rows.shards.name(number)
        write_shard(path, {LENGTHS: lengths, **records}, self.facts.plan)

    def finish(self) -> bool:
        """Write ``complete.json`` if every file is there; return whether it is."""
        names = all_names(self.facts)
        if missing(self.folder, names):
            return False
        hashes = fingerprint_files([self.folder / name for name in names], self.memory)
        content = {path.name: fingerprint for path, fingerprint in hashes.items()}
        write_json(self.folder / COMPLETE, {"plan": self.facts.plan, "files": content})
        (self.folder / WRITER).unlink(missing_ok=True)
        return True

    def beat(self) -> None:
        """Say, once in a while, that the teacher is alive."""
        now = time.time()
        if now - self._seen > HEARTBEAT_SECONDS:
            self._seen = now
            say_alive(self.folder)

    def _delete(self, shards: Shards, numbers: range) -> None:
        for number in numbers:
            (self.folder / shards.name(number)).unlink(missing_ok=True)


def say_alive(folder: Path) -> None:
    """Write ``writer.json``: somebody fills this cache."""
    seen = {"time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
    write_json(folder / WRITER, seen)


def uniform_numbers(seed: int, name: str, count: int) -> Tensor:
    """The random numbers of a shard, float64 [count] in [0, 1): a function of the arguments."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator)
