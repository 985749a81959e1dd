"""Split of the documents into training and held-out ones, by a hash of each document's name.

Documents are read twice in a run: once to hash their names and texts, once to be tokenized. In
between 16 bytes are kept of each.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator

import numpy as np

from sad.config.sections import DataConfig
from sad.data.documents import Document, SourceKey, read_documents
from sad.data.formats.base import TEXT
from sad.errors import UnfitError

logger = logging.getLogger(__name__)


class DocumentSet:
    """The training or the held-out documents; may be iterated any number of times.

    ``selected`` is a mask over the documents that ``read_documents(config, key)`` yields, and
    ``source_digest`` the hash of all of them. An iteration that reads others than were hashed
    raises ``UnfitError`` at its end.
    """

    kinds: frozenset[str] = TEXT
    """The ``Document.kind`` of all documents of the source together."""

    def __init__(
        self,
        config: DataConfig,
        key: SourceKey,
        selected: np.ndarray,  # bool [documents read]
        source_digest: str,
        kinds: frozenset[str] = TEXT,
    ) -> None:
        self.kinds = kinds
        self._config = config
        self._key: SourceKey = key
        self._selected = selected
        self._source_digest = source_digest

    @property
    def digest(self) -> str:
        """Equal only for the same texts in the same order."""
        mask = np.packbits(self._selected).tobytes()
        return hashlib.blake2b(self._source_digest.encode() + mask, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._selected.sum())

    def __iter__(self) -> Iterator[Document]:
        digest = _TextDigest()
        for index, document in enumerate(read_documents(self._config, self._key)):
            digest.add(document)
            if index < len(self._selected) and self._selected[index]:
                yield document
        # Text that changed on disk would make the rows differ from their fingerprint.
        if digest.hex() != self._source_digest:
            raise UnfitError(
                f"data.{self._key} must stay as it is while it is read, got other text in the "
                "second pass than in the first; start again when nobody writes to it"
            )


def split_documents(config: DataConfig) -> tuple[DocumentSet, DocumentSet]:
    """The training documents and the held-out ones.

    With ``config.eval`` these are two sources. Otherwise a document is held out if the hash of its
    name, a number in [0, 1), is below ``eval_fraction``, so adding documents moves no other from
    one set to the other. Each set gets at least one document, which matters only for a handful of
    them. ``max_documents`` limits ``config.train`` before anything is held out, by another hash of
    the names.

    Raises ``UnfitError`` if a set would be empty, and whatever ``read_documents`` raises.
    """
    names, digest, kinds = _hash_documents(config, "train")
    selected = _smallest(names["limit"], config.max_documents)
    if config.eval:
        eval_names, eval_digest, eval_kinds = _hash_documents(config, "eval")
        everything = np.ones(len(eval_names), dtype=bool)
        train = DocumentSet(config, "train", selected, digest, kinds)
        return train, DocumentSet(config, "eval", everything, eval_digest, eval_kinds)

    if selected.sum() < 2:
        raise UnfitError(
            "data.train must hold at least 2 documents so that one can be held out, got "
            f"{selected.sum()}; name held-out text in data.eval, or cut the text into documents "
            "with data.document_separator"
        )
    held_out = _held_out(names["split"], selected, config.eval_fraction)
    return (
        DocumentSet(config, "train", selected & ~held_out, digest, kinds),
        DocumentSet(config, "train", selected & held_out, digest, kinds),
    )


_NAME_HASH = np.dtype([("split", "<u8"), ("limit", "<u8")])
"""The halves of a name's 128-bit hash: one decides on holding out, one on ``max_documents``."""


def _hash_documents(config: DataConfig, key: SourceKey) -> tuple[np.ndarray, str, frozenset[str]]:
    """Read every document once; return the hashes of their names, one digest of all that they
    hold, and their kinds."""
    hashes, digest, kinds = bytearray(), _TextDigest(), TEXT - TEXT
    for document in read_documents(config, key, report=logger.warning):
        hashes += hashlib.blake2b(
            document.name.encode(errors="surrogateescape"), digest_size=16
        ).digest()
        digest.add(document)
        kinds |= document.kind
    if not hashes:
        raise UnfitError(
            f"data.{key} must hold text, got no document in {', '.join(getattr(config, key))} "
            "that is not empty; name other files"
        )
    return np.frombuffer(hashes, dtype=_NAME_HASH), digest.hex(), kinds


def _smallest(hashes: np.ndarray, count: int | None) -> np.ndarray:
    """A mask of the ``count`` documents with the smallest hashes."""
    mask = np.ones(len(hashes), dtype=bool)
    mask[np.argsort(hashes, kind="stable")[len(hashes) if count is None else count :]] = False
    return mask


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

    def add(self, document: Document) -> None:
        encoded = document.text.encode()
        if document.conversation is not None:
            encoded = document.conversation.to_json().encode()
            self._hash.update(_CONVERSATION)
        self._hash.update(len(encoded).to_bytes(8, "little"))
        self._hash.update(encoded)

    def hex(self) -> str:
        return self._hash.hexdigest()
