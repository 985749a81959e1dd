"""Runs on conversations: what is scored, what the header says, when the student stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chat import BOS, CHAT_TEMPLATE, END, TURN, byte_tokenizer, say, write_records
from support.tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from sad.checkpoint.run_directory import RunDirectory
from sad.config.schema import DistillConfig
from sad.models.stop_tokens import add_stop_tokens
from sad.training.run import distill

VOCAB = 260
SPOKEN = [("Hi", "Hello"), ("And?", "No."), ("Really?", "é")]


def chat_model(seed: int, **overrides: Any) -> Any:
    fields = {"vocab_size": VOCAB, "eos_token_id": 1, "bos_token_id": 0, **overrides}
    return tiny_llama(seed=seed, **fields)


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    records = [
        {"prompt": say(f"user: {user}"), "completion": say(f"assistant: {answer}")}
        for user, answer in SPOKEN
    ]
    long = {"prompt": say("user: Hi"), "completion": say(f"assistant: {'x' * 99}")}
    return DistillConfig(
        student=save_tiny(tmp_path / "student", chat_model(1), byte_tokenizer(None)),
        teacher=save_tiny(tmp_path / "teacher", chat_model(2), byte_tokenizer()),
        data={  # pyright: ignore[reportArgumentType]
            "train": write_records(tmp_path / "train.jsonl", *records, long),
            "eval": write_records(tmp_path / "eval.jsonl", *records),
            "chat_template": CHAT_TEMPLATE,
            "cache_dir": str(tmp_path / "cache"),
        },
        max_length=64,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        use_ema=False,
        output_dir=str(tmp_path / "run"),
    )


def by_hand(student: Any, teacher: Any) -> tuple[float, float]:
    """NLL of the student and KL from the teacher, means over what the assistant says."""
    encode = byte_tokenizer().convert_tokens_to_ids
    nll, kl, count = 0.0, 0.0, 0
    for user, answer in SPOKEN:
        prompt = [BOS, TURN, *byte_tokenizer().tokenize(f"user: {user}"), END]
        prompt += [TURN, *byte_tokenizer().tokenize("assistant: ")]
        ids = torch.tensor([encode([*prompt, *byte_tokenizer().tokenize(answer), END])])
        with torch.no_grad():
            q, p = (
                F.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), -1)
                for model in (student, teacher)
            )
        labels = ids[0, len(prompt) :]
        nll -= q.gather(1, labels[:, None]).sum().item()
        kl += (p.exp() * (p - q)).sum().item()
        count += len(labels)
    return nll / count, kl / count


def test_only_what_is_said_is_scored_and_all_before_it_is_read(
    config: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = distill(config)
    nll, kl = by_hand(chat_model(1), chat_model(2))
    assert result.metrics["eval/nll"] == pytest.approx(nll, rel=1e-5)
    assert result.metrics["eval/kl"] == pytest.approx(kl, rel=1e-5)
    # 29, 29 and 31 tokens, of which 6, 4 and 3 are targets; the third begins the second row.
    shown = " ".join(capsys.readouterr().out.split())
    row = "3 documents, 89 tokens, 13 targets in 2 rows, 32.0% padding"
    assert f"{row} (1 left out for more than 64 tokens); held out {row} length" in shown

    # The student stops where its teacher's turns end, and is spoken to as it was trained.
    assert "stop tokens <|end|> (3) added to those of the student" in shown
    for folder in (result.best, result.final):
        exported: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert exported.generation_config.eos_token_id == [1, 3]
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "before, ends, after",
    [(1, [1], 1), (None, [3], 3), (1, [1, 3], [1, 3]), ([1, 2], [3], [1, 2, 3])],
)
def test_what_is_missing_is_added_and_said(before: Any, ends: list[int], after: Any) -> None:
    model = chat_model(0)
    model.generation_config.eos_token_id = before
    line = add_stop_tokens(model, ends, byte_tokenizer())
    assert model.generation_config.eos_token_id == after
    assert line == ("<|end|> (3) added to those of the student, which is trained to end there" * (
        before != after
    ))  # fmt: skip


def test_samples_go_on_from_a_rows_own_prompt(config: DistillConfig) -> None:
    samples = RunDirectory(distill(config).run_dir).read_run()["samples"]
    # The first two conversations share a row, of which the first counts.
    asked = [f"{BOS}{TURN}user: {user}{END}{TURN}assistant: " for user in ("Hi", "Really?")]
    assert [sample["prompt"] for sample in samples] == asked
    assert all(sample["text"] for sample in samples)


def test_a_prompt_is_whole_also_where_it_fills_the_positions(config: DistillConfig) -> None:
    eval_file = Path(config.data.eval[0])
    question = "Hi" * 25  # 50 tokens, and 12 around them
    records = [{"prompt": say(f"user: {question}"), "completion": say("assistant: ")}]
    data = replace(config.data, eval=(write_records(eval_file, *records),))
    student = save_tiny(
        Path(config.student), chat_model(1, max_position_embeddings=80), byte_tokenizer(None)
    )
    config = replace(config, data=data, student=student, max_length=80)
    (sample,) = RunDirectory(distill(config).run_dir).read_run()["samples"]
    assert sample["prompt"] == f"{BOS}{TURN}user: {question}{END}{TURN}assistant: "
    assert sample["text"]


def test_a_sample_of_texts_stays_within_one(config: DistillConfig, tmp_path: Path) -> None:
    texts = write_records(tmp_path / "texts.jsonl", {"text": "ab"}, {"text": "cdefgh"})
    data = replace(config.data, train=(texts,), eval=(texts,))
    (sample,) = RunDirectory(distill(replace(config, data=data)).run_dir).read_run()["samples"]
    assert sample["prompt"] == f"{BOS}cdefgh"


def test_a_text_ends_in_the_token_that_is_named(config: DistillConfig, tmp_path: Path) -> None:
    texts = write_records(tmp_path / "texts.jsonl", {"text": "ab"}, {"text": "cd"})
    data = replace(config.data, train=(texts,), eval=(texts,), document_end=END)
    result = distill(replace(config, data=data))
    exported: Any = AutoModelForCausalLM.from_pretrained(result.final)
    assert exported.generation_config.eos_token_id == [1, 3]
