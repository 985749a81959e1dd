"""Models that are split before they have weights, against the same models loaded whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.allocations import peak_bytes
from support.families import tiny_family
from support.ranks import run_ranks
from support.tiny import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sad.config.schema import DistillConfig
from sad.distributed.loading import LoadedWholeError, fill, stored_weights, without_weights
from sad.distributed.sharding import fsdp_modules, whole_state
from sad.distributed.tensors import is_split
from sad.distributed.world import World, whole_world
from sad.errors import UnfitError
from sad.models.load import load_student, load_teacher, model_to_fill
from sad.models.preflight import check_model
from sad.optim.precision import Precision
from sad.teachers.sharded import ShardedTeacher, load_sharded_teacher
from sad.training.ranks import shard_student
from sad.training.student import build_student

TIED = partial(tiny_llama, tie_word_embeddings=True)
CPU = torch.device("cpu")
IDS = torch.arange(48).reshape(2, 24) * 5 % 500


def save(folder: Path, model: PreTrainedModel, **keys: Any) -> str:
    model.save_pretrained(folder, **keys)
    return str(folder)


def config_for(model: str, **keys: Any) -> DistillConfig:
    return DistillConfig(student=model, teacher=model, device="cpu", **keys)


def in_world(function: Callable[[World], Any]) -> Any:
    with whole_world("cpu", timeout_seconds=60) as world:
        return function(world)


def sharded_teacher(config: DistillConfig, world: World) -> ShardedTeacher:
    said: list[str] = []
    teacher = load_sharded_teacher(config, 100, device=CPU, world=world, say=said.append)
    assert teacher is not None, said
    return teacher


# What is loaded


def logits_of(config: DistillConfig) -> Tensor:
    def run(world: World) -> Tensor:
        teacher = sharded_teacher(config, world)
        assert all(is_split(p) for p in teacher.model.parameters())
        with torch.no_grad():
            return teacher.within(lambda: teacher.model(input_ids=IDS, use_cache=False).logits)

    return in_world(run)


@pytest.mark.parametrize(
    ("ranks", "keys", "stored", "dtype"),
    [
        (2, {"tie_word_embeddings": True}, torch.float32, "float32"),
        (3, {"tie_word_embeddings": False}, torch.float32, "float32"),
        (3, {"tie_word_embeddings": True}, torch.bfloat16, "float32"),
        (2, {"tie_word_embeddings": False}, torch.float32, "bfloat16"),
    ],
)
def test_logits_have_the_bits_of_the_whole_model(
    tmp_path: Path, ranks: int, keys: dict[str, Any], stored: torch.dtype, dtype: str
) -> None:
    model = tiny_llama(seed=3, hidden_size=48, **keys).to(stored)  # pyright: ignore
    name = save(tmp_path / "model", model, max_shard_size="100KB" if ranks == 3 else "1GB")
    assert (len([*(tmp_path / "model").glob("*.safetensors")]) > 1) == (ranks == 3)
    config = config_for(name, teacher_dtype=dtype)
    with torch.no_grad():
        expected = load_teacher(config)(input_ids=IDS, use_cache=False).logits
    assert all(torch.equal(found, expected) for found in run_ranks(ranks, logits_of, config))


def split_student(config: DistillConfig) -> Any:
    def run(world: World) -> Any:
        found = model_to_fill(config, "student", world, lambda _: None)
        assert found is not None
        model: Any = found[0]
        precision = Precision(config, CPU, sharded=True)
        student = build_student(config, model, 100, precision)
        shard_student(student, config, precision, world)
        fill(model, found[1], CPU, world)
        modes = [p.requires_grad for p in model.parameters()], model.training
        described = model.config.to_dict(), model.generation_config.to_dict()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return whole_state(model, world), modes, described, tied

    return in_world(run)


@pytest.mark.parametrize("build", [partial(tiny_family, "gpt2"), partial(tiny_llama, seed=4)])
def test_a_student_is_the_one_that_is_loaded_whole(
    tmp_path: Path, build: Callable[[], Any]
) -> None:
    model = build()
    model.generation_config.eos_token_id = [7, 9]
    config = config_for(save(tmp_path / "model", model), bf16=True)
    (state, modes, described, tied), other = run_ranks(2, split_student, config)
    student: Any = load_student(config)
    expected = student.state_dict()
    assert state.keys() == expected.keys() and not other[0]
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert tied == bool(student.config.tie_word_embeddings)
    assert modes == ([True] * len([*student.parameters()]), True)
    assert described == (student.config.to_dict(), student.generation_config.to_dict())
    assert described[1]["eos_token_id"] == [7, 9]


FAMILIES = "codegen ctrl falcon_h1 gemma3_text gpt_neo llama mamba xglm"
MORE_FAMILIES = """
    apertus arcee bamba biogpt bitnet bloom cohere cohere2 cwm diffllama doge ernie4_5 exaone4
    falcon falcon_mamba gemma gemma2 gemma4_text gemma4_unified_text glm glm4 gpt2 gpt_bigcode
    gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe_swa helium
    hunyuan_v1_dense hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe lfm2
    llama4_text mamba2 minicpm3 minimax_m3_vl_text ministral ministral3 mistral mpt nanochat
    nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 recurrent_gemma rwkv
    seed_oss smollm3 stablelm starcoder2 vaultgemma xlstm youtu zaya
"""


@pytest.mark.parametrize(
    "family",
    [*FAMILIES.split(), *(pytest.param(f, marks=pytest.mark.slow) for f in MORE_FAMILIES.split())],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_buffers_are_those_of_a_loaded_model(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    name = save(tmp_path / "model", tiny_family(family))
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    built = without_weights(lambda: AutoModelForCausalLM.from_config(loaded.config, dtype=dtype))
    assert all(parameter.is_meta for parameter in built.parameters())
    stored = loaded.state_dict().keys()
    expected = {name: b for name, b in loaded.named_buffers() if name not in stored}
    buffers = dict(built.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for buffer, value in expected.items():
        assert buffers[buffer].dtype == value.dtype
        assert torch.equal(buffers[buffer], value), buffer


@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_weights_of_the_hub_are_those_of_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    name = save(repository / "snapshots" / commit, TIED(), max_shard_size=size)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = without_weights(TIED)
    model.config._commit_hash = commit
    weights = stored_weights(model, "someone/tiny")
    assert str(weights.folder) == name
    assert weights.names.keys() == model.state_dict().keys()
    assert weights.names["lm_head.weight"] == "model.embed_tokens.weight"


# How much memory it takes


def peak_of_loading(config: DistillConfig) -> int:
    return in_world(lambda world: peak_bytes(lambda: sharded_teacher(config, world)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_rank_ever_holds_a_whole_model(tmp_path: Path, ranks: int) -> None:
    model = tiny_llama(num_hidden_layers=6, hidden_size=48, intermediate_size=128)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    # Files are mapped, one after the other: of this allocator's view each is an allocation.
    config = config_for(save(tmp_path / "model", model, max_shard_size="100KB"))
    whole = peak_bytes(lambda: load_teacher(config))
    assert whole >= sum(sizes)  # this sees a whole copy
    allowed = sum(sizes) / ranks + 2 * max(sizes) + 64 * len(sizes)
    assert allowed < 0.8 * sum(sizes)
    assert max(run_ranks(ranks, peak_of_loading, config)) <= allowed


# Models that are loaded whole


def reasons(config: DistillConfig) -> list[str]:
    def run(world: World) -> list[str]:
        said: list[str] = []
        assert model_to_fill(config, "teacher", world, said.append) is None
        return said

    return in_world(run)


def lose(folder: Path, tensor: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[tensor]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def add_file(folder: Path) -> None:
    save_file({"more": torch.zeros(2)}, folder / "more.safetensors")


def change_vocabulary(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 500}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("family", "harm", "keys", "said"),
    [
        ("mixtral", None, {}, "is stored in another form"),
        ("llama", None, {"feature": {"weight": 0.1}}, "losses on inner layers"),
        ("llama", add_file, {}, "has other .safetensors files"),
        ("llama", partial(lose, tensor="model.norm.weight"), {}, "have 0 tensors of model.norm"),
        ("llama", change_vocabulary, {}, "in shape [128, 32]"),
        ("llama", cut, {}, "could not be read"),
        ("deepseek_v3", None, {"teacher_dtype": "bfloat16"}, "stay fp32"),
    ],
)
def test_what_is_loaded_whole_is_said(
    tmp_path: Path, family: str, harm: Callable[[Path], None] | None, keys: Any, said: str
) -> None:
    name = save(tmp_path / "model", tiny_family(family))
    if harm is not None:
        harm(tmp_path / "model")
    for (line,) in run_ranks(2, reasons, config_for(name, **keys)):
        assert line.startswith("loading the teacher whole in each process") and said in line


def test_a_model_that_reads_its_parameters_to_be_built_is_loaded_whole() -> None:
    def build() -> Any:
        return torch.nn.Linear(1, 1).weight.item()

    with pytest.raises(LoadedWholeError, match="needs its weights to be built"):
        without_weights(build)
    assert not torch.nn.Linear(1, 1).weight.is_meta  # what is built after it


# Checks of a model that was never whole


def refusal(config: DistillConfig) -> str:
    def run(world: World) -> str:
        teacher = sharded_teacher(config, world)
        check = partial(check_model, teacher.model, IDS % 100, packing=True)
        with pytest.raises(UnfitError) as caught:
            teacher.within(check)
        return str(caught.value)

    return in_world(run)


@pytest.mark.parametrize(
    ("harmed", "said"),
    [
        ("lm_head", "the head of LlamaForCausalLM must hold finite numbers"),
        ("model.embed_tokens", "the input embedding of LlamaForCausalLM must hold finite numbers"),
        (
            "model.layers.1.mlp.up_proj",
            "its weight model.layers.1.mlp.up_proj.weight is not finite",
        ),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, harmed: str, said: str) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_submodule(harmed).weight[-1] = torch.nan  # type: ignore
    lines = run_ranks(2, refusal, config_for(save(tmp_path / "model", model)))
    assert all(said in line for line in lines) and len({*lines}) == 1


def errors_of(config: DistillConfig) -> dict[str, float]:
    def run(world: World) -> dict[str, float]:
        teacher = sharded_teacher(config, world)
        errors = teacher.within(partial(check_model, teacher.model, IDS % 100, packing=True))
        assert all(is_split(p) for p in teacher.model.parameters())
        assert fsdp_modules(teacher._root)
        teacher.answer(IDS % 100)  # and runs as before
        return errors

    return in_world(run)


@pytest.mark.parametrize("family", ["gemma2", "granite", "gpt2"])
def test_the_checks_measure_what_they_measure_on_the_whole_model(
    tmp_path: Path, family: str
) -> None:
    config = config_for(save(tmp_path / "model", tiny_family(family)))
    expected = check_model(load_teacher(config), IDS % 100, packing=True)
    assert run_ranks(2, errors_of, config) == [expected, expected]
