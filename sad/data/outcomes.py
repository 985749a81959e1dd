r"""Outcomes: events that tokens of two vocabularies can both be counted as.

Where a student and a teacher with another tokenizer have read the same text, their next tokens
differ, but the text that follows is the same. An *outcome* is a string of bytes that both have a
token for, or end-of-text, and each token counts for its longest prefix among them: ``" distill"``
may count for ``" dist"``. The two distributions over outcomes can be compared, no mass is lost, and
for equal vocabularies they are those over tokens.

Special tokens are outcomes by their role, such as end-of-text, or by equal strings. What shares no
prefix with the other side counts for one last outcome, if there is anything.

*Labels disagree* at a boundary where the true next tokens of the two sides count for different
outcomes: one side spells what the other has a token for. There each model is right and the
divergence is above 0. *Closing* replaces an outcome whose labels disagree too often by its next
shorter prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from sad.data.alignment import AlignedRows, Side
from sad.data.tokenizers import PROBES

SAMPLE = 1 << 20
"""Boundaries whose labels are counted, from the first rows on."""

_ROLES = ("bos_token_id", "unk_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class OutcomeTables:
    """The outcome of each token, as numbers from 0 to below ``count``.

    ``student`` int32 [V_s] and ``teacher`` int32 [V_t] have an entry per id. ``sizes`` int64
    [count] are the outcomes' lengths in bytes, 0 for special tokens and for what has no outcome of
    its own; ``shorter`` int64 [count] the longest of the others that is a prefix of each, or -1.
    """

    student: np.ndarray
    teacher: np.ndarray
    count: int
    sizes: np.ndarray
    shorter: np.ndarray
    notes: tuple[str, ...] = field(default=())

    @property
    def hash(self) -> str:
        """A hash of both tables: equal for equal outcomes of equal tokens."""
        digest = hashlib.blake2b(f"{len(self.student)} {self.count};".encode(), digest_size=16)
        for table in (self.student, self.teacher):
            digest.update(table.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def is_identity(self) -> bool:
        """Whether every token of both sides is an outcome of its own, with equal ids."""
        own = np.arange(self.count)
        return np.array_equal(self.student, own) and np.array_equal(self.teacher, own)


@dataclass(frozen=True, eq=False)
class LabelPairs:
    """How often the next token was the student's id and the teacher's: int64 [pairs] all three."""

    student: np.ndarray
    teacher: np.ndarray
    counts: np.ndarray

    def outcomes(self, tables: OutcomeTables) -> tuple[np.ndarray, np.ndarray]:
        """The outcome of each label on either side."""
        ours, theirs = tables.student[self.student], tables.teacher[self.teacher]
        return ours.astype(np.int64), theirs.astype(np.int64)

    def disagreement(self, tables: OutcomeTables) -> float:
        """The share of boundaries at which the two labels are different outcomes."""
        ours, theirs = self.outcomes(tables)
        return int(self.counts[ours != theirs].sum()) / max(int(self.counts.sum()), 1)


def shared_outcomes(student: Side, teacher: Side) -> OutcomeTables:
    """The outcomes of two vocabularies: all strings that both have, and special tokens.

    They are numbered in the order of the student's ids, so that equal vocabularies have the
    identity.
    """
    keys, teacher_keys = _keys(student), _keys(teacher)
    if _same_tokens(student.tokenizer, teacher.tokenizer):
        # By their strings, which tell a byte from the character that it is.
        keys, teacher_keys = _strings(student), _strings(teacher)
    known = set(teacher_keys)
    numbers: dict[Hashable, int] = {}
    for key in keys:
        if key is not None and key in known:
            numbers.setdefault(key, len(numbers))
    rest = len(numbers)  # the outcome of tokens that share nothing
    tables = [
        np.array([_number(key, numbers, rest) for key in of_side], dtype=np.int32)
        for of_side in (keys, teacher_keys)
    ]
    has_rest = any(bool((table == rest).any()) for table in tables)
    size = [len(key) if isinstance(key, bytes) else 0 for key in numbers]
    shorter = [
        _prefix(key[:-1], numbers, -1) if isinstance(key, bytes) and key else -1 for key in numbers
    ]
    return OutcomeTables(
        *tables,
        count=rest + has_rest,
        sizes=np.array(size + [0] * has_rest, dtype=np.int64),
        shorter=np.array(shorter + [-1] * has_rest, dtype=np.int64),
    )


def label_pairs(rows: AlignedRows, limit: int = SAMPLE) -> LabelPairs:
    """The true next tokens of both sides at boundaries, counted in the first rows that have
    ``limit`` of them."""
    found, total = [], 0
    width = 1 << 32
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows.batch(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
        assert batch.theirs is not None
        row, at = np.nonzero(batch.theirs.boundaries.numpy())
        teacher_at = batch.theirs.positions.numpy()[row, at]
        ours = batch.labels.numpy()[row, at]
        theirs = batch.theirs.batch.labels.numpy()[row, teacher_at]
        found.append(np.unique(ours * width + theirs, return_counts=True))
        total += len(row)
        if total >= limit:
            break
    codes, place = np.unique(np.concatenate([codes for codes, _ in found]), return_inverse=True)
    counts = np.zeros(len(codes), dtype=np.int64)
    np.add.at(counts, place, np.concatenate([number for _, number in found]))
    return LabelPairs(codes // width, codes % width, counts)


def close_outcomes(tables: OutcomeTables, pairs: LabelPairs, threshold: float) -> OutcomeTables:
    """Replace outcomes whose labels disagree in more than ``threshold`` of their uses, until there
    is none.

    Where labels disagree one outcome is a prefix of the other, and the longer one is to blame: it
    is replaced by the longest outcome that is a proper prefix of it. One without a shorter one,
    such as a single byte, stays.
    """
    ours, theirs = pairs.outcomes(tables)
    stands = np.arange(tables.count)  # outcome -> the one it is replaced by, or itself
    while True:
        x, y = stands[ours], stands[theirs]
        differs = x != y
        uses = np.bincount(x, pairs.counts, tables.count)
        uses += np.bincount(y[differs], pairs.counts[differs], tables.count)
        longer = np.where(tables.sizes[x] >= tables.sizes[y], x, y)[differs]
        wrong = np.bincount(longer, pairs.counts[differs], tables.count)
        replaced = (wrong > threshold * uses) & (tables.shorter >= 0)
        if not replaced.any():
            break
        # The shorter ones come first: what stands for them is known by then.
        for outcome in sorted(np.flatnonzero(replaced), key=lambda o: (tables.sizes[o], o)):
            stands[stands == outcome] = stands[tables.shorter[outcome]]
    return _renumbered(tables, stands)


def run_outcomes(
    student: Side, teacher: Side, rows: AlignedRows, threshold: float | None
) -> OutcomeTables:
    """The outcomes of a run on these rows, with a line on them for its header.

    Closed if there is a ``threshold``, by the labels of the first rows.
    """
    tables = shared_outcomes(student, teacher)
    pairs = label_pairs(rows)
    found = tables if threshold is None else close_outcomes(tables, pairs, threshold)
    line = f"{found.count:,}; labels disagree at {pairs.disagreement(found):.2%} of boundaries"
    if threshold is not None:
        line += (
            f", at {pairs.disagreement(tables):.2%} before {tables.count - found.count:,} outcomes "
            f"were closed that disagreed in more than {threshold:.2g} of their uses"
        )
    return replace(found, notes=(line,))


def _renumbered(tables: OutcomeTables, stands: np.ndarray) -> OutcomeTables:
    kept = np.flatnonzero(stands == np.arange(len(stands)))
    number = np.full(len(stands) + 1, -1, dtype=np.int64)  # the last for none
    number[kept] = np.arange(len(kept))
    new = number[stands]
    shorter = tables.shorter[kept]
    return OutcomeTables(
        student=new[tables.student].astype(np.int32),
        teacher=new[tables.teacher].astype(np.int32),
        count=len(kept),
        sizes=tables.sizes[kept],
        shorter=np.where(shorter >= 0, new[shorter], -1),
    )


def _number(key: Hashable, numbers: dict[Hashable, int], rest: int) -> int:
    return _prefix(key, numbers, rest) if isinstance(key, bytes) else numbers.get(key, rest)


def _prefix(text: bytes, numbers: dict[Hashable, int], otherwise: int) -> int:
    """The number of the longest prefix of a text, itself included."""
    for size in range(len(text), 0, -1):
        if text[:size] in numbers:
            return numbers[text[:size]]
    return otherwise


def _keys(side: Side) -> list[Hashable]:
    """What tells the token of each id: bytes of text, the role or the string of a special token;
    None for no token."""
    keys: list[Hashable] = [piece or None for piece in side.bytes.pieces]
    for token_id in np.flatnonzero(side.bytes.special).tolist():
        keys[token_id] = "token", side.bytes.pieces[token_id]
    roles = {role: getattr(side.tokenizer, role, None) for role in _ROLES}
    for role, token_id in reversed(roles.items()):
        if isinstance(token_id, int):
            keys[token_id] = "role", role
    keys[int(side.affixes.suffix[-1])] = "role", "end of text"
    return keys


def _strings(side: Side) -> list[Hashable]:
    keys: list[Hashable] = [None] * len(side.bytes)
    for token, token_id in side.tokenizer.get_vocab().items():
        keys[token_id] = "string", token
    return keys


def _same_tokens(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers differ by their ids at most, as far as difficult texts show."""
    if ours.get_vocab().keys() != theirs.get_vocab().keys():
        return False
    return all(ours.tokenize(text) == theirs.tokenize(text) for text in PROBES)
