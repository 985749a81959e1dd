"""The disk is asked before anything is loaded, and the sizes it is asked for are the real ones."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.checkpoint.atomic_files import tree_bytes
from sad.checkpoint.disk_space import checkpoint_bytes, require_space
from sad.config.schema import DistillConfig
from sad.errors import OutputError, StoppedError, UsageError
from sad.models.load import build_model
from sad.training.run import distill
from sad.training.trainer import Trainer

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "student": save_tiny(folder / "student", tiny_llama(**SIZES)),
        "data": {"train": write_texts(folder / "texts", count=4)},
        "kd_weight": 0.0,
        "max_length": 16,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
    }


def config_in(run_dir: Path, keys: dict[str, Any]) -> DistillConfig:
    return DistillConfig(**keys, output_dir=str(run_dir))


def meta_student(config: DistillConfig) -> Any:
    with torch.device("meta"):
        return build_model(config, "student", getattr(torch, config.param_dtype))


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = shutil._ntuple_diskusage(10**15, 0, count)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize(
    "keys",
    [{}, {"use_ema": False}, {"param_dtype": "bfloat16"}, {"gradient_accumulation_steps": 2}],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_foreseen(
    sources: dict[str, Any],
    keys: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the middle of the second window, where it has one: gradients are saved too."""
    config = config_in(tmp_path / "run", sources | keys | {"max_steps": 4})
    micro_batch = Trainer.micro_batch

    def interrupted(self: Trainer) -> bool:
        if self.counters.micro_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batch(self)

    monkeypatch.setattr(Trainer, "micro_batch", interrupted)
    with pytest.raises(StoppedError, match="after micro-batch 3"):
        distill(config)
    real = tree_bytes(tmp_path / "run" / "checkpoints")
    assert 0 < real - checkpoint_bytes(config, meta_student(config)) < 100_000


@pytest.mark.parametrize(("baseline", "checkpoints", "exports"), [(False, 4, 2), (True, 7, 4)])
def test_too_little_room_is_refused_before_anything_is_read(
    sources: dict[str, Any],
    baseline: bool,
    checkpoints: int,
    exports: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"data": {"train": "absent.txt"}, "baseline": baseline, "save_total_limit": 3}
    config = config_in(tmp_path / "run", sources | keys)
    student = meta_student(config)
    weights = sum(p.nbytes for p in student.parameters())
    # Buffers, a few bytes, are not counted here.
    needed = checkpoints * checkpoint_bytes(config, student) + exports * weights
    free(monkeypatch, needed - 10_000)  # config.yaml and the like
    with pytest.raises(OutputError, match=f"room for {checkpoints} checkpoints of") as refused:
        distill(config)
    assert refused.value.exit_code == 73
    assert f"and {exports} exported students" in str(refused.value)
    assert str(tmp_path / "run") in str(refused.value) and "\n" not in str(refused.value)
    free(monkeypatch, needed + 10_000)
    with pytest.raises(UsageError, match=r"absent\.txt"):
        distill(config)


def test_what_an_earlier_attempt_wrote_counts_as_room(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, sources)
    free(monkeypatch, 1000)
    with pytest.raises(OutputError):
        require_space(config)
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "earlier").open("wb") as file:
        file.truncate(60 * 2**20)
    require_space(config)
    # What was set aside stays for good.
    (tmp_path / "checkpoints" / "set-aside").mkdir()
    (tmp_path / "checkpoints" / "earlier").rename(tmp_path / "checkpoints" / "set-aside" / "one")
    with pytest.raises(OutputError):
        require_space(config)


def test_a_file_system_that_does_not_tell_is_trusted(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    require_space(config_in(tmp_path, sources))
