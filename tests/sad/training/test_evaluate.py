"""Evaluations of a run share the teacher's forward passes where they may, and say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_tiny, tiny_llama, write_texts
from support.tiny_moe import tiny_moe

from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.report.log import read_log
from sad.teachers.frozen import FrozenTeacher
from sad.training.inputs import load_inputs
from sad.training.rescore import evaluate_run
from sad.training.run import distill

Make = Callable[..., DistillConfig]

ROWS, LENGTH, WIDTH = 4, 32, 48
BATCHES = 2
"""Held-out batches in an evaluation."""
EVALUATIONS = 5
"""Of a run: the teacher's own, the baseline's two, the student's two."""


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    save_tiny(tmp_path / "teacher", tiny_llama(seed=1, hidden_size=WIDTH))
    save_tiny(tmp_path / "student", tiny_llama(seed=2))
    write_texts(tmp_path / "texts", count=12)

    def make(**overrides: Any) -> DistillConfig:
        defaults: dict[str, Any] = {
            "teacher": str(tmp_path / "teacher"),
            "student": str(tmp_path / "student"),
            "data": {"train": str(tmp_path / "texts"), "eval_fraction": 0.3},
            "output_dir": str(tmp_path / "run"),
            "max_length": LENGTH,
            "max_steps": 2,
            "eval_steps": 1,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": ROWS // BATCHES,
            "max_eval_rows": ROWS,
            "baseline": True,
        }
        return DistillConfig(**(defaults | overrides))

    return make


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches of every forward pass of a teacher from now on."""
    seen: list[Batch] = []
    forward = FrozenTeacher.forward

    def noted(self: FrozenTeacher, batch: Batch, *others: Any) -> Any:
        seen.append(batch)
        return forward(self, batch, *others)

    monkeypatch.setattr(FrozenTeacher, "forward", noted)
    return seen


def over_held_out_rows(passes: list[Batch], config: DistillConfig) -> int:
    """How many of the passes were over batches of an evaluation."""
    batches = list(load_inputs(config).eval_batches(config))
    assert len(batches) == BATCHES
    return sum(
        torch.equal(seen.input_ids, batch.input_ids)
        for seen in passes
        for batch in batches
        if seen.input_ids.shape == batch.input_ids.shape
    )


def evaluations(config: DistillConfig) -> list[dict[str, Any]]:
    """The eval records of a run and its baseline."""
    folders = (Path(config.output_dir), Path(config.output_dir) / "baseline")
    return [r for folder in folders for r in read_log(folder) if r["kind"] == "eval"]


def test_one_pass_serves_every_evaluation_of_a_run(make_config: Make, passes: list[Batch]) -> None:
    kept = make_config()
    results = distill(kept).results
    assert over_held_out_rows(passes, kept) == BATCHES

    passes.clear()
    anew = make_config(eval_teacher_cache=0, output_dir=kept.output_dir + "-anew")
    assert distill(anew).results == results
    assert over_held_out_rows(passes, anew) == EVALUATIONS * BATCHES
    assert len(evaluations(kept)) == EVALUATIONS - 1
    for ours, theirs in zip(evaluations(kept), evaluations(anew), strict=True):
        metrics = [name for name in ours if name.startswith("eval")]
        assert len(metrics) > 10
        assert [ours[name] for name in metrics] == [theirs[name] for name in metrics]


@pytest.mark.slow
def test_what_does_not_fit_is_computed_each_time(make_config: Make, passes: list[Batch]) -> None:
    config = make_config(eval_teacher_cache=ROWS * LENGTH * WIDTH * 4 - 1)
    distill(config)
    assert over_held_out_rows(passes, config) == 1 + EVALUATIONS * (BATCHES - 1)


@pytest.mark.slow
def test_a_resumed_run_fills_it_again(make_config: Make, passes: list[Batch]) -> None:
    distill(make_config(baseline=False, max_steps=1))
    passes.clear()
    config = make_config(
        baseline=False, resume_from_checkpoint="auto", allow_config_change=True, max_steps=3
    )
    distill(config)
    assert over_held_out_rows(passes, config) == BATCHES


def test_a_student_that_is_scored_again_shares_the_teachers_pass(
    make_config: Make, passes: list[Batch]
) -> None:
    config = make_config(baseline=False)
    distill(config)
    passes.clear()
    evaluate_run(config.output_dir)
    assert over_held_out_rows(passes, config) == BATCHES


@pytest.mark.parametrize(
    "keys",
    [
        {"routing": {"mode": "student_aware", "learning_rate": 1e-2}},
        pytest.param({"routing": {"mode": "knowledge_augmentation"}}, marks=pytest.mark.slow),
        pytest.param({"feature": {"weight": 0.1}}, marks=pytest.mark.slow),
    ],
    ids=["gates that train", "gates that are sampled", "activations"],
)
def test_a_teacher_that_changes_or_is_looked_into_runs_each_time(
    make_config: Make, passes: list[Batch], tmp_path: Path, keys: dict[str, Any]
) -> None:
    teacher = save_tiny(tmp_path / "moe", tiny_moe("qwen3_moe", seed=1))
    config = make_config(teacher=teacher, **keys)
    distill(config)
    assert over_held_out_rows(passes, config) == EVALUATIONS * BATCHES
