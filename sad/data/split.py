"""Split of the documents into training and held-out ones, by a hash of each document's name.

Documents are read twice in a run: once to hash their names and texts, once to be tokenized. In
between 16 bytes are kept of each.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import partial

import numpy as np

from sad.config.sections import DataConfig
from sad.data.documents import Document, SourceKey, read_documents, read_sources
from sad.data.formats.base import TEXT
from sad.environment import stop_if_requested
from sad.errors import UnfitError

logger = logging.getLogger(__name__)


class DocumentSet:
    """The training or the held-out documents; may be iterated any number of times.

    ``selected`` is a mask over the documents that ``read_documents(config, key)`` yields, and
    ``source_digest`` the hash of all of them; folders are read without ``run_dir``. An iteration
    that reads others than were hashed raises ``UnfitError`` at its end. ``times`` says how often
    each document is yielded: what is yielded again comes after all documents, in the same order,
    for copies side by side would share a row. ``num_bytes`` is the length of all that the sources
    hold, in UTF-8.
    """

    kinds: frozenset[str] = TEXT
    """The ``Document.kind`` of all documents of the source together."""
    num_bytes: int = 0
    """Length of what is yielded, about: as if documents were equally long."""

    def __init__(
        self,
        config: DataConfig,
        key: SourceKey,
        selected: np.ndarray,  # bool [documents read]
        source_digest: str,
        kinds: frozenset[str] = TEXT,
        *,
        times: np.ndarray | None = None,  # int64 [documents read]
        num_bytes: int = 0,
        run_dir: str | None = None,
    ) -> None:
        self.kinds = kinds
        self._run_dir = run_dir
        self._config = config
        self._key: SourceKey = key
        self._selected = selected
        self._source_digest = source_digest
        self._times = selected.astype(np.int64) if times is None else selected * times
        self.num_bytes = num_bytes * int(self._times.sum()) // max(len(selected), 1)

    @property
    def digest(self) -> str:
        """Equal only for the same texts in the same order."""
        mask = np.packbits(self._selected).tobytes()
        if (self._times != self._selected).any():
            mask += self._times.tobytes()
        return hashlib.blake2b(self._source_digest.encode() + mask, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._times.sum())

    def __iter__(self) -> Iterator[Document]:
        for time in range(max(int(self._times.max(initial=0)), 1)):
            yield from self._read_once(self._times > time)

    def _read_once(self, mask: np.ndarray) -> Iterator[Document]:
        digest = _TextDigest()
        documents = read_documents(self._config, self._key, run_dir=self._run_dir)
        for index, document in enumerate(documents):
            stop_if_requested(READING)
            digest.add(document)
            if index < len(mask) and mask[index]:
                yield document
        # Text that changed on disk would make the rows differ from their fingerprint.
        if digest.hex() != self._source_digest:
            raise UnfitError(
                f"data.{self._key} must stay as it is while it is read, got other text in the "
                "second pass than in the first; start again when nobody writes to it"
            )


def split_documents(
    config: DataConfig, *, run_dir: str | None = None
) -> tuple[DocumentSet, DocumentSet]:
    """The training documents and the held-out ones.

    With ``config.eval`` these are two sources. Otherwise a document is held out if the hash of its
    name, a number in [0, 1), is below ``eval_fraction``, so adding documents moves no other from
    one set to the other. Each set gets at least one document, which matters only for a handful of
    them. ``max_documents`` limits ``config.train`` before anything is held out, by another hash of
    the names. ``train_weights`` repeat or thin out training documents; what is held out is read
    once.

    Folders are read without ``run_dir``, the run's own directory.

    Raises ``UnfitError`` if a set would be empty, and whatever ``read_documents`` raises.
    """
    document_set = partial(DocumentSet, config, run_dir=run_dir)
    names, digest, kinds, num_bytes = _hash_documents(config, "train", run_dir)

    def train_set(mask: np.ndarray) -> DocumentSet:
        times = _times(names, mask, config) if config.weighted else None
        return document_set("train", mask, digest, kinds, times=times, num_bytes=num_bytes)

    selected = _smallest(names["limit"], config.max_documents)
    if config.eval:
        eval_names, eval_digest, eval_kinds, eval_bytes = _hash_documents(config, "eval", run_dir)
        everything = np.ones(len(eval_names), dtype=bool)
        held_out = document_set("eval", everything, eval_digest, eval_kinds, num_bytes=eval_bytes)
        return train_set(selected), held_out

    if selected.sum() < 2:
        raise UnfitError(
            "data.train must hold at least 2 documents so that one can be held out, got "
            f"{selected.sum()}; name held-out text in data.eval, or cut the text into documents "
            "with data.document_separator"
        )
    held_out = _held_out(names["split"], selected, config.eval_fraction)
    return (
        train_set(selected & ~held_out),
        document_set("train", selected & held_out, digest, kinds, num_bytes=num_bytes),
    )


READING = "reading the text"
"""What a stop signal interrupts."""

_NAME_HASH = np.dtype([("split", "<u8"), ("limit", "<u8"), ("source", "<u4")])
"""The halves of a name's 128-bit hash, and the number of its source: one half decides on holding
out, the other on ``max_documents`` and what a fraction of a weight takes."""


def _hash_documents(
    config: DataConfig, key: SourceKey, run_dir: str | None
) -> tuple[np.ndarray, str, frozenset[str], int]:
    """Read every document once; return the hashes of their names, one digest of all that they
    hold, their kinds, and the length of what they hold in UTF-8."""
    hashes, digest, kinds = bytearray(), _TextDigest(), TEXT - TEXT
    sources = read_sources(config, key, report=logger.warning, run_dir=run_dir)
    for source, document in sources:
        stop_if_requested(READING)
        hashes += hashlib.blake2b(
            document.name.encode(errors="surrogateescape"), digest_size=16
        ).digest()
        hashes += source.to_bytes(4, "little")
        digest.add(document)
        kinds |= document.kind
    if not hashes:
        raise UnfitError(
            f"data.{key} must hold text, got no document in {', '.join(getattr(config, key))} "
            "that is not empty; name other files"
        )
    return np.frombuffer(hashes, dtype=_NAME_HASH), digest.hex(), kinds, digest.num_bytes


def _smallest(hashes: np.ndarray, count: int | None) -> np.ndarray:
    """A mask of the ``count`` documents with the smallest hashes."""
    mask = np.ones(len(hashes), dtype=bool)
    mask[np.argsort(hashes, kind="stable")[len(hashes) if count is None else count :]] = False
    return mask


def _times(names: np.ndarray, mask: np.ndarray, config: DataConfig) -> np.ndarray:
    """How often each document of ``mask`` is read per epoch, int64: the whole part of its source's
    weight, and once more for the share of documents that the fraction is, by their hashes."""
    times = np.zeros(len(names), dtype=np.int64)
    for source, weight in enumerate(config.train_weights or ()):
        members = np.flatnonzero(mask & (names["source"] == source))
        order = np.argsort(names["limit"][members], kind="stable")
        times[members] = int(weight)
        times[members[order[: round(weight % 1 * len(members))]]] += 1
    return times


def _held_out(hashes: np.ndarray, candidates_mask: np.ndarray, fraction: float) -> np.ndarray:
    """A mask of the documents whose hash, as a number in [0, 1), is below ``fraction``."""
    candidates = np.flatnonzero(candidates_mask)
    held_out = hashes < np.uint64(fraction * 2**64)
    # At least one candidate on each side: this changes something only among a handful.
    held_out[candidates[np.argmin(hashes[candidates])]] = True
    held_out[candidates[np.argmax(hashes[candidates])]] = False
    return held_out


_CONVERSATION = b"\xff" * 8
"""Comes before a conversation in the hash: no text is so long that its length reads like this."""


class _TextDigest:
    """Hash of a sequence of documents; the boundaries between them count, too."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_bytes = 0

    def add(self, document: Document) -> None:
        encoded = document.text.encode()
        if document.conversation is not None:
            encoded = document.conversation.to_json().encode()
            self._hash.update(_CONVERSATION)
        self.num_bytes += len(encoded)
        self._hash.update(len(encoded).to_bytes(8, "little"))
        self._hash.update(encoded)

    def hex(self) -> str:
        return self._hash.hexdigest()
