"""Tokenizing documents and packing them into rows, written to a folder once.

A document of text is tokenized as ``tokenizer(text)`` would, BOS included, and ended by one token;
a conversation is what the chat template makes of it. All documents are concatenated into one token
stream, and a row is a window of at most ``L = max_length`` inputs on it. The target of an input is
the next token of the stream, if that belongs to the same document and is learned: not BOS, and not
the *context* of a conversation, which its prompt is.

* Packed: several documents share a row without attending to each other. A text that does not end
  there goes on in the next row, where it does not see its beginning. A conversation, or a prompt
  with its completion, is never cut: one that does not fit into the row begins the next.
* Not packed: a row holds one document; a text longer than L goes on in the next rows.

Conversations longer than L are left out or cut (``data.truncation``), and so are those in which
nothing is learned; the index counts them.

The folder holds the stream, the offsets of its documents, the places where a new row begins in
spite of room in the last, the spans of context, the number of UTF-8 bytes of each row's targets,
and an index with a hash of each file. Rows are not stored: ``cut_rows`` computes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.chat import RenderedConversation, render
from sad.data.documents import Document
from sad.data.formats.base import TEXT
from sad.data.parallel import map_in_order
from sad.data.split import DocumentSet
from sad.data.stream import Affixes, ConversationTokens, TokenPiece, TokenStream, describe_counts
from sad.data.tokenizers import (
    document_end_id,
    fingerprint,
    special_affixes,
    special_ids,
    valid_vocab,
)
from sad.environment import stop_if_requested
from sad.errors import UnfitError
from sad.expected import boolean, every, integer, mapping, one_of, record, string

FORMAT = 1
"""Part of the fingerprint, so that rows packed by other rules are never read."""

INDEX = "index.json"
TOKENS = "tokens.bin"  # the stream, in the index's token_dtype
DOCUMENTS = "documents.bin"  # int64: where each document begins in the stream
ROW_STARTS = "row_starts.bin"  # int64: documents before which the last row ends; packed rows only
CONTEXT = "context.bin"  # int64 pairs: spans of the stream that are no targets
TARGET_BYTES = "target_bytes.bin"  # int64, one per row

CONVERSATION_FORMAT = 2
"""The same for conversations alone."""

_BATCH_CHARS = 1 << 18  # a token takes about 0.8 KB until it is written (transformers 5.23)
_BATCH_TEXTS = 4096
_HASH_BYTES = 1 << 20

PACKING = "packing the text"
"""What a stop signal interrupts: the next start packs it again."""


def fingerprint_rows(
    documents: DocumentSet,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    packing: bool,
    config: DataConfig,
) -> str:
    """Hash of everything that decides the rows' content: 32 hexadecimal digits.

    What changes nothing for these documents is left out, so that rows that were packed before a key
    existed keep their name, and a run on them can be resumed.
    """
    deciding: dict[str, Any] = {}
    if config.add_special_tokens and any(special_affixes(tokenizer)):
        deciding["add_special_tokens"] = True
    end = document_end_id(tokenizer, config.document_end)
    if end != tokenizer.eos_token_id:
        deciding["document_end"] = end
    if documents.kinds != TEXT:
        deciding["conversations"] = [
            CONVERSATION_FORMAT,
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            special_ids(tokenizer),
            config.completion_only_loss,
            config.assistant_only_loss,
            config.truncation,
        ]
    return _digest(
        format=FORMAT,
        documents=documents.digest,
        tokenizer=fingerprint(tokenizer),
        max_length=max_length,
        packing=packing,
        **deciding,
    )


def write_rows(
    folder: Path,
    name: str,
    documents: DocumentSet,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    packing: bool,
    config: DataConfig,
) -> None:
    """Write the packed rows of ``documents`` to an empty folder; ``name`` is their fingerprint.

    Memory hardly grows with the text: documents are tokenized in batches of 2^18 characters. A
    longer text is cut for that, after the last line end before the limit, which can change a token
    at the cut.

    Raises ``UnfitError`` if the tokenizer has no end-of-text token, a conversation does not fit the
    chat template, or the documents give no tokens.
    """
    affixes = Affixes.of(tokenizer, config)
    token_dtype = "<u2" if valid_vocab(tokenizer) <= 1 << 16 else "<i4"
    # Bytes per token are needed until the rows are cut, and only their sums per row are kept.
    token_bytes = folder / "token_bytes.bin"
    with (folder / TOKENS).open("wb") as ids_file, token_bytes.open("wb") as sizes_file:
        stream = TokenStream(
            ids_file, sizes_file, token_dtype, max_length, affixes, config.truncation
        )
        bar = tqdm(documents, desc="tokenizing", unit=" documents", leave=False, disable=None)
        for piece in tokenize(bar, tokenizer, config):
            stop_if_requested(PACKING)
            stream.add(piece)
    stream.warn()
    if stream.num_tokens == 0:
        if any(stream.counts.values()):
            raise UnfitError(
                f"data must hold a conversation that can be learned from, got "
                f"{describe_counts(stream.counts, max_length)} among {len(documents)} documents; "
                f"{_remedy(stream.counts, config)}"
            )
        raise UnfitError(
            f"data must hold text that the tokenizer knows, got no token from {len(documents)} "
            "documents; choose another tokenizer"
        )
    arrays = {DOCUMENTS: np.array(stream.documents, dtype="<i8")}
    if stream.context:
        arrays[CONTEXT] = np.array(stream.context, dtype="<i8")
    if len(stream.row_starts) > 1 and packing:
        arrays[ROW_STARTS] = np.array(stream.row_starts, dtype="<i8")
    breaks = row_breaks(arrays[DOCUMENTS], arrays.get(ROW_STARTS), packing=packing)
    rows = cut_rows(breaks, stream.num_tokens, max_length)
    arrays[TARGET_BYTES] = sum_over_targets(token_bytes, *rows)
    for file_name, content in arrays.items():
        content.tofile(folder / file_name)
    token_bytes.unlink()

    index = {
        "fingerprint": name,
        "max_length": max_length,
        "packing": packing,
        "token_dtype": token_dtype,
        "max_token_id": stream.max_token_id,
        "end_tokens": sorted(stream.end_tokens),
        "counts": stream.counts,
    }
    write_index(folder, index, (TOKENS, *arrays))


def write_index(folder: Path, index: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write the index of packed rows, with a hash of each of their files and one of itself.

    It comes last: a folder without its index is never read.
    """
    index = {**index, "files": {name: _file_digest(folder / name) for name in names}}
    content = json.dumps(index | {"digest": _digest(**index)}, indent=2)
    (folder / INDEX).write_text(content, encoding="utf-8")


def _remedy(counts: Mapping[str, int], config: DataConfig) -> str:
    """What to do about conversations of which none can be learned from."""
    if counts["longer"]:
        return "raise max_length, or set data.truncation"
    if counts["cut"]:
        return "raise max_length, or keep the other end in data.truncation"
    if config.assistant_only_loss:
        return "add what the assistant says, or leave out data.assistant_only_loss"
    return "give each prompt its completion"


def read_index(folder: Path) -> dict[str, Any]:
    """The index of packed rows on disk.

    Raises ``ValueError``, ``KeyError`` or ``OSError`` if it is not as ``write_rows`` left it.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{INDEX} is nested too deeply") from error
    if not isinstance(index, dict):
        raise ValueError(f"{INDEX} is not a JSON object")
    if index.pop("digest") != _digest(**index):
        raise ValueError(f"{INDEX} does not match its digest")
    _INDEX(index, INDEX)
    return index


_INDEX = record(
    {
        "fingerprint": string,
        "max_length": integer(1),
        "packing": boolean,
        "token_dtype": one_of("<u2", "<i4"),
        "max_token_id": integer(0),
        "files": mapping(string),
    },
    optional={"end_tokens": every(integer(0)), "counts": mapping(integer(0))},
)


def read_array(folder: Path, name: str, index: dict[str, Any]) -> np.ndarray:
    """A file of int64; none if these rows have no such file.

    Its bytes are read once, and checked against their hash: raises like ``read_index``.
    """
    if name not in index["files"]:
        return np.zeros(0, dtype="<i8")
    content = (folder / name).read_bytes()
    if hashlib.blake2b(content, digest_size=16).hexdigest() != index["files"][name]:
        raise ValueError(f"{name} does not match its digest")
    return np.frombuffer(content, dtype="<i8")


def _digest(**fields: Any) -> str:
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_HASH_BYTES):
            stop_if_requested(PACKING)
            digest.update(chunk)
    return digest.hexdigest()


def row_breaks(
    documents: np.ndarray, row_starts: np.ndarray | None, *, packing: bool
) -> np.ndarray:
    """Positions of the stream where a new row begins whatever room the last one has left."""
    if not packing:
        return documents
    return documents[:1] if row_starts is None else row_starts


def cut_rows(breaks: np.ndarray, num_tokens: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First input and number of inputs of each row, both [rows].

    From one break to the next, rows follow each other without a gap. The last token before a break
    is never an input: it has no target.
    """
    inputs = np.diff(breaks, append=num_tokens) - 1
    rows = -(-inputs // max_length)  # rounded up
    part = np.repeat(np.arange(len(breaks)), rows)
    row_in_part = np.arange(len(part)) - np.repeat(np.cumsum(rows) - rows, rows)
    offset = row_in_part * max_length
    return breaks[part] + offset, np.minimum(max_length, inputs[part] - offset)


def sum_over_targets(token_bytes: Path, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of each row's targets, int64 [rows]."""
    with token_bytes.open("rb") as file:

        def total(start: int, length: int) -> int:
            stop_if_requested(PACKING)
            file.seek((start + 1) * 4)
            sizes = np.frombuffer(file.read(length * 4), dtype="<u4")
            if len(sizes) != length:
                raise OSError(f"{token_bytes} was cut while it was read")
            return int(sizes.sum(dtype=np.int64))

        spans = zip(starts.tolist(), lengths.tolist(), strict=True)
        sums = (total(start, length) for start, length in spans)
        return np.fromiter(sums, dtype="<i8", count=len(starts))


# Tokenizing


class TextPiece(NamedTuple):
    """Part of a document that is tokenized at once: the whole of it, unless it is very long."""

    text: str
    ends_document: bool
    conversation: Document | None = None  # whose text is not rendered yet


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, config: DataConfig
) -> Iterator[TokenPiece]:
    def pieces_of(batch: Sequence[TextPiece]) -> list[TokenPiece]:
        return list(tokenize_batch(batch, tokenizer, config))

    # The batches, and so the bytes written, do not depend on the number of processes.
    for pieces in map_in_order(pieces_of, text_batches(documents), config.num_proc):
        yield from pieces


def tokenize_batch(
    pieces: Sequence[TextPiece], tokenizer: PreTrainedTokenizerFast, config: DataConfig
) -> Iterator[TokenPiece]:
    """The tokens of texts, and of conversations by the chat template."""
    rendered = [
        None if piece.conversation is None else render(piece.conversation, tokenizer, config)
        for piece in pieces
    ]
    texts = [
        piece.text if conversation is None else conversation.text
        for piece, conversation in zip(pieces, rendered, strict=True)
    ]
    encoded = encode(texts, tokenizer)
    prompts = encode([r.prompt for r in rendered if r is not None and r.prompt], tokenizer)
    special = special_ids(tokenizer) if any(rendered) else []
    for piece, conversation, text, (ids, offsets) in zip(
        pieces, rendered, texts, encoded, strict=True
    ):
        tokens = np.array(ids, dtype=np.int64)
        sizes = _utf8_bytes(text, offsets)
        if piece.conversation is None or conversation is None:
            yield TokenPiece(tokens, sizes, piece.ends_document)
            continue
        prompt = next(prompts)[0] if conversation.prompt else []
        name = piece.conversation.name
        _require_prefix(prompt, ids, name, tokenizer)
        learned = _learned(conversation, offsets, len(prompt))
        end_token = None
        if conversation.from_template:
            is_special = np.isin(tokens, special)
            sizes = np.where(is_special, 0, sizes)  # they stand for no text
            end_token = _end_token(tokens, is_special & learned, text, offsets)
        details = name, learned, conversation.from_template, end_token, conversation.empty_turns
        yield TokenPiece(tokens, sizes, True, ConversationTokens(*details))


Offsets = Sequence[tuple[int, int]]
"""First character of each token, and the one after its last."""


def encode(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], Offsets]]:
    if not texts:
        return
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,  # it would warn of texts longer than the model's context
    )
    yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def _learned(conversation: RenderedConversation, offsets: Offsets, num_prompt: int) -> np.ndarray:
    """Whether each token of a conversation is a target: in one of its spans, past its prompt."""
    learned = np.ones(len(offsets), dtype=bool)
    if conversation.spans is not None:
        bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        learned[:] = False
        for start, end in conversation.spans:
            learned |= (bounds[:, 0] < end) & (bounds[:, 1] > start)
    learned[:num_prompt] = False
    return learned


def _end_token(ids: np.ndarray, candidates: np.ndarray, text: str, offsets: Offsets) -> int | None:
    """The last of the special tokens that are learned, if only white space comes after it."""
    for last in np.flatnonzero(candidates)[-1:]:
        if not text[offsets[last][1] :].strip():
            return int(ids[last])
    return None


def _require_prefix(
    prompt: Sequence[int], ids: Sequence[int], name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise ``UnfitError`` unless ``ids`` begin with those of the prompt alone: the student would
    learn to go on from what it never gets to see."""
    same = 0
    while same < len(prompt) and prompt[same : same + 1] == ids[same : same + 1]:
        same += 1
    if same < len(prompt):
        alone, joined = (
            tokenizer.decode(list(tokens[same : same + 8])) for tokens in (prompt, ids)
        )
        raise UnfitError(
            f"{name} must begin with the tokens of its prompt alone, got {joined!r} where the "
            f"prompt alone has {alone!r}; end the prompt where a token ends (move white space to "
            "the completion), or take a chat template that writes a prompt as it does before an "
            "answer"
        )


def text_batches(documents: Iterable[Document]) -> Iterator[list[TextPiece]]:
    """Pieces of documents, in order, about as many characters at a time as one call tokenizes."""
    batch: list[TextPiece] = []
    chars = 0
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            chars += _num_chars(piece)
            if chars >= _BATCH_CHARS or len(batch) >= _BATCH_TEXTS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _num_chars(piece: TextPiece) -> int:
    """Characters of a piece; of a conversation, about as many."""
    document = piece.conversation
    if document is None or document.conversation is None:
        return len(piece.text)
    return len(document.conversation.to_json())


def _pieces(document: Document) -> Iterator[TextPiece]:
    """Cut a text after line ends, where there are any, into pieces of ``_BATCH_CHARS`` at most."""
    if document.conversation is not None:
        yield TextPiece("", ends_document=True, conversation=document)
        return
    text = document.text
    start = 0
    while len(text) - start > _BATCH_CHARS:
        limit = start + _BATCH_CHARS
        cut = text.rfind("\n", start, limit) + 1 or limit
        yield TextPiece(text[start:cut], ends_document=False)
        start = cut
    yield TextPiece(text[start:], ends_document=True)


def _utf8_bytes(text: str, offsets: Offsets) -> np.ndarray:
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
