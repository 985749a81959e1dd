"""Which of a teacher's ids stands for each of a student's, where their vocabularies differ.

Two vocabularies of a common base name the same pieces of text by other ids, or one has a few tokens
more. With ``map[student id] = teacher id or none`` the teacher answers for the student's ids: its
softmax is taken over those of them that it knows, while the student's is over all its own.

A map is found from equal tokens, if all that the teacher lacks are tokens that were added to the
student's tokenizer by hand, or is read from a file. Both tokenizers must then encode text alike
under it, which difficult texts and the first documents of a run show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from sad.data.rows import PackedRows
from sad.data.tokenizers import PROBES, require_same_tokenizer, valid_vocab
from sad.errors import UnfitError, UsageError, first_difference, one_line, shortened

NONE = -1
"""Stands for a teacher's id that does not exist."""

MAX_MASKED = 0.01
"""Share of targets that may stand behind a token which the teacher cannot read."""

DOCUMENTS = 1000
"""Documents of the training text that both tokenizers encode."""

CHARACTERS = 50_000
"""Of each of them, at most."""


@dataclass(frozen=True, eq=False)
class VocabMap:
    """A map from the student's ids to the teacher's.

    ``teacher_ids`` int64 [V_s] holds the teacher's id of each of the student's, or -1; no teacher's
    id stands twice. ``teacher_vocab`` is the number of ids that the teacher's tokenizer can make.
    """

    teacher_ids: np.ndarray
    teacher_vocab: int
    notes: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> np.ndarray:
        """Which of the student's ids the teacher lacks, bool [V_s]."""
        return self.teacher_ids == NONE

    @property
    def is_identity(self) -> bool:
        """Whether every id stands for itself."""
        return bool((self.teacher_ids == np.arange(len(self.teacher_ids))).all())

    @property
    def hash(self) -> str:
        """32 hexadecimal digits, equal for equal maps."""
        content = self.teacher_ids.astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def find_vocab_map(
    theirs: PreTrainedTokenizerFast,
    ours: PreTrainedTokenizerFast,
    *,
    file: str | None = None,
    source: Literal["student", "tokenizer"] = "student",
) -> tuple[VocabMap | None, tuple[str, ...]]:
    """The map from the ids of ``ours`` to those of the teacher's tokenizer ``theirs``, and notes.

    None where the ids are the same, by ``require_same_tokenizer``, whose notes are returned then.
    ``file`` names a map (see ``read_vocab_map``); ``source`` is the key that names ours. Raises
    ``UnfitError`` for tokenizers that have no such map or encode text otherwise under it.
    """
    if file is None:
        try:
            return None, require_same_tokenizer(theirs, ours, source=source)
        except UnfitError:
            found = _by_tokens(theirs, ours)
            if found is None:
                raise
    else:
        found = read_vocab_map(file, valid_vocab(ours), valid_vocab(theirs))
    image = set(found.teacher_ids.tolist())
    for text in PROBES:
        # Where the teacher uses a token that was trimmed away, the student has to spell it out.
        if image.issuperset(theirs(text, add_special_tokens=False)["input_ids"]):
            _require_alike(found, theirs, ours, text, f"{text[:30]!r}")
    if found.is_identity:
        return None, ()
    return found, (describe_map(found, file),)


def describe_map(found: VocabMap, file: str | None) -> str:
    """A line of a run's header on a map."""
    total, known = len(found.teacher_ids), int((~found.missing).sum())
    how = "equal tokens" if file is None else file
    lacking = f"; {total - known:,} of the student's have none" if known < total else ""
    return (
        f"the teacher's ids differ: {known:,} of its {found.teacher_vocab:,} stand for the "
        f"student's, by {how}{lacking}"
    )


def read_vocab_map(path: str, vocab: int, teacher_vocab: int) -> VocabMap:
    """The map in a JSON file, of ``vocab`` ids of the student to ``teacher_vocab`` of the teacher.

    The file holds a list, whose entry i is the teacher's id for the student's id i or null, or an
    object of student id -> teacher id or null, which may leave ids out. Raises ``UsageError`` for a
    file that cannot be read and ``UnfitError`` for ids out of range or that stand twice.
    """
    try:
        content: Any = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"vocab_map must be a JSON file that can be read, got '{one_line(error)}' for {path}; "
            "write a list or an object of student id -> teacher id"
        ) from error

    def refuse(expectation: str, got: object) -> UnfitError:
        return UnfitError(f"vocab_map must {expectation}, got {shortened(str(got), 60)} in {path}")

    if isinstance(content, list):
        if len(content) > vocab:
            raise refuse(f"have at most the student's {vocab:,} ids", f"{len(content):,}")
        pairs = dict(enumerate(content))
    elif isinstance(content, dict):
        wrong = next((key for key in content if not (key.isascii() and key.isdigit())), None)
        if wrong is not None:
            raise refuse("have ids of the student as keys", repr(wrong))
        pairs = {int(key): value for key, value in content.items()}
        if len(pairs) < len(content):
            raise refuse("name each of the student's ids once", "one twice")
    else:
        raise refuse("be a list or an object", type(content).__name__)
    teacher_ids = np.full(vocab, NONE, dtype=np.int64)
    seen: set[int] = set()
    for ours, theirs in pairs.items():
        if theirs is None:
            continue
        if not 0 <= ours < vocab:
            raise refuse(f"name ids of the student, 0 to {vocab - 1}", ours)
        if type(theirs) is not int or not 0 <= theirs < teacher_vocab:
            raise refuse(f"lead to ids of the teacher, 0 to {teacher_vocab - 1}, or null", theirs)
        if theirs in seen:
            raise refuse("lead to each of the teacher's ids once", f"{theirs} twice")
        seen.add(theirs)
        teacher_ids[ours] = theirs
    if not seen:
        raise refuse("name at least one pair of ids", "none")
    return VocabMap(teacher_ids, teacher_vocab)


def require_alike_documents(
    found: VocabMap,
    theirs: PreTrainedTokenizerFast,
    ours: PreTrainedTokenizerFast,
    texts: Iterable[tuple[str, str]],
) -> None:
    """Raise ``UnfitError`` unless texts, given as (name, text), are encoded alike under a map.

    A text counts up to its first token that the teacher lacks: nothing is asked of it from there.
    """
    for name, text in texts:
        _require_alike(found, theirs, ours, text[:CHARACTERS], name)


def masked_positions(missing: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """Where a teacher has met a token that it cannot read: bool [..., L].

    ``missing`` are the inputs that it lacks, and ``position_ids`` begin at 0 with each document of
    a row: from such an input to the end of its document.
    """
    place = np.arange(position_ids.shape[-1])
    begin = np.maximum.accumulate(np.where(position_ids == 0, place, 0), axis=-1)
    last = np.maximum.accumulate(np.where(missing, place, -1), axis=-1)
    return last >= begin


def masked_targets(rows: PackedRows, missing: np.ndarray) -> int:
    """How many targets of packed rows stand behind an input that the teacher lacks."""
    numbers, total = rows.rows_with(missing), 0
    for start in range(0, len(numbers), 256):
        batch = rows.batch(numbers[start : start + 256])
        unread = missing[batch.input_ids.numpy()]
        masked = masked_positions(unread, batch.position_ids.numpy())
        total += int((masked & (batch.labels.numpy() >= 0)).sum())
    return total


def _by_tokens(theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast) -> VocabMap | None:
    """The map of equal tokens; None if the teacher lacks one that was not added by hand."""
    known, size = theirs.get_vocab(), valid_vocab(ours)
    teacher_ids = np.full(size, NONE, dtype=np.int64)
    for token, token_id in ours.get_vocab().items():
        if token in known:
            teacher_ids[token_id] = known[token]
        elif token_id not in ours.added_tokens_decoder:
            return None
    return VocabMap(teacher_ids, valid_vocab(theirs))


def _require_alike(
    found: VocabMap,
    theirs: PreTrainedTokenizerFast,
    ours: PreTrainedTokenizerFast,
    text: str,
    name: str,
) -> None:
    encoded = ours(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    mapped = found.teacher_ids[ids]
    unknown = np.flatnonzero(mapped == NONE)
    if len(unknown):
        text = text[: encoded["offset_mapping"][unknown[0]][0]]
        mapped = mapped[: unknown[0]]
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    if mapped.tolist() != expected:
        at = first_difference(mapped.tolist(), expected)
        raise UnfitError(
            f"teacher and student tokenizers must encode text alike but for their ids, got the "
            f"teacher's {expected[at : at + 6]}... where the student's stand for "
            f"{mapped[at : at + 6].tolist()}..., from token {at} of {name}; choose a student of "
            "the teacher's family, or correct vocab_map"
        )
