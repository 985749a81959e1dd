"""A teacher that is not here: its targets are read from the folder that it has left.

Nothing of its body is opened. Of hidden states its head is, whose product with them gives the
logits; sparse targets are a few ids and their weights per token.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sad_kernels import TeacherHidden, TeacherTopK
from torch import Tensor, nn

from sad.data.batch import Batch
from sad.errors import UnfitError, UsageError, printable, shortened
from sad.losses.capture import Capture
from sad.losses.cross_tokenizer import TeacherLikelihood
from sad.models.cached_targets import CachedTargets
from sad.teachers.cache.facts import CacheFacts
from sad.teachers.cache.files import AGAIN, HEAD, Section, open_tensors, read_facts, shards_of
from sad.teachers.cache.forms import require_decoded
from sad.teachers.cache.reader import CacheReader
from sad.teachers.cache.source import position_bytes
from sad.teachers.cache.sparse import decode
from sad.teachers.frozen import TeacherOutput
from sad.teachers.vocabulary import read_weights, unknown_ids


class AbsentModel(nn.Module):
    """A model of which the width of its hidden states is known, and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=width)
        self.config = SimpleNamespace(hidden_size=width, get_text_config=lambda: text)


class CachedTeacher:
    """Targets of the training rows or of the held-out ones, from a cache.

    Sparse targets are read at ``temperature``; hidden states serve any.
    """

    def __init__(
        self, reader: CacheReader, section: Section, *, temperature: float, device: torch.device
    ) -> None:
        self.reader = reader
        self.section: Section = section
        self.device = device
        self._shards = shards_of(reader.facts, section)
        self._temperature = temperature
        self._column = 0
        if self._shards.kind == "topk":
            self._column = _column_of(reader, temperature)

    @property
    def kind(self) -> str:
        """``sampled``, ``topk``, ``hidden`` or ``likelihood``."""
        return self._shards.kind

    @property
    def model(self) -> Any:
        """What stands for the teacher's model where losses ask for its width; None for sparse
        targets, which have none."""
        head = self.reader.facts.head
        return None if head is None else AbsentModel(head.width)

    @cached_property
    def _head(self):
        return self.reader.head(self.device)

    @cached_property
    def _unknown(self):
        return unknown_ids(self._head) if self.reader.facts.vocab_map is not None else None

    @cached_property
    def _codec(self):
        return self.reader.codec(self.device)

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """The targets of a batch. Nothing can be captured: there are no layers."""
        try:
            return self._targets(batch)
        except UnfitError as error:
            # The other ranks do not read these rows: they only learn that this one is lost.
            error.spoken = True
            raise

    def _targets(self, batch: Batch) -> TeacherOutput:
        places = self._places(batch)
        length = batch.input_ids.shape[1]
        lengths = batch.lengths.cpu()
        record = self.reader.read(self.section, places, lengths, length)
        if self._shards.kind == "hidden":
            record = {name: values.to(self.device) for name, values in record.items()}
            hidden = self._codec.decode(record, self._head.weight.dtype)
            weights = None if self._unknown is None else read_weights(batch, self._unknown)
            return TeacherOutput((TeacherHidden(hidden, self._head),), kd_weights=weights)
        if self._shards.kind == "likelihood":
            known = record["log_prob"]  # still in host memory: nobody waits for the device
            if not bool((known <= 0).all()):  # NaN compares false
                raise UnfitError(
                    f"{self.reader.folder} must hold log-probabilities, got one above 0; {AGAIN}"
                )
            return TeacherOutput((TeacherLikelihood(known.to(self.device)),))
        temperature = self._temperature if self._shards.kind == "topk" else 1.0
        ids, log_probs = decode(record, self._column, temperature)
        require_decoded(self.reader.folder, record, ids, self.reader.facts.num_ids)
        tail = "bucket" if self._shards.kind == "topk" else "zero"
        target = TeacherTopK(ids.to(self.device), log_probs.to(self.device), tail)
        weights = None
        if self.reader.facts.vocab_map is not None:  # what the teacher could not read is padding
            weights = (~target.log_probs.isneginf().all(-1)).float()
        if batch.theirs is not None:
            weights = batch.theirs.boundaries.float()
        return TeacherOutput((target,), kd_weights=weights)

    def release(self) -> None:
        """As ``FrozenTeacher.release``: there is nothing to free."""

    @property
    def grows(self) -> bool:
        """Whether another process fills the cache while this one reads it."""
        return not self.reader.complete

    def has(self, first: int, last: int) -> bool:
        """Whether the targets of the places from ``first`` to ``last`` of the run are there."""
        return self.reader.has(self.section, first, last)

    def wait_for(self, first: int, last: int) -> None:
        """Wait until they are; ``StoppedError`` on every rank if they do not come."""
        self.reader.wait_for(self.section, first, last)

    def open(self, first: int, last: int) -> None:
        """Verify them on every rank, before any reads one; ``UnfitError`` on all ranks."""
        self.reader.open(self.section, first, last)

    def needs_from(self, place: int) -> None:
        """Say that nothing before this place of the run will be asked for again."""
        if self.grows:
            self.reader.needs_from(place)

    def _places(self, batch: Batch) -> Tensor:
        """The places of a batch's rows in the cache, int64 [B]."""
        facts = self.reader.facts
        if self.section == "eval" or facts.order is not None:
            assert batch.places is not None
            return batch.places
        assert batch.rows is not None
        if facts.subset is None:
            return batch.rows
        places = np.searchsorted(self._numbers, batch.rows.numpy())
        if (self._numbers.take(places, mode="clip") != batch.rows.numpy()).any():
            raise UnfitError(
                f"teacher_cache must hold the rows that are trained on, got {self.reader.folder} "
                "without one of them; make it again with this file"
            )
        return torch.from_numpy(places)

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The rows of a cache that has not all of them."""
        assert self.reader.facts.subset is not None
        return self.reader.facts.subset.numbers()


def _column_of(reader: CacheReader, temperature: float) -> int:
    temperatures = reader.facts.tail_temperatures
    if temperature not in temperatures:
        raise UnfitError(
            f"teacher_cache must hold top-k targets at temperature {temperature:g}, got "
            f"{', '.join(f'{t:g}' for t in temperatures)} in {reader.folder}; make it again with "
            f"--temperatures {temperature:g}"
        )
    return temperatures.index(temperature)


def planned_targets(folder: Path, facts: CacheFacts | None = None) -> CachedTargets:
    """The sizes that a plan of memory needs of a cache, from its facts and its head's header.

    Raises ``UsageError`` for a folder without a cache, ``UnfitError`` for one that is damaged.
    """
    found = (facts, {}) if facts is not None else read_facts(folder.expanduser())
    if found is None:
        raise UsageError(
            f"teacher_cache must be a folder that `sad cache-teacher` has made, got {folder}, "
            "which holds none; make it, or plan without one"
        )
    facts, _ = found
    if facts.head is None:
        size = position_bytes(facts, facts.kind, 0)
        return CachedTargets(size, top_k=facts.top_k or 0)
    tensors = open_tensors(folder.expanduser() / HEAD)
    dtype, (rows, width) = tensors.form("weight")
    return CachedTargets(
        position_bytes(facts, facts.kind, width),
        head_rows=rows,
        width=width,
        head_dtype=dtype,
        head_bias="bias" in tensors,
    )


def describe(reader: CacheReader) -> str:
    """What a run's header says of its teacher's cache."""
    facts, notes = reader.facts, reader.notes
    count = notes.get("parameters")
    size = f", {count:,} parameters" if isinstance(count, int) else ""
    if size and "format" not in notes:  # an import does not know in which dtype they were
        size += f" in {facts.teacher.dtype}"
    match facts.kind:
        case "sampled" if "format" in notes:
            what = f"{facts.top_k} ids per token of {notes['format']}, whose weights sum to 1"
        case "sampled":
            what = f"{facts.top_k} sampled ids per token at T = {facts.temperatures[0]:g}"
        case "topk":
            at = ", ".join(f"{t:g}" for t in facts.temperatures)
            what = f"the {facts.top_k} most likely ids per token at T = {at}"
        case "likelihood":
            what = "the likelihood of the text between boundaries"
        case "hidden":
            what = f"final hidden states in {facts.codec}"
            what += f" ({notes['format']})" if "format" in notes else ""
    if facts.cross_tokenizer is not None:  # at other positions there is nothing
        what = what.replace("ids per token", "outcomes per boundary")
    name = shortened(printable(facts.teacher.name), 80)
    return f"{name}{size}; {what}, from {reader.folder}"
