"""Students made of the teacher's layers: exact, whatever the family, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_family
from support.tiny import save_tiny, tiny_gpt2, tiny_llama, write_texts
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from sad.config.schema import DistillConfig
from sad.errors import UnfitError, UsageError
from sad.models.heads import decoder_layers
from sad.models.layers import copy_layers
from sad.models.load import load_student
from sad.models.memory_plan import plan
from sad.training.rescore import evaluate_run
from sad.training.run import distill

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def config_for(teacher: str | Path, layers: Any, **keys: Any) -> DistillConfig:
    settings: dict[str, Any] = {"device": "cpu", "max_length": 32}
    layered = {"student_init": "layers", "student_layers": layers}
    return DistillConfig(teacher=str(teacher), **(settings | layered | keys))


def by_hand(teacher: PreTrainedModel, layers: list[int], ids: Tensor) -> Tensor:
    """The teacher's logits with all other layers taken out of its own ``ModuleList``."""
    blocks = decoder_layers(teacher)
    kept = [blocks[i] for i in layers]
    config: Any = teacher.config
    types = getattr(config, "layer_types", None)
    for i in reversed(range(len(blocks))):
        del blocks[i]
    blocks.extend(kept)
    config.num_hidden_layers = len(layers)
    if types is not None:
        config.layer_types = [types[i] for i in layers]
    with torch.no_grad():
        return teacher.eval()(ids, use_cache=False).logits


def alternating() -> PreTrainedModel:
    """Gemma 2: every other layer attends within a window, which the ids below are longer than."""
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=4))


def without_positions() -> PreTrainedModel:
    """SmolLM 3: every fourth layer does not rotate positions."""
    return SmolLM3ForCausalLM(SmolLM3Config(**SMALL))


def tied() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=6, tie_word_embeddings=True)


def learned_positions() -> PreTrainedModel:
    return tiny_gpt2(n_layer=6)


def partly_experts() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **SMALL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[0, 3],
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize(
    "build", [alternating, without_positions, tied, learned_positions, partly_experts]
)
@pytest.mark.parametrize("layers", [[0, 3, 5], [1, 2]])
def test_it_is_what_copying_by_hand_gives(build: Any, layers: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_tiny(tmp_path, build())
    student = load_student(config_for(tmp_path, layers)).eval()
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(24)[None] * 7 % 512
    with torch.no_grad():
        logits = student(ids, use_cache=False).logits
    assert torch.equal(logits, by_hand(teacher, layers, ids))
    assert student.config.num_hidden_layers == len(layers)
    student.save_pretrained(tmp_path / "student")  # and it survives its configuration
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        (1, [0]),
        (2, [0, 5]),
        (3, [0, 3, 5]),
        (4, [0, 2, 3, 5]),
        (6, [*range(6)]),
        ([-6, -1], [0, 5]),
    ],
)
def test_a_number_is_spread_from_the_first_to_the_last(
    chosen: Any, layers: list[int], tmp_path: Path
) -> None:
    teacher = tied()
    save_tiny(tmp_path, teacher)
    student = load_student(config_for(tmp_path, chosen))
    blocks = decoder_layers(teacher)
    assert len(decoder_layers(student)) == len(layers)
    for mine, number in zip(decoder_layers(student), layers, strict=True):
        theirs = dict(blocks[number].named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in mine.named_parameters())


def test_weights_are_those_that_are_stored(tmp_path: Path) -> None:
    """A teacher that is run in 16 bits gives its student the bits of its files."""
    teacher = tied()
    save_tiny(tmp_path, teacher)
    student = load_student(config_for(tmp_path, 2, teacher_dtype="bfloat16"))
    ours, theirs = (dict(model.named_parameters()) for model in (student, teacher))
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])


def test_a_whole_run(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", tied())
    config = config_for(
        tmp_path / "teacher",
        3,
        data={"train": write_texts(tmp_path / "texts"), "eval_fraction": 0.3},
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        baseline=True,
    )
    assert plan(config).total > 0
    result = distill(config)
    assert AutoModelForCausalLM.from_pretrained(result.final).config.num_hidden_layers == 3
    row = evaluate_run(result.run_dir)[-1]
    assert row["nll"] == pytest.approx(result.results[-1]["nll"], rel=1e-6)  # pyright: ignore
    assert "3 layers of " in (tmp_path / "run" / "run.json").read_text()


# What cannot be


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (7, "student_layers must be at most the teacher's 6, got 7; lower it"),
        ([0, 6], r"must be rising numbers from 0 to 5, .*, got \[0, 6\]"),
        ([3, 1], r"must be rising numbers from 0 to 5, .*, got \[3, 1\]"),
        ([1, 1], r"must be rising numbers from 0 to 5, .*, got \[1, 1\]"),
        ([0, -6], r"must be rising numbers from 0 to 5, .*, got \[0, -6\]"),
    ],
)
def test_layers_that_are_not_there(layers: Any, message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, tied())
    with pytest.raises(UsageError, match=message):
        load_student(config_for(tmp_path, layers))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"student_layers": None}, "student_layers must be given with student_init layers"),
        ({"student_layers": 0}, "student_layers must be a number of layers, or a list of layers"),
        ({"student_layers": []}, "student_layers must be a number of layers, or a list of layers"),
        ({"student": "s"}, "student must be left out with student_init layers, got 's'"),
        ({"teacher": None, "kd_weight": 0}, "student must be given, got ''"),
        ({"student_init": "random", "student": "s"}, "student_layers must be given with student_i"),
        ({"student_init": "pretrained"}, "student must be given, got ''"),
    ],
)
def test_keys_that_contradict_each_other(keys: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"teacher": "t", "student_init": "layers", "student_layers": 2}
    with pytest.raises(UsageError, match=message):
        DistillConfig(**(settings | keys))


def test_a_layer_that_would_work_otherwise_elsewhere_is_refused(tmp_path: Path) -> None:
    """As in families that derive something from a layer's number that none of their lists says."""
    two: dict[str, Any] = SMALL | {"num_hidden_layers": 2}
    shallow = Gemma2ForCausalLM(Gemma2Config(**two))
    message = "every layer of Gemma2ForCausalLM must work the same at another depth"
    with pytest.raises(UnfitError, match=message):
        copy_layers(alternating(), shallow, [0, 2])
    save_tiny(tmp_path, tiny_family("deepseek_v3"))  # the first layer is dense, others have experts
    with pytest.raises(UnfitError, match=r"got layer 1 with .* as layer 0; choose other"):
        load_student(config_for(tmp_path, [1]))
