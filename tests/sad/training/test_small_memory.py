"""Options for cards with little memory: they resume to the same bits and are planned for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_same_bits, everything, make_trainer
from support.tiny import tiny_run

from sad.checkpoint.disk_space import checkpoint_bytes
from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import UsageError
from sad.models.load import build_student_model
from sad.models.memory_plan import plan
from sad.training.inputs import load_inputs
from sad.training.resume import plan_resumption

pytest.importorskip("bitsandbytes")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    return tiny_run(tmp_path, texts=8) | {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"param_dtype": "bfloat16"}, {"peft": {"r": 64, "target_modules": "all-linear"}}],
    ids=lambda options: ",".join(options) or "fp32",
)
def test_moments_in_8_bits_resume_to_the_same_bits(
    keys: dict[str, Any], options: dict[str, Any]
) -> None:
    config = DistillConfig(**keys, optim="adamw_8bit", ema_device="cpu", **options)
    inputs = load_inputs(config)
    whole = make_trainer(config, inputs)
    total = whole.run_length.micro_batches
    for _ in range(total):
        whole.micro_batch()
    end = everything(whole)
    assert any(t.dtype == torch.uint8 for n, t in end.items() if n.startswith("optimizer/"))

    first = make_trainer(config, inputs)
    for _ in range(3):
        first.micro_batch()
    state, tensors = first.capture()
    foreseen = checkpoint_bytes(config, _meta_student(config))
    maps = sum(t.nbytes for n, t in tensors["optimizer"].items() if "/qmap" in n)
    saved = sum(t.nbytes for g, group in tensors.items() if g != "rng" for t in group.values())
    assert abs(saved - maps - foreseen) < 10_000
    path = save_checkpoint(config.output_dir, 3, state, tensors, save_total_limit=2)
    second = make_trainer(config, inputs)
    second.restore(load_checkpoint(path), warn=pytest.fail)
    while second.counters.micro_step < total:
        second.micro_batch()
    assert_same_bits(everything(second), end)


@pytest.mark.parametrize(
    "options", [{}, {"param_dtype": "bfloat16", "master_weights": False}], ids=str
)
def test_moments_in_8_bits_survive_an_allowed_change(
    keys: dict[str, Any], options: dict[str, Any]
) -> None:
    config = DistillConfig(**keys, **options, optim="adamw_8bit")
    inputs = load_inputs(config)
    first = make_trainer(config, inputs)
    for _ in range(2):
        first.micro_batch()
    path = save_checkpoint(config.output_dir, 2, *first.capture(), save_total_limit=2)
    changed = replace(config, weight_decay=0.1, allow_config_change=True)
    second = make_trainer(changed, inputs)
    second.restore(load_checkpoint(path), lambda _: None)
    before, after = everything(first), everything(second)
    moments = [name for name in before if name.startswith("optimizer/")]
    assert_same_bits({n: before[n] for n in moments}, {n: after[n] for n in moments})
    second.micro_batch()
    second.micro_batch()


def _meta_student(config: DistillConfig) -> Any:
    with torch.device("meta"):
        return build_student_model(config)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optim": "adamw_torch_fused"}, "optim"),
        ({"peft": {"r": 4}}, r"peft\.r"),
        ({"student_init": "random"}, "student_init"),
    ],
)
def test_other_tensors_are_refused_even_where_changes_are_allowed(
    keys: dict[str, Any], change: dict[str, Any], key: str
) -> None:
    config = DistillConfig(**keys, optim="adamw_8bit")
    inputs = load_inputs(config)
    first = make_trainer(config, inputs)
    path = save_checkpoint(config.output_dir, 0, *first.capture(), save_total_limit=2)
    other = replace(config, **change, allow_config_change=True)
    with pytest.raises(UsageError, match=f"{key} must stay when a run is resumed, got"):
        plan_resumption(load_checkpoint(path), other, inputs.train_rows)


def test_an_average_in_host_memory_is_planned_there(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, on_cpu = (plan(DistillConfig(**keys, ema_device=device)) for device in (None, "cpu"))
    assert here.items == on_cpu.items and here.host == on_cpu.host, "there is no other memory"
    config = DistillConfig(**keys, ema_device="cpu")
    object.__setattr__(config, "device", "meta")  # one that is not the host's
    assert "EMA, float32" in dict(plan(config).host).keys() - dict(plan(config).items).keys()
