"""``sad cache-teacher --check``: some batches made again with the teacher, beside what is stored.

The only test that sees a wrong adapter or template: hashes say that the bytes are those that were
written, not whose targets they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sad.errors import UnfitError
from sad.teachers.cache.facts import CacheFacts, Kind
from sad.teachers.cache.files import BASIS, LENGTHS, Section, missing, open_shard, open_tensors
from sad.teachers.cache.hidden import build_codec
from sad.teachers.cache.source import Record, Source, TeacherSource
from sad.teachers.cache.sparse import decode
from sad.teachers.cache.writer import SectionRows, uniform_numbers
from sad.teachers.frozen import FrozenTeacher

BATCHES = 8
"""Batches that are made again, at most."""

AGREEMENT = 0.95
"""Share of ids that must be the same: another machine's rounding moves a sample now and then,
another model nearly all of them."""

STATE_ERROR = 0.05
"""Relative error of hidden states that is taken for that of their codec: int8 makes 0.01."""


LIKELIHOOD_ERROR = 0.1
"""Nats by which the log-probability of a piece of text may differ between two machines."""


class Checked(NamedTuple):
    """What a check has found."""

    batches: int
    agreement: float | None
    """Share of equal ids or log-probabilities; None for hidden states."""
    error: float | None
    """Relative error of hidden states in the 2-norm; None for other targets."""
    compared: str
    """What was: hidden states, ids or log-probabilities."""


def compare_with_teacher(
    folder: Path,
    facts: CacheFacts,
    sections: Mapping[Section, SectionRows],
    device: torch.device,
    teacher: FrozenTeacher | Source,
    seed: int | None = None,
) -> Checked:
    """Make some batches of a cache again, by a teacher or what stands for it, and compare;
    ``UnfitError`` if they are not the same."""
    tensors = open_tensors(folder / BASIS) if facts.codec == "int8" else None
    codec = None if facts.codec is None else build_codec(facts.codec, tensors=tensors).to(device)
    source = teacher
    if isinstance(teacher, FrozenTeacher):
        source = TeacherSource(teacher, facts, codec)
    assert not isinstance(source, FrozenTeacher)
    there: list[tuple[Section, int, int]] = [
        (section, number, first)
        for section, rows in sections.items()
        for number in range(len(rows.shards))
        if not missing(folder, [rows.shards.name(number)])
        for first, _ in rows.batches(number)
    ]
    if not there:
        raise UnfitError(f"{folder} must hold targets to be checked, got no shard; make it first")
    chosen = random.Random(seed).sample(there, min(BATCHES, len(there)))
    same = ids = 0
    difference = norm = 0.0
    for section, number, first in chosen:
        rows = sections[section]
        ours, theirs = _both(folder, facts, rows, number, first, source, device)
        if rows.shards.kind == "hidden":
            assert codec is not None
            exact = codec.decode(ours, torch.float32)
            difference += float((codec.decode(theirs, torch.float32) - exact).square().sum())
            norm += float(exact.square().sum())
        elif rows.shards.kind == "likelihood":
            known, again = ours["log_prob"], theirs["log_prob"]
            same += int(((known - again).abs()[known != 0] < LIKELIHOOD_ERROR).sum())
            ids += int((known != 0).sum())
        else:
            equal, count = _equal_ids(ours, theirs, rows.shards.kind)
            same, ids = same + equal, ids + count
    agreement = same / ids if ids else None
    error = (difference / norm) ** 0.5 if norm else None
    compared = {"hidden": "hidden states", "likelihood": "log-probabilities"}.get(facts.kind, "ids")
    if (agreement is not None and agreement < AGREEMENT) or (error or 0.0) > STATE_ERROR:
        found = (
            f"{100 * (agreement or 0):.1f} % of the {compared}"
            if error is None
            else f"hidden states with a relative error of {error:.2g}"
        )
        raise UnfitError(
            f"{folder} must hold the targets of {facts.teacher.name}, got {found} in common with "
            f"what it gives now, in {len(chosen)} batches; make the cache again with this teacher"
        )
    return Checked(len(chosen), agreement, error, compared)


def _both(
    folder: Path,
    facts: CacheFacts,
    rows: SectionRows,
    number: int,
    first: int,
    source: Source,
    device: torch.device,
) -> tuple[Record, Record]:
    """The records of a batch: those that are stored, and made again."""
    shard = open_shard(folder / rows.shards.name(number), facts.plan, verify=False)
    start = 0
    for place, numbers in rows.batches(number):
        count = int(rows.rows.lengths[numbers].sum())
        if place == first:
            break
        start += count
    else:
        raise ValueError(f"no batch of shard {number} begins at {first}")
    stored: Record = {}
    for name in shard:
        if name != LENGTHS:
            _, shape = shard.form(name)
            stored[name] = shard.part(name, (start, *[0] * len(shape[1:])), (count, *shape[1:]))
    uniform = uniform_numbers(facts.seed, rows.shards.name(number), rows.positions(number))
    batch = rows.rows.batch(numbers).to(device)
    made = source.records(batch, rows.shards.kind, uniform[start : start + count])
    return stored, made


def _equal_ids(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], kind: Kind):
    """How many ids of both are the same, of how many."""
    (our_ids, our_weights), (their_ids, their_weights) = decode(ours), decode(theirs)
    used = ~(our_weights.isneginf() & their_weights.isneginf())
    a = our_ids.masked_fill(our_weights.isneginf(), -1)
    b = their_ids.masked_fill(their_weights.isneginf(), -2)
    equal = (a[:, :, None] == b[:, None, :]).any(2)
    return int((equal & used).sum()), int(used.sum())
