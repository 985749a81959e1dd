"""Experiment trackers that receive the log's numbers: the packages ``report_to`` may name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sad.errors import UsageError


class Tracker(Protocol):
    """What a tracker must do: take scalars at a position, counted in micro-batches; be closed."""

    def log(self, scalars: Mapping[str, float], micro_step: int) -> None: ...

    def close(self) -> None: ...


def open_tracker(package: str, run_dir: Path, *, attempt: int, initial: int) -> Tracker:
    """A tracker for one process of a run that starts after ``initial`` micro-batches.

    Raises ``UsageError`` naming the package if it is not installed.
    """
    if package == "tensorboard":
        return _TensorBoard(run_dir, initial)
    return _HostedTracker(package, run_dir, attempt)


class _TensorBoard:
    """TensorBoard: event files under ``RUN_DIR/tensorboard``.

    Steps that a resumed run repeats are purged from what an earlier process wrote.
    """

    def __init__(self, run_dir: Path, initial: int) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=initial + 1)

    def log(self, scalars: Mapping[str, float], micro_step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, micro_step)

    def close(self) -> None:
        self._writer.close()


class _HostedTracker:
    """wandb, or trackio, which has the same functions. Each attempt of a run is a run there."""

    def __init__(self, package: str, run_dir: Path, attempt: int) -> None:
        self._module = _import(package, package)
        name = run_dir.resolve().name + (f" (attempt {attempt})" if attempt > 1 else "")
        self._module.init(project="sad", name=name)

    def log(self, scalars: Mapping[str, float], micro_step: int) -> None:
        self._module.log(dict(scalars), step=micro_step)

    def close(self) -> None:
        self._module.finish()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"report_to must name installed packages, got {package!r}, which is missing; "
            f"run `pip install {package}`, or take it out of report_to"
        ) from error
