"""Conversations of two chat templates meet in what the assistant says, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chat import CHAT_TEMPLATE, byte_tokenizer, say, write_records
from support.pairs import byte_level
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.alignment import AlignedRows, align_documents
from sad.data.split import split_documents
from sad.errors import UnfitError

THEIRS = (
    "{% for message in messages %}{% if message.role == 'user' %}[Q]{{ message.content | trim }}"
    "[A]{% else %}{{ message.content | trim }}<end>{% endif %}{% endfor %}"
)
TALK = say("user: assistant", "assistant:  a bab ", "user: abab?", "assistant: ab")


def teacher(template: str | None = THEIRS) -> PreTrainedTokenizerFast:
    tokenizer = byte_level([("a", "b")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[Q]", "[A]"]})
    tokenizer.chat_template = template  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def rows_of(
    folder: Path, *records: object, theirs: Any = None, max_length: int = 128, **keys: Any
) -> AlignedRows:
    config = DataConfig(
        train=(write_records(folder / "train.jsonl", *records),),
        eval=(write_records(folder / "eval.jsonl", {"text": "x"}),),
        **keys,
    )
    return align_documents(
        split_documents(config)[0],
        byte_tokenizer(CHAT_TEMPLATE),
        theirs or teacher(),
        max_length=max_length,
        packing=True,
        cache_dir=folder / "cache",
        config=config,
    )


def compared(rows: AlignedRows) -> list[tuple[str, str]]:
    """What student and teacher have read since the last character of a template, where they are
    compared."""
    batch = rows.batch(range(len(rows)))
    assert batch.theirs is not None
    found = []
    for row, places in enumerate(batch.theirs.positions.tolist()):
        for at, there in enumerate(places):
            if there >= 0:
                ours = str(byte_tokenizer().decode(batch.input_ids[row, : at + 1]))
                theirs = str(teacher().decode(batch.theirs.batch.input_ids[row, : there + 1]))
                found.append((ours.rpartition("assistant: ")[2], theirs.rpartition("[A]")[2]))
    return found


def test_templates_are_compared_in_what_the_assistant_says(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"messages": TALK})
    assert not rows.left_out and len(rows) == 1
    # a, space, b, ab against a byte each: after the last one each template goes on in its own way.
    assert compared(rows) == [
        (" ", ""), (" a", "a"), (" a ", "a "), (" a b", "a b"), ("", ""),
    ]  # fmt: skip
    batch = rows.batch([0])
    assert batch.theirs is not None
    # Groups are a, space, b, ab and ab: as many as places, and each of the same bytes.
    groups = sorted(set(batch.theirs.groups[batch.theirs.groups >= 0].tolist()))
    texts = [
        (
            byte_tokenizer().decode(batch.labels[batch.theirs.groups == group]),
            teacher().decode(batch.theirs.batch.labels[batch.theirs.teacher_groups == group]),
        )
        for group in groups
    ]
    assert texts == [("a", "a"), (" ", " "), ("b", "b"), ("ab", "ab"), ("ab", "ab")]


def test_only_what_is_learned_is_compared(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"messages": TALK}, assistant_only_loss=True)
    batch = rows.batch([0])
    assert batch.theirs is not None
    said = byte_tokenizer().decode(batch.labels[batch.labels >= 0])
    theirs = batch.theirs.batch.labels
    assert said == " a bab <|end|>ab<|end|>" and teacher().decode(theirs[theirs >= 0]) == "a babab"
    assert len(compared(rows)) == 5
    alone = rows_of(
        tmp_path / "2", {"prompt": TALK[:1], "completion": TALK[1:2]}, completion_only_loss=True
    )
    assert [a for a, _ in compared(alone)] == [" ", " a", " a ", " a b"]


def test_a_prompt_and_its_completion_are_one_text(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"prompt": "abx", "completion": " ab"})
    batch = rows.batch([0])
    assert batch.theirs is not None
    at = [i for i, place in enumerate(batch.theirs.positions[0].tolist()) if place >= 0]
    read = [byte_tokenizer().decode(batch.input_ids[0, 1 : i + 1]) for i in at]
    assert read == ["abx", "abx ", "abx ab"]  # the last one is before end-of-text
    assert batch.theirs.groups[0, at[-1]] >= 0


def test_a_conversation_is_never_cut(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *({"messages": TALK} for _ in range(4)), max_length=150)
    batch = rows.batch(range(len(rows)))
    assert rows.num_segments.sum() == 4 > len(rows)
    assert len(compared(rows)) == 20 and int(batch.counts.targets) > 0
    left = rows_of(tmp_path / "2", {"messages": TALK}, {"messages": TALK[2:]}, max_length=60)
    assert left.left_out == "1 left out for more than 60 tokens" and left.num_documents == 1


def test_what_a_template_changes_is_left_out(tmp_path: Path) -> None:
    loud = teacher(THEIRS.replace("content | trim }}<end>", "content | upper }}<end>"))
    other = {"prompt": "a", "completion": " b"}
    rows = rows_of(tmp_path, {"messages": TALK}, other, theirs=loud)
    assert rows.left_out == "1 left out because a chat template changes what is said"


def test_nothing_of_a_template_is_compared(tmp_path: Path) -> None:
    assert rows_of(tmp_path, {"messages": TALK}).num_boundaries == 5


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match="teacher's tokenizer must have a chat template"):
        rows_of(tmp_path, {"messages": TALK}, theirs=teacher(None))
    with pytest.raises(UnfitError, match=r"data\.truncation must be drop with cross_tokenizer"):
        rows_of(tmp_path, {"messages": TALK}, truncation="keep_end")
