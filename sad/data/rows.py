"""Packed rows, their cache on disk, and batches of them in a reproducible order.

Rows are packed once (see ``sad.data.packing``) and kept in a cache, in a folder whose name is a
fingerprint of everything that decides their content. Their order in an epoch is a pure function of
the seed and the epoch's number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from sad.checkpoint.atomic_files import TEMPORARY, describe, free_bytes
from sad.config.schema import DistillConfig
from sad.config.sections import DataConfig
from sad.data.batch import IGNORE_INDEX, Batch, LossCounts
from sad.data.forecast import LARGE_TEXT, forecast
from sad.data.formats.base import COMPLETION, MESSAGES
from sad.data.packing import (
    CONTEXT,
    DOCUMENTS,
    ROW_STARTS,
    TARGET_BYTES,
    TOKENS,
    cut_rows,
    fingerprint_rows,
    read_array,
    read_index,
    row_breaks,
    write_rows,
)
from sad.data.parallel import usable_cores
from sad.data.split import DocumentSet, split_documents
from sad.data.stream import describe_counts
from sad.data.token_file import TokenFile
from sad.errors import OutputError, UnfitError

_WEEK = 7 * 24 * 3600.0

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows")


class PackedRows:
    """Packed rows in a folder of the cache; tokens are read from the disk when they are needed.

    ``num_targets``, ``num_segments``, ``num_sequences`` and ``target_bytes`` are int64 arrays with
    one entry per row; ``longest_segment`` is the largest number of positions that a document has in
    a row. The caller checks ``max_token_id`` against the model's embedding.

    ``content`` is a hash of all their files: that of ``fingerprint`` says what they were made from.

    Raises ``ValueError``, ``KeyError`` or ``OSError`` if the folder is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        self.fingerprint: str = index["fingerprint"]
        self.max_length: int = index["max_length"]
        self.max_token_id: int = index["max_token_id"]
        files = json.dumps(index["files"], sort_keys=True).encode()
        self.content = hashlib.blake2b(files, digest_size=16).hexdigest()
        self.target_bytes = read_array(folder, TARGET_BYTES, index)
        self._tokens = TokenFile(folder / TOKENS, index["token_dtype"], index["files"][TOKENS])
        self._documents = read_array(folder, DOCUMENTS, index)  # where each begins
        self._ends = np.append(self._documents[1:], len(self._tokens))
        self._context = read_array(folder, CONTEXT, index)  # spans: begin, end, begin, end ...
        self._starts, self._lengths = self._cut(folder, index)
        self.counts_left_out: dict[str, int] = index.get("counts", {})
        self.end_tokens: list[int] = index.get("end_tokens", [])
        # The targets of inputs [start, start + length) are the tokens one further on.
        not_learned = _Spans.union(self._documents, self._context)
        self.num_targets = self._lengths - (
            not_learned.tokens_before(self._starts + self._lengths + 1)
            - not_learned.tokens_before(self._starts + 1)
        )
        # Segments are what lies between cuts: the beginnings of documents, and the row bounds.
        ends = self._starts + self._lengths
        cuts = np.unique(np.concatenate([self._documents, self._starts, ends]))
        sizes = np.diff(cuts, append=len(self._tokens))
        rows = np.searchsorted(self._starts, cuts, side="right") - 1
        # Unpacked rows leave out the last token of each document: such a piece is in no row.
        in_row = (rows >= 0) & (cuts < ends[rows])
        rows, sizes = rows[in_row], sizes[in_row]
        self.longest_segment = int(sizes.max(initial=0))
        self.num_segments = np.bincount(rows, minlength=len(self))
        self.num_sequences = np.bincount(rows[sizes > 1], minlength=len(self))

    def _cut(self, folder: Path, index: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """First input and number of inputs of each row, int64 [rows] both."""
        row_starts = read_array(folder, ROW_STARTS, index)
        breaks = row_breaks(
            self._documents, row_starts if len(row_starts) else None, packing=index["packing"]
        )
        return cut_rows(breaks, len(self._tokens), self.max_length)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def lengths(self) -> np.ndarray:
        """Inputs of each row before its padding, int64 [rows]."""
        return self._lengths

    @property
    def num_documents(self) -> int:
        return len(self._documents)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def padding(self) -> float:
        """Share of the rows' positions that hold no input."""
        return 1 - int(self._lengths.sum()) / (len(self) * self.max_length)

    @property
    def left_out(self) -> str:
        """What was left out or cut of the conversations, in words; nothing for nothing."""
        return describe_counts(self.counts_left_out, self.max_length)

    def _learned(self, at: np.ndarray) -> np.ndarray:
        """Whether the tokens at these places of the stream are no context."""
        return np.searchsorted(self._context, at, side="right") % 2 == 0

    def counts(self, row_numbers: Sequence[int] | np.ndarray) -> LossCounts:
        """The loss denominators of a batch of these rows, without reading their tokens."""
        rows = np.asarray(row_numbers, dtype=np.int64)
        segments = self.num_segments[rows]
        return LossCounts(
            targets=int(self.num_targets[rows].sum()),
            tokens=int((self._lengths[rows] - segments).sum()),
            sequences=int(self.num_sequences[rows].sum()),
            max_segments=int(segments.max(initial=1)),
        )

    def rows_with(self, wanted: np.ndarray) -> np.ndarray:
        """The numbers of the rows whose inputs or targets hold a token id v with ``wanted[v]``,
        bool [V], and perhaps of a neighbour; reads all tokens."""
        found = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(self._tokens), 1 << 20):
            at = np.arange(start, min(start + (1 << 20), len(self._tokens)))
            at = at[wanted[self._tokens[at]]]
            for places in (at, at - 1):  # as an input, and as the target of the one before
                found.append(np.unique(np.searchsorted(self._starts, places, side="right") - 1))
        rows = np.unique(np.concatenate(found))
        return rows[rows >= 0]

    def batch(self, row_numbers: Sequence[int] | np.ndarray) -> Batch:
        """A batch of the rows ``row_numbers``, in that order.

        Raises ``UnfitError`` if their file is no longer what it was when the rows were opened.
        """
        rows = np.asarray(row_numbers, dtype=np.int64)
        start = self._starts[rows][:, None]  # [B, 1]
        length = self._lengths[rows][:, None]  # [B, 1]
        column = np.arange(self.max_length)  # [L]
        # Padding repeats the last input of its row. It has no target, and under causal attention
        # no token before it sees it, so neither its ids nor its positions matter.
        at = start + np.minimum(column, length - 1)  # [B, L], positions in the stream
        document = np.searchsorted(self._documents, at, side="right") - 1
        has_target = (column < length) & (at + 1 < self._ends[document]) & self._learned(at + 1)
        inputs, targets = self._tokens[np.stack([at, at + 1])].astype(np.int64)
        labels = np.where(has_target, targets, IGNORE_INDEX)
        positions = column - (np.maximum(self._documents[document], start) - start)
        return Batch(
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            lengths=torch.from_numpy(self._lengths[rows].astype(np.int64)),
            counts=self.counts(rows),
            target_bytes=int(self.target_bytes[rows].sum()),
            rows=torch.from_numpy(rows),
        )


class _Spans(NamedTuple):
    """Spans of the stream, in order, none of which overlap."""

    begins: np.ndarray  # int64
    ends: np.ndarray  # int64

    @classmethod
    def union(cls, documents: np.ndarray, context: np.ndarray) -> _Spans:
        """The context and the first token of each document, which is in the context or is not."""
        alone = documents[np.searchsorted(context, documents, side="right") % 2 == 0]
        begins = np.concatenate([alone, context[0::2]])
        order = np.argsort(begins, kind="stable")
        return cls(begins[order], np.concatenate([alone + 1, context[1::2]])[order])

    def tokens_before(self, at: np.ndarray) -> np.ndarray:
        """How many tokens of the spans lie before each of these places."""
        total = np.concatenate([[0], np.cumsum(self.ends - self.begins)])
        number = np.searchsorted(self.begins, at)  # of spans that begin before
        beyond = np.maximum(np.append(0, self.ends)[number] - at, 0)  # of the last of them
        return total[number] - beyond


def epoch_permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in an epoch, int64 [num_rows]; a pure function of its arguments.

    Row ``i`` sorts by output ``i`` of the SplitMix64 generator (Steele, Lea, Flood: Fast splittable
    pseudorandom number generators, 2014) whose state is a BLAKE2b hash of seed and epoch. Nothing
    but 64-bit arithmetic is involved, so no library's next version changes the order. The outputs
    are distinct: each row comes once per epoch.
    """
    key = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    state = np.frombuffer(key, dtype="<u8")  # [1]: array arithmetic wraps around silently
    z = state + np.arange(1, num_rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").astype(np.int64)


def load_rows(
    config: DistillConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[PackedRows, PackedRows]:
    """Training rows and held-out rows; raises like ``split_documents`` and ``pack_documents``."""
    cache = cache_directory(config.data.cache_dir)
    sides = split_documents(config.data, run_dir=config.output_dir)
    _require_use(config.data, sides)
    train, held_out = (
        pack_documents(
            documents,
            tokenizer,
            max_length=config.max_length,
            packing=config.packing,
            cache_dir=cache,
            config=config.data,
        )
        for documents in sides
    )
    return train, held_out


def _require_use(config: DataConfig, sides: Sequence[DocumentSet]) -> None:
    """Raise ``UnfitError`` if a key says what is learned of records that there are none of."""
    kinds = frozenset().union(*(documents.kinds for documents in sides))
    for key, on, kind, records in (
        ("completion_only_loss", config.completion_only_loss, COMPLETION, "prompt and completion"),
        ("assistant_only_loss", config.assistant_only_loss, MESSAGES, "messages"),
    ):
        if on and not kinds & kind:
            raise UnfitError(
                f"data.{key} must be left out for data without {records}, got no such record; "
                "leave it out, or rename the fields"
            )


def pack_documents(
    documents: DocumentSet,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    packing: bool,
    cache_dir: Path,
    config: DataConfig = DataConfig(),  # noqa: B008 it is frozen
) -> PackedRows:
    """Packed rows of ``documents``, from the cache if it has them undamaged.

    Of ``config`` the keys count that say what documents become: special tokens, chat template,
    what is learned. Of much text is said first what tokenizing it will take. Raises ``UnfitError``
    if the tokenizer has no end-of-text token, a conversation does not fit the chat template or the
    documents give no tokens, and ``OutputError`` if the cache cannot be written or has no room.
    """
    options: Any = {"packing": packing, "config": config}
    name = fingerprint_rows(documents, tokenizer, max_length, **options)

    def write(folder: Path) -> None:
        if documents.num_bytes >= LARGE_TEXT:
            _foresee(documents, tokenizer, cache_dir, config)
        write_rows(folder, name, documents, tokenizer, max_length, **options)

    return kept_rows(cache_dir, name, write, PackedRows)


def kept_rows(
    cache_dir: Path, name: str, write: Callable[[Path], None], opened: Callable[[Path], Rows]
) -> Rows:
    """What ``opened`` makes of the rows that the cache has under ``name``; those that are not there
    or damaged ``write`` writes to an empty folder first.

    Raises ``OutputError`` if the cache cannot be written.
    """
    folder = cache_dir / f"rows-{name}"
    rows = _from_cache(folder, opened)
    if rows is not None:
        return rows

    # Written under another name and renamed when complete: processes may share a cache.
    tmp = cache_dir / f"{TEMPORARY}rows-{secrets.token_hex(8)}"
    try:
        tmp.mkdir(parents=True)
        _sweep(cache_dir)
        write(tmp)
        return _publish(tmp, folder, opened)
    except OSError as error:
        raise OutputError(
            f"data.cache_dir must be writable, got {describe(error)} in {cache_dir}; free space, "
            "or choose another data.cache_dir"
        ) from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _foresee(
    documents: DocumentSet,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    config: DataConfig,
) -> None:
    """Say what tokenizing will take; raise ``OutputError`` if the cache has no room for it."""
    expected = forecast(documents, tokenizer, config)
    free = free_bytes(cache_dir)
    gib, minutes = expected.disk / 2**30, expected.seconds / 60
    processes = config.num_proc or usable_cores()
    print(
        f"text: {documents.num_bytes / 1e9:,.1f} GB in {len(documents):,} documents, about "
        f"{expected.tokens:,.3g} tokens; tokenizing takes about {minutes:,.0f} minutes by "
        f"{processes} processes and {gib:,.1f} GiB in {cache_dir}",
        flush=True,
    )
    if free is not None and free < expected.disk:
        raise OutputError(
            f"data.cache_dir must have room for about {gib:,.1f} GiB of tokens, got "
            f"{free / 2**30:,.1f} GiB free in {cache_dir}; free space, or choose another "
            "data.cache_dir"
        )


# The cache


def cache_directory(configured: str | None) -> Path:
    """The folder of packed rows: ``data.cache_dir``, or one under the user's cache."""
    path = configured or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sad")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OutputError(
            f"data.cache_dir must be a directory, got {path} for a user without a home; set it"
        ) from error


def _from_cache(folder: Path, opened: Callable[[Path], Rows]) -> Rows | None:
    """The rows in ``folder`` if it is complete; a damaged folder is removed."""
    if not folder.exists():
        return None
    try:
        return opened(folder)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("packed rows are damaged and made again: %s (%s)", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _publish(tmp: Path, folder: Path, opened: Callable[[Path], Rows]) -> Rows:
    """Rename finished rows to their final name and open them.

    Nothing is flushed to disk: hashes show damage when rows are read again.
    """
    try:
        tmp.rename(folder)
    except OSError:
        rows = _from_cache(folder, opened)  # another process may have packed the same rows first
        if rows is None:
            raise
        return rows
    return opened(folder)


def _sweep(cache_dir: Path) -> None:
    """Remove week-old temporary folders of processes that were killed while packing."""
    for path in cache_dir.glob(f"{TEMPORARY}rows-*"):
        with suppress(FileNotFoundError):  # another process has just finished or swept it
            if time.time() - path.stat().st_mtime > _WEEK:
                shutil.rmtree(path, ignore_errors=True)
