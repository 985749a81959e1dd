"""An import on its way into a cache: its rows, and its targets in the order that they came in.

A row is a whole document, so the targets of row i are one piece of a *spool*: a file per tensor of
the records (see ``sad.teachers.cache.sparse``), which lives until the shards are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sad.data.batch import Batch
from sad.errors import UnfitError
from sad.teachers.cache.answers import Answer
from sad.teachers.cache.facts import CacheFacts, Kind
from sad.teachers.cache.files import Section
from sad.teachers.cache.source import inputs_of, placed
from sad.teachers.cache.sparse import Record, encode


class Spool:
    """The records of positions, one after another, in files of a folder."""

    def __init__(self, folder: Path, top_k: int, vocab: int) -> None:
        self._folder = folder
        self.top_k = top_k
        self._vocab = vocab
        self._files: dict[str, BinaryIO] = {}
        self._forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._starts: dict[Section, list[int]] = {"train": [], "eval": []}
        self._length = 0
        self.tail = 0.0
        """Mass outside the ids, summed over all positions that have any."""
        self.targets = 0
        """Positions that have any."""

    def add(self, section: Section, targets: Answer) -> None:
        """The targets of the next row of a section: the most likely ``top_k`` of each position."""
        k = min(self.top_k, targets.ids.shape[1])
        pad = (0, self.top_k - k)
        ids = torch.nn.functional.pad(targets.ids[:, :k], pad)
        log_probs = torch.nn.functional.pad(targets.log_probs[:, :k], pad, value=-torch.inf)
        log_probs = log_probs.clamp(max=0.0)
        used = ~log_probs.isneginf().all(1)
        tail = (1 - log_probs.exp().sum(1)).clamp(0, 1)
        tail = torch.where(used, tail, 0.0)  # of padding there is none
        self.tail += float(tail.sum())
        self.targets += int(used.sum())
        self._starts[section].append(self._length)
        self._length += len(ids)
        for name, tensor in encode(ids, log_probs, tail[:, None], self._vocab).items():
            array = tensor.numpy()
            if name not in self._files:
                self._files[name] = (self._folder / name).open("w+b")
                self._forms[name] = array.dtype, array.shape[1:]
            self._files[name].write(array.tobytes())

    def read(self, section: Section, row: int, count: int) -> Record:
        """The records of the first ``count`` positions of a row."""
        start = self._starts[section][row]
        found: Record = {}
        for name, (dtype, shape) in self._forms.items():
            size = int(np.prod(shape)) * dtype.itemsize
            file = self._files[name]
            file.seek(start * size)
            content = np.frombuffer(bytearray(file.read(count * size)), dtype=dtype)
            found[name] = torch.from_numpy(content.reshape(count, *shape))
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class ImportedSource:
    """Gives the records of a section's rows, out of a spool."""

    def __init__(self, spool: Spool, facts: CacheFacts, section: Section) -> None:
        self._spool = spool
        self._section: Section = section
        self._facts = facts

    def records(self, batch: Batch, kind: Kind, uniform: Tensor) -> Record:
        """As ``TeacherSource.records``; nothing is drawn."""
        assert batch.rows is not None
        rows = zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True)
        parts = [self._spool.read(self._section, row, length) for row, length in rows]
        learned = (batch.labels >= 0).cpu()[inputs_of(batch)]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if kind == "sampled":  # weights that sum to 1
            del found["tail"]
        found = {name: _chosen(tensor, learned) for name, tensor in found.items()}
        return placed(found, learned, self._facts, kind)


def section_of(tokens: list[int], eval_fraction: float) -> Section:
    """Where a document belongs: to the held-out rows if the hash of its tokens, as a number in
    [0, 1), is below ``eval_fraction``; equal documents lie on one side."""
    digest = hashlib.blake2b(np.array(tokens, dtype="<i8").tobytes(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "little") < eval_fraction * 2**64 else "train"


def require_both(counts: Mapping[Section, int], path: object) -> None:
    """Raise ``UnfitError`` unless there are documents for both sections."""
    names: dict[Section, str] = {"train": "training", "eval": "held-out"}
    for section, what in names.items():
        if not counts[section]:
            raise UnfitError(
                f"{path} must hold documents for training and for evaluations, got no {what} ones "
                f"among {sum(counts.values())}; change data.eval_fraction, or import more"
            )


def _chosen(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; torch cannot index uint16."""
    if tensor.dtype == torch.uint16:
        return tensor.view(torch.int16)[rows].view(torch.uint16)
    return tensor[rows]
