"""Which documents train and which are held out: decided by a hash of each document's name.

Documents are read twice in a run: once for their names and a digest of their text, once to be used.
In between 16 bytes are kept of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from sad.config.schema import DataConfig
from sad.data.documents import Document, Side, read_documents
from sad.errors import UnfitError


class DocumentSet:
    """Documents of one side of a split; may be iterated any number of times.

    ``chosen`` says which of the documents that ``read_documents(config, side)`` yields belong here;
    ``source_digest`` is the hash of all their texts. An iteration whose sources give other texts by
    now raises ``UnfitError`` at its end.
    """

    def __init__(
        self,
        config: DataConfig,
        side: Side,
        chosen: np.ndarray,  # bool [documents read]
        source_digest: str,
    ) -> None:
        self._config = config
        self._side: Side = side
        self._chosen = chosen
        self._source_digest = source_digest

    @property
    def digest(self) -> str:
        """Equal only for the same texts in the same order."""
        mask = np.packbits(self._chosen).tobytes()
        return hashlib.blake2b(self._source_digest.encode() + mask, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._chosen.sum())

    def __iter__(self) -> Iterator[Document]:
        digest = _TextDigest()
        for index, document in enumerate(read_documents(self._config, self._side)):
            digest.add(document.text)
            if index < len(self._chosen) and self._chosen[index]:
                yield document
        if digest.hex() != self._source_digest:
            raise UnfitError(
                f"data.{self._side} must stay as it is while it is read, got other text in the "
                "second pass than in the first; start again when nobody writes to it"
            )


def split_documents(config: DataConfig) -> tuple[DocumentSet, DocumentSet]:
    """The training documents and the held-out ones.

    With ``config.eval`` these are two sources. Otherwise a document is held out if the hash of its
    name, a number in [0, 1), is below ``eval_fraction``, so adding documents moves no other from
    one side to the other. Each side gets at least one document, which decides only among a handful.
    ``max_documents`` limits ``config.train`` before anything is held out, by another hash of the
    names.

    Raises ``UnfitError`` if a side would be empty, and whatever ``read_documents`` raises.
    """
    names, digest = _survey(config, "train")
    wanted = _smallest(names["limit"], config.max_documents)
    if config.eval:
        eval_names, eval_digest = _survey(config, "eval")
        everything = np.ones(len(eval_names), dtype=bool)
        train = DocumentSet(config, "train", wanted, digest)
        return train, DocumentSet(config, "eval", everything, eval_digest)

    if wanted.sum() < 2:
        raise UnfitError(
            "data.train must hold at least 2 documents so that one can be held out, got "
            f"{wanted.sum()}; name held-out text in data.eval, or cut the text into documents with "
            "data.document_separator"
        )
    held_out = _held_out(names["split"], wanted, config.eval_fraction)
    return (
        DocumentSet(config, "train", wanted & ~held_out, digest),
        DocumentSet(config, "train", wanted & held_out, digest),
    )


_NAME_HASH = np.dtype([("split", "<u8"), ("limit", "<u8")])


def _survey(config: DataConfig, side: Side) -> tuple[np.ndarray, str]:
    """Read everything once: the hash of each document's name and the digest of all texts."""
    hashes, digest = bytearray(), _TextDigest()
    for document in read_documents(config, side):
        hashes += hashlib.blake2b(
            document.name.encode(errors="surrogateescape"), digest_size=16
        ).digest()
        digest.add(document.text)
    if not hashes:
        raise UnfitError(
            f"data.{side} must hold text, got no document in {', '.join(getattr(config, side))} "
            "that is not empty; name other files"
        )
    return np.frombuffer(hashes, dtype=_NAME_HASH), digest.hex()


def _smallest(hashes: np.ndarray, count: int | None) -> np.ndarray:
    """A mask of the ``count`` documents with the smallest hashes."""
    mask = np.ones(len(hashes), dtype=bool)
    mask[np.argsort(hashes, kind="stable")[len(hashes) if count is None else count :]] = False
    return mask


def _held_out(hashes: np.ndarray, among: np.ndarray, fraction: float) -> np.ndarray:
    candidates = np.flatnonzero(among)
    held_out = hashes < np.uint64(fraction * 2**64)
    # This changes something only where a handful of documents all fell on one side.
    held_out[candidates[np.argmin(hashes[candidates])]] = True
    held_out[candidates[np.argmax(hashes[candidates])]] = False
    return held_out


class _TextDigest:
    """Hash of a sequence of texts that also tells where one ends."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        encoded = text.encode()
        self._hash.update(len(encoded).to_bytes(8, "little"))
        self._hash.update(encoded)

    def hex(self) -> str:
        return self._hash.hexdigest()
