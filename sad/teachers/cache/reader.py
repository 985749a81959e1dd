"""Reading a cache: the records of some rows, from shards that are verified when they are opened.

A cache that is whole is hashed before anything is trained from it. One that grows beside the run is
verified shard by shard, and waited for: the student says in ``reader.json`` what it can still need.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from sad_kernels import Head
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.tensor_files import FileTensors
from sad.distributed.world import ALONE, World
from sad.environment import stop_if_requested
from sad.errors import StoppedError, UnfitError, UsageError
from sad.teachers.cache.files import (
    AGAIN,
    BASIS,
    CACHE,
    COMPLETE,
    HEAD,
    LENGTHS,
    READER,
    WRITER,
    Section,
    all_names,
    missing,
    open_shard,
    open_tensors,
    read_facts,
    shards_of,
    write_json,
)
from sad.teachers.cache.hidden import Codec, build_codec
from sad.teachers.cache.sparse import PADDING
from sad.teachers.fingerprint import fingerprint_file, fingerprint_files

POLL_SECONDS = 0.2
OPEN_SHARDS = 32
"""Shards that are kept open at a time: a process may have some hundred files."""

Record = dict[str, Tensor]


class CacheReader:
    """The records of a cache in ``folder``.

    ``memory`` is where hashes of files are remembered, ``patience`` the seconds to wait for a
    teacher that gives no sign of life; ``say`` is told before that may take long. Raises
    ``UsageError`` for a folder that is none, ``UnfitError`` for a cache that is damaged or was not
    finished, and ``StoppedError`` where a teacher that fills it was waited for in vain.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        memory: Path,
        patience: float,
        world: World = ALONE,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.patience = patience
        self.world = world
        self.say = say
        if not self.folder.is_dir():
            raise UsageError(
                f"teacher_cache must be a folder that `sad cache-teacher` has made, got {folder}, "
                "which does not exist; run `sad cache-teacher` with the same recipe and "
                f"--output {folder}"
            )
        self._life: tuple[object, float] = (None, time.monotonic())
        self._open: OrderedDict[tuple[Section, int], tuple[FileTensors, np.ndarray]] = OrderedDict()
        if not (self.folder / CACHE).exists():
            self._wait(lambda: (self.folder / CACHE).exists(), "its first file")
        found = read_facts(self.folder)
        assert found is not None
        self.facts, self.notes = found
        self.complete = self._complete()
        if not self.complete and self.facts.order is None:
            self._wait(self._complete, "its last shard")
            self.complete = True
        if self.complete:
            world.main_first(lambda: self._verify(memory))
        else:
            names = [n for n in all_names(self.facts) if not n.startswith("shard-")]
            self._wait(lambda: not missing(self.folder, names), "its held-out rows")

    def head(self, device: torch.device) -> Head:
        """The teacher's head, of hidden states, cut to the tokenizer's ids."""
        facts = self.facts.head
        assert facts is not None
        path = self.folder / HEAD
        found = fingerprint_file(path)
        if found != facts.hash:
            raise UnfitError(
                f"{path} must be the head that the cache was made with, of hash {facts.hash}, got "
                f"{found}; {AGAIN}"
            )
        tensors = open_tensors(path)
        bias = tensors["bias"].to(device) if "bias" in tensors else None
        return Head(
            tensors["weight"].to(device),
            bias,
            logit_scale=facts.logit_scale,
            softcap=facts.softcap,
            valid_vocab=self.facts.valid_vocab,
        )

    def codec(self, device: torch.device) -> Codec:
        """What hidden states are decoded with."""
        assert self.facts.codec is not None
        if self.facts.codec != "int8":
            return build_codec(self.facts.codec)
        return build_codec(self.facts.codec, tensors=open_tensors(self.folder / BASIS)).to(device)

    def read(self, section: Section, places: Tensor, lengths: Tensor, width: int) -> Record:
        """The records of the rows at ``places`` [B], each [B, ``width``, ...], on the host.

        ``lengths`` [B] are the inputs of each row; behind them there is padding. Waits for shards
        of a cache that grows.
        """
        shards = shards_of(self.facts, section)
        record: Record = {}
        for row, (place, length) in enumerate(zip(places.tolist(), lengths.tolist(), strict=True)):
            number, at = divmod(place, shards.per_shard)
            tensors, ends = self._shard(section, number)
            begin, end = int(ends[at]), int(ends[at + 1])
            if length and end - begin != length:
                raise UnfitError(
                    f"{self.folder / shards.name(number)} must hold {length} positions of row "
                    f"{place}, got {end - begin}; {AGAIN}"
                )
            for name in tensors:
                if name == LENGTHS:
                    continue
                _, shape = tensors.form(name)
                offsets, sizes = (begin, *[0] * len(shape[1:])), (length, *shape[1:])
                part = tensors.part(name, offsets, sizes)
                if name not in record:
                    fill = PADDING if name == "logw" else 0
                    shape = (len(places), width, *shape[1:])
                    record[name] = torch.full(shape, fill, dtype=part.dtype)
                record[name][row, :length] = part
        return record

    def has(self, section: Section, first: int, last: int) -> bool:
        """Whether the shards of the places from ``first`` to ``last`` are there."""
        return not self._lacking(section, first, last)

    def wait_for(self, section: Section, first: int, last: int) -> None:
        """Wait until they are.

        Raises ``StoppedError`` on every rank after ``patience`` seconds without a sign of the
        teacher, or on a signal.
        """
        lacking = self._lacking(section, first, last)
        what = lacking[0] if lacking else "shards that other processes need"
        self._wait(lambda: not self._lacking(section, first, last), what)

    def _lacking(self, section: Section, first: int, last: int) -> list[str]:
        shards = shards_of(self.facts, section)
        numbers = range(first // shards.per_shard, last // shards.per_shard + 1)
        names = [shards.name(n) for n in numbers if (section, n) not in self._open]
        return [] if self.complete else missing(self.folder, names)

    def needs_from(self, place: int) -> None:
        """Say that no training row before this place can be needed any more."""
        if self.world.main and not self.complete:
            shards = shards_of(self.facts, "train")
            number = len(shards) if place >= shards.places else place // shards.per_shard
            write_json(self.folder / READER, {"next": number, "plan": self.facts.plan})

    def _shard(self, section: Section, number: int) -> tuple[FileTensors, np.ndarray]:
        """A shard, and where each of its rows begins and the last one ends."""
        key = section, number
        if key not in self._open:
            path = self.folder / shards_of(self.facts, section).name(number)
            tensors = open_shard(path, self.facts.plan, verify=not self.complete)
            ends = np.concatenate([[0], np.cumsum(tensors[LENGTHS].numpy().astype(np.int64))])
            self._open[key] = tensors, ends
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def _complete(self) -> bool:
        content = files.read_object(self.folder / COMPLETE)
        return content is not None and content.get("plan") == self.facts.plan

    def _verify(self, memory: Path) -> None:
        """Raise ``UnfitError`` unless every file is what was written."""
        content = files.read_object(self.folder / COMPLETE) or {}
        expected: Mapping[str, object] = content.get("files", {})
        names = all_names(self.facts)
        lacking = missing(self.folder, names)
        if lacking:
            raise UnfitError(
                f"{self.folder} must hold all of the teacher's targets, got no {lacking[0]}"
                f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}; `sad "
                "cache-teacher` with the same file makes what is missing"
            )
        found = fingerprint_files([self.folder / name for name in names], memory)
        for path, fingerprint in found.items():
            if fingerprint != expected.get(path.name):
                raise UnfitError(
                    f"{path} must be what was written, of size and hash "
                    f"{expected.get(path.name)}, got {fingerprint}; delete it and {COMPLETE}, and "
                    "let `sad cache-teacher` make it again"
                )

    def _wait(self, there: Callable[[], bool], what: str) -> None:
        """Wait on every rank until ``there()``, or raise on all of them."""
        reason = ""
        if not there():
            self.say(f"waiting for the teacher, who fills {self.folder}: {what}")
        while not there():
            try:
                stop_if_requested("waiting for the teacher")
            except StoppedError as error:
                reason = str(error)
                break
            silent = self._silence()
            if silent > self.patience or silent < 0:
                reason = self._unheard(what, silent)
                break
            time.sleep(POLL_SECONDS)
        reasons = [found for found in self.world.gather(reason) if found]
        if not reasons:
            return
        if reasons[0].startswith("teacher_cache"):
            raise UnfitError(reasons[0])
        raise StoppedError(reasons[0])

    def _silence(self) -> float:
        """Seconds since the teacher's last sign of life; -1 if nobody ever wrote here."""
        said = files.read_object(self.folder / WRITER)
        count = len(os.listdir(self.folder)) if self.folder.is_dir() else 0
        if (said, count) != self._life[0]:
            self._life = (said, count), time.monotonic()
        if said is None and (self.folder / CACHE).exists():
            return -1.0
        return time.monotonic() - self._life[1]

    def _unheard(self, what: str, silent: float) -> str:
        if silent < 0:
            return (
                f"teacher_cache must be finished, got {self.folder} without {what}, and nobody "
                "writes to it; let `sad cache-teacher` finish it"
            )
        if not (self.folder / CACHE).exists():
            return (
                f"teacher_cache must hold a teacher's targets, got {self.folder} without "
                f"{CACHE} for {silent:.0f} s; make it with `sad cache-teacher`"
            )
        return (
            f"the teacher must fill {self.folder}, got no {what}, and no sign of life for "
            f"{silent:.0f} s (teacher_wait); start `sad cache-teacher` again, then the same "
            "command with --resume_from_checkpoint auto goes on"
        )
