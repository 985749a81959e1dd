"""A run on several ranks against the same run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.ranks import run_ranks
from support.runs import make_trainer
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.config.schema import DistillConfig
from sad.distributed.world import World, whole_world
from sad.report.log import SilentLog
from sad.training.inputs import load_inputs


class Window(NamedTuple):
    """What a window was seen to do."""

    loss: float
    grad_norm: float
    lr: float
    targets: float


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", tiny_llama(seed=1, tie_word_embeddings=False))
    save_tiny(folder / "student", tiny_llama(seed=2))
    write_texts(folder / "texts", count=24)
    return folder


def config_of(models: Path, run_dir: Path, **keys: Any) -> DistillConfig:
    base: dict[str, Any] = {
        "teacher": str(models / "teacher"),
        "student": str(models / "student"),
        "data": {
            "train": str(models / "texts"),
            "eval_fraction": 0.3,
            "cache_dir": str(models / "cache"),
        },
        "max_length": 32,
        "max_steps": 4,
        "global_batch_size": 10,
        "gradient_accumulation_steps": 2,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "ema_decay": 0.95,
        "per_device_eval_batch_size": 2,
        "max_eval_rows": 7,
        "device": "cpu",
        "output_dir": str(run_dir),
    }
    return DistillConfig(**(base | keys))


def train(
    config: DistillConfig, windows: int, replicas: int = 1
) -> tuple[list[Window], dict[str, float]]:
    """Train for some windows, then evaluate."""
    with whole_world("cpu", timeout_seconds=30, replicas=replicas) as world:
        return _train(config, windows, world)


def _train(
    config: DistillConfig, windows: int, world: World
) -> tuple[list[Window], dict[str, float]]:
    trainer = make_trainer(config, load_inputs(config, world=world))
    trainer.student.train()
    seen = []
    while len(seen) < windows:
        if trainer.micro_batch():
            trainer.meter.collect(world)
            loss, *_ = trainer.meter.losses({}).values() if world.main else (0.0,)
            targets = float(trainer.meter.sums[4])
            seen.append(Window(loss, float(trainer.meter.grad_norm), trainer.meter.lr, targets))
            trainer.meter.reset()
    trainer.run_dir.export = lambda *_, **__: None  # type: ignore[method-assign]
    trainer.evaluate(SilentLog())
    return seen, trainer.counters.metrics


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_are_those_of_one_process(models: Path, tmp_path: Path, ranks: int) -> None:
    config = config_of(models, tmp_path / "run")
    alone, metrics = train(config, 4)
    (seen, found), *others = run_ranks(ranks, train, config, 4)
    for ours, theirs in zip(seen, alone, strict=True):
        assert ours.targets == theirs.targets
        assert ours.lr == theirs.lr
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    assert found == pytest.approx(metrics, rel=1e-5)
    assert all(metrics == found for _, metrics in others)
