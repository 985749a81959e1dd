"""Documents in the tokens of two tokenizers, and the places where both have read the same.

A text is the same bytes for both. Of a conversation each side makes a text by its own chat
template: they have in common what the assistant says, and are compared there alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.chat import RenderedConversation, messages_of, render
from sad.data.formats.base import Document
from sad.data.packing import TextPiece, encode, text_batches, tokenize_batch
from sad.data.parallel import map_in_order
from sad.data.stream import Affixes
from sad.data.token_bytes import TokenBytes, token_bytes

COMPARED, BEGINS_GROUP, MEETING = 1, 2, 4
"""What a place is at which both have read the same, as bits of its flags: whether what comes next
can be compared, whether the text up to the next place is the same on both sides, and that it is
such a place at all."""

BOUNDARY = COMPARED | BEGINS_GROUP | MEETING


def own_config(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> DataConfig:
    """The configuration of one side: a ``document_end`` that its tokenizer lacks is one of the
    other's, and end-of-text stands for it."""
    if config.document_end is None or config.document_end in tokenizer.get_vocab():
        return config
    return replace(config, document_end=None)


class Side(NamedTuple):
    """A tokenizer, what it puts around texts, and the bytes of its tokens."""

    tokenizer: PreTrainedTokenizerFast
    affixes: Affixes
    bytes: TokenBytes
    config: DataConfig
    role: str  # "student" or "teacher"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, config: DataConfig, role: str) -> Side:
        """Raises ``UnfitError`` for a tokenizer without end-of-text, or whose tokens have no bytes
        that can be told."""
        config = own_config(config, tokenizer)
        affixes = Affixes.of(tokenizer, config)
        return cls(tokenizer, affixes, token_bytes(tokenizer, role), config, role)


class AlignedDocument(NamedTuple):
    """A document in the tokens of both sides, and where they meet as pairs of positions."""

    ids: tuple[np.ndarray, np.ndarray]  # int64 [n_s], [n_t]
    sizes: tuple[np.ndarray, np.ndarray]  # int64: bytes that each token stands for as a target
    pairs: np.ndarray  # int64 [places, 2]; the last is that of the last tokens
    flags: np.ndarray  # uint8 [places]: see BOUNDARY
    learned: tuple[np.ndarray, np.ndarray] | None = None  # bool: targets; None: all but the first
    whole: bool = False  # whether it may not be cut
    end_tokens: tuple[int | None, int | None] = (None, None)  # what ends it, if anything does
    empty_turns: int = 0

    @property
    def cuts(self) -> np.ndarray:
        """The places after which a row may end."""
        return self.pairs[-1:] if self.whole else self.pairs


def aligned(
    documents: Iterable[Document], sides: tuple[Side, Side], config: DataConfig
) -> Iterator[AlignedDocument | str]:
    """The documents that have tokens, aligned, or the reason to leave one out."""

    def align_batch(batch: Sequence[TextPiece]) -> list[_Piece | AlignedDocument | str]:
        return list(_align_pieces(batch, sides))

    pieces: list[_Piece] = []
    for batch in map_in_order(align_batch, text_batches(documents), config.num_proc):
        for piece in batch:
            if not isinstance(piece, _Piece):
                yield piece
                continue
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


def _align_pieces(
    batch: Sequence[TextPiece], sides: tuple[Side, Side]
) -> Iterator[_Piece | AlignedDocument | str]:
    texts = [piece.text for piece in batch]
    encoded = zip(*(encode(texts, side.tokenizer) for side in sides), strict=True)
    for piece, ((ours, _), (theirs, _)) in zip(batch, encoded, strict=True):
        if piece.conversation is not None:
            yield _align_conversation(piece.conversation, sides)
            continue
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
    known = [ends for ends in found if ends is not None]
    if len(known) < len(found):
        return _Piece(ids, None, ends_document, "changed")
    (ours, our_space), (theirs, their_space) = known
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
    whole = np.concatenate([whole, ends[(ends >= 0).all(1)]])
    flags = np.full(len(whole), BOUNDARY, dtype=np.uint8)
    flags[-1] = MEETING  # after end-of-text comes another document
    suffixes = [int(side.affixes.suffix[-1]) for side in sides]
    return AlignedDocument(
        (ids[0], ids[1]),
        (sizes[0], sizes[1]),
        whole,
        flags,
        end_tokens=(suffixes[0], suffixes[1]),
    )


class _Told(NamedTuple):
    """A conversation in the tokens of one side."""

    rendered: RenderedConversation
    ids: np.ndarray
    sizes: np.ndarray
    learned: np.ndarray
    end_token: int | None
    ends: np.ndarray  # the byte of its text at which each token ends
    spans: list[tuple[int, int]]  # bytes of what both sides have in common, in order


def _align_conversation(document: Document, sides: tuple[Side, Side]) -> AlignedDocument | str:
    """A conversation of both sides, whose places to compare lie in what the assistant says."""
    ours, theirs = (_tell(document, side) for side in sides)
    if isinstance(ours, str):
        return ours
    if isinstance(theirs, str):
        return theirs
    if len(ours.spans) != len(theirs.spans):
        return "template"
    both_end = all(len(side.affixes.suffix) == 1 for side in sides)  # as texts do
    pairs, flags = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.uint8)]
    for spans in zip(ours.spans, theirs.spans, strict=True):
        reached, found = [], []
        for side, of_side, (start, end) in zip(sides, (ours, theirs), spans, strict=True):
            inside = (of_side.ends >= start) & (of_side.ends <= end)
            reached.append(of_side.ends[inside] - start)
            special = _special_spans(of_side.ids, of_side.ends, side.bytes)
            found.append([(a - start, b - start) for a, b in special if start <= a < b <= end])
        if found[0] != found[1]:
            return "special"
        common = np.intersect1d(*reached)
        if not len(common):
            continue
        pairs.append(
            np.stack(
                [
                    np.searchsorted(of_side.ends, common + start, side="right") - 1
                    for of_side, (start, _) in zip((ours, theirs), spans, strict=True)
                ],
                axis=1,
            )
        )
        of_span = np.full(len(common), BOUNDARY, dtype=np.uint8)
        # What comes after it is each template's own, and so is a token that reaches out of it.
        size = spans[0][1] - spans[0][0]
        if common[-1] < size:
            of_span[-1] = MEETING | COMPARED
        elif ours.rendered.from_template or not both_end:
            of_span[-1] = MEETING
        flags.append(of_span)
    lasts = np.array([[len(ours.ids) - 1, len(theirs.ids) - 1]])
    places = np.concatenate(pairs)
    inner = (places < lasts).all(axis=1)
    return AlignedDocument(
        (ours.ids, theirs.ids),
        (ours.sizes, theirs.sizes),
        np.concatenate([places[inner], lasts]),
        np.append(np.concatenate(flags)[inner], np.uint8(MEETING)),
        learned=(ours.learned, theirs.learned),
        whole=True,
        end_tokens=(ours.end_token, theirs.end_token),
        empty_turns=ours.rendered.empty_turns,
    )


def _tell(document: Document, side: Side) -> _Told | str:
    config, said_only = side.config, False
    if side.role == "teacher" and config.assistant_only_loss:
        # Its template need not mark what the assistant says: that is looked for.
        config, said_only = replace(config, assistant_only_loss=False), True
    rendered = render(document, side.tokenizer, config)
    piece = TextPiece("", ends_document=True, conversation=document)
    ((ids, sizes, _, tokens),) = tokenize_batch([piece], side.tokenizer, config)
    assert tokens is not None
    text = rendered.text.encode()
    found = side.bytes.ends(ids.tolist(), text)
    if found is None:
        return "changed"
    ends, learned, end_token = found[0], tokens.learned.copy(), tokens.end_token
    spans = [(0, len(text))]
    if rendered.from_template:
        spans = _said(document, side.tokenizer, config, rendered.text)
        if spans is None:
            return "template"
        if said_only:
            begins = ends - side.bytes.sizes[ids]
            inside = [(begins < end) & (ends > start) for start, end in spans]
            learned &= np.any(inside, axis=0) if inside else False
    else:  # it is treated as a text is
        prefix, suffix = side.affixes
        begin, last = np.zeros_like(prefix), np.full_like(suffix, len(text) + 1)
        ids = np.concatenate([prefix, ids, suffix])
        sizes = np.concatenate([begin, sizes, np.zeros_like(suffix)])
        ends = np.concatenate([begin, ends, last])
        learned = np.concatenate([begin > 0, learned, last > 0])
        end_token = int(suffix[-1])
    learned[:1] = False  # the first token of a document is no target
    return _Told(rendered, ids, np.where(learned, sizes, 0), learned, end_token, ends, spans)


def _said(
    document: Document, tokenizer: PreTrainedTokenizerFast, config: DataConfig, text: str
) -> list[tuple[int, int]] | None:
    """The bytes of a rendered conversation that are what the assistant says, without white space
    around it; None if the chat template makes something else of it.

    Where it stands is found by a mark in place of each content: the content itself may stand in the
    template, too.
    """
    conversation = document.conversation
    assert conversation is not None
    given = messages_of(conversation)
    contents = [message.get("content") for message in given]
    said = [content if isinstance(content, str) else "" for content in contents]
    marks = [f"\ue000{number}\ue001" if text.strip() else "" for number, text in enumerate(said)]
    marked = [
        message | ({"content": mark} if mark else {})
        for message, mark in zip(given, marks, strict=True)
    ]
    prompt = len(conversation.prompt) if isinstance(conversation.prompt, list) else 0
    changed = conversation._replace(messages=marked)
    if isinstance(conversation.prompt, list):
        changed = conversation._replace(prompt=marked[:prompt], completion=marked[prompt:])
    rest = render(document._replace(conversation=changed), tokenizer, config).text
    spans, at = [], 0
    for message, content, mark in zip(given, said, marks, strict=True):
        if not mark:
            continue
        before, found, rest = rest.partition(mark)
        if not found or not text.startswith(before, at):
            return None
        at += len(before)
        for as_written in (content, content.strip()):  # some templates strip it
            after = at + len(as_written)
            if text.startswith(as_written, at) and _goes_on(text, after, rest):
                break
        else:
            return None
        start = at + as_written.index(content.strip())
        if message["role"] == "assistant":
            end = start + len(content.strip())
            spans.append((len(text[:start].encode()), len(text[:end].encode())))
        at = after
    return spans if text[at:] == rest else None


def _goes_on(text: str, at: int, rest: str) -> bool:
    """Whether a text goes on as a marked one does, up to its next mark."""
    return text.startswith(rest.partition("\ue000")[0], at)
