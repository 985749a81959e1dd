"""Which library computes a run's products on a CPU, and that the process is left as found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sad_kernels._torch import gemm
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.config.schema import DistillConfig
from sad.optim.precision import Precision
from sad.teachers.frozen import FrozenTeacher
from sad.training.rescore import evaluate_run
from sad.training.run import distill

matmul = SimpleNamespace(fp32_precision="none")
"""Stands for torch's setting, which on a processor with AMX would round products to bf16."""


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        teacher=save_tiny(tmp_path / "teacher", tiny_llama(seed=1)),
        student=save_tiny(tmp_path / "student", tiny_llama(seed=2)),
        data={"train": write_texts(tmp_path / "texts", count=12), "eval_fraction": 0.3},  # pyright: ignore
        output_dir=str(tmp_path / "run"),
        max_length=32,
        max_steps=1,
        max_eval_rows=2,
        per_device_train_batch_size=2,
    )


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The setting at every pass of the teacher and every step, on a CPU where oneDNN is faster."""
    seen: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(matmul.fp32_precision)
            return function(*args, **options)

        return call

    monkeypatch.setattr(gemm, "_switch", lambda: matmul)
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(FrozenTeacher, "forward", noted(FrozenTeacher.forward))
    monkeypatch.setattr(Precision, "step", noted(Precision.step))
    return seen


def test_a_run_and_its_later_score_take_the_faster_products(
    config: DistillConfig, settings: list[str]
) -> None:
    before = matmul.fp32_precision
    distill(config)
    assert len(settings) >= 3 and set(settings) == {"bf16"} != {before}
    assert matmul.fp32_precision == before
    settings.clear()
    evaluate_run(config.output_dir)
    assert settings and set(settings) == {"bf16"}
    assert matmul.fp32_precision == before


def test_a_run_that_fails_leaves_the_setting_as_it_was(
    config: DistillConfig, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(matmul.fp32_precision)

    monkeypatch.setattr(Precision, "step", fail)
    with pytest.raises(ValueError, match="bf16"):
        distill(config)
    assert matmul.fp32_precision == "none"


def test_where_it_is_no_gain_nothing_is_set(
    config: DistillConfig, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", False)
    distill(config)
    assert set(settings) == {"none"}
