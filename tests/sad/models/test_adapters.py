"""LoRA students: adapters are trained, exported in PEFT's form or merged, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import save_tiny, tiny_llama, write_texts
from support.tiny_moe import tiny_moe
from torch import Tensor
from transformers import AutoModelForCausalLM

from sad.checkpoint.disk_space import checkpoint_bytes
from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig, ce_only
from sad.environment import StopSignals, quiet_libraries
from sad.errors import CheckpointError, SadError, UnfitError, UsageError
from sad.losses.feature import FeatureLoss
from sad.models.load import build_student_model, load_student
from sad.models.memory_plan import plan
from sad.optim.precision import Precision
from sad.training.inputs import RunInputs, load_inputs
from sad.training.rehearsal import rehearse
from sad.training.rescore import evaluate_run
from sad.training.run import distill

peft: Any = pytest.importorskip("peft")

Make = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "teacher": save_tiny(folder / "teacher", tiny_llama(seed=1, hidden_size=48)),
        "student": save_tiny(folder / "student", tiny_llama(seed=2)),
        "tied": save_tiny(folder / "tied", tiny_llama(seed=2, tie_word_embeddings=True)),
        "experts": save_tiny(folder / "experts", tiny_moe("qwen3_moe", seed=2)),
        "data": {"train": write_texts(folder / "texts", count=12), "eval_fraction": 0.3},
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> Make:
    def make(**keys: Any) -> DistillConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "peft": {"r": 4, "target_modules": "all-linear"},
            "max_length": 32,
            "max_steps": 3,
            "max_eval_rows": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
        }
        own = {key: value for key, value in sources.items() if key not in ("tied", "experts")}
        return DistillConfig(**(own | defaults | keys))

    return make


def named(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Training


def test_adapters_are_trained_and_nothing_else(make_config: Make) -> None:
    trainer = make_trainer(make_config(peft={"r": 4, "target_modules": ["q_proj", "down_proj"]}))
    model = trainer.student.model
    before = named(model)
    while trainer.counters.micro_step < trainer.run_length.micro_batches:
        trainer.micro_batch()
    changed = {name for name, value in named(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == 2 * 2 * 2  # layers, modules, A and B
    assert all(("q_proj" in name) or ("down_proj" in name) for name in changed)
    assert trainer.ema is not None and trainer.ema.tensors().keys() == changed
    # Decay 0.9999 has hardly begun: the average is under way between the first and the last.
    averaged = [(shadow, before[n]) for n, shadow in trainer.ema.tensors().items()]
    assert any(not torch.equal(shadow, first) for shadow, first in averaged)


def test_they_depend_on_the_seed_alone(make_config: Make) -> None:
    first = named(load_student(make_config()))
    torch.rand(7)
    state = torch.get_rng_state()
    again, other = named(load_student(make_config())), named(load_student(make_config(seed=1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {name for name in first if ".lora_A." in name}


def test_they_are_fp32_over_16_bits(make_config: Make) -> None:
    model = load_student(make_config(param_dtype="bfloat16"))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        assert parameter.requires_grad == (".lora_" in name)


def test_a_baseline_has_the_same_adapters(make_config: Make) -> None:
    config = make_config()
    assert replace(config, **ce_only()).peft == config.peft


def ranks(model: Any) -> dict[str, int]:
    """Layer's name -> rows of its A."""
    return {
        name.partition(".lora_A")[0]: len(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }


def test_patterns_give_layers_their_own_rank_and_alpha(make_config: Make) -> None:
    patterns = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\.self_attn.q_proj": 2, "q_proj": 6},  # the first that fits
        "alpha_pattern": {"up_proj": 16},
    }
    model: Any = load_student(make_config(peft=patterns))
    assert ranks(model) == {
        "model.layers.0.self_attn.q_proj": 6,
        "model.layers.0.mlp.up_proj": 4,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.mlp.up_proj": 4,
    }
    layer = model.model.layers[1]
    assert layer.mlp.up_proj.scaling == {"default": 16 / 4}
    assert layer.self_attn.q_proj.scaling == {"default": 8 / 2}


EXPERTS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
    "rank_pattern": {"experts.down_proj": 3},
}


def test_parameters_without_a_layer_of_their_own_get_adapters(
    make_config: Make, sources: dict[str, Any]
) -> None:
    trainer = make_trainer(make_config(student=sources["experts"], peft=EXPERTS))
    model = trainer.student.model
    of_experts = {name: rank for name, rank in ranks(model).items() if "q_proj" not in name}
    assert of_experts.pop("model.layers.0.mlp.experts") == 8 * 2
    # Of two parameters of a layer, the wrapper of one is around that of the other.
    assert of_experts.keys() == {f"model.layers.1.mlp.experts{n}" for n in ("", ".base_layer")}
    assert sorted(of_experts.values()) == [8 * 2, 8 * 3]
    before = named(model)
    for _ in range(4):
        trainer.micro_batch()
    changed = {name for name, value in named(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


# Export


def scored(config: DistillConfig, inputs: RunInputs | None = None) -> tuple[Any, Tensor, Tensor]:
    """A trainer at its end, and the logits of the averaged weights on a held-out row."""
    inputs = inputs or load_inputs(config)
    trainer = make_trainer(config, inputs)
    with run_log(config, trainer) as log:
        trainer.train(log, StopSignals())
    ids = inputs.eval_rows.batch([0]).input_ids
    assert trainer.ema is not None
    with trainer.ema.swapped():
        logits = logits_of(trainer.student.model, ids)
    return trainer, ids, logits


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def loaded(folder: Path) -> Any:
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_what_is_exported_are_adapters_as_peft_reads_them(make_config: Make) -> None:
    config = make_config()
    trainer, ids, logits = scored(config)
    best = trainer.run_dir.best
    assert not (best / "model.safetensors").exists() and not (best / "config.json").exists()
    names = load_file(best / "adapter_model.safetensors").keys()
    assert names and all(name.startswith("base_model.model.model.layers.") for name in names)
    assert torch.equal(logits_of(loaded(best), ids), logits)
    with quiet_libraries():
        base = AutoModelForCausalLM.from_pretrained(config.student)
        by_peft = peft.PeftModel.from_pretrained(base, best)
    assert torch.equal(logits_of(by_peft, ids), logits)


@pytest.mark.parametrize("student", ["student", "tied"])
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "all"}])
def test_a_merged_export_is_an_ordinary_student(
    make_config: Make, sources: dict[str, Any], student: str, keys: dict[str, Any]
) -> None:
    section = {"r": 4, "target_modules": "all-linear"} | keys
    config = make_config(peft=section, merge_adapters=True, student=sources[student])
    trainer, ids, logits = scored(config)
    live = named(trainer.student.model)
    trainer.export(trainer.run_dir.final)
    assert_same_bits(named(trainer.student.model), live)  # merging leaves no trace
    assert not (trainer.run_dir.final / "adapter_config.json").exists()
    model = loaded(trainer.run_dir.final)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits_of(model, ids), logits, rtol=1e-5, atol=1e-5)
    untouched = logits_of(loaded(Path(config.student or "")), ids)
    assert (untouched - logits).abs().max() > 1e-3, "training must show"


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_of_parameters_are_exported(
    make_config: Make, sources: dict[str, Any], merge: bool
) -> None:
    config = make_config(student=sources["experts"], peft=EXPERTS, merge_adapters=merge)
    trainer, ids, logits = scored(config)
    live = named(trainer.student.model)
    trainer.export(trainer.run_dir.final)
    assert_same_bits(named(trainer.student.model), live)
    model = loaded(trainer.run_dir.final)
    assert any(".lora_" in name for name, _ in model.named_parameters()) != merge
    torch.testing.assert_close(logits_of(model, ids), logits, rtol=1e-5, atol=1e-5)
    untouched = logits_of(loaded(Path(config.student or "")), ids)
    assert (untouched - logits).abs().max() > 1e-3, "training must show"


@pytest.mark.few(1)
@pytest.mark.parametrize("section", [{}, EXPERTS], ids=["layers", "parameters"])
def test_a_run_and_its_later_score(
    make_config: Make, sources: dict[str, Any], section: dict[str, Any]
) -> None:
    keys = {"student": sources["experts"], "peft": section} if section else {}
    result = distill(make_config(**keys))
    assert (result.final / "adapter_model.safetensors").exists()
    row = evaluate_run(result.run_dir)[-1]
    assert row["nll"] == pytest.approx(result.results[-1]["nll"], rel=1e-6)  # pyright: ignore


def test_a_random_student_is_exported_whole(make_config: Make) -> None:
    result = distill(make_config(student_init="random", merge_adapters=True, max_steps=1))
    assert (result.final / "model.safetensors").exists()
    row = evaluate_run(result.run_dir)[-1]
    assert row["nll"] == pytest.approx(result.results[-1]["nll"], rel=1e-4)  # pyright: ignore


# Resumption


@pytest.mark.parametrize(
    ("student", "section"),
    [
        ("student", {"r": 4, "lora_dropout": 0.1, "rank_pattern": {"q_proj": 2}}),
        ("experts", EXPERTS),
    ],
)
def test_a_stop_after_any_micro_batch_changes_no_bit(
    make_config: Make, sources: dict[str, Any], student: str, section: dict[str, Any]
) -> None:
    config = make_config(student=sources[student], peft=section)
    inputs = load_inputs(config)
    whole = make_trainer(config, inputs)
    total = whole.run_length.micro_batches
    for _ in range(total):
        whole.micro_batch()
    end = everything(whole)
    assert not any(n.startswith("model/") and ".lora_" not in n for n in end)

    for stop in (1, 3, 4):
        first = make_trainer(config, inputs)
        for _ in range(stop):
            first.micro_batch()
        path = save_checkpoint(config.output_dir, stop, *first.capture(), save_total_limit=2)
        second = make_trainer(config, inputs)
        second.restore(load_checkpoint(path), warn=pytest.fail)
        while second.counters.micro_step < total:
            second.micro_batch()
        assert_same_bits(everything(second), end)


def test_adapters_do_not_resume_over_other_weights(make_config: Make, tmp_path: Path) -> None:
    student = tmp_path / "student"
    config = make_config(student=save_tiny(student, tiny_llama(seed=2)))
    trainer = make_trainer(config)
    path = save_checkpoint(config.output_dir, 0, *trainer.capture(), save_total_limit=2)
    other: Any = tiny_llama(seed=2)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    other.save_pretrained(student)
    with pytest.raises(CheckpointError, match="weights under its adapters that the run began with"):
        make_trainer(config).restore(load_checkpoint(path), warn=pytest.fail)


# What cannot be


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"peft": {"modules_to_save": ["lm_head"]}},
            UnfitError,
            r"the head of LlamaForCausalLM must be exactly torch\.nn\.Linear.* take the head",
        ),
        (
            {"peft": {"target_modules": ["q_proj", "lm_head"]}},
            UnfitError,
            r"the head of LlamaForCausalLM must be exactly torch\.nn\.Linear.* take the head",
        ),
        (
            {"peft": {"target_modules": ["quark_proj"]}},
            UsageError,
            "peft must name layers of LlamaForCausalLM.*quark_proj.*correct peft.target_modules",
        ),
        (
            {"peft": {"rank_pattern": {"quark_proj": 2}}},
            UsageError,
            r"peft\.rank_pattern must name what has adapters in LlamaForCausalLM, got 'quark_proj'",
        ),
        (
            {"peft": {"alpha_pattern": {"proj": 2}}},
            UsageError,
            r"peft\.alpha_pattern must name what has adapters in LlamaForCausalLM, got 'proj'",
        ),
        ({"peft": {"rank_pattern": {"[": 2}}}, UsageError, "got unterminated character set"),
        (
            {"peft": {**EXPERTS, "target_parameters": ["gate_up_proj", "up"], "rank_pattern": {}}}
            | {"student": "experts"},
            UsageError,
            r"peft\.target_parameters must name what has adapters in Qwen3MoeForCausalLM, got 'up'",
        ),
        (
            {"peft": {"modules_to_save": ["embed_tokens"]}, "student": "tied"},
            UnfitError,
            "the input embeddings of LlamaForCausalLM must stay as they are",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    make_config: Make,
    sources: dict[str, Any],
    keys: dict[str, Any],
    error: type[SadError],
    message: str,
) -> None:
    keys = keys | {"student": sources[keys.get("student", "student")]}
    with pytest.raises(error, match=message) as caught:
        distill(make_config(**keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"peft": {}, "merge_adapters": True},
            "merge_adapters must be false without a key",
        ),
        (
            {"student_init": "random"},
            "student_init must be pretrained for adapters",
        ),
        ({"peft": {"r": 0}}, r"peft\.r must be at least 1, got 0"),
        ({"peft": {"peft_type": "LOHA"}}, r"peft\.peft_type must be one of LORA, got 'LOHA'"),
        (
            {"peft": {"rank_pattern": {"q_proj": 0}}},
            r"peft\.rank_pattern must hold numbers of at least 1, got {'q_proj': 0}",
        ),
        ({"peft": {"rank_pattern": 8}}, r"peft\.rank_pattern must be a mapping, got 8"),
        (
            {"peft": {"target_parameters": ["experts.up"], "lora_dropout": 0.1}},
            r"peft\.lora_dropout must be left out with peft\.target_parameters, got 0\.1; PEFT has",
        ),
        (
            {"peft": {"target_parameters": ["experts.up"], "use_dora": True}},
            r"peft\.use_dora must be left out with peft\.target_parameters, got True; PEFT has no",
        ),
        (
            {"peft": {"target_parameters": ["experts.up"], "layers_to_transform": [1]}},
            r"peft\.layers_to_transform must be left out with peft\.target_parameters, got \(1,\)",
        ),
        ({"peft": {"init_lora_weights": "pissa"}}, "must be one of gaussian, orthogonal"),
    ],
)
def test_keys_that_contradict_each_other(
    make_config: Make, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(**keys)


def test_without_peft_the_command_that_installs_it(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UsageError, match=r"peft must be installed .*distillation\[peft\]"):
        load_student(make_config())


# Memory and disk


def test_only_adapters_count(make_config: Make) -> None:
    config = make_config(gradient_accumulation_steps=2)
    sizes, full = (dict(plan(c).items) for c in (config, make_config(peft={})))
    count = sum(p.numel() for n, p in load_student(config).named_parameters() if ".lora_" in n)
    assert sizes["AdamW moments"] == 8 * count and sizes["EMA, float32"] == 4 * count
    assert sizes["gradients"] == 4 * count
    assert sizes["student weights, float32"] == full["student weights, float32"] + 4 * count
    assert "loss: gradient of the head" in full.keys() - sizes.keys()


def test_a_checkpoint_is_as_large_as_foreseen(make_config: Make) -> None:
    config = make_config()
    trainer = make_trainer(config)
    trainer.micro_batch()
    trainer.micro_batch()
    trainer.micro_batch()  # in the middle of a window
    _, tensors = trainer.capture()
    saved = sum(t.nbytes for g, group in tensors.items() if g != "rng" for t in group.values())
    with torch.device("meta"):
        student = build_student_model(config)
    assert 0 <= saved - checkpoint_bytes(config, student) < 10_000


def test_what_the_curriculum_asks_for_later_is_rehearsed_with_adapters(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = ("attention", "relations", "feature", "layerwise", "contrastive")
    config = make_config(
        **{name: {"weight": 0.1} for name in losses},
        curriculum={name: [[0.5, 0], [0.6, 1]] for name in losses},
    )
    rehearsed = []
    backward = Precision.backward

    def noted(self: Precision, loss: Tensor) -> None:
        rehearsed.append(loss.item())
        backward(self, loss)

    monkeypatch.setattr(Precision, "backward", noted)
    inputs = load_inputs(config)
    rehearse(config, inputs)
    assert len(rehearsed) == 1
    ends = []
    for again in (True, False):
        if again:
            rehearse(config, inputs)
        trainer = make_trainer(config, inputs)
        while trainer.counters.micro_step < trainer.run_length.micro_batches:
            trainer.micro_batch()
        ends.append(everything(trainer))
    assert_same_bits(*ends)

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(FeatureLoss, "forward", broken)
    with pytest.raises(UnfitError, match=r"must work for .*, got RuntimeError: shapes"):
        distill(config)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_structural_losses_look_at_layers_with_adapters(
    make_config: Make, options: dict[str, Any]
) -> None:
    on = {"weight": 0.1}
    losses = {"relations": on, "attention": on, "layerwise": on, "use_curriculum": False}
    trainer = make_trainer(make_config(**losses, **options))
    before = named(trainer.student.model)
    trainer.student.train()
    trainer.micro_batch()
    trainer.micro_batch()
    after = named(trainer.student.model)
    assert all(torch.equal(after[n], before[n]) != (".lora_B." in n) for n in after)
