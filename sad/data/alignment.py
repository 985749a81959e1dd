"""Rows of one text in the tokens of two tokenizers, the student's and its teacher's.

Both encode each document whole. A *boundary* is a byte of the text at which a token of either side
ends, also inside a character. There both models have read the same and go on from it, so what they
predict can be compared. Boundaries of a document are the ends that both sides have in common, the
end of the text, and its beginning where both put a token such as BOS before it.

Rows are those of ``sad.data.rows``, of the student's tokens, with the teacher's beside them. They
are cut at boundaries alone and have at most ``max_length`` tokens on either side; where the
tokenizers are equal they are the rows that the student would have anyway. Documents that cannot be
aligned are left out and counted: those that a tokenizer changes, in which one side alone has a
special token, and those without a boundary for longer than a row.

Of each token is kept whether the sides meet there. The k-th such place of a row in the student's
tokens and the k-th in the teacher's are the same one.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.aligned_documents import (
    BEGINS_GROUP,
    COMPARED,
    AlignedDocument,
    Side,
    aligned,
    own_config,
)
from sad.data.batch import Batch, TeacherTokens
from sad.data.formats.base import MESSAGES, TEXT
from sad.data.packing import (
    CONTEXT,
    DOCUMENTS,
    PACKING,
    TARGET_BYTES,
    TOKENS,
    fingerprint_rows,
    read_array,
    sum_over_targets,
    write_index,
)
from sad.data.rows import PackedRows, kept_rows
from sad.data.split import DocumentSet
from sad.data.stream import ALIGNMENT_COUNTS, COUNTS, describe_counts
from sad.data.token_file import TokenFile
from sad.data.tokenizers import document_end_id, fingerprint
from sad.environment import stop_if_requested
from sad.errors import UnfitError

FORMAT = 1
"""Part of the fingerprint, so that rows aligned by other rules are never read."""

ROWS = "rows.bin"  # int64 pairs: first input and number of inputs of each row
BOUNDARIES = "boundaries.bin"  # one byte per token of the stream: its flags, 0 for none
STUDENT, TEACHER = "student", "teacher"  # folders of the two streams
_TOKEN_BYTES = "token_bytes.bin"  # needed until the rows are cut


class _Stream(PackedRows):
    """Rows of one side, which begin and end where their file says."""

    def _cut(self, folder: Path, index: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        self._boundaries = TokenFile(folder / BOUNDARIES, "<u1", index["files"][BOUNDARIES])
        rows = read_array(folder, ROWS, index).reshape(-1, 2)
        return rows[:, 0].copy(), rows[:, 1].copy()

    @property
    def num_boundaries(self) -> int:
        """All boundaries, whether or not they have targets; reads the whole file."""
        size, total = len(self._boundaries), 0
        for start in range(0, size, 1 << 20):
            part = self._boundaries[np.arange(start, min(start + (1 << 20), size))]
            total += int(np.count_nonzero(part & COMPARED))
        return total

    def places(self, row: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Where in a row the sides meet, the flags of each such place, and whether the token after
        the row's last input is one."""
        start, length = int(self._starts[row]), int(self._lengths[row])
        flags = self._boundaries[np.arange(start, start + length + 1)]
        at = np.flatnonzero(flags[:-1])
        return at, flags[at], bool(flags[-1])


class AlignedRows(_Stream):
    """Rows of the student's tokens, whose batches have the teacher's tokens beside them.

    Raises like ``PackedRows`` if the folder is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / STUDENT)
        self.theirs = _Stream(folder / TEACHER)
        if len(self.theirs) != len(self):
            raise ValueError("the two sides have different rows")
        both = (self.content + self.theirs.content).encode()
        self.content = hashlib.blake2b(both, digest_size=16).hexdigest()

    def batch(self, row_numbers: Sequence[int] | np.ndarray) -> Batch:
        """As ``PackedRows.batch``, with ``theirs``."""
        rows = np.asarray(row_numbers, dtype=np.int64)
        ours, theirs = super().batch(rows), self.theirs.batch(rows)
        parts = self._meet(rows, ours.labels.numpy(), theirs.labels.numpy())
        tensors = (torch.from_numpy(part) for part in parts)
        return ours._replace(theirs=TeacherTokens(theirs, *tensors))

    def _meet(
        self, rows: np.ndarray, labels: np.ndarray, teacher_labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``positions``, ``groups`` and ``teacher_groups`` of ``TeacherTokens``."""
        positions, groups = (np.full(labels.shape, -1, dtype=np.int64) for _ in range(2))
        teacher_groups = np.full(teacher_labels.shape, -1, dtype=np.int64)
        for row, number in enumerate(rows.tolist()):
            at, flags, goes_on = self.places(number)
            teacher_at, _, teacher_goes_on = self.theirs.places(number)
            if len(at) != len(teacher_at):
                raise UnfitError(
                    f"both sides of row {number} must meet equally often, got {len(at)} "
                    f"and {len(teacher_at)}; remove these rows from data.cache_dir"
                )
            if not len(at):
                continue
            has_both = (labels[row, at] >= 0) & (teacher_labels[row, teacher_at] >= 0)
            compared = has_both & ((flags & COMPARED) > 0)
            positions[row, at[compared]] = teacher_at[compared]
            # Of the last group this row has the first tokens alone, unless they are all of it.
            begins = has_both & ((flags & BEGINS_GROUP) > 0)
            begins[-1] &= goes_on and teacher_goes_on
            numbers = np.where(begins, row * labels.shape[1] + at, -1)
            groups[row] = _groups(at, labels[row], numbers)
            teacher_groups[row] = _groups(teacher_at, teacher_labels[row], numbers)
        return positions, groups, teacher_groups


def _groups(begins: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The group of each target of a row, int64 [L]: the number of the boundary at or before it."""
    group = np.searchsorted(begins, np.arange(len(labels)), side="right") - 1
    return np.where((group >= 0) & (labels >= 0), numbers[group], -1)


def align_documents(
    documents: DocumentSet,
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    *,
    max_length: int,
    packing: bool,
    cache_dir: Path,
    config: DataConfig,
) -> AlignedRows:
    """Aligned rows of ``documents``, from the cache if it has them undamaged.

    Raises ``UnfitError`` for tokenizers or documents that cannot be aligned at all, and
    ``OutputError`` if the cache cannot be written.
    """
    document_end_id(student, config.document_end)  # whose token it must be
    names = [
        fingerprint_rows(
            documents, side, max_length, packing=packing, config=own_config(config, side)
        )
        for side in (student, teacher)
    ]
    text = json.dumps([FORMAT, *names, fingerprint(teacher)])
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    write = partial(
        write_aligned_rows,
        name=name,
        documents=documents,
        tokenizers=(student, teacher),
        max_length=max_length,
        packing=packing,
        config=config,
    )
    return kept_rows(cache_dir, name, write, AlignedRows)


def write_aligned_rows(
    folder: Path,
    *,
    name: str,
    documents: DocumentSet,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    max_length: int,
    packing: bool,
    config: DataConfig,
) -> None:
    """Write the rows of ``documents`` to an empty folder; ``name`` is their fingerprint."""
    if documents.kinds & MESSAGES and not tokenizers[1].chat_template:
        raise UnfitError(
            "the teacher's tokenizer must have a chat template for conversations, got none; name a "
            "tokenizer of its family that has one in teacher_tokenizer"
        )
    if config.truncation != "drop" and documents.kinds != TEXT:
        raise UnfitError(
            f"data.truncation must be drop with cross_tokenizer, got {config.truncation}; two "
            "tokenizers would cut a conversation at other places"
        )
    sides = (
        Side.of(tokenizers[0], config, STUDENT),
        Side.of(tokenizers[1], config, TEACHER),
    )
    counts = dict.fromkeys(COUNTS | ALIGNMENT_COUNTS, 0)
    with AlignedWriter(folder, sides, max_length, packing=packing) as writer:
        bar = tqdm(documents, desc="tokenizing", unit=" documents", leave=False, disable=None)
        for document in aligned(bar, sides, config):
            stop_if_requested(PACKING)
            if isinstance(document, str):
                counts[document] += 1
                continue
            counts["empty_turn"] += document.empty_turns > 0
            if document.learned is not None and not all(map(np.any, document.learned)):
                counts["no_target"] += 1
            elif not writer.add(document):
                counts["longer" if document.whole else "apart"] += 1
        writer.finish(name, counts)


class AlignedWriter:
    """Writes aligned documents to an empty folder; a context, within which ``finish`` is called."""

    def __init__(
        self, folder: Path, sides: tuple[Side, Side], max_length: int, *, packing: bool
    ) -> None:
        self._streams = [
            _StreamWriter(folder / name, side)
            for name, side in zip((STUDENT, TEACHER), sides, strict=True)
        ]
        self._max_length, self._packing = max_length, packing
        self._row = np.zeros(2, dtype=np.int64)  # where the open row begins

    def __enter__(self) -> AlignedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.close()

    def add(self, document: AlignedDocument) -> bool:
        """Add a document; False for one that cannot be cut into rows, which is left out."""
        longest = np.diff(document.cuts, axis=0, prepend=-1).max(initial=0)
        if longest > self._max_length:
            return False
        begin = np.array([stream.num_tokens for stream in self._streams])
        if not (self._row < begin).all():  # nothing is open
            self._row = begin
        pairs = document.cuts + begin
        if not (pairs[0] - self._row < self._max_length).all() and (self._row < begin).all():
            if (self._row < begin - 1).all():  # else there is no target in it
                self._close(begin)
            self._row = begin
        for number, stream in enumerate(self._streams):
            stream.add(document, number)
        while True:
            last = int(
                min(
                    np.searchsorted(pairs[:, side], self._row[side] + self._max_length)
                    for side in (0, 1)
                )
            )
            if last == len(pairs):
                break
            assert last > 0, "a group is longer than a row"
            self._close(pairs[last - 1] + 1)
        if not self._packing:
            self._close_document()
        return True

    def finish(self, name: str, counts: dict[str, int]) -> None:
        """Write what describes the rows; ``name`` is their fingerprint, ``counts`` what was left
        out. Raises ``UnfitError`` for no rows."""
        if self._packing:
            self._close_document()
        for stream in self._streams:
            if not stream.rows:
                found = describe_counts(counts, self._max_length) or "no tokens"
                raise UnfitError(
                    f"data must hold text that both tokenizers can encode, got {found}; set "
                    "cross_tokenizer for another pair of models, or raise max_length"
                )
            stream.finish(name, self._max_length, counts, packing=self._packing)

    def _close(self, end: np.ndarray) -> None:
        """End the open row before the tokens at ``end``, where the next one begins."""
        for stream, first, last in zip(self._streams, self._row, end, strict=True):
            stream.cut(int(first), int(last))
        self._row = end

    def _close_document(self) -> None:
        """End the open row with the last document; its end-of-text is no input."""
        end = np.array([stream.num_tokens for stream in self._streams])
        if (self._row < end - 1).all():
            self._close(end - 1)
        self._row = end


class _StreamWriter:
    """One side of the rows while they are written."""

    def __init__(self, folder: Path, side: Side) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = "<u2" if len(side.bytes) <= 1 << 16 else "<i4"
        self._prefix = len(side.affixes.prefix)
        self._end_tokens: set[int] = set()
        self._tokens = (folder / TOKENS).open("wb")
        self._boundaries = (folder / BOUNDARIES).open("wb")
        self._sizes = (folder / _TOKEN_BYTES).open("wb")
        self._documents, self._context = array("q"), array("q")
        self.rows = array("q")  # first input, number of inputs, first input ...
        self.num_tokens = 0
        self._max_id = 0

    def add(self, document: AlignedDocument, side: int) -> None:
        """Add the tokens of one side, 0 or 1, of a document."""
        ids, sizes, end = document.ids[side], document.sizes[side], document.end_tokens[side]
        flags = np.zeros(len(ids), dtype=np.uint8)
        flags[document.pairs[:, side]] = document.flags
        self._documents.append(self.num_tokens)
        if document.learned is not None:
            # A change from learned to context begins a span or ends one.
            changes = np.flatnonzero(np.diff(document.learned[side], prepend=True, append=True))
            self._context.extend((self.num_tokens + changes).tolist())
        elif self._prefix > 1:  # the first token of a document is no target in any case
            self._context.extend((self.num_tokens, self.num_tokens + self._prefix))
        if end is not None:
            self._end_tokens.add(end)
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._sizes.write(sizes.astype("<u4").tobytes())
        self._boundaries.write(flags.tobytes())
        self.num_tokens += len(ids)
        self._max_id = max(self._max_id, int(ids.max()))

    def cut(self, first: int, end: int) -> None:
        """Add the row of the inputs from ``first`` to before ``end``."""
        self.rows.extend((first, end - first))

    def close(self) -> None:
        for file in (self._tokens, self._sizes, self._boundaries):
            file.close()

    def finish(self, name: str, max_length: int, counts: dict[str, int], *, packing: bool) -> None:
        self.close()
        sizes, rows = self._folder / _TOKEN_BYTES, np.array(self.rows).reshape(-1, 2)
        target_bytes = sum_over_targets(sizes, rows[:, 0], rows[:, 1])
        sizes.unlink()
        arrays = {DOCUMENTS: self._documents, ROWS: self.rows, TARGET_BYTES: target_bytes}
        if self._context:
            arrays[CONTEXT] = self._context
        for file_name, values in arrays.items():
            np.array(values, dtype="<i8").tofile(self._folder / file_name)
        index = {
            "fingerprint": name,
            "max_length": max_length,
            "packing": packing,
            "token_dtype": self._dtype,
            "max_token_id": self._max_id,
            "end_tokens": sorted(self._end_tokens),
            "counts": counts,
        }
        write_index(self._folder, index, (TOKENS, BOUNDARIES, *arrays))
