"""Loading tokenizers, requiring that two are equal, training a small one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sad.environment import quiet_libraries
from sad.errors import UnfitError, UsageError, one_line

END_OF_TEXT = "<|endoftext|>"

_REMEDY = "choose a student with the teacher's tokenizer"

_PROBES = (
    "The quick brown fox's 2nd jump, IT'LL cost $1,234.56 (or 7e-05).",
    "def area(r):\n\tif r < 0:\n        raise ValueError(f'{r!r}')\r\n    return 3.14*r**2\n",
    "  two  spaces,   three, trailing   \n\n\n\tand tabs\t\t",
    "naïve cafe\u0301 \u212b \ufb01ne straße İstanbul \u00a0 \u200b “quoted” €",
    "日本語 中文字 한국어 русский العربية हिन्दी",
    "\U0001f600 \U0001f469\u200d\U0001f680 \U0001d54f \x00\x7f\ufeff",
    "0123456789 12345678901234567890 \u0663\u0664 ½",
)
"""Texts that tokenizers of equal vocabulary may split differently: upper and lower case,
apostrophes, runs of digits and white space, code, composed and combining characters, scripts,
emoji, control characters."""


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer at a local path or Hugging Face id.

    It must be a fast one, which gives offsets: bytes are counted from them. Raises ``UsageError``
    if nothing is found, ``UnfitError`` if what is found is not a usable tokenizer.
    """
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UsageError(
            f"tokenizer must be a local path or a Hugging Face id that can be read, got '{name}' "
            f"({one_line(error)}); check the path and the connection"
        ) from error
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise UnfitError(
            f"tokenizer must load, got '{name}' ({one_line(error)}); save one there with "
            "save_pretrained, or name another in `tokenizer`"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnfitError(
            f"tokenizer must be a fast one, got {type(tokenizer).__name__} in '{name}'; convert it "
            "to a tokenizer.json"
        )
    # For a folder that holds a model only, transformers makes an untrained tokenizer of its kind.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise UnfitError(
            f"tokenizer must know words, got {valid_vocab(tokenizer)} special tokens only in "
            f"'{name}'; save the tokenizer there, or name another in `tokenizer`"
        )
    return tokenizer


def require_same_tokenizer(
    teacher_tok: PreTrainedTokenizerFast, student_tok: PreTrainedTokenizerFast
) -> None:
    """Raise ``UnfitError`` unless both tokenizers encode text alike, as far as can be tested.

    Compared are the vocabularies (token -> id), the ids of the special tokens that may stand in
    text (padding carries no loss and may differ), and the ids of a few difficult texts. Sizes of
    embeddings prove nothing: models pad their vocabularies differently.
    """
    _require_same_ids(teacher_tok.get_vocab(), student_tok.get_vocab())
    for role in ("bos_token", "eos_token", "unk_token"):
        ids = [getattr(tok, f"{role}_id") for tok in (teacher_tok, student_tok)]
        if ids[0] != ids[1]:
            raise UnfitError(
                f"teacher and student tokenizers must be equal, got another {role} (teacher "
                f"{_or_none(ids[0])}, student {_or_none(ids[1])}); {_REMEDY}"
            )
    for text in _PROBES:
        teacher_ids, student_ids = (
            tok(text, add_special_tokens=False)["input_ids"] for tok in (teacher_tok, student_tok)
        )
        if teacher_ids != student_ids:
            raise UnfitError(
                "teacher and student tokenizers must be equal, got the same vocabulary but other "
                f"ids for {text!r} (teacher {teacher_ids[:8]}..., student {student_ids[:8]}...); "
                f"{_REMEDY}"
            )


def _require_same_ids(teacher_ids: dict[str, int], student_ids: dict[str, int]) -> None:
    tokens = teacher_ids.keys() | student_ids.keys()
    different = [token for token in tokens if teacher_ids.get(token) != student_ids.get(token)]
    if not different:
        return

    def lowest_id(token: str) -> tuple[int, str]:
        return min(ids[token] for ids in (teacher_ids, student_ids) if token in ids), token

    # The lowest id, not the first by chance: a set's order changes from process to process.
    first = min(different, key=lowest_id)
    raise UnfitError(
        f"teacher and student tokenizers must be equal, got {len(different)} of {len(tokens)} "
        f"tokens with other ids, first {first!r} (teacher {_or_none(teacher_ids.get(first))}, "
        f"student {_or_none(student_ids.get(first))}); {_REMEDY}"
    )


def _or_none(token_id: int | None) -> str:
    return "none" if token_id is None else str(token_id)


def valid_vocab(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of logits that count: one more than the tokenizer's largest id. Heads are often
    padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def special_affixes(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids that ``tokenizer(text)`` puts before those of the text, such as BOS, and after them."""
    probe = "a1."
    text = tokenizer(probe, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(probe, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    first = next((i for i, special in enumerate(added) if not special), len(ids))
    prefix, suffix = ids[:first], ids[first + len(text) :]
    assert prefix + text + suffix == ids, (ids, text)
    return prefix, suffix


def document_end_id(tokenizer: PreTrainedTokenizerFast, document_end: str | None) -> int:
    """The id of the token that ends a document of text; default: the tokenizer's end of text.

    Raises ``UnfitError`` if there is no such token.
    """
    if document_end is not None:
        ids = tokenizer.get_vocab()
        if document_end not in ids:
            raise UnfitError(
                f"data.document_end must be a token of the tokenizer, got {document_end!r}; write "
                f"one such as {tokenizer.eos_token or END_OF_TEXT}"
            )
        return ids[document_end]
    if not isinstance(tokenizer.eos_token_id, int):
        raise UnfitError(
            "tokenizer must have an end-of-text token, got none; name a token in "
            "data.document_end, or set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that stand for no text: end of text, end of turn, and the like."""
    added = tokenizer.added_tokens_decoder.items()
    return sorted({i for i, token in added if token.special} | set(tokenizer.all_special_ids))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of the tokenizer's definition: 32 hexadecimal digits, equal for equal encodings."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # A call with padding or truncation leaves these settings behind in the tokenizer.
    definition |= {"padding": None, "truncation": None, "eos": tokenizer.eos_token_id}
    text = json.dumps(definition, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most ``vocab_size`` tokens: 256 bytes, a special one, merges.

    The special token (id 0) is end-of-text and padding. The same texts give the same tokenizer.
    Raises ``UsageError`` if ``vocab_size`` has no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UsageError(
            f"vocab_size must be more than {len(alphabet)}, got {vocab_size}; every byte needs an "
            "entry"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
