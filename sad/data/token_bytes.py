"""The bytes that each token of a vocabulary stands for, and whether they add up to a text.

Two tokenizers share no tokens, but they cut the same text: in bytes their tokens can be compared.
Of a byte-level vocabulary each character of a token's string is one byte; of a SentencePiece one
``\\u2581`` is a space and ``<0xAB>`` a byte. A tokenizer that changes its text (lower case,
composed characters, words that it does not know) shows it: its tokens do not add up to the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sad.data.tokenizers import special_ids, valid_vocab
from sad.errors import UnfitError

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of each id of a tokenizer.

    ``pieces`` has an entry per id up to the largest: the bytes of a token of text, the string of a
    special token in UTF-8, and nothing for an id that no token has. ``sizes`` int64 [V] are their
    lengths, ``special`` bool [V] says which are special tokens.
    """

    pieces: tuple[bytes, ...]
    sizes: np.ndarray
    special: np.ndarray

    def __len__(self) -> int:
        return len(self.pieces)

    def ends(self, ids: Sequence[int], text: bytes) -> tuple[np.ndarray, bool] | None:
        """Where each token ends in ``text``, int64 [n], and whether a space was put before it.

        None if the tokens do not add up to the text. Of a space that the tokenizer puts before a
        text of its own the text knows nothing: a token that is no more than it ends at 0.
        """
        joined = b"".join([self.pieces[i] for i in ids])
        ends = np.cumsum(self.sizes[np.asarray(ids, dtype=np.int64)])
        if joined == text:
            return ends, False
        if joined == b" " + text:
            return ends - 1, True
        return None


def token_bytes(tokenizer: PreTrainedTokenizerFast, role: str) -> TokenBytes:
    """The bytes of each token; ``role`` says whose tokenizer it is in an error.

    Raises ``UnfitError`` for a vocabulary that is neither byte-level nor SentencePiece's: the bytes
    of its tokens cannot be told from their strings.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    of_string = _reader(definition, role)
    pieces = [b""] * valid_vocab(tokenizer)
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    for token, token_id in tokenizer.get_vocab().items():
        # Added tokens are matched in the text as they are written.
        pieces[token_id] = token.encode() if token_id in added else of_string(token)
    special = np.zeros(len(pieces), dtype=bool)
    special[[i for i in special_ids(tokenizer) if i < len(pieces)]] = True
    sizes = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    return TokenBytes(tuple(pieces), sizes, special)


def _reader(definition: dict[str, Any], role: str):
    """What reads the bytes of a token off its string."""
    parts = json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
    kinds = set(re.findall(r'"type": "(\w+)"', parts))
    if "ByteLevel" in kinds:
        return _of_byte_level
    if "Metaspace" in kinds or json.dumps(SPACE) in parts:
        return _of_sentencepiece
    raise UnfitError(
        f"the {role}'s tokenizer must be byte-level or SentencePiece's with cross_tokenizer, got "
        f"{', '.join(sorted(kinds)) or 'neither'} in its tokenizer.json; choose another model"
    )


def _of_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # a string that was put into the vocabulary by hand
        return token.encode()


def _of_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it can be seen, else the next from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
