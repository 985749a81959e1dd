"""Nothing is found out late: what later phases need is tried before anything takes time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import tiny_llama, tiny_run
from support.tiny_moe import tiny_moe
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

from sad.checkpoint.run_directory import RunDirectory
from sad.config.schema import DistillConfig
from sad.environment import seed_everything
from sad.errors import UnfitError
from sad.losses.capture import Capture
from sad.losses.feature import FeatureLoss
from sad.report.header import memory_line
from sad.report.log import read_log
from sad.training import run
from sad.training.inputs import load_inputs
from sad.training.rehearsal import rehearse
from sad.training.run import distill
from sad.training.trainer import Trainer

Make = Callable[..., DistillConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    def make(student: PreTrainedModel, teacher: PreTrainedModel, **keys: Any) -> DistillConfig:
        models = tiny_run(tmp_path, student, teacher)
        defaults: dict[str, Any] = {"max_steps": 4, "max_eval_rows": 2} | models
        return DistillConfig(**(defaults | keys))

    return make


def windowed(*kinds: str, seed: int = 0) -> PreTrainedModel:
    """A tiny Gemma 3 whose layers see 16 positions back, or all."""
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=16,
        layer_types=[f"{kind}_attention" for kind in kinds],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return Gemma3ForCausalLM(config).eval()


def refusal(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line with which a run is refused, before the teacher is scored or a baseline trained."""

    def too_late(*_: Any, **__: Any) -> None:
        pytest.fail("something took its time before the refusal")

    monkeypatch.setattr("sad.training.teacher_score.evaluate_teacher", too_late)
    monkeypatch.setattr(run, "_train", too_late)
    with pytest.raises(UnfitError) as caught:
        distill(config)
    assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["code"]) == ("failed", 65)
    return str(caught.value)


@pytest.mark.parametrize("baseline", [False, True])
def test_layers_with_other_windows_are_refused_with_a_pair_that_fits(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, baseline: bool
) -> None:
    """As Gemma 3 270M and 1B, whose last layers are of two kinds: the curriculum asks at 30 %."""
    student, teacher = windowed("sliding", "full"), windowed("full", "full", "sliding", seed=1)
    config = make_config(student, teacher, attention={"weight": 0.1}, baseline=baseline)
    assert refusal(config, monkeypatch) == (
        "attention.layers must pair layers that see as many positions back, got a window of all in "
        "student layer 1 and of 16 in teacher layer 2; write attention.layers: [[1, 1]], or set "
        "attention.weight: 0"
    )


@pytest.mark.slow
def test_the_pair_that_was_proposed_is_taken(make_config: Make) -> None:
    student, teacher = windowed("sliding", "full"), windowed("full", "full", "sliding", seed=1)
    distill(make_config(student, teacher, attention={"weight": 0.1, "layers": [[1, 1]]}))


def test_projections_too_narrow_for_relations_are_refused(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_llama(num_key_value_heads=1)
    teacher = tiny_llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, seed=1)
    line = refusal(make_config(student, teacher, relations={"weight": 0.1}), monkeypatch)
    assert "got 8 in the student and 24 in the teacher" in line
    assert line.endswith("or set relations.weight: 0")


def test_whatever_a_later_phase_needs_is_tried(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what no check knows of: here a loss that fails when it is computed."""

    def broken(self: FeatureLoss, inputs: Any) -> Any:
        raise ValueError("widths must be equal, got 3 and 4; choose others")

    monkeypatch.setattr(FeatureLoss, "forward", broken)
    curriculum = {"feature": [[0.9, 0], [1, 1]]}
    keys = {"feature": {"weight": 0.1}, "curriculum": curriculum}
    line = refusal(make_config(tiny_llama(), tiny_llama(seed=1), **keys), monkeypatch)
    assert line == "widths must be equal, got 3 and 4; choose others, or set feature.weight: 0"


def test_a_failure_that_no_check_foresaw_is_one_line_too(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FeatureLoss, inputs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)\nand more")

    monkeypatch.setattr(FeatureLoss, "forward", broken)
    config = make_config(tiny_llama(), tiny_llama(seed=1), feature={"weight": 0.1})
    assert refusal(config, monkeypatch) == (
        f"feature must work for {config.student} and {config.teacher}, got RuntimeError: mat1 and "
        "mat2 shapes cannot be multiplied (3x4 and 5x6); set the weight of the one that does not "
        "to 0 (--debug shows where it fails)"
    )


def test_a_routing_that_the_teacher_has_not_is_refused_before_the_baseline(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"routing": {"mode": "student_aware"}, "baseline": True}
    line = refusal(make_config(tiny_llama(), tiny_llama(seed=1), **keys), monkeypatch)
    assert line.startswith("student-aware routing must have a model with experts")


@pytest.mark.parametrize("mode", ["teacher", "student_aware", "knowledge_augmentation"])
def test_a_rehearsal_leaves_no_trace(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Weights, gates, queues, random generators: the run is the same with it and without."""
    teacher = tiny_moe("qwen3_moe", seed=1)
    config = make_config(
        tiny_llama(attention_dropout=0.1),
        teacher,
        feature={"weight": 0.1},
        contrastive={"weight": 0.1, "queue_size": 5},
        use_curriculum=False,
        routing={"mode": mode},
    )
    ends = []
    for rehearsed in (True, False):
        inputs = load_inputs(config)
        if rehearsed:
            rehearse(config, inputs)
            assert not any(p.requires_grad for p in inputs.teacher.model.parameters())  # pyright: ignore[reportOptionalMemberAccess]
            assert all(p.grad is None for p in inputs.teacher.model.parameters())  # pyright: ignore[reportOptionalMemberAccess]
        seed_everything(config.seed)
        trainer = make_trainer(config, inputs)
        for _ in range(2):
            trainer.micro_batch()
        ends.append(everything(trainer))
    assert_same_bits(*ends)


@pytest.mark.slow
def test_an_ordinary_run_has_none(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first micro-batch needs all that later ones need."""
    monkeypatch.setattr(run, "rehearse", lambda *_: pytest.fail("rehearsed for nothing"))
    distill(make_config(tiny_llama(), tiny_llama(seed=1)))


@pytest.mark.parametrize("part", [PreTrainedConfig, PreTrainedTokenizerBase])
def test_a_student_that_cannot_be_saved_again_is_not_trained(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, part: type[Any]
) -> None:
    """Else the first export would find out, after all of the training."""
    config = make_config(tiny_llama(), tiny_llama(seed=1))

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("some parameters are set where they should not be\nand more")

    monkeypatch.setattr(part, "save_pretrained", refuse)
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained for nothing"))
    with pytest.raises(UnfitError) as caught:
        distill(config)
    assert str(caught.value) == (
        "student must be a model that can be saved again, got ValueError: some parameters are set "
        "where they should not be; correct its configuration or its tokenizer"
    )
    assert not list(Path(config.output_dir).glob(".tmp-*"))


# Evaluation


def structural_run(make_config: Make, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Any:
    """Eval records of a run whose losses come in at half of it, and the layers hooked in each."""
    losses = {"layerwise": {"weight": 0.1, "num_pairs": 1}, "relations": {"weight": 0.1}}
    curriculum = {"layerwise": [[0.5, 0], [0.5, 1]], "relations": [[0, 0]]}
    config = make_config(
        tiny_llama(), tiny_llama(seed=1), **losses, curriculum=curriculum, eval_steps=1, **keys
    )
    hooked: list[bool] = []
    install = Capture._install

    def noted(self: Capture, *args: Any) -> None:
        hooked.append(True)
        install(self, *args)

    inputs = load_inputs(config)
    trainer = make_trainer(config, inputs)
    monkeypatch.setattr(Capture, "_install", noted)
    counts = []
    with run_log(config, trainer) as log:
        while trainer.counters.micro_step < trainer.run_length.micro_batches:
            trainer.micro_batch()
            hooked.clear()
            trainer.evaluate(log)
            counts.append(len(hooked))
    return [r for r in read_log(config.output_dir) if r["kind"] == "eval"], counts


def test_evaluation_computes_and_hooks_no_loss_that_has_no_weight_yet(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, hooked = structural_run(make_config, monkeypatch)
    assert ["eval/layerwise" in r for r in records] == [False, True, True, True]
    assert not any("eval/relations" in r for r in records)
    assert hooked[0] == 0 and all(hooked[1:])


def test_eval_all_losses_computes_them_all(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, hooked = structural_run(make_config, monkeypatch, eval_all_losses=True)
    assert all({"eval/relations", "eval_ema/layerwise"} <= r.keys() for r in records)
    assert all(hooked)


@pytest.mark.slow
def test_eval_all_losses_may_change_when_a_run_resumes(make_config: Make) -> None:
    config = make_config(tiny_llama(), tiny_llama(seed=1), feature={"weight": 0.1}, max_steps=1)
    distill(config)
    keys = {"eval_all_losses": True, "resume_from_checkpoint": "auto"}
    keys |= {"feature": {"weight": 0.1}, "max_steps": 1}
    distill(make_config(tiny_llama(), tiny_llama(seed=1), **keys))


# The estimate of memory


def test_an_estimate_that_fails_ends_no_run(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("no fake form of this operator")

    monkeypatch.setattr("sad.report.header.plan", failing)
    result = distill(make_config(tiny_llama(), tiny_llama(seed=1), max_steps=1))
    header = dict(RunDirectory(result.run_dir).read_run()["header"])
    assert header["memory"].startswith("not predicted")
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert "memory: peak" in shown.out and "predicted for" not in shown.out


def test_without_a_prediction_the_peak_stands_alone() -> None:
    mib = 2**20
    assert memory_line(None, 0, {"cuda_peak_bytes": mib, "cuda_total_bytes": 2 * mib}) == (
        "peak 1 MiB of 2"
    )


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_mixture_of_experts_of_any_width_runs(
    make_config: Make, capfd: pytest.CaptureFixture[str], family: str
) -> None:
    """Experts 20 wide, fp32: torch's fake of grouped products wants bf16 and 16 bytes."""
    width = {"moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size": 20}
    result = distill(make_config(tiny_moe(family, **width), tiny_llama(seed=1), max_steps=1))
    header = dict(RunDirectory(result.run_dir).read_run()["header"])
    assert header["memory"].endswith("MiB predicted at peak")
    assert "Traceback" not in capfd.readouterr().err


def test_the_language_model_of_a_multimodal_student_learns(make_config: Make) -> None:
    """Gemma 3: its vision tower draws its weights from numbers that an estimate does not have."""
    text = windowed("sliding", "full").config
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model: Any = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    config = make_config(model, tiny_llama(seed=1), max_steps=2, use_ema=False, learning_rate=1e-2)
    result = distill(config)
    header = dict(RunDirectory(result.run_dir).read_run()["header"])
    assert header["memory"].endswith("MiB predicted at peak")
    parts, inner = ("vision_tower", "multi_modal_projector"), model.base_model
    count = sum(p.numel() for name in parts for p in inner.get_submodule(name).parameters())
    assert header["not trained"] == (
        f"{', '.join(parts)} ({count:,} parameters), which text does not use"
    )
    trained = Gemma3ForConditionalGeneration.from_pretrained(result.final)
    before, after = (dict(m.named_parameters()) for m in (model, trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    assert len(RunDirectory(result.run_dir).read_run()["samples"]) == 2
