"""The stream of tokens that rows are windows on: what is put around texts, left out and counted."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping
from typing import BinaryIO, Literal, NamedTuple, assert_never

import numpy as np
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.tokenizers import document_end_id, special_affixes
from sad.errors import printable

logger = logging.getLogger(__name__)

COUNTS = {
    "longer": "left out for more than {max_length:,} tokens",
    "no_target": "left out with nothing to learn",
    "cut": "cut to {max_length:,} tokens",
    "empty_turn": "with an empty answer",
}
"""What is counted of conversations, and in which words it is told."""

ALIGNMENT_COUNTS = {
    "changed": "left out because a tokenizer changes the text",
    "special": "left out for a special token that one tokenizer alone has in the text",
    "template": "left out because a chat template changes what is said",
    "apart": "left out without a common token end within {max_length:,} tokens",
}
"""What is counted of documents that two tokenizers encode."""

Truncation = Literal["drop", "keep_start", "keep_end"]


class TokenPiece(NamedTuple):
    """The tokens of a conversation, of a text, or of a part of one that is very long."""

    ids: np.ndarray  # int64
    sizes: np.ndarray  # int64: UTF-8 bytes that each token stands for
    ends_document: bool
    conversation: ConversationTokens | None = None


class ConversationTokens(NamedTuple):
    """What is to be known of a piece that is a whole conversation."""

    name: str
    learned: np.ndarray  # bool: whether each token is a target
    from_template: bool
    end_token: int | None  # the special token that ends it, if one does
    empty_turns: int


class Affixes(NamedTuple):
    """What is put around the tokens of a text."""

    prefix: np.ndarray  # never targets
    suffix: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> Affixes:
        prefix, suffix = special_affixes(tokenizer) if config.add_special_tokens else ([], [])
        end = document_end_id(tokenizer, config.document_end)
        if suffix[-1:] != [end]:  # some tokenizers add it themselves
            suffix = [*suffix, end]
        return cls(np.array(prefix, dtype=np.int64), np.array(suffix, dtype=np.int64))


def describe_counts(counts: Mapping[str, int], max_length: int) -> str:
    """What was counted, in words; nothing for nothing."""
    words = COUNTS | ALIGNMENT_COUNTS
    return ", ".join(
        f"{number:,} {words[count].format(max_length=max_length)}"
        for count, number in counts.items()
        if number
    )


class TokenStream:
    """The token stream while it is written: ids, and as uint32 the UTF-8 bytes of each.

    Tokens that are no targets, such as the first of a document, and those that stand for no text,
    such as end-of-text, get 0 bytes. A document without tokens leaves nothing in the stream.
    """

    def __init__(
        self,
        ids_file: BinaryIO,
        sizes_file: BinaryIO,
        token_dtype: str,
        max_length: int,
        affixes: Affixes,
        truncation: Truncation,
    ) -> None:
        self._ids_file, self._sizes_file, self._token_dtype = ids_file, sizes_file, token_dtype
        self._max_length = max_length
        self._affixes = affixes
        self._truncation: Truncation = truncation
        self._in_document = False
        self._row_is_full = False
        self._first_counted: dict[str, str] = {}  # count -> name of the first document
        self.documents = array("q")  # where each begins
        self.row_starts = array("q", [0])  # as row_breaks has them
        self.context = array("q")  # where each span begins, and ends
        self.num_tokens = 0
        self.max_token_id = 0
        self.end_tokens: set[int] = set()
        self.counts = dict.fromkeys(COUNTS, 0)

    def add(self, piece: TokenPiece) -> None:
        """Append the tokens of a piece, with what belongs around them."""
        if piece.conversation is None:
            self._add_text(piece)
        else:
            self._add_conversation(piece, piece.conversation)

    def warn(self) -> None:
        """Log a line for each reason to leave something out, with the first document."""
        for count, first in self._first_counted.items():
            number = self.counts[count]
            logger.warning(
                "%s %s %s, first %s",
                f"{number:,}",
                "document" if number == 1 else "documents",
                COUNTS[count].format(max_length=self._max_length),
                printable(first),
            )

    def _add_text(self, piece: TokenPiece) -> None:
        ids, sizes = piece.ids, piece.sizes
        if not self._in_document and len(ids):
            self._in_document = True
            self._begin_document()
            prefix = self._affixes.prefix
            if len(prefix) > 1:  # the first token of a document is no target in any case
                self.context.extend((self.num_tokens, self.num_tokens + len(prefix)))
            ids, sizes = np.append(prefix, ids), np.append(np.zeros_like(prefix), sizes)
            sizes[0] = 0  # never a target
        if self._in_document and piece.ends_document:
            self._in_document = False
            suffix = self._affixes.suffix
            ids, sizes = np.append(ids, suffix), np.append(sizes, np.zeros_like(suffix))
            self.end_tokens.add(int(suffix[-1]))
        self._write(ids, sizes)

    def _add_conversation(self, piece: TokenPiece, conversation: ConversationTokens) -> None:
        ids, sizes, learned = piece.ids, piece.sizes, conversation.learned
        end = conversation.end_token
        if not conversation.from_template:
            prefix, suffix = self._affixes
            ids = np.concatenate((prefix, ids, suffix))
            sizes = np.concatenate((np.zeros_like(prefix), sizes, np.zeros_like(suffix)))
            learned = np.concatenate(
                (np.zeros(len(prefix), bool), learned, np.ones(len(suffix), bool))
            )
            end = int(suffix[-1])
        if conversation.empty_turns:
            self._count("empty_turn", conversation.name)
        if len(ids) > self._max_length:
            match self._truncation:
                case "drop":
                    self._count("longer", conversation.name)
                    return
                case "keep_start":
                    kept = slice(0, self._max_length)
                    end = None
                case "keep_end":
                    kept = slice(len(ids) - self._max_length, len(ids))
                case _:
                    assert_never(self._truncation)
            self._count("cut", conversation.name)
            ids, sizes, learned = ids[kept], sizes[kept], learned[kept]
        learned[:1] = False  # the first token of a document is no target
        if not learned.any():
            self._count("no_target", conversation.name)
            return

        self._begin_document(len(ids))
        # A change from learned to context begins a span or ends one.
        changes = np.flatnonzero(np.diff(learned, prepend=True, append=True))
        self.context.extend((self.num_tokens + changes).tolist())
        if end is not None:
            self.end_tokens.add(end)
        self._write(ids, np.where(learned, sizes, 0))

    def _begin_document(self, whole: int = 0) -> None:
        """Note that a document begins here, of which ``whole`` tokens must lie in one row.

        Its last token needs no room in the row, where it would be an input without a target.
        """
        used = (self.num_tokens - self.row_starts[-1]) % self._max_length
        if self._row_is_full or used + whole - 1 > self._max_length:
            self.row_starts.append(self.num_tokens)
            used = 0
        # Else the last token of a conversation would be the first input of the next row.
        self._row_is_full = whole > 0 and used + whole - 1 == self._max_length
        self.documents.append(self.num_tokens)

    def _count(self, count: str, name: str) -> None:
        self.counts[count] += 1
        self._first_counted.setdefault(count, name)

    def _write(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        self._ids_file.write(ids.astype(self._token_dtype).tobytes())
        self._sizes_file.write(sizes.astype("<u4").tobytes())
        self.num_tokens += len(ids)
        self.max_token_id = max(self.max_token_id, int(ids.max(initial=0)))
