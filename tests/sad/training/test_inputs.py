"""Tokenizers of a run: which is taken, with what it is compared, and what the header says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sad_kernels import TeacherHidden
from support.tiny import EOS, TEXT, save_tiny, tiny_llama, tiny_tokenizer, write_texts
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sad.config.schema import DistillConfig
from sad.errors import UnfitError
from sad.report.log import read_log
from sad.training.inputs import load_inputs
from sad.training.run import distill

Make = Callable[..., DistillConfig]


def chat_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a turn's end after its ids, which is its eos."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *more]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    def make(
        teacher: PreTrainedTokenizerFast | None = None,
        student: PreTrainedTokenizerFast | None = None,
        **overrides: Any,
    ) -> DistillConfig:
        defaults: dict[str, Any] = {
            "teacher": save_tiny(tmp_path / "teacher", tiny_llama(seed=1, vocab_size=520), teacher),
            "student": save_tiny(tmp_path / "student", tiny_llama(seed=2), student),
            "data": {"train": write_texts(tmp_path / "texts", count=8), "eval_fraction": 0.3},
            "output_dir": str(tmp_path / "run"),
            "max_length": 32,
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "max_eval_rows": 2,
        }
        return DistillConfig(**(defaults | overrides))

    return make


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_students_own_tokenizer_is_compared_too(make_config: Make, tmp_path: Path) -> None:
    other = tiny_tokenizer(text=TEXT[::-1])
    config = make_config(teacher=other, tokenizer=saved(tmp_path / "other", other))
    message = (
        r"^the student's own tokenizer and that of `tokenizer` must be equal, got \d+ of \d+ "
        r"tokens with other ids, first '.*' \(student .*, tokenizer .*\); name a tokenizer"
    )
    with pytest.raises(UnfitError, match=message) as refusal:
        load_inputs(config)
    assert "\n" not in str(refusal.value)


def test_ids_mean_nothing_yet_to_a_student_of_random_weights(
    make_config: Make, tmp_path: Path
) -> None:
    other = tiny_tokenizer(text=TEXT[::-1])
    config = make_config(
        teacher=other, tokenizer=saved(tmp_path / "other", other), student_init="random"
    )
    assert load_inputs(config).tokenizer_notes == ()


def test_a_base_student_of_an_instruct_teacher_trains_and_the_header_says_how(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(teacher=chat_tokenizer("<|tool|>"))
    result = distill(config)
    (start,) = (r for r in read_log(result.run_dir) if r["kind"] == "start")
    header = dict(start["header"])
    assert header["vocabulary"] == "512 ids"
    assert header["tokenizer"].splitlines() == [
        f"the teacher's eos_token '<|im_end|>' (512) is '{EOS}' (0) here: the student's are taken; "
        "`tokenizer` may name the teacher's",
        "tokens of the teacher beyond the last id here: 2 (first '<|im_end|>', id 512); cut from "
        "both models' logits",
    ]
    kept = AutoTokenizer.from_pretrained(result.final)
    assert kept.eos_token == EOS and len(kept) == 512


def test_logits_of_ids_beyond_are_cut_from_the_teacher(make_config: Make) -> None:
    inputs = load_inputs(make_config(teacher=chat_tokenizer()))
    assert inputs.teacher is not None and inputs.valid_vocab == 512
    (target,) = inputs.teacher.forward(inputs.eval_rows.batch([0])).targets
    assert isinstance(target, TeacherHidden) and target.head.vocab_size == 512
    assert inputs.teacher.model.get_output_embeddings().weight.shape[0] == 520  # pyright: ignore


def test_special_tokens_are_those_of_the_key_tokenizer(make_config: Make, tmp_path: Path) -> None:
    """A base student that is to speak as its teacher does: its padded head has a row for each."""
    chat = chat_tokenizer()
    student = save_tiny(tmp_path / "padded", tiny_llama(seed=2, vocab_size=520))
    config = make_config(teacher=chat, student=None, tokenizer=saved(tmp_path / "chat", chat))
    inputs = load_inputs(replace(config, student=student))
    assert inputs.tokenizer.eos_token == "<|im_end|>" and inputs.valid_vocab == 513
    ends = inputs.train_rows._tokens[inputs.train_rows._ends - 1]
    assert set(ends.tolist()) == {512}
    assert inputs.tokenizer_notes == (
        f"the student's eos_token '{EOS}' (0) is '<|im_end|>' (512) here: those of `tokenizer` are "
        "taken",
        "tokens of `tokenizer` that are new to the student: 1 (first '<|im_end|>', id 512); their "
        "rows of its embedding are as they came with the model",
    )


def test_a_student_without_rows_for_the_tokenizers_ids_is_refused(
    make_config: Make, tmp_path: Path
) -> None:
    chat = chat_tokenizer()
    config = make_config(teacher=chat, tokenizer=saved(tmp_path / "chat", chat))
    with pytest.raises(UnfitError, match="for each of the tokenizer's 513 ids, got 512"):
        distill(config)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 65
