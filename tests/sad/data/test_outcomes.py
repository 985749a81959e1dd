"""Tokens of two vocabularies count for common outcomes, and outcomes can be closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.pairs import END, aligned, byte_level, sentencepiece
from support.tiny import TEXT, tiny_tokenizer
from support.vocabularies import permutation, permuted_tokenizer
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.alignment import Side
from sad.data.outcomes import (
    LabelPairs,
    OutcomeTables,
    close_outcomes,
    label_pairs,
    run_outcomes,
    shared_outcomes,
)

LINES: list[str] = [*TEXT.strip().splitlines()]


def side(tokenizer: PreTrainedTokenizerFast) -> Side:
    return Side.of(tokenizer, DataConfig(), "student")


def tables(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> OutcomeTables:
    return shared_outcomes(side(ours), side(theirs))


def outcome_strings(
    found: OutcomeTables, table: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> dict[str, set[str]]:
    """Of tokens: the tokens of the same side that count for the same outcome."""
    assert len(table) == len(tokenizer) and table.min() >= 0 and table.max() < found.count
    tokens = tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    return {
        token: {other for other, o in zip(tokens, table, strict=True) if o == table[i]}
        for i, token in enumerate(tokens)
    }


def test_equal_vocabularies_have_the_identity() -> None:
    found = tables(tiny_tokenizer(), tiny_tokenizer())
    assert found.is_identity and found.count == 512
    order = permutation(512)
    found = tables(tiny_tokenizer(), permuted_tokenizer(order))
    assert np.array_equal(found.student, np.arange(512))
    assert np.array_equal(found.teacher[order], np.arange(512)) and not found.is_identity


def test_a_byte_and_its_character_are_two_outcomes_of_equal_vocabularies_alone() -> None:
    ours = sentencepiece(["\u2581", "a", "b"], prefix=False)
    assert tables(ours, sentencepiece(["\u2581", "a", "b"], prefix=False)).count == len(ours)
    found = tables(ours, sentencepiece(["\u2581", "a"], prefix=False))
    a, byte = (ours.convert_tokens_to_ids(token) for token in ("a", "<0x61>"))
    assert found.student[a] == found.student[byte]


def test_each_token_counts_for_its_longest_shared_prefix() -> None:
    ours = byte_level([("a", "b"), ("ab", "c"), ("abc", "d"), ("x", "y")])
    theirs = byte_level([("a", "b"), ("b", "c"), ("ab", "q")], end="<|other end|>")
    found = tables(ours, theirs)
    assert found.count == 256 + 2  # bytes, ab, end of text
    ids = {t: i for t, i in ours.get_vocab().items()}
    teacher_ids = theirs.get_vocab()
    of = {t: int(found.student[i]) for t, i in ids.items()}
    teacher_of = {t: int(found.teacher[i]) for t, i in teacher_ids.items()}
    assert of["ab"] == of["abc"] == of["abcd"] == teacher_of["ab"] == teacher_of["abq"]
    assert of["xy"] == of["x"] == teacher_of["x"] and teacher_of["bc"] == teacher_of["b"] == of["b"]
    assert of[END] == teacher_of["<|other end|>"] and list(of.values()).count(of[END]) == 1
    assert found.shorter[of["ab"]] == of["a"] and found.shorter[of["a"]] == -1
    assert found.sizes[of["ab"]] == 2 and found.sizes[of[END]] == 0
    alone = outcome_strings(found, found.teacher, theirs)["q"]
    assert alone == {"q"}


def test_what_shares_nothing_is_the_last_outcome() -> None:
    ours = byte_level([])
    ours.add_special_tokens({"additional_special_tokens": ["<tool>", "<both>"]})
    theirs = byte_level([])
    theirs.add_special_tokens({"additional_special_tokens": ["<both>"], "bos_token": "<begin>"})
    found = tables(ours, theirs)
    last = found.count - 1
    assert found.student[ours.convert_tokens_to_ids("<tool>")] == last
    assert found.teacher[theirs.convert_tokens_to_ids("<begin>")] == last
    both = found.student[ours.convert_tokens_to_ids("<both>")]
    assert both == found.teacher[theirs.convert_tokens_to_ids("<both>")] != last


def test_special_tokens_of_one_role_are_one_outcome() -> None:
    ours, theirs = byte_level([]), byte_level([])
    ours.add_special_tokens({"bos_token": "<s>"})
    theirs.add_special_tokens({"bos_token": "<begin>"})
    found = tables(ours, theirs)
    begin = found.student[ours.convert_tokens_to_ids("<s>")]
    assert begin == found.teacher[theirs.convert_tokens_to_ids("<begin>")]
    assert found.count == 256 + 2 and (found.student == begin).sum() == 1


def test_label_pairs_are_the_next_tokens_at_boundaries(tmp_path: Path) -> None:
    ours, theirs = byte_level([("a", "b")]), byte_level([("b", "c"), ("a", "b")])
    rows = aligned(tmp_path, ["xabcabx"], ours, theirs)
    pairs = label_pairs(rows)
    # x | ab c | ab | x end and x | a bc | ab | x end: boundaries after x, abc, ab and x.
    found = {
        (ours.convert_ids_to_tokens(int(a)), theirs.convert_ids_to_tokens(int(b))): int(n)
        for a, b, n in zip(pairs.student, pairs.teacher, pairs.counts, strict=True)
    }
    assert found == {("ab", "a"): 1, ("ab", "ab"): 1, ("x", "x"): 1, (END, END): 1}
    assert pairs.disagreement(tables(ours, theirs)) == 0.25
    assert label_pairs(aligned(tmp_path, ["xabcabx"] * 3, ours, theirs), 1).counts.sum() == 12


def test_an_outcome_that_disagrees_too_often_is_closed() -> None:
    merges = [("a", "b"), ("ab", "c"), ("x", "y")]
    ours = byte_level(merges)
    found = tables(ours, byte_level([*merges, ("q", "q")]))
    assert found.count == 260
    ids = ours.get_vocab()

    def pair(a: str, b: str, count: int) -> tuple[int, int, int]:
        return ids[a], ids[b], count

    labels = [
        pair("abc", "ab", 4),  # abc disagrees in 4 of 100 uses: it becomes ab ...
        pair("abc", "abc", 96),
        pair("ab", "ab", 500),
        pair("xy", "x", 3),  # xy in 3 of 100: it stays
        pair("xy", "xy", 97),
    ]
    pairs = LabelPairs(*(np.array(column) for column in zip(*labels, strict=True)))
    closed = close_outcomes(found, pairs, 0.03)
    of = {t: int(closed.student[i]) for t, i in ids.items()}
    assert closed.count == 259 and of["abc"] == of["ab"] != of["a"] and of["xy"] != of["x"]
    assert pairs.disagreement(closed) == 3 / 700 < pairs.disagreement(found) == 7 / 700
    assert np.array_equal(np.unique(closed.student), np.arange(closed.count))
    assert closed.sizes[of["ab"]] == 2 and closed.shorter[of["ab"]] == of["a"]
    # ... and ab becomes a, if the spellings of abc are too many of its uses by then.
    labels += [pair("ab", "a", 20)]
    pairs = LabelPairs(*(np.array(column) for column in zip(*labels, strict=True)))
    closed = close_outcomes(found, pairs, 0.03)
    of = {t: int(closed.student[i]) for t, i in ids.items()}
    assert closed.count == 258 and of["abc"] == of["ab"] == of["a"]
    assert close_outcomes(found, pairs, 1.0).count == found.count


def test_single_bytes_are_never_closed() -> None:
    ours = byte_level([("a", "b")])
    found = tables(ours, byte_level([]))
    a, b = ours.convert_tokens_to_ids("a"), ours.convert_tokens_to_ids("b")
    pairs = LabelPairs(np.array([a]), np.array([b]), np.array([5]))
    closed = close_outcomes(found, pairs, 0.0)
    assert closed.count == found.count and pairs.disagreement(closed) == 1


@pytest.mark.parametrize("vocab", [512, 300])
def test_the_header_says_what_closing_did(tmp_path: Path, vocab: int) -> None:
    ours, theirs = tiny_tokenizer(), tiny_tokenizer(vocab)
    rows = aligned(tmp_path, LINES * 3, ours, theirs)
    open_, closed = (run_outcomes(side(ours), side(theirs), rows, t) for t in (None, 0.03))
    assert closed.is_identity == open_.is_identity == (vocab == 512)
    (line,) = closed.notes
    share = label_pairs(rows).disagreement(open_)
    assert f"at {share:.2%} before" in line and line.startswith(f"{closed.count:,}; labels")
    assert (share == 0) == (vocab == 512) and label_pairs(rows).disagreement(closed) < 0.01
    assert open_.notes[0].endswith("of boundaries")
