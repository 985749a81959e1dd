"""Exported students on disks that refuse, and after damage: never lost, never believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_run

from sad.checkpoint.run_directory import RunDirectory, is_whole_export
from sad.checkpoint.store import latest_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import OutputError
from sad.report.log import read_log
from sad.training.run import distill
from sad.training.trainer import Trainer


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    cadence: dict[str, Any] = {"max_steps": 4, "eval_steps": 1, "save_steps": 2}
    return DistillConfig(**tiny_run(tmp_path), **cadence, learning_rate=1e-3, max_eval_rows=2)


def failing_exports(
    monkeypatch: pytest.MonkeyPatch, name: str, attempts: set[int], error: Exception
) -> list[int]:
    """Let these attempts to export to ``name`` fail; the list counts them all."""
    export, seen = RunDirectory.export, []

    def sometimes(self: RunDirectory, target: Path, *args: Any, **options: Any) -> None:
        if target.name == name:
            seen.append(len(seen))
            if seen[-1] in attempts:
                raise error
        export(self, target, *args, **options)

    monkeypatch.setattr(RunDirectory, "export", sometimes)
    return seen


def warnings(config: DistillConfig) -> list[str]:
    return [r["message"] for r in read_log(config.output_dir) if r["kind"] == "warning"]


REFUSED = OutputError("best must be writable, got ENOSPC; free space")


def test_a_disk_that_refuses_one_export_costs_nothing(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = failing_exports(monkeypatch, "best", {1}, REFUSED)
    result = distill(config)
    assert len(seen) == 4 and is_whole_export(result.best) and is_whole_export(result.final)
    (warning,) = warnings(config)
    assert "ENOSPC" in warning and "next better score" in warning


def test_the_last_export_is_tried_twice(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_exports(monkeypatch, "best", {3}, REFUSED)
    again = failing_exports(monkeypatch, "final", {0}, REFUSED)
    result = distill(config)
    assert len(again) == 2 and is_whole_export(result.best) and is_whole_export(result.final)
    best, final = (folder / "model.safetensors" for folder in (result.best, result.final))
    assert best.read_bytes() == final.read_bytes()


@pytest.mark.few(1)
@pytest.mark.parametrize("error", [REFUSED, RuntimeError("this family cannot be saved")])
def test_the_state_is_saved_before_giving_up(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A student that could not be exported was lost with all its training."""
    with monkeypatch.context() as patch:
        failing_exports(patch, "best", {2, 3}, error)
        with pytest.raises(type(error), match=r"must be writable|cannot be saved"):
            distill(replace(config, save_steps=None))
    saved = latest_checkpoint(config.output_dir, report=pytest.fail)
    assert saved is not None
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["checkpoint"]) == ("failed", saved.name)
    result = distill(replace(config, resume_from_checkpoint="auto"))
    assert is_whole_export(result.best)


Harm = Callable[[Path], object]
HARM: dict[str, Harm] = {
    "flipped": lambda p: p.write_bytes(p.read_bytes()[:-1] + b"!"),
    "deleted": lambda p: p.unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HARM)
@pytest.mark.parametrize("after", [2, 4])
def test_a_damaged_best_is_written_anew(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch, how: str, after: int
) -> None:
    """It was left as it was, and the run ended with another student than the one it scored."""
    micro_batch = Trainer.micro_batch

    def stopping(self: Trainer) -> bool:
        if self.counters.micro_step == after:
            raise RuntimeError("stopped")
        return micro_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "micro_batch", stopping)
        if after < 4:
            with pytest.raises(RuntimeError, match="stopped"):
                distill(config)
        else:
            distill(config)
    best = Path(config.output_dir, "best")
    HARM[how](best / "model.safetensors")
    result = distill(replace(config, resume_from_checkpoint="auto"))
    assert is_whole_export(result.best)
    assert any("is not what was exported" in warning for warning in warnings(config))
