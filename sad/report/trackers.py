"""Experiment trackers that receive the log's numbers: the packages ``report_to`` may name.

A package that is not installed is refused before a run loads anything. What a tracker raises later
(no network, no login, a full disk) is for the log to announce: the run goes on without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sad.errors import UsageError


class Tracker(Protocol):
    """What a tracker must do: take scalars at a position, counted in micro-batches; be closed."""

    def log(self, scalars: Mapping[str, float], micro_step: int) -> None: ...

    def close(self) -> None: ...


MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Package -> the module that is imported of it."""


def require_installed(packages: Iterable[str]) -> None:
    """Import ``packages``; raise ``UsageError`` that names the first that is not installed.

    What else an import raises is a tracker's failure: it comes again when the tracker is opened.
    """
    for package in packages:
        try:
            _import(package)
        except UsageError:
            raise
        except Exception:
            continue


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
        module = _import("tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=initial + 1)

    def log(self, scalars: Mapping[str, float], micro_step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, micro_step)

    def close(self) -> None:
        self._writer.close()


class _HostedTracker:
    """wandb, or trackio, which has the same functions. Each attempt of a run is a run there."""

    def __init__(self, package: str, run_dir: Path, attempt: int) -> None:
        self._module = _import(package)
        name = run_dir.resolve().name + (f" (attempt {attempt})" if attempt > 1 else "")
        self._module.init(project="sad", name=name)

    def log(self, scalars: Mapping[str, float], micro_step: int) -> None:
        self._module.log(dict(scalars), step=micro_step)

    def close(self) -> None:
        self._module.finish()


def _import(package: str) -> Any:
    try:
        return importlib.import_module(MODULES[package])
    except ImportError as error:
        raise UsageError(
            f"report_to must name installed packages, got {package!r}, which is missing; "
            f"run `pip install {package}`, or take it out of report_to"
        ) from error
