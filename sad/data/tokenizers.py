"""Loading tokenizers, requiring that two are equal, training a small one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sad.environment import quiet_libraries
from sad.errors import UnfitError, UsageError, one_line

END_OF_TEXT = "<|endoftext|>"

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Of a saved tokenizer a folder has at least one."""

_ROLES = ("bos_token", "eos_token", "unk_token")
"""Special tokens that may stand in text; padding carries no loss."""

PROBES = (
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


def own_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast | None:
    """The tokenizer that a model came with; None if there is none to be had."""
    folder = Path(name).expanduser()
    # transformers makes an untrained tokenizer up for a folder that holds a model only.
    if folder.is_dir() and not any((folder / file).is_file() for file in _FILES):
        return None
    try:
        return load_tokenizer(name, trust_remote_code)
    except (UsageError, UnfitError):
        return None


class _Pair(NamedTuple):
    """The tokenizer that came with a model, and the one that a run encodes its text with."""

    role: Literal["teacher", "student"]
    theirs: PreTrainedTokenizerFast
    source: Literal["student", "tokenizer"]
    ours: PreTrainedTokenizerFast

    @property
    def subject(self) -> str:
        if self.source == "student":
            return "teacher and student tokenizers"
        return f"the {self.role}'s own tokenizer and that of `tokenizer`"

    @property
    def remedy(self) -> str:
        if self.role == "teacher":
            return "choose a student with the teacher's tokenizer, or set cross_tokenizer: prefix"
        return "name a tokenizer that the student was trained with, or set student_init: random"

    @property
    def whose(self) -> str:
        """Whose special tokens a run takes."""
        return "the student's are" if self.source == "student" else "those of `tokenizer` are"

    def both(self, theirs: object, ours: object) -> str:
        return f"{self.role} {theirs}, {self.source} {ours}"


def require_same_tokenizer(
    theirs: PreTrainedTokenizerFast,
    ours: PreTrainedTokenizerFast,
    *,
    role: Literal["teacher", "student"] = "teacher",
    source: Literal["student", "tokenizer"] = "student",
) -> tuple[str, ...]:
    """Raise ``UnfitError`` unless both tokenizers encode text alike, as far as can be tested.

    ``ours`` encodes the text of a run, ``theirs`` came with the model that has the ``role``;
    ``source`` is the key that names ours. Compared are the vocabularies (token -> id) and the ids
    of a few difficult texts. Sizes of embeddings prove nothing: models pad their vocabularies
    differently.

    Models of one family may differ, and each difference is a line of what is returned, which says
    what is taken: bos, eos and unk; names of special tokens under one id; tokens of theirs after
    our last id, which no text of the run holds and whose logits are cut; and for a student, tokens
    of ours after its last id, which it has to learn.
    """
    pair = _Pair(role, theirs, source, ours)
    notes = _compare_ids(pair)
    for text in PROBES:
        their_ids, our_ids = (
            tok(text, add_special_tokens=False)["input_ids"] for tok in (theirs, ours)
        )
        if their_ids != our_ids:
            found = pair.both(f"{their_ids[:8]}...", f"{our_ids[:8]}...")
            raise UnfitError(
                f"{pair.subject} must be equal, got the same vocabulary but other ids for "
                f"{text!r} ({found}); {pair.remedy}"
            )
    return (*_compare_roles(pair), *notes)


def _compare_roles(pair: _Pair) -> list[str]:
    """A line on the special tokens that have one role and other ids, if there are any."""
    different = [
        f"{name} {_token(pair.theirs, name)} is {_token(pair.ours, name)} here"
        for name in _ROLES
        if getattr(pair.theirs, f"{name}_id") != getattr(pair.ours, f"{name}_id")
    ]
    if not different:
        return []
    other = "" if pair.role == "student" else "; `tokenizer` may name the teacher's"
    return [f"the {pair.role}'s {', '.join(different)}: {pair.whose} taken{other}"]


def _token(tokenizer: PreTrainedTokenizerFast, role: str) -> str:
    token, token_id = getattr(tokenizer, role), getattr(tokenizer, f"{role}_id")
    return "none" if token_id is None else f"{str(token)!r} ({token_id})"


def _compare_ids(pair: _Pair) -> list[str]:
    """Lines on tokens that only one side has and that do no harm; ``UnfitError`` for others."""
    theirs, ours = pair.theirs.get_vocab(), pair.ours.get_vocab()
    tokens = theirs.keys() | ours.keys()
    different = {token for token in tokens if theirs.get(token) != ours.get(token)}
    if not different:
        return []

    beyond = sorted(
        (theirs[t], t) for t in different - ours.keys() if theirs[t] > max(ours.values())
    )
    new = []
    if pair.role == "student":  # a teacher cannot be asked for what it does not know
        new = sorted(
            (ours[t], t) for t in different - theirs.keys() if ours[t] > max(theirs.values())
        )
    renamed = _renamed_specials(pair, different - ours.keys(), different - theirs.keys())
    harmless = {token for _, token in (*beyond, *new)} | {t for pair in renamed for t in pair[1:]}
    wrong = different - harmless
    if wrong:
        _refuse_ids(pair, wrong, len(tokens))

    notes = []
    if renamed:
        token_id, their_name, our_name = renamed[0]
        found = f"first {token_id}: {pair.both(repr(their_name), repr(our_name))}"
        notes.append(
            f"special tokens with another name: {len(renamed)} ({found}); {pair.whose} taken"
        )
    if beyond:
        first = f"first {beyond[0][1]!r}, id {beyond[0][0]}"
        notes.append(
            f"tokens of the {pair.role} beyond the last id here: {len(beyond)} ({first}); cut from "
            "both models' logits"
        )
    if new:
        first = f"first {new[0][1]!r}, id {new[0][0]}"
        notes.append(
            f"tokens of `tokenizer` that are new to the student: {len(new)} ({first}); their rows "
            "of its embedding are as they came with the model"
        )
    return notes


def _renamed_specials(
    pair: _Pair, only_theirs: set[str], only_ours: set[str]
) -> list[tuple[int, str, str]]:
    """Ids under which both have a special token, with another name: id, their name, our name."""
    specials = [
        {i: str(token) for i, token in tok.added_tokens_decoder.items() if token.special}
        for tok in (pair.theirs, pair.ours)
    ]
    return [
        (i, specials[0][i], specials[1][i])
        for i in sorted(specials[0].keys() & specials[1].keys())
        if specials[0][i] in only_theirs and specials[1][i] in only_ours
    ]


def _refuse_ids(pair: _Pair, different: set[str], total: int) -> None:
    theirs, ours = pair.theirs.get_vocab(), pair.ours.get_vocab()

    def lowest_id(token: str) -> tuple[int, str]:
        return min(ids[token] for ids in (theirs, ours) if token in ids), token

    # The lowest id, not the first by chance: a set's order changes from process to process.
    first = min(different, key=lowest_id)
    found = pair.both(_or_none(theirs.get(first)), _or_none(ours.get(first)))
    raise UnfitError(
        f"{pair.subject} must be equal, got {len(different)} of {total} tokens with other ids, "
        f"first {first!r} ({found}); {pair.remedy}"
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
