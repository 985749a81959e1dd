"""A teacher in 8 or 4 bits: what is quantized, how near it stays, and what it cannot do."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_run
from support.tiny_moe import tiny_moe
from torch import Tensor, nn

from sad.checkpoint.run_directory import RunDirectory
from sad.config.identity import config_hash
from sad.config.schema import DistillConfig
from sad.config.values import ConfigError
from sad.data.batch import Batch, LossCounts
from sad.distributed.world import World
from sad.errors import SadError, UnfitError, UsageError
from sad.models import load as loading
from sad.models.flops import forward_flops
from sad.models.heads import output_embedding, split_head
from sad.models.load import load_student, load_teacher, read_model_config
from sad.models.memory_plan import plan
from sad.models.preflight import check_model
from sad.models.quantization import is_quantized, parameter_count, quantized_count
from sad.recipes import FOLDER
from sad.teachers.frozen import FrozenTeacher
from sad.teachers.policy import build_teacher_policy
from sad.training.inputs import load_inputs
from sad.training.machine import check_machine
from sad.training.ranks import check_ranks
from sad.training.run import distill

torchao = pytest.importorskip("torchao.quantization")
pytest.importorskip("bitsandbytes")

QUICKSTART = str(FOLDER / "quickstart" / "teacher")
KINDS = ("int8", "int4")
CPU = torch.device("cpu")


def config_of(model: str, **keys: Any) -> DistillConfig:
    settings: dict[str, Any] = {"student": model, "teacher": model, "device": "cpu"}
    return DistillConfig(**settings | keys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_llama(seed=1, tie_word_embeddings=False)
    return save_tiny(tmp_path_factory.mktemp("plain") / "teacher", model)


@pytest.fixture(scope="module")
def saved(plain: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of teachers that were saved quantized."""
    folder = tmp_path_factory.mktemp("saved")
    models = {kind: load_teacher(config_of(plain, teacher_quantization=kind)) for kind in KINDS}
    return {kind: save_tiny(folder / kind, model) for kind, model in models.items()}


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert isinstance(error.value, SadError) and "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def log_probs(model: nn.Module, vocabulary: int = 512) -> Tensor:
    ids = torch.randint(vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
    return model(ids).logits.float().log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "dtype", "least", "most"),
    [
        ("int8", "float32", 1e-6, 1e-4),
        ("int8", "bfloat16", 1e-5, 4e-4),
        ("int4", "float32", 1e-3, 1e-2),
        ("int4", "bfloat16", 1e-3, 1e-2),
    ],
)
def test_it_stays_near_the_teacher_in_fp32(
    kind: str, dtype: str, least: float, most: float
) -> None:
    keys: dict[str, Any] = {"teacher_quantization": kind, "teacher_dtype": dtype}
    exact = load_teacher(config_of(QUICKSTART))
    model = load_teacher(config_of(QUICKSTART, **keys))
    truth, answer = log_probs(exact, 4096), log_probs(model, 4096)
    assert least < float((truth.exp() * (truth - answer)).sum(-1).mean()) < most
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    # Of the linear layers all are quantized but the head, which is what it was in that dtype.
    linear = [m for m in exact.modules() if isinstance(m, nn.Linear)][:-1]
    assert quantized_count(model) == sum(m.weight.numel() for m in linear)
    assert parameter_count(model) == parameter_count(exact)
    own = output_embedding(exact).weight.to(getattr(torch, dtype))
    assert torch.equal(output_embedding(model).weight, own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_stays_plain_and_the_checks_of_a_run_hold(kind: str, plain: str) -> None:
    model = load_teacher(config_of(plain, teacher_quantization=kind))
    head = output_embedding(model).weight
    assert type(head) is nn.Parameter and torch.equal(
        head, output_embedding(load_teacher(config_of(plain))).weight
    )
    row = torch.arange(32)[None] * 7 % 512
    errors = check_model(model, row, packing=True)
    assert errors.keys() == {"causality", "head", "packing"}
    teacher = FrozenTeacher(model, 512, device=CPU)
    assert teacher.head().weight.is_floating_point() and teacher.head().vocab_size == 512
    flops = forward_flops(load_teacher(config_of(plain)), 32)
    assert forward_flops(model, 32) == flops


def test_layers_that_bitsandbytes_cannot_pack_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors with AVX512-BF16 it packs weights [out, in] in the first forward pass, and
    fails unless 32 divides out and 64 divides in. Every processor is said to be one here, and the
    packed weights are left unused, as the others cannot multiply with them."""
    modules: Any = pytest.importorskip("bitsandbytes.nn.modules")
    pack, packed = modules._convert_weight_packed_for_cpu, set[tuple[int, ...]]()

    def pack_a_copy(weight: Tensor, state: Any) -> tuple[Tensor, Any]:
        pack(weight.clone(), copy.deepcopy(state))
        packed.add(tuple(state.shape))
        return weight, state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", pack_a_copy)
    model = tiny_llama(hidden_size=128, head_dim=32, intermediate_size=72)
    teacher = save_tiny(tmp_path / "teacher", model)
    assert log_probs(load_teacher(config_of(teacher, teacher_quantization="int4"))).isfinite().all()
    assert packed == {(128, 128), (64, 128)}


def test_settings_of_the_process_stay(plain: str) -> None:
    """Of torchao's, one makes fp32 products of a GPU less exact in some versions."""
    from torch._inductor import config as inductor

    before = inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    load_teacher(config_of(plain, teacher_quantization="int8"))
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


def test_a_quantized_head_is_one_line(plain: str) -> None:
    model = load_teacher(config_of(plain))
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, _: module is model.lm_head,
    )
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(UnfitError) as caught:
        split_head(model)
    assert "must have a plain tensor as weight, got Int8Tensor" in one_line(caught)


def test_a_model_without_linear_layers_is_one_line(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "gpt2", tiny_gpt2())  # its layers are Conv1D
    with pytest.raises(UnfitError, match="must find linear layers") as caught:
        load_teacher(config_of(teacher, teacher_quantization="int8"))
    one_line(caught)


@pytest.mark.parametrize("missing", ["torchao", "bitsandbytes", "accelerate"])
def test_what_is_not_installed_is_one_line(
    plain: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    kind = "int8" if missing == "torchao" else "int4"
    config = config_of(plain, teacher_quantization=kind)
    check_machine(config)
    monkeypatch.setitem(sys.modules, missing, None)
    expected = rf"{missing} must be installed .*distillation\[quantized\]"
    with pytest.raises(UsageError, match=expected) as caught:
        check_machine(config)
    one_line(caught)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_was_saved_quantized_just_loads(
    kind: str, plain: str, saved: dict[str, str]
) -> None:
    model = load_teacher(config_of(plain, teacher=saved[kind]))
    same = load_teacher(config_of(plain, teacher_quantization=kind))
    assert quantized_count(model) == quantized_count(same) > 0
    assert torch.equal(log_probs(model), log_probs(same))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_was_saved_quantized_cannot_be_all_things(
    kind: str, plain: str, saved: dict[str, str]
) -> None:
    stored = saved[kind]
    refusals: list[tuple[DistillConfig, str]] = [
        (config_of(stored), "student must begin with weights that can be trained"),
        (
            DistillConfig(teacher=stored, student_init="layers", student_layers=1),
            "student must begin with weights that can be trained",
        ),
    ]
    for config, message in refusals:
        with pytest.raises(UnfitError, match=message) as caught:
            load_student(config)
        one_line(caught)
    for keys, message in (
        ({"teacher_quantization": "int8"}, "teacher_quantization must not be int8"),
        ({"routing": {"mode": "student_aware"}}, "routing.mode must not be student_aware"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            read_model_config(config_of(plain, teacher=stored, **keys), "teacher")
        one_line(caught)
    with pytest.raises(UsageError, match="must not be quantized on several processes") as caught:
        loading._model_to_fill(config_of(plain, teacher=stored), "teacher")
    one_line(caught)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher": None, "kd_weight": 0}, "teacher_quantization must be left out without"),
        ({"routing": {"mode": "student_aware"}}, "left out with routing.mode student_aware"),
    ],
)
def test_keys_that_exclude_each_other_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_of("model", teacher_quantization="int8", **keys)
    one_line(caught)


def test_ranks_are_refused_and_a_resumed_run_keeps_its_teacher() -> None:
    config = config_of("model", teacher_quantization="int8")
    with pytest.raises(UsageError, match="teacher_quantization must be left out on several") as one:
        check_ranks(config, World(size=2))
    one_line(one)
    others = [config_of("model"), config_of("model", teacher_quantization="int4")]
    assert config_hash(config) not in map(config_hash, others)


def test_a_student_of_its_layers_has_weights_that_are_not_quantized(plain: str) -> None:
    keys: dict[str, Any] = {"student_init": "layers", "student_layers": 1, "device": "cpu"}
    student = load_student(DistillConfig(teacher=plain, **keys))
    same = load_student(DistillConfig(teacher=plain, teacher_quantization="int4", **keys))
    pairs = zip(student.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) and not is_quantized(b) for a, b in pairs)


def test_experts_that_are_drawn_mix_in_a_quantized_teacher(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "moe", tiny_moe("qwen3_moe"))
    routing = {"mode": "knowledge_augmentation", "passes": 2}
    config = config_of(teacher, teacher_quantization="int8", routing=routing)
    model = load_teacher(config)
    assert quantized_count(model) > 0
    policy = build_teacher_policy(config, FrozenTeacher(model, 512, device=CPU), 512)
    ids = torch.arange(16)[None] * 7 % 512
    positions, lengths = torch.arange(16)[None], torch.tensor([16])
    batch = Batch(ids, ids, positions, lengths, LossCounts(16, 15, 1), 1)
    first, second = policy.forward(batch).targets
    assert first.hidden.isfinite().all() and not torch.equal(first.hidden, second.hidden)


# Memory


def stored_bytes(model: nn.Module) -> int:
    """What the tensors of a model take, however they are wrapped."""

    def size(tensor: Any) -> int:
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            return tensor.nbytes + state.absmax.nbytes
        if is_quantized(tensor):
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            return sum(part.nbytes for part in parts if part is not None)
        return tensor.nbytes

    return sum(map(size, (*model.parameters(), *model.buffers())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_its_size(kind: str, dtype: str) -> None:
    keys: dict[str, Any] = {"teacher_quantization": kind, "teacher_dtype": dtype}
    config = config_of(QUICKSTART, **keys)
    bits = {"int8": 8, "int4": 4}[kind]
    planned = dict(plan(config).items)[f"teacher weights, {dtype} and {bits} bits"]
    assert planned == pytest.approx(stored_bytes(load_teacher(config)), rel=0.001)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_size_of_one_that_was_saved_so(
    kind: str, plain: str, saved: dict[str, str]
) -> None:
    own = plan(config_of(plain, teacher_quantization=kind))
    assert plan(config_of(plain, teacher=saved[kind])).items == own.items


# Runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_every_loss_on_inner_layers(kind: str, tmp_path: Path) -> None:
    losses: dict[str, Any] = {
        "feature": {"weight": 0.1},
        "attention": {"weight": 0.1},
        "relations": {"weight": 0.1},
        "layerwise": {"weight": 0.1},
        "contrastive": {"weight": 0.1},
    }
    keys = tiny_run(tmp_path) | losses | {"device": "cpu", "max_steps": 2, "max_eval_rows": 2}
    keys |= {"teacher_quantization": kind, "teacher_device": "cpu", "teacher_prefetch": 1}
    config = DistillConfig(**keys)
    result = distill(config)
    assert result.metrics["eval_ema/kl"] > 0
    header = dict(RunDirectory(config.output_dir).read_run()["header"])
    model = load_teacher(config)
    said = f"{parameter_count(model):,} parameters in float32, {quantized_count(model):,} of them"
    assert f"{said} in {kind}" in header["teacher"]
    assert result.results[0]["parameters"] == parameter_count(model)
    identity = load_inputs(config).identity(config)
    assert json.loads(json.dumps(identity))["config"]["teacher_quantization"] == kind
