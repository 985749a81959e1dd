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

Of each token is kept whether it is a boundary. The k-th boundary of a row in the student's tokens
and the k-th in the teacher's are the same place.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.batch import Batch, TeacherTokens
from sad.data.packing import (
    CONTEXT,
    DOCUMENTS,
    PACKING,
    TARGET_BYTES,
    TOKENS,
    TextPiece,
    encode,
    fingerprint_rows,
    read_array,
    sum_over_targets,
    text_batches,
    write_index,
)
from sad.data.parallel import map_in_order
from sad.data.rows import PackedRows, kept_rows
from sad.data.split import DocumentSet
from sad.data.stream import ALIGNMENT_COUNTS, Affixes, describe_counts
from sad.data.token_bytes import TokenBytes, token_bytes
from sad.data.token_file import TokenFile
from sad.data.tokenizers import fingerprint
from sad.environment import stop_if_requested
from sad.errors import UnfitError

FORMAT = 1
"""Part of the fingerprint, so that rows aligned by other rules are never read."""

ROWS = "rows.bin"  # int64 pairs: first input and number of inputs of each row
BOUNDARIES = "boundaries.bin"  # one byte per token of the stream: whether it is a boundary
STUDENT, TEACHER = "student", "teacher"  # folders of the two streams
_TOKEN_BYTES = "token_bytes.bin"  # needed until the rows are cut


class Side(NamedTuple):
    """A tokenizer, what it puts around texts, and the bytes of its tokens."""

    tokenizer: PreTrainedTokenizerFast
    affixes: Affixes
    bytes: TokenBytes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, config: DataConfig, role: str) -> Side:
        """Raises ``UnfitError`` for a tokenizer without end-of-text, or whose tokens have no bytes
        that can be told."""
        return cls(tokenizer, Affixes.of(tokenizer, config), token_bytes(tokenizer, role))


class AlignedDocument(NamedTuple):
    """A document in the tokens of both sides, and its boundaries as pairs of positions."""

    ids: tuple[np.ndarray, np.ndarray]  # int64 [n_s], [n_t]
    sizes: tuple[np.ndarray, np.ndarray]  # int64: bytes that each token stands for as a target
    pairs: np.ndarray  # int64 [boundaries, 2]; the last is that of the end-of-text tokens


class _Stream(PackedRows):
    """Rows of one side, which begin and end where their file says."""

    def _cut(self, folder: Path, index: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        self._boundaries = TokenFile(folder / BOUNDARIES, "<u1", index["files"][BOUNDARIES])
        rows = read_array(folder, ROWS, index).reshape(-1, 2)
        return rows[:, 0].copy(), rows[:, 1].copy()

    @property
    def num_boundaries(self) -> int:
        """All boundaries, one after the end of each document among them; reads the whole file."""
        size, total = len(self._boundaries), 0
        for start in range(0, size, 1 << 20):
            total += int(
                (self._boundaries[np.arange(start, min(start + (1 << 20), size))] > 0).sum()
            )
        return total

    def boundaries(self, row: int) -> tuple[np.ndarray, bool]:
        """The boundaries of a row, int64, and whether the token after its last input is one."""
        start, length = int(self._starts[row]), int(self._lengths[row])
        flags = self._boundaries[np.arange(start, start + length + 1)] > 0
        return np.flatnonzero(flags[:-1]), bool(flags[-1])


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
            at, goes_on = self.boundaries(number)
            teacher_at, teacher_goes_on = self.theirs.boundaries(number)
            if len(at) != len(teacher_at):
                raise UnfitError(
                    f"both sides of row {number} must have equally many boundaries, got {len(at)} "
                    f"and {len(teacher_at)}; remove these rows from data.cache_dir"
                )
            if not len(at):
                continue
            has_both = (labels[row, at] >= 0) & (teacher_labels[row, teacher_at] >= 0)
            positions[row, at[has_both]] = teacher_at[has_both]
            # Of the last group this row has the first tokens alone, unless they are all of it.
            has_both[-1] &= goes_on and teacher_goes_on
            numbers = np.where(has_both, row * labels.shape[1] + at, -1)
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
    options: Any = {"packing": packing, "config": config}
    names = [fingerprint_rows(documents, tok, max_length, **options) for tok in (student, teacher)]
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
    sides = (
        Side.of(tokenizers[0], config, STUDENT),
        Side.of(tokenizers[1], config, TEACHER),
    )
    counts = dict.fromkeys(ALIGNMENT_COUNTS, 0)
    with AlignedWriter(folder, sides, max_length, packing=packing) as writer:
        bar = tqdm(documents, desc="tokenizing", unit=" documents", leave=False, disable=None)
        for aligned in _aligned(bar, sides, config):
            stop_if_requested(PACKING)
            if isinstance(aligned, str):
                counts[aligned] += 1
            elif not writer.add(aligned):
                counts["apart"] += 1
        writer.finish(name, counts)


def _aligned(
    documents: DocumentSet | tqdm[Any], sides: tuple[Side, Side], config: DataConfig
) -> Iterator[AlignedDocument | str]:
    """The documents that have tokens, aligned, or the reason to leave one out."""

    def align_batch(batch: Sequence[TextPiece]) -> list[_Piece]:
        return list(_align_pieces(batch, sides))

    pieces: list[_Piece] = []
    for batch in map_in_order(align_batch, text_batches(documents), config.num_proc):
        for piece in batch:
            pieces.append(piece)
            if piece.ends_document:
                document = _joined(pieces, sides)
                if document is not None:
                    yield document
                pieces = []


class _Piece(NamedTuple):
    """A part of a document that is tokenized at once, in the tokens of both sides."""

    ids: tuple[np.ndarray, np.ndarray]
    ends: np.ndarray | None  # int64 [boundaries, 2]: the tokens that end there; None for a refusal
    ends_document: bool
    refused: str = ""
    at_start: bool = False  # whether both have read nothing of it before its first token


def _align_pieces(batch: Sequence[TextPiece], sides: tuple[Side, Side]) -> Iterator[_Piece]:
    for piece in batch:
        if piece.conversation is not None:
            raise UnfitError(
                f"data must hold texts with cross_tokenizer, got the conversation "
                f"{piece.conversation.name}; leave cross_tokenizer out, or write conversations as "
                "texts"
            )
    texts = [piece.text for piece in batch]
    encoded = zip(*(encode(texts, side.tokenizer) for side in sides), strict=True)
    for piece, ((ours, _), (theirs, _)) in zip(batch, encoded, strict=True):
        ids = np.array(ours, dtype=np.int64), np.array(theirs, dtype=np.int64)
        yield align(piece.text, ids, sides, ends_document=piece.ends_document)


def align(
    text: str,
    ids: tuple[np.ndarray, np.ndarray],
    sides: tuple[Side, Side],
    *,
    ends_document: bool = True,
) -> _Piece:
    """Find the bytes of a text at which tokens of both sides end."""
    content = text.encode()
    found = [side.bytes.ends(part.tolist(), content) for side, part in zip(sides, ids, strict=True)]
    if found[0] is None or found[1] is None:
        return _Piece(ids, None, ends_document, "changed")
    (ours, our_space), (theirs, their_space) = found
    spans = [
        _special_spans(part, ends, side.bytes)
        for part, ends, side in zip(ids, (ours, theirs), sides, strict=True)
    ]
    if spans[0] != spans[1]:
        return _Piece(ids, None, ends_document, "special")
    common = np.intersect1d(ours, theirs)
    common = common[common > 0]
    # Of several tokens that end at one byte the last has read them all.
    pairs = [np.searchsorted(ends, common, side="right") - 1 for ends in (ours, theirs)]
    at_start = not (our_space or their_space)
    return _Piece(ids, np.stack(pairs, axis=1), ends_document, at_start=at_start)


def _special_spans(ids: np.ndarray, ends: np.ndarray, table: TokenBytes) -> list[tuple[int, int]]:
    """First byte, and the one after the last, of special tokens that stand in a text."""
    special = np.flatnonzero(table.special[ids])
    after = ends[special]
    return list(zip((after - table.sizes[ids[special]]).tolist(), after.tolist(), strict=True))


def _joined(pieces: list[_Piece], sides: tuple[Side, Side]) -> AlignedDocument | str | None:
    """A document of its pieces, with what belongs around it; None for one without tokens."""
    refused = next((piece.refused for piece in pieces if piece.refused), None)
    if refused:
        return refused
    if not any(len(part) for piece in pieces for part in piece.ids):
        return None
    begins = [len(side.affixes.prefix) for side in sides]
    pairs = []
    if min(begins) and pieces[0].at_start:
        pairs.append(np.array([begins]) - 1)
    place = np.array(begins)
    for number, piece in enumerate(pieces):
        assert piece.ends is not None
        if number and not piece.at_start and pairs:
            pairs[-1] = pairs[-1][:-1]  # the next tokens hold a space that is not in the text
        pairs.append(piece.ends + place)
        place = place + [len(part) for part in piece.ids]
    ids, sizes = [], []
    for number, side in enumerate(sides):
        prefix, suffix = side.affixes
        parts = [piece.ids[number] for piece in pieces]
        ids.append(np.concatenate([prefix, *parts, suffix]))
        texts = side.bytes.sizes[np.concatenate(parts)]
        sizes.append(np.concatenate([np.zeros_like(prefix), texts, np.zeros_like(suffix)]))
        sizes[-1][0] = 0  # never a target
    whole = np.concatenate(pairs)
    lengths = np.array([len(part) for part in ids])
    # At the end of the text both go on to end-of-text, unless one puts another token before it.
    whole = whole[(whole < lengths - 2).all(axis=1)]
    ends = np.stack([lengths - 2, lengths - 1])
    return AlignedDocument(
        (ids[0], ids[1]), (sizes[0], sizes[1]), np.concatenate([whole, ends[(ends >= 0).all(1)]])
    )


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
        """Add a document; False for one that has a group longer than a row, which is left out."""
        longest = np.diff(document.pairs, axis=0, prepend=-1).max(initial=0)
        if longest > self._max_length:
            return False
        begin = np.array([stream.num_tokens for stream in self._streams])
        if not (self._row < begin).all():  # nothing is open
            self._row = begin
        pairs = document.pairs + begin
        if not (pairs[0] - self._row < self._max_length).all() and (self._row < begin).all():
            if (self._row < begin - 1).all():  # else there is no target in it
                self._close(begin)
            self._row = begin
        for number, stream in enumerate(self._streams):
            flags = np.zeros(len(document.ids[number]), dtype=np.uint8)
            flags[document.pairs[:, number]] = 1
            stream.add(document.ids[number], document.sizes[number], flags)
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
        self._end_token = int(side.affixes.suffix[-1])
        self._tokens = (folder / TOKENS).open("wb")
        self._boundaries = (folder / BOUNDARIES).open("wb")
        self._sizes = (folder / _TOKEN_BYTES).open("wb")
        self._documents, self._context = array("q"), array("q")
        self.rows = array("q")  # first input, number of inputs, first input ...
        self.num_tokens = 0
        self._max_id = 0

    def add(self, ids: np.ndarray, sizes: np.ndarray, flags: np.ndarray) -> None:
        self._documents.append(self.num_tokens)
        if self._prefix > 1:  # the first token of a document is no target in any case
            self._context.extend((self.num_tokens, self.num_tokens + self._prefix))
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
            "end_tokens": [self._end_token],
            "counts": counts,
        }
        write_index(self._folder, index, (TOKENS, BOUNDARIES, *arrays))
