"""Prompts: from records, conversations and texts, for the student and for the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import EOS, save_tiny, tiny_llama, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DistillConfig
from sad.data.formats.base import Conversation
from sad.data.prompts import Prompt, Prompts, load_prompts
from sad.errors import UnfitError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", tiny_llama())


def prompts_of(
    records: list[dict[str, Any]], model: str, tmp_path: Path, **keys: Any
) -> tuple[list[tuple[str, str | None]], PreTrainedTokenizerFast]:
    """The prompts of records in the order of the file, as texts, and the tokenizer."""
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    data: dict[str, Any] = {"train": str(file), "eval": str(file), "cache_dir": str(tmp_path)}
    lengths = {"max_length": 64, "max_completion_length": 16, "prompt_length": 4}
    settings: dict[str, Any] = {"data": data, "lmbda": 1} | lengths | keys
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = DistillConfig(student=model, teacher=model, **settings)
    found = load_prompts(config, tokenizer, 1000)
    texts = []
    for i in range(len(found)):
        ids, theirs = found[i]
        other = None if theirs is None else str(tokenizer.decode(theirs.tolist()))
        texts.append((str(tokenizer.decode(ids.tolist())), other))
    return texts, tokenizer


def test_a_record_s_prompt_is_taken_whole_and_the_teacher_may_have_its_own(
    model: str, tmp_path: Path
) -> None:
    records = [
        {"prompt": "def average(values): total", "completion": " = sum(values)"},
        {"prompt": "a", "completion": "b", "teacher_prompt": "the answer is b: a"},
    ]
    texts, _ = prompts_of(records, model, tmp_path)
    assert texts == [("def average(values): total", None), ("a", "the answer is b: a")]


def test_a_conversation_is_asked_up_to_its_last_answer(model: str, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    hint = [{"role": "system", "content": "it is four"}, *turns[:3]]
    records: list[dict[str, Any]] = [
        {"messages": turns, "teacher_prompt": hint},
        {"messages": turns[:1]},
        {"messages": [turns[1]]},  # begins with the assistant: nothing to answer
        {"prompt": turns[:1], "completion": turns[1:2]},
    ]
    texts, _ = prompts_of(records, model, tmp_path, max_length=256)
    asked = f"<user>one{EOS}<assistant>two{EOS}<user>three{EOS}<assistant>"
    assert texts == [
        (asked, f"<system>it is four{EOS}{asked}"),
        (f"<user>one{EOS}<assistant>", None),
        (f"<user>one{EOS}<assistant>", None),
    ]


def test_a_text_gives_the_beginning_of_each_window(model: str, tmp_path: Path) -> None:
    text = "momentum keeps direction; decay shrinks them. " * 12
    texts, tokenizer = prompts_of([{"text": text}], model, tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 128
    windows = [ids[start : start + 4] for start in range(0, len(ids) - 1, 64)]
    assert [prompt for prompt, _ in texts] == [tokenizer.decode(window) for window in windows]


def test_a_prompt_without_room_loses_its_beginning(model: str, tmp_path: Path) -> None:
    long = "seven wizards judge my box of old frozen liquid. " * 4
    record = {"prompt": long, "completion": "x", "teacher_prompt": "see: " + long}
    ((ours, theirs),), tokenizer = prompts_of(
        [record], model, tmp_path, max_length=200, max_completion_length=190
    )
    ids = tokenizer(long)["input_ids"]
    assert ours == theirs == tokenizer.decode(ids[-10:])


def test_no_prompt_is_refused(model: str, tmp_path: Path) -> None:
    records = [{"messages": [{"role": "assistant", "content": "alone"}]}]
    with pytest.raises(UnfitError, match="data must hold prompts for lmbda above 0, got none"):
        prompts_of(records, model, tmp_path)


@pytest.mark.parametrize("value", [3, [{"role": "user", "content": "a"}]])
def test_a_teacher_prompt_in_another_form_is_refused(
    model: str, tmp_path: Path, value: Any
) -> None:
    records = [{"prompt": "a", "completion": "b", "teacher_prompt": value}]
    with pytest.raises(UnfitError, match="must hold text in field 'teacher_prompt'"):
        prompts_of(records, model, tmp_path)


def test_each_comes_once_before_any_comes_again() -> None:
    prompts = Prompts([Prompt(np.array([i], dtype=np.int32)) for i in range(7)], seed=3)
    order = [int(prompt.ids[0]) for prompt in prompts.at(range(21))]
    for turn in range(3):
        assert sorted(order[7 * turn : 7 * turn + 7]) == list(range(7))
    assert order[:7] != order[7:14]
    again = Prompts([Prompt(np.array([i], dtype=np.int32)) for i in range(7)], seed=3)
    assert [int(p.ids[0]) for p in again.at(range(10, 15))] == order[10:15], "by place alone"


def test_records_without_the_field_keep_their_fingerprint() -> None:
    plain = Conversation(prompt="a", completion="b")
    assert plain.to_json() == '[null, "a", "b", null, null]', "as before there was the field"
    assert plain._replace(teacher_prompt="c").to_json() != plain.to_json()
