"""Predicted memory is exact where it is arithmetic, else within a tenth of a measured step."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels._torch.scratch import release_scratch
from support.families import tiny_family
from support.runs import make_trainer, run_log
from support.tiny import save_tiny, tiny_llama, write_texts
from support.tiny_moe import tiny_moe
from torch import Tensor, nn

from sad.cli import main
from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig, config_to_yaml
from sad.data.batch import Batch, LossCounts
from sad.errors import UnfitError, UsageError
from sad.models.cached_targets import CachedTargets
from sad.models.heads import Backbone
from sad.models.load import compute_dtype, load_student, load_teacher
from sad.models.memory_plan import MemoryPlan, format_plan, plan
from sad.optim.precision import Precision
from sad.teachers.cached import CachedTeacher, planned_targets
from sad.teachers.frozen import FrozenTeacher
from sad.training.cache_teacher import cache_teacher
from sad.training.student import StudentWithLoss

STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 2048}
DEEP = STUDENT | {"num_hidden_layers": 12, "vocab_size": 128}
TEACHER = STUDENT | {"hidden_size": 128, "intermediate_size": 384}
PARAMETERS = sum(p.numel() for p in tiny_llama(**STUDENT).parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_llama(**STUDENT).save_pretrained(path / "student")
    tiny_llama(**TEACHER).save_pretrained(path / "teacher")
    tiny_llama(**STUDENT, tie_word_embeddings=True).save_pretrained(path / "tied")
    tiny_llama(**DEEP).save_pretrained(path / "deep")
    return path


def config_for(folder: Path, student: str = "student", **keys: Any) -> DistillConfig:
    settings: dict[str, Any] = {
        "teacher": str(folder / "teacher"),
        "device": "cpu",
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
    }
    settings |= keys
    # A device that is not the host's, and which no configuration takes.
    elsewhere = {key: settings.pop(key) for key, value in keys.items() if value == "meta"}
    config = DistillConfig(student=str(folder / student), **settings)
    for key, value in elsewhere.items():
        object.__setattr__(config, key, value)
    return config


def sizes(plan: MemoryPlan) -> dict[str, int]:
    return dict(plan.items) | dict(plan.elsewhere)


# States


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("keys", "per_parameter"),
    [
        ({}, 16 + 4),
        ({"bf16": True}, 16 + 4),
        ({"use_ema": False}, 16),
        ({"param_dtype": "bfloat16"}, 18 + 4),
        ({"param_dtype": "bfloat16", "master_weights": False}, 8 + 4),
    ],
)
def test_states_are_exact(folder: Path, keys: dict[str, Any], per_parameter: int) -> None:
    found = sizes(plan(config_for(folder, gradient_accumulation_steps=2, **keys)))
    states = ("student weights", "master weights", "AdamW", "EMA", "gradients")
    total = sum(size for label, size in found.items() if label.startswith(states))
    buffers = sum(b.nbytes for b in tiny_llama(**STUDENT).buffers())
    assert total == per_parameter * PARAMETERS + buffers


def test_tied_weights_count_once(folder: Path) -> None:
    whole, tied = (
        sizes(plan(config_for(folder, name)))["AdamW moments"] for name in ("student", "tied")
    )
    assert whole - tied == 8 * 2048 * 64


def test_the_teacher_has_its_own_dtype(folder: Path) -> None:
    whole = sizes(plan(config_for(folder)))["teacher weights, float32"]
    half = sizes(plan(config_for(folder, teacher_dtype="bfloat16")))["teacher weights, bfloat16"]
    buffers = sum(b.nbytes for b in tiny_llama(**TEACHER).buffers())
    assert whole - buffers == 2 * (half - buffers)


def test_a_teacher_elsewhere_leaves_its_head_here(folder: Path) -> None:
    here = plan(config_for(folder))
    away = plan(config_for(folder, teacher_device="meta"))
    assert away.elsewhere == (
        ("teacher weights, float32", sizes(here)["teacher weights, float32"]),
    )
    assert sizes(away)["teacher head"] == 4 * 2048 * 128
    assert here.total - away.total == dict(away.elsewhere).popitem()[1] - 4 * 2048 * 128


def test_a_head_for_other_ids_is_a_copy(folder: Path) -> None:
    alone = plan(config_for(folder))
    found = plan(config_for(folder, vocab_map="not opened"))
    assert sizes(found)["teacher head, in the student's ids"] == 4 * 2048 * 128
    assert found.total - alone.total == 4 * 2048 * 128


def test_without_a_teacher_nothing_is_planned_for_one(folder: Path) -> None:
    alone = plan(config_for(folder, teacher=None, kd_weight=0))
    assert not any("teacher" in label for label, _ in alone.items)
    assert alone.full_logits == 4 * 256 * 2048 * 4


def test_full_logits_are_those_of_both_models(folder: Path) -> None:
    assert plan(config_for(folder, bf16=True)).full_logits == 4 * 256 * 2048 * (2 + 2)


# What evaluations keep


ROW = 256 * 128 * 4
"""Bytes of the teacher's hidden states of one row."""
KEPT = "teacher states for evaluations"
CACHE: dict[str, Any] = {"eval_teacher_cache": 1 << 28}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("keys", "eval_rows", "label", "size"),
    [
        ({"max_eval_rows": 100}, None, f"{KEPT}, at most", 100 * ROW),
        ({}, 70, KEPT, 70 * ROW),
        ({"max_eval_rows": 100}, 70, KEPT, 70 * ROW),
        ({"max_eval_rows": 60}, 70, KEPT, 60 * ROW),
        ({"max_eval_rows": 60, "teacher_dtype": "bfloat16"}, 70, KEPT, 60 * ROW // 2),
        ({"eval_teacher_cache": 9 * ROW}, 70, KEPT, 9 * ROW),
    ],
)
def test_what_evaluations_keep_counts(
    folder: Path, keys: dict[str, Any], eval_rows: int | None, label: str, size: int
) -> None:
    config = config_for(folder, **(CACHE | keys))
    found = plan(config, eval_rows)
    assert sizes(found)[label] == size and not found.host
    assert found.total == plan(replace(config, eval_teacher_cache=0)).total + size


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("device", "eval_rows", "label", "size"),
    [("cpu", None, f"{KEPT}, at most", 1 << 28), ("meta", 70, KEPT, 70 * ROW)],
    ids=["unknown rows", "another device"],
)
def test_what_is_a_bound_or_not_on_the_device_stands_apart(
    folder: Path, device: str, eval_rows: int | None, label: str, size: int
) -> None:
    found = plan(config_for(folder, device=device, **CACHE), eval_rows)
    assert found.host == ((label, size),)
    assert found.total == plan(config_for(folder, device=device)).total
    lines = format_plan(found).splitlines()
    assert lines[lines.index("in host memory") + 1].startswith(f"  {label} ")


@pytest.mark.parametrize(
    "keys",
    [
        {"eval_teacher_cache": 0},
        {"teacher": None, "kd_weight": 0},
        {"feature": {"weight": 0.1}},
        {"routing": {"mode": "student_aware"}},
        {"routing": {"mode": "knowledge_augmentation"}},
    ],
    ids=str,
)
def test_where_evaluations_keep_nothing_nothing_is_planned(
    folder: Path, keys: dict[str, Any]
) -> None:
    found = plan(config_for(folder, **(CACHE | keys)), 70)
    assert KEPT not in sizes(found) and not found.host


# Activations


def kept_for_backward(student: nn.Module, config: DistillConfig) -> int:
    """What a real forward pass over packed rows keeps, parameters and buffers aside."""
    own = {t.untyped_storage()._cdata for t in (*student.parameters(), *student.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    batch = packed_batch(config, 0)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        Precision(config).autocast(),
    ):
        Backbone(student)(batch.input_ids, batch.position_ids)  # pyright: ignore
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize(
    "keys", [{}, {"bf16": True}, {"param_dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
def test_activations_are_those_of_a_real_forward_pass(folder: Path, keys: dict[str, Any]) -> None:
    config = config_for(folder, **keys)
    real = kept_for_backward(load_student(config), config)
    assert sizes(plan(config))["student activations"] == real


@pytest.mark.parametrize("family", ["gemma2", "gpt_neo"])
def test_activations_of_other_families_are_those_of_a_real_forward_pass(
    family: str, tmp_path: Path
) -> None:
    """GPT-Neo's backward pass reads a buffer, which is no activation."""
    tiny_family(family).save_pretrained(tmp_path / "student")
    keys = {"attn_implementation": "eager", "max_length": 64}
    config = config_for(tmp_path, teacher=None, kd_weight=0, **keys)
    real = kept_for_backward(load_student(config), config)
    assert sizes(plan(config))["student activations"] == real


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_estimated_from_above(family: str, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path / "student")
    config = config_for(tmp_path, teacher=None, kd_weight=0, max_length=64)
    real = kept_for_backward(load_student(config), config)
    assert real <= sizes(plan(config))["student activations"] <= 1.6 * real


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("keys", [{}, {"bf16": True}], ids=str)
def test_experts_of_any_width_are_estimated_in_their_own_dtype(
    family: str, keys: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's fake of grouped products is of bf16 alone, in widths of 16 bytes."""
    width = {"moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size": 20}
    tiny_moe(family, **width).save_pretrained(tmp_path / "student")
    capfd.readouterr()
    config = config_for(tmp_path, teacher=None, kd_weight=0, max_length=64, **keys)
    assert sizes(plan(config))["student activations"] > 0
    assert capfd.readouterr().err == ""


def test_a_student_without_a_fake_form_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def data_dependent(*_: Any) -> Any:
        return torch.zeros(3).nonzero().item()

    monkeypatch.setattr(Backbone, "__call__", data_dependent)
    with pytest.raises(UnfitError, match="an estimate of memory must run") as caught:
        plan(config_for(folder))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


# A whole step


def packed_batch(config: DistillConfig, seed: int) -> Batch:
    shape = config.per_device_train_batch_size, config.max_length
    ids = torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, dims=1)
    labels[:, 39::40] = -100
    positions = (torch.arange(shape[1]) % 40).repeat(shape[0], 1)
    counts = LossCounts(int((labels != -100).sum()), int((positions > 0).sum()), shape[0])
    return Batch(ids, labels, positions, torch.full(shape[:1], shape[1]), counts, 1)


def measured_peak(config: DistillConfig) -> int:
    """The most bytes alive at once, from the loaded models to the end of the second window.

    Weights are counted by their sizes: they may be mapped from a file, or read in by other threads,
    and the profiler sees neither. It sees the changes from there on.
    """
    precision, model = Precision(config), load_student(config)
    vocab = model.config.vocab_size
    student = StudentWithLoss(
        model,
        vocab,
        compute_dtype=precision.compute_dtype,
        autocast=precision.autocast,
        chunk_bytes=config.chunk_bytes,
    ).train()
    teacher, loaded = None, [model]
    if config.teacher is not None:
        loaded.append(load_teacher(config))
        teacher = FrozenTeacher(loaded[1], vocab, device=torch.device("cpu"))
    alive = peak = sum(t.nbytes for m in loaded for t in (*m.parameters(), *m.buffers()))

    release_scratch()  # buffers of earlier losses count as well
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        optimizer, ema = precision.build_optimizer(student), precision.build_ema(student)
        for step in range(2):
            for _ in range(config.gradient_accumulation_steps):
                batch = packed_batch(config, step)
                target = None if teacher is None else teacher.forward(batch)
                out = student(batch, target, config.objective(), LossCounts(1000, 0, 0))
                precision.backward(out.loss)
            ema.update(precision.step(optimizer, 1.0).ok)
            precision.zero_grad(optimizer)
    events = profile.kineto_results.events()  # pyright: ignore
    changes: list[Any] = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"param_dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        pytest.param({"chunk_bytes": 1 << 20}, marks=pytest.mark.slow),
        {"per_device_train_batch_size": 1, "max_length": 8},
    ],
    ids=lambda keys: ",".join(keys) or "defaults",
)
def test_the_peak_is_within_a_tenth_of_a_measured_step(folder: Path, keys: dict[str, Any]) -> None:
    config = config_for(folder, **keys)
    assert plan(config).tensors == pytest.approx(measured_peak(config), rel=0.1)


WIDE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048}
WIDER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 2048}
ON = {"weight": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("runs")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    positions = {"max_position_embeddings": 512}
    return {
        "student": save_tiny(path / "s", tiny_llama(**WIDE, **positions, num_hidden_layers=4)),
        "teacher": save_tiny(path / "t", tiny_llama(**WIDER, **positions, **heads)),
        "data": {"train": write_texts(path / "texts", count=60), "eval_fraction": 0.2},
        "output_dir": str(path / "run"),
        "device": "cpu",
        "max_length": 256,
        "max_steps": 2,
        "use_curriculum": False,
        "max_eval_rows": 8,
        "per_device_train_batch_size": 8,
    }


def profiled(work: Callable[[], object], alive: int) -> tuple[int, int]:
    """The most bytes alive at once while something runs, and those alive at its end."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    events = profile.kineto_results.events()  # pyright: ignore
    changes: list[Any] = [event for event in events if event.name() == "[memory]"]
    peak = alive
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, alive


def measured_run(config: DistillConfig) -> tuple[int, int]:
    """The peaks of the training and of the evaluation of a run, in bytes of tensors."""
    trainer = make_trainer(config)
    structural = trainer.student.structural
    assert trainer.inputs.teacher is not None and trainer.ema is not None
    teacher = trainer.inputs.teacher
    modules = [trainer.student.model, *([] if teacher.model is None else [teacher.model])]
    modules += [] if structural is None else [structural]
    tensors = {id(t): t.nbytes for m in modules for t in (*m.parameters(), *m.buffers())}
    alive = sum(tensors.values()) + sum(t.nbytes for t in trainer.ema.tensors().values())
    if isinstance(teacher, CachedTeacher) and teacher.kind == "hidden":
        alive += teacher._head.weight.nbytes  # read from its file, which the profiler does not see

    def train() -> None:
        while trainer.counters.micro_step < trainer.run_length.micro_batches:
            trainer.micro_batch()

    trainer.student.train()
    release_scratch()
    training, alive = profiled(train, alive)
    with run_log(config, trainer) as log:
        evaluation, _ = profiled(lambda: trainer.evaluate(log), alive)
    return training, evaluation


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        pytest.param({"attention": ON}, marks=pytest.mark.slow),
        pytest.param({"relations": ON}, marks=pytest.mark.slow),
        {"relations": ON | {"query_block": 64}, "layerwise": ON, "feature": ON},
        {name: ON for name in ("attention", "relations", "layerwise", "feature", "contrastive")},
        pytest.param({"relations": ON, "bf16": True}, marks=pytest.mark.slow),
    ],
    ids=lambda keys: ",".join(keys) or "none",
)
def test_structural_losses_count(runs: dict[str, Any], keys: dict[str, Any]) -> None:
    config = DistillConfig(**runs | keys)
    training, _ = measured_run(config)
    assert training > 120 << 20
    found = plan(config)
    assert found.moment == "between forward and backward"
    assert found.tensors == pytest.approx(training, rel=0.15)


@pytest.mark.few(1)
@pytest.mark.parametrize("keys", [{}, {"relations": ON}], ids=lambda keys: ",".join(keys) or "none")
def test_evaluations_of_more_rows_count(runs: dict[str, Any], keys: dict[str, Any]) -> None:
    rows = {"per_device_train_batch_size": 1}
    rows |= {"per_device_eval_batch_size": 24, "max_eval_rows": 24}
    settings: dict[str, Any] = runs | rows | keys
    config = DistillConfig(**settings)
    training, evaluation = measured_run(config)
    assert evaluation > 1.5 * training
    found = plan(config)
    assert found.moment == "in an evaluation"
    assert found.tensors == pytest.approx(evaluation, rel=0.15)


CACHES = {
    "hidden": {"kind": "hidden"},
    "topk": {"kind": "topk", "top_k": 256},
}
EVERY_CACHE = pytest.mark.parametrize("cache", CACHES)


@pytest.mark.few(1)
@EVERY_CACHE
@pytest.mark.parametrize("many", [False, True], ids=["training", "evaluation"])
def test_a_cache_of_the_teacher_counts(
    runs: dict[str, Any], tmp_path: Path, cache: str, many: bool
) -> None:
    rows = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 24} if many else {}
    settings: dict[str, Any] = runs | rows | ({"max_eval_rows": 24} if many else {})
    config = DistillConfig(**settings, temperature=1.0)
    folder = cache_teacher(config, CacheOptions(output=str(tmp_path / "cache"), **CACHES[cache]))
    config = replace(config, teacher=None, teacher_cache=str(folder))
    training, evaluation = measured_run(config)
    found = plan(config, cached=planned_targets(folder))
    assert found.moment == ("in an evaluation" if many else "between forward and backward")
    # The tiles of a dense teacher's logits are counted from above; here its body weighs nothing.
    within = 0.15 if cache == "topk" else 0.25
    assert found.tensors == pytest.approx(evaluation if many else training, rel=within)
    labels = {label for label, _ in found.items}
    assert ("teacher head" in labels) == (CACHES[cache]["kind"] == "hidden")
    assert not any(label.startswith("teacher weights") for label in labels)


@pytest.mark.slow
def test_the_command_plans_with_a_cache(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DistillConfig(**runs)
    folder = cache_teacher(config, CacheOptions(output=str(tmp_path / "cache"), top_k=16))
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    words = ["plan", str(path), "--teacher_cache", str(folder)]
    capsys.readouterr()
    assert main(words) == 0
    alone = capsys.readouterr().out
    assert "teacher targets" in alone and "teacher weights" not in alone
    assert main([*words, "--ranks", "2", "--memory", "8"]) == 0
    ranks = capsys.readouterr().out
    assert "teacher targets" in ranks and "teacher weights" not in ranks
    assert "largest per_device_train_batch_size" in ranks
    assert main(["plan", str(path), "--teacher_cache", str(tmp_path)]) == 2
    assert "which holds none; make it, or plan without one" in capsys.readouterr().err


def test_records_that_are_read_count(runs: dict[str, Any]) -> None:
    config = DistillConfig(**runs | {"teacher": None, "teacher_cache": "not opened"})
    found = plan(config, cached=CachedTargets(5 << 20, top_k=8))
    assert found.moment == "reading the teacher's targets" or "reading" in str(found.items)
    assert found.total > 8 * 256 * (5 << 20)


def resident(config: DistillConfig, *words: str) -> tuple[int, int]:
    """MiB that a run in a process of its own took beyond its base, and those predicted for it."""
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(config_to_yaml(config))
    command = [sys.executable, "-m", "sad", "distill", str(path), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"and ([\d,]+) by the run, predicted ([\d,]+)", result.stdout)
    assert found, result.stdout
    return tuple(int(number.replace(",", "")) for number in found.groups())  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{}, {"relations": ON, "layerwise": ON}, {"bf16": True}], ids=lambda k: ",".join(k)
)
def test_a_process_takes_what_was_planned_and_no_more_when_resumed(
    runs: dict[str, Any], tmp_path: Path, keys: dict[str, Any]
) -> None:
    sizes = {"hidden_size": 320, "intermediate_size": 960, "vocab_size": 8192}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    models = {
        "student": save_tiny(tmp_path / "s", tiny_llama(**sizes, num_hidden_layers=6)),
        "teacher": save_tiny(tmp_path / "t", tiny_llama(**sizes, num_hidden_layers=12, seed=1)),
    }
    settings: dict[str, Any] = runs | models | keys | {"output_dir": str(tmp_path / "run")}
    config = DistillConfig(**settings)
    whole = replace(config, max_steps=4, output_dir=str(tmp_path / "whole"))
    taken, planned = resident(whole)
    assert taken > 400
    assert planned == pytest.approx(taken, rel=0.15)
    resident(config)  # and to the same end from here on
    longer = ("--max_steps", "4", "--allow_config_change", "true")
    resumed, _ = resident(config, "--resume_from_checkpoint", "auto", *longer)
    assert resumed < 1.05 * taken


def test_a_teacher_much_larger_than_its_student_counts(folder: Path, tmp_path: Path) -> None:
    tiny_llama(**STUDENT | {"intermediate_size": 8192}).save_pretrained(tmp_path)
    config = config_for(folder, teacher=str(tmp_path), gradient_checkpointing=True)
    found = plan(config)
    assert found.moment == "in the teacher's forward pass"
    assert found.tensors == pytest.approx(measured_peak(config), rel=0.15)


def test_small_batches_peak_at_the_optimizer_step(folder: Path) -> None:
    config = config_for(
        folder,
        "deep",
        teacher=None,
        kd_weight=0,
        per_device_train_batch_size=1,
        max_length=8,
    )
    found = plan(config)
    assert found.moment == "at the optimizer step"
    assert sizes(found)["gradients"] == sum(4 * p.numel() for p in tiny_llama(**DEEP).parameters())
    assert "student activations" not in sizes(found)
    assert found.tensors == pytest.approx(measured_peak(config), rel=0.1)


# What it takes, and what it says


def test_configurations_are_enough_and_nothing_is_disturbed(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for role in ("student", "teacher"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text((folder / role / "config.json").read_text())
    before = torch.get_rng_state()
    capfd.readouterr()
    assert plan(config_for(tmp_path)) == plan(config_for(folder))
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_models_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="student must be"):
        plan(config_for(tmp_path, "missing"))
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnfitError, match="must be a causal language model"):
        plan(config_for(tmp_path, "t5"))


def test_the_table_adds_up() -> None:
    found = MemoryPlan(
        device="cpu",
        moment="between forward and backward",
        items=(("student weights, float32", 3 << 20), ("gradients", 2500 << 20)),
        elsewhere=(("teacher weights, bfloat16", 7 << 20),),
        full_logits=1 << 30,
        base=400 << 20,
    )
    lines = format_plan(found).splitlines()
    assert lines[0] == "memory on cpu, between forward and backward"
    assert [line.split()[-2:] for line in lines if line.endswith("MiB")] == [
        ["3.0", "MiB"],
        ["2,500.0", "MiB"],
        ["2,503.0", "MiB"],
        ["400.0", "MiB"],
        ["7.0", "MiB"],
        ["1,024.0", "MiB"],
    ]
    assert len({len(line) for line in lines if line.endswith("MiB")}) == 1


def test_compute_dtype_agrees_with_the_trainers(folder: Path) -> None:
    choices: tuple[dict[str, Any], ...] = ({}, {"bf16": True}, {"fp16": True})
    for keys in (*choices, {"param_dtype": "bfloat16"}):
        config = config_for(folder, **keys)
        assert compute_dtype(config) == Precision(config).compute_dtype


# Saving in the background

SAVED = {"save_steps": 10}


@pytest.mark.parametrize(
    ("keys", "counted"),
    [
        (SAVED, True),
        ({"num_train_epochs": 2}, True),
        ({}, False),
        ({"num_train_epochs": 2, "max_steps": 5}, False),
        (SAVED | {"async_save": False}, False),
    ],
    ids=str,
)
def test_the_copy_that_is_saved_counts_where_there_is_one(
    folder: Path, keys: dict[str, Any], counted: bool
) -> None:
    """Weights, two moments and the average, in fp32, and a buffer of a few bytes."""
    found = sizes(plan(config_for(folder, **keys))).get("copy of the state, for saving", 0)
    assert 0 <= found - (16 * PARAMETERS if counted else 0) < 100
