"""Two tokenizers of one text meet where both have read the same bytes, and rows are cut there."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pairs import (
    END,
    aligned,
    byte_level,
    documents_of,
    lower_casing,
    sentencepiece,
    word_pieces,
)
from support.tiny import TEXT, tiny_tokenizer
from support.vocabularies import permutation, permuted_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sad.data.alignment import AlignedRows
from sad.data.rows import pack_documents
from sad.errors import UnfitError

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
LINES: list[str] = [*TEXT.strip().splitlines()]


def bytes_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """The text of byte-level tokens, end-of-text left out."""
    tokens = tokenizer.convert_ids_to_tokens([i for i in ids if i != tokenizer.eos_token_id])
    return bytes(BYTE_OF[character] for token in tokens for character in token)


def ends_of(tokenizer: PreTrainedTokenizerFast, text: str) -> set[int]:
    """The bytes at which tokens end, by lengths alone."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return set(itertools.accumulate(len(bytes_of(tokenizer, [i])) for i in ids))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("permuted", [False, True])
def test_equal_tokenizers_give_the_rows_of_one(
    tmp_path: Path, packing: bool, permuted: bool
) -> None:
    order = permutation(512) if permuted else np.arange(512)
    student, teacher = tiny_tokenizer(), permuted_tokenizer(order)
    rows = aligned(tmp_path, LINES, student, teacher, packing=packing)
    documents, config = documents_of(tmp_path / "texts", LINES)
    alone = pack_documents(
        documents, student, max_length=32, packing=packing, cache_dir=tmp_path, config=config
    )
    assert len(rows) == len(alone)
    ours, expected = rows.batch(range(len(rows))), alone.batch(range(len(alone)))
    assert ours.counts == expected.counts and ours.target_bytes == expected.target_bytes
    assert np.array_equal(rows.target_bytes, alone.target_bytes)
    for name in ("input_ids", "labels", "position_ids", "lengths"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    assert ours.theirs is not None
    # Every target is a boundary at its own position, and a group of one token.
    at = torch.arange(32).expand_as(ours.labels)
    assert torch.equal(ours.theirs.positions, torch.where(ours.labels >= 0, at, -1))
    assert torch.equal(ours.theirs.batch.input_ids, torch.from_numpy(order)[ours.input_ids])
    assert torch.equal(ours.theirs.groups, ours.theirs.teacher_groups)
    assert torch.equal(ours.theirs.groups >= 0, ours.labels >= 0)


def test_tokens_that_cut_characters_of_four_bytes_meet_inside_them(tmp_path: Path) -> None:
    emoji = "\U0001f600"  # f0 9f 98 80
    a, b, c, d = (bytes_to_unicode()[byte] for byte in emoji.encode())
    # One cuts it after two bytes, the other after one: they meet after its last byte alone ...
    student, teacher = byte_level([(a, b), (c, d)]), byte_level([(b, c)])
    found = meetings(aligned(tmp_path / "1", [f"x{emoji}y"], student, teacher), student, teacher)
    assert found == [(1, 1), (5, 5), (6, 6)]
    # ... or after two and after four.
    teacher = byte_level([(c, d)])
    found = meetings(aligned(tmp_path / "2", [f"x{emoji}y"], student, teacher), student, teacher)
    assert found == [(1, 1), (3, 3), (5, 5), (6, 6)]


def meetings(
    rows: AlignedRows, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> list[tuple[int, int]]:
    """Bytes that the student and the teacher have read at each boundary of the only row."""
    assert len(rows) == 1
    batch = rows.batch([0])
    assert batch.theirs is not None
    ours, theirs = batch.input_ids[0].tolist(), batch.theirs.batch.input_ids[0].tolist()
    return [
        (len(bytes_of(student, ours[: at + 1])), len(bytes_of(teacher, theirs[: there + 1])))
        for at, there in enumerate(batch.theirs.positions[0].tolist())
        if there >= 0
    ]


PIECES = st.sampled_from(
    ["the ", "teacher ", "\U0001f600", "é", "日本", "\n", " learns", "0", "xq"]
)
TEXTS = st.lists(st.lists(PIECES, min_size=1, max_size=30).map("".join), min_size=1, max_size=4)


@settings(max_examples=10)
@given(
    texts=TEXTS, max_length=st.integers(6, 20), vocab=st.integers(258, 400), packing=st.booleans()
)
def test_rows_are_cut_where_both_have_read_the_same(
    texts: list[str], max_length: int, vocab: int, packing: bool
) -> None:
    texts = [text for text in texts if text.strip()] or ["x"]
    student, teacher = tiny_tokenizer(), tiny_tokenizer(vocab)
    with tempfile.TemporaryDirectory() as folder:
        rows = aligned(
            Path(folder), texts, student, teacher, max_length=max_length, packing=packing
        )
        batch = rows.batch(range(len(rows)))
    assert batch.theirs is not None and not rows.left_out
    document, read = 0, b""
    for row in range(len(rows)):
        assert 0 < rows.lengths[row] <= max_length and 0 < rows.theirs.lengths[row] <= max_length
        # Each goes on where it stopped, and so do the boundaries of the text.
        for at in range(int(rows.lengths[row])):
            token = int(batch.input_ids[row, at])
            read += bytes_of(student, [token])
            there = int(batch.theirs.positions[row, at])
            if token == student.eos_token_id:
                document, read = document + 1, b""
                assert there == -1
                continue
            text = texts[document]
            assert text.encode().startswith(read)
            common = ends_of(student, text) & ends_of(teacher, text)
            assert (there >= 0) == (len(read) in common)
            if there >= 0:
                before = batch.theirs.batch.input_ids[row, : there + 1].tolist()
                end = teacher.eos_token_id
                own = before[len(before) - before[::-1].index(end) :] if end in before else before
                assert read.endswith(bytes_of(teacher, own))
        if not packing and read == texts[document].encode():
            document, read = document + 1, b""
    targets = sum(len(student(text)["input_ids"]) for text in texts)
    assert int(rows.num_targets.sum()) == targets  # the first is none, end-of-text is one
    assert int(rows.theirs.num_targets.sum()) == sum(len(teacher(t)["input_ids"]) for t in texts)


@given(texts=TEXTS, max_length=st.integers(6, 20))
def test_a_group_is_the_same_text_on_both_sides(texts: list[str], max_length: int) -> None:
    texts = [text for text in texts if text.strip()] or ["x"]
    student, teacher = tiny_tokenizer(), tiny_tokenizer(300)
    with tempfile.TemporaryDirectory() as folder:
        rows = aligned(Path(folder), texts, student, teacher, max_length=max_length)
        batch = rows.batch(range(len(rows)))
    theirs = batch.theirs
    assert theirs is not None
    groups = sorted(set(theirs.groups[theirs.groups >= 0].tolist()))
    assert groups == sorted(set(theirs.teacher_groups[theirs.teacher_groups >= 0].tolist()))
    text_of_group = [
        bytes_of(tokenizer, labels[of_side == group].tolist())
        for group in groups
        for tokenizer, labels, of_side in (
            (student, batch.labels, theirs.groups),
            (teacher, theirs.batch.labels, theirs.teacher_groups),
        )
    ]
    assert text_of_group[0::2] == text_of_group[1::2]
    # At most the last group of each row is cut off by its end.
    starts = int(theirs.boundaries.sum())
    assert starts - len(rows) <= len(groups) <= starts


def test_a_space_that_a_tokenizer_puts_before_the_text_is_none_of_it(tmp_path: Path) -> None:
    student = byte_level([("a", "b")])
    teacher = sentencepiece(["\u2581", "a", "b", "\u2581a"], prefix=True)
    rows = aligned(tmp_path, ["abab a"], student, teacher)
    batch = rows.batch([0])
    assert batch.theirs is not None and not rows.left_out
    # ab ab _ a end against _a b a b _a end
    assert batch.theirs.positions[0, :4].tolist() == [1, 3, -1, 4]


def test_what_cannot_be_aligned_is_left_out_and_counted(tmp_path: Path) -> None:
    student, teacher = byte_level([("a", "b")]), lower_casing(byte_level([]))
    rows = aligned(tmp_path / "1", ["ab", "Ab", "AB"], student, teacher)
    assert rows.num_documents == 1
    assert rows.left_out == "2 left out because a tokenizer changes the text"
    rows = aligned(tmp_path / "2", ["ab", f"a{END}b"], student, byte_level([], end="<|e|>"))
    assert rows.left_out.startswith("1 left out for a special token that one tokenizer alone has")
    # The student's tokens are ab ab ab ..., the teacher's a ba ba ...
    rows = aligned(tmp_path / "3", ["ab" * 50, "ab"], student, byte_level([("b", "a")]))
    assert rows.left_out == "1 left out without a common token end within 32 tokens"


def test_a_token_that_ends_documents_is_the_students(tmp_path: Path) -> None:
    student, teacher = byte_level([("a", "b")]), byte_level([], end="<|e|>")
    student.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    rows = aligned(tmp_path, ["ab", "b"], student, teacher, document_end="<stop>")
    assert rows.end_tokens == [student.convert_tokens_to_ids("<stop>")]
    assert rows.theirs.end_tokens == [teacher.eos_token_id]
    with pytest.raises(UnfitError, match="document_end must be a token of the tokenizer"):
        aligned(tmp_path, ["ab"], student, teacher, document_end="<|e|>")


def test_a_special_token_that_both_have_in_the_text_is_aligned(tmp_path: Path) -> None:
    student, teacher = byte_level([("a", "b")]), byte_level([])
    rows = aligned(tmp_path, [f"ab{END}b"], student, teacher)
    batch = rows.batch([0])
    assert batch.theirs is not None and not rows.left_out
    assert batch.theirs.positions[0, :3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("texts", [["AB"], ["A"]])
def test_text_of_which_nothing_can_be_aligned_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UnfitError, match="text that both tokenizers can encode, got 1 left out"):
        aligned(tmp_path, texts, byte_level([]), lower_casing(byte_level([])))


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match="teacher's tokenizer must be byte-level or Sentence"):
        aligned(tmp_path, ["a"], byte_level([]), word_pieces())


def test_rows_that_were_changed_are_made_again(tmp_path: Path) -> None:
    pair = byte_level([("a", "b")]), byte_level([])
    before = aligned(tmp_path, ["abab"], *pair)
    (file,) = (tmp_path / "cache").glob("rows-*/teacher/boundaries.bin")
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    again = aligned(tmp_path, ["abab"], *pair)
    assert again.content == before.content
    other = aligned(tmp_path, ["abab"], pair[0], byte_level([("b", "a")]))
    assert other.fingerprint != before.fingerprint and other.content != before.content
