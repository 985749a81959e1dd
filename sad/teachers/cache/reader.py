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
from typing import Any

import numpy as np
import torch
from sad_kernels import Head
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.tensor_files import FileTensors
from sad.distributed.world import ALONE, World
from sad.environment import stop_if_requested
from sad.errors import StoppedError, UnfitError, UsageError, quoted
from sad.teachers.cache.facts import CacheFacts
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
    open_tensors,
    read_facts,
    shards_of,
    strangers,
    write_json,
)
from sad.teachers.cache.forms import open_head, open_whole_shard, require_basis
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
                "which is no folder; run `sad cache-teacher` with the same recipe and "
                f"--output {folder}"
            )
        others = strangers(self.folder)
        if others and not (self.folder / CACHE).exists():  # it will never come there
            raise UsageError(
                f"teacher_cache must be a folder that `sad cache-teacher` has made, got {folder}, "
                f"which holds {quoted(others[0], 40)} and no {CACHE}; name that folder"
            )
        self._life: tuple[object, float] = (None, time.monotonic())
        self._open: OrderedDict[tuple[Section, int], tuple[FileTensors, np.ndarray]] = OrderedDict()
        self._heads: dict[torch.device, Head] = {}
        # All ranks take the same way, whatever each of them sees at its own moment.
        self._wait(lambda: (self.folder / CACHE).exists(), "its first file")
        self.facts, self.notes = world.agree(self._facts)
        self.complete = world.from_main(self._complete)
        if self.complete or self.facts.order is None:
            self._wait(self._complete, "its last shard")
            self.complete = True
            world.main_first(lambda: self._verify(memory))
        else:
            names = [n for n in all_names(self.facts) if not n.startswith("shard-")]
            self._wait(lambda: not missing(self.folder, names), "its held-out rows")
        world.agree(self._check_forms)

    def head(self, device: torch.device) -> Head:
        """The teacher's head, of hidden states, cut to the tokenizer's ids: read once, for training
        and evaluations hold the same one."""
        if device not in self._heads:
            self._heads[device] = self._read_head(device)
        return self._heads[device]

    def _read_head(self, device: torch.device) -> Head:
        facts = self.facts.head
        assert facts is not None
        path = self.folder / HEAD
        found = fingerprint_file(path)
        if found != facts.hash:
            raise UnfitError(
                f"{path} must be the head that the cache was made with, of hash {facts.hash}, got "
                f"{found}; {AGAIN}"
            )
        tensors = open_head(path, self.facts)
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

        ``lengths`` [B] are the inputs of each row; behind them there is padding. Of a cache that
        grows the shards must be there: see ``wait_for``.
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

    def open(self, section: Section, first: int, last: int) -> None:
        """Open these shards and verify them, on every rank; ``UnfitError`` on all for one that is
        damaged."""
        per_shard = shards_of(self.facts, section).per_shard
        numbers = range(first // per_shard, last // per_shard + 1)
        self.world.agree(lambda: [self._shard(section, number) for number in numbers])

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
            shards = shards_of(self.facts, section)
            tensors, lengths = open_whole_shard(
                self.folder, self.facts, shards, number, verify=not self.complete
            )
            ends = np.concatenate([[0], np.cumsum(lengths.numpy())])
            self._open[key] = tensors, ends
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def _facts(self) -> tuple[CacheFacts, dict[str, Any]]:
        found = read_facts(self.folder)
        if found is None:
            raise UsageError(
                f"teacher_cache must be a folder that `sad cache-teacher` fills, got {self.folder} "
                f"without {CACHE}, which was there; make it again"
            )
        return found

    def _check_forms(self) -> None:
        """Raise ``UnfitError`` unless the files that are there hold what a run will read."""
        facts, folder = self.facts, self.folder
        if facts.head is not None:
            open_head(folder / HEAD, facts)
        if facts.codec == "int8":
            require_basis(folder / BASIS, open_tensors(folder / BASIS), facts)
        sections: tuple[Section, ...] = ("eval", "train") if self.complete else ("eval",)
        for section in sections:
            shards = shards_of(facts, section)
            for number in range(len(shards)):
                open_whole_shard(folder, facts, shards, number, verify=False)

    def _complete(self) -> bool:
        content = files.read_object(self.folder / COMPLETE)
        return content is not None and content.get("plan") == self.facts.plan

    def _verify(self, memory: Path) -> None:
        """Raise ``UnfitError`` unless every file is what was written."""
        content = files.read_object(self.folder / COMPLETE) or {}
        files_then = content.get("files")
        expected: Mapping[str, object] = files_then if isinstance(files_then, dict) else {}
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
        """Wait until ``there()`` on every rank, or raise on all of them. All ask in step: a rank
        that has seen it, or was told to stop, must not leave the others waiting."""
        said = False
        while True:
            found = there()
            answers = self.world.gather((found, "" if found else self._reason_to_end(what)))
            if all(found for found, _ in answers):
                return
            reason = next((reason for _, reason in answers if reason), "")
            if reason.startswith("teacher_cache"):
                raise UnfitError(reason)
            if reason:
                raise StoppedError(reason)
            if not said:
                said = True
                self.say(f"waiting for the teacher, who fills {self.folder}: {what}")
            time.sleep(POLL_SECONDS)

    def _reason_to_end(self, what: str) -> str:
        """Why not to wait any longer; empty for none."""
        try:
            stop_if_requested("waiting for the teacher")
        except StoppedError as error:
            return str(error)
        silent = self._silence()
        return self._unheard(what, silent) if silent > self.patience or silent < 0 else ""

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
