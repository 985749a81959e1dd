"""Tokenizing documents and packing them into rows, written to a folder once.

Every document is tokenized and ended by the end-of-text token. All of them are concatenated into
one token stream, and a row is a window of at most ``L = max_length`` inputs on it. The target of an
input is the next token of the stream, if that belongs to the same document: each token except the
first of a document is a target exactly once, wherever rows are cut.

* Packed: row ``r`` begins at input ``r * L``. Several documents share a row without attending to
  each other; a long one goes on in the next row, where it does not see its beginning.
* Not packed: a row holds one document; one longer than L goes on in the next rows.

Only a row that runs out of inputs is padded, on the right.

The folder holds the stream, the offsets of its documents, the number of UTF-8 bytes of each row's
targets, and an index with a hash of each file. Rows are not stored: ``cut_rows`` computes them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sad.data.documents import Document
from sad.data.split import DocumentSet
from sad.data.tokenizers import fingerprint, valid_vocab
from sad.errors import UnfitError

FORMAT = 1
"""Part of the fingerprint, so that rows packed by other rules are never read."""

INDEX = "index.json"
TOKENS = "tokens.bin"  # the stream, in the index's token_dtype
DOCUMENTS = "documents.bin"  # int64: where each document begins in the stream
TARGET_BYTES = "target_bytes.bin"  # int64, one per row

_BATCH_CHARS = 1 << 18  # a token takes about 0.8 KB until it is written (transformers 5.23)
_BATCH_TEXTS = 4096


def fingerprint_rows(
    documents: DocumentSet, tokenizer: PreTrainedTokenizerFast, max_length: int, *, packing: bool
) -> str:
    """Hash of everything that decides the rows' content: 32 hexadecimal digits."""
    return _digest(
        format=FORMAT,
        documents=documents.digest,
        tokenizer=fingerprint(tokenizer),
        max_length=max_length,
        packing=packing,
    )


def write_rows(
    folder: Path,
    name: str,
    documents: DocumentSet,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    packing: bool,
) -> None:
    """Write the packed rows of ``documents`` to an empty folder; ``name`` is their fingerprint.

    Memory hardly grows with the text: documents are tokenized in batches of 2^18 characters. A
    longer document is cut for that, after the last line end before the limit, which can change a
    token at the cut.

    Raises ``UnfitError`` if the tokenizer has no end-of-text token or the documents give no tokens.
    """
    end_of_text = tokenizer.eos_token_id
    if not isinstance(end_of_text, int):
        raise UnfitError(
            "tokenizer must have an end-of-text token, got none; set eos_token in its "
            "tokenizer_config.json"
        )
    token_dtype = "<u2" if valid_vocab(tokenizer) <= 1 << 16 else "<i4"
    # Bytes per token are needed until the rows are cut, and only their sums per row are kept.
    token_bytes = folder / "token_bytes.bin"
    with (folder / TOKENS).open("wb") as ids_file, token_bytes.open("wb") as sizes_file:
        bar = tqdm(documents, desc="tokenizing", unit=" documents", leave=False, disable=None)
        pieces = _tokenize(bar, tokenizer)
        stream = _write_stream(pieces, end_of_text, token_dtype, ids_file, sizes_file)
    if stream.num_tokens == 0:
        raise UnfitError(
            f"data must hold text that the tokenizer knows, got no token from {len(documents)} "
            "documents; choose another tokenizer"
        )
    stream.documents.tofile(folder / DOCUMENTS)
    rows = cut_rows(stream.documents, stream.num_tokens, max_length, packing=packing)
    _sum_over_targets(token_bytes, *rows).tofile(folder / TARGET_BYTES)
    token_bytes.unlink()

    # Written last: a folder without its index is never read.
    index = {
        "fingerprint": name,
        "max_length": max_length,
        "packing": packing,
        "token_dtype": token_dtype,
        "max_token_id": stream.max_token_id,
        "files": {n: _file_digest(folder / n) for n in (TOKENS, DOCUMENTS, TARGET_BYTES)},
    }
    content = json.dumps(index | {"digest": _digest(**index)}, indent=2)
    (folder / INDEX).write_text(content, encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of packed rows on disk; every byte of every file is checked against its hash.

    Raises ``ValueError``, ``KeyError`` or ``OSError`` if anything is not as ``write_rows`` left it.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise ValueError(f"{INDEX} is not a JSON object")
    if index.pop("digest") != _digest(**index):
        raise ValueError(f"{INDEX} does not match its digest")
    for name, expected in index["files"].items():
        if _file_digest(folder / name) != expected:
            raise ValueError(f"{name} does not match its digest")
    return index


def _digest(**fields: Any) -> str:
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def cut_rows(
    documents: np.ndarray, num_tokens: int, max_length: int, *, packing: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First input and number of inputs of each row, both [rows].

    The last token of a stream is never an input, and unpacked neither is that of a document: it
    has no target.
    """
    if packing:
        starts = np.arange(0, num_tokens - 1, max_length)
        return starts, np.minimum(max_length, num_tokens - 1 - starts)
    inputs = np.diff(documents, append=num_tokens) - 1
    rows = -(-inputs // max_length)  # rounded up
    document = np.repeat(np.arange(len(documents)), rows)
    row_in_document = np.arange(len(document)) - np.repeat(np.cumsum(rows) - rows, rows)
    offset = row_in_document * max_length
    return documents[document] + offset, np.minimum(max_length, inputs[document] - offset)


class _Stream(NamedTuple):
    documents: np.ndarray  # int64: where each begins
    num_tokens: int
    max_token_id: int


def _write_stream(
    pieces: Iterable[_TokenPiece],
    end_of_text: int,
    token_dtype: str,
    ids_file: BinaryIO,
    sizes_file: BinaryIO,
) -> _Stream:
    """Write the token ids and, as uint32, the UTF-8 bytes that each of them stands for.

    The first token of a document, which is never a target, and end-of-text, which stands for no
    text, get 0 bytes. A document without tokens leaves nothing in the stream.
    """
    starts, num_tokens, max_token_id = array("q"), 0, 0
    in_document = False
    for ids, sizes, ends_document in pieces:
        if not in_document and len(ids):
            in_document = True
            starts.append(num_tokens)
            sizes[0] = 0  # never a target
        if in_document and ends_document:
            in_document = False
            ids = np.append(ids, end_of_text)
            sizes = np.append(sizes, 0)
        ids_file.write(ids.astype(token_dtype).tobytes())
        sizes_file.write(sizes.astype("<u4").tobytes())
        num_tokens += len(ids)
        max_token_id = max(max_token_id, int(ids.max(initial=0)))
    return _Stream(np.array(starts, dtype="<i8"), num_tokens, max_token_id)


def _sum_over_targets(token_bytes: Path, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of each row's targets, int64 [rows]."""
    sizes = np.memmap(token_bytes, dtype="<u4", mode="r")
    sums = (
        int(sizes[start + 1 : start + length + 1].sum(dtype=np.int64))
        for start, length in zip(starts, lengths, strict=True)
    )
    return np.fromiter(sums, dtype="<i8", count=len(starts))


# Tokenizing


class _TextPiece(NamedTuple):
    """Part of a document that is tokenized at once: the whole of it, unless it is very long."""

    text: str
    ends_document: bool


class _TokenPiece(NamedTuple):
    """The tokens of a ``_TextPiece``."""

    ids: np.ndarray  # int64
    sizes: np.ndarray  # int64: UTF-8 bytes that each token stands for
    ends_document: bool


def _tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[_TokenPiece]:
    for pieces in _batches(documents):
        yield from _tokenize_batch(pieces, tokenizer)


def _tokenize_batch(
    pieces: Sequence[_TextPiece], tokenizer: PreTrainedTokenizerFast
) -> Iterator[_TokenPiece]:
    encoded = tokenizer(
        [piece.text for piece in pieces],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,  # it would warn of texts longer than the model's context
    )
    every_ids, every_offsets = encoded["input_ids"], encoded["offset_mapping"]
    for piece, ids, offsets in zip(pieces, every_ids, every_offsets, strict=True):
        sizes = _utf8_bytes(piece.text, offsets)
        yield _TokenPiece(np.array(ids, dtype=np.int64), sizes, piece.ends_document)


def _batches(documents: Iterable[Document]) -> Iterator[list[_TextPiece]]:
    batch: list[_TextPiece] = []
    chars = 0
    for document in documents:
        for piece in _pieces(document.text):
            batch.append(piece)
            chars += len(piece.text)
            if chars >= _BATCH_CHARS or len(batch) >= _BATCH_TEXTS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[_TextPiece]:
    """Cut a text after line ends, where there are any, into pieces of ``_BATCH_CHARS`` at most."""
    start = 0
    while len(text) - start > _BATCH_CHARS:
        limit = start + _BATCH_CHARS
        cut = text.rfind("\n", start, limit) + 1 or limit
        yield _TextPiece(text[start:cut], ends_document=False)
        start = cut
    yield _TextPiece(text[start:], ends_document=True)


def _utf8_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of ``text`` that each token stands for, int64; they add up to its length.

    Offsets count characters. Tokens that share a character (byte tokens) have equal offsets: the
    first of them gets its bytes. Characters that no token covers (white space that a tokenizer
    drops) go to the next token, at the end of the text to the last.
    """
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    ends[-1] = len(text)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    # UTF-8 takes 1 byte for code points below 0x80 and one more past each of these limits.
    widths = np.ones(len(text), dtype=np.int64)
    for first_wider in (0x80, 0x800, 0x10000):
        widths += code_points >= first_wider
    bytes_before = np.concatenate(([0], np.cumsum(widths)))
    # A token's bytes run from the end of the tokens before it to its own.
    return np.diff(bytes_before[np.maximum.accumulate(ends)], prepend=0)
