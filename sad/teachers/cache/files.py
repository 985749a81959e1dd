"""How a cache lies on disk.

    cache.json           first: what it is a cache of (``facts``)
    head.safetensors     hidden states: the teacher's head, weight and bias
    basis.safetensors    hidden states in int8: mean, permutation and signs
    eval-00000.safetensors    the held-out rows
    shard-00017.safetensors   training rows: whole batches of them, up to 256 MB
    complete.json        last: size and hash of every file; without it the cache grows or is broken
    writer.json reader.json   while it grows: when the teacher was last seen, and what the student
                              can still need

A shard is a safetensors file: ``lengths`` [rows] int32, the inputs of each row, and the records of
all inputs, row after row. Its header has the ``plan`` of the cache and a hash of the tensors. It is
written under another name and renamed, so a shard that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.tensor_files import FileTensors, file_order, safetensors_chunks
from sad.errors import UnfitError, one_line, quoted
from sad.teachers.cache.facts import CacheFacts, Kind, facts_of

CACHE, COMPLETE, WRITER, READER = "cache.json", "complete.json", "writer.json", "reader.json"
HEAD, BASIS = "head.safetensors", "basis.safetensors"
ROWS, SPOOL = "rows", "import-spool"
"""Folders of an import: its text, and what has been read and is in no shard yet."""

SHARD_BYTES = 256 * 10**6
"""Size of a shard, at most, unless one batch is larger."""

Section = Literal["train", "eval"]
LENGTHS = "lengths"

AGAIN = "make it again with `sad cache-teacher`"


@dataclass(frozen=True)
class Shards:
    """The shards of one section: places [0, places), so many to a shard."""

    section: Section
    kind: Kind
    places: int
    per_shard: int
    batch_rows: int

    def __len__(self) -> int:
        return math.ceil(self.places / self.per_shard)

    def name(self, number: int) -> str:
        """The file of a shard."""
        prefix = "shard" if self.section == "train" else "eval"
        return f"{prefix}-{number:05d}.safetensors"

    def names(self) -> list[str]:
        return [self.name(number) for number in range(len(self))]

    def of(self, number: int) -> range:
        """The places in a shard."""
        return range(number * self.per_shard, min((number + 1) * self.per_shard, self.places))


def shards_of(facts: CacheFacts, section: Section) -> Shards:
    """The shards of a section of a cache."""
    if section == "train":
        places, per_shard = facts.train_places, facts.rows_per_shard
        return Shards(section, facts.kind, places, per_shard, facts.batch_rows)
    places, per_shard = facts.eval_places, facts.eval_rows_per_shard
    return Shards(section, facts.eval_kind, places, per_shard, facts.eval_batch_rows)


def all_names(facts: CacheFacts) -> list[str]:
    """Every file that a whole cache has besides the two that say what it is."""
    names = [HEAD] if facts.head is not None else []
    names += [BASIS] if facts.codec == "int8" else []
    return [*names, *shards_of(facts, "eval").names(), *shards_of(facts, "train").names()]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of tensors, whole or not at all. Raises ``OutputError``."""
    files.write_atomic_chunks(path, safetensors_chunks(tensors, metadata))


def write_shard(path: Path, tensors: Mapping[str, Tensor], plan: str) -> None:
    """Write a shard of the cache with this ``plan``. Raises ``OutputError``."""
    write_tensors(path, tensors, {"plan": plan, "blake2b": tensors_hash(tensors)})


def open_shard(path: Path, plan: str, *, verify: bool) -> FileTensors:
    """Open a shard; with ``verify`` its tensors are hashed first.

    Raises ``UnfitError`` for one that is damaged, or of a cache with another plan.
    """
    tensors = open_tensors(path)
    found = tensors.metadata.get("plan")
    if found != plan:
        raise UnfitError(
            f"{path} must be a shard of the cache beside it, whose plan is {plan}, got one of "
            f"{quoted(found, 40)}; {AGAIN}"
        )
    if verify and tensors_hash(tensors) != tensors.metadata.get("blake2b"):
        raise UnfitError(
            f"{path} must hold what was written to it, got other bytes; delete it and {AGAIN}"
        )
    return tensors


def open_tensors(path: Path) -> FileTensors:
    """Open a file of tensors; ``UnfitError`` without one that can be read."""
    try:
        return FileTensors(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UnfitError(
            f"{path} must be a file of the teacher's cache, got {one_line(error)}; {AGAIN}"
        ) from error


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b hash (16 bytes) of tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in file_order({name: tensors[name] for name in tensors}):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_facts(folder: Path) -> tuple[CacheFacts, dict[str, Any]] | None:
    """Facts and notes of the cache in ``folder``; None without a ``cache.json``.

    Raises ``UnfitError`` for one that is damaged, or of another format.
    """
    path = folder / CACHE
    if not path.exists():
        return None
    content = files.read_object(path)
    if content is None:
        raise UnfitError(f"{path} must hold a JSON object, got something else; {AGAIN}")
    return facts_of(content, str(path))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write_atomic(path, json.dumps(content, indent=1) + "\n")


def strangers(folder: Path) -> list[str]:
    """Names in a folder that are not those of a cache; hidden files, which a writer makes, too, are
    nobody's."""
    own = {CACHE, COMPLETE, WRITER, READER, HEAD, BASIS, ROWS, SPOOL}
    shard = re.compile(r"(shard|eval)-\d{5,}\.safetensors")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [n for n in names if n not in own and n[0] != "." and not shard.fullmatch(n)]


def missing(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the files that are not there."""
    return [name for name in names if not files.is_file(folder / name)]
