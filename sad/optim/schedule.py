"""Length of a run in micro-batches and optimizer steps, and the learning-rate schedule over it.

Lengths are integers: rows, micro-batches, windows (the micro-batches of one optimizer step). The
learning rate is a pure function of the number of steps taken. It is stepped once per *micro-batch*,
or with ``scheduler_unit: optimizer_step`` once per window; the schedule's length is counted in the
same unit. A length in the wrong unit fails silently: with 100 micro-batches, windows of 8 and a
schedule of 13 steps, a linear schedule is at zero after the second update. So the trainer builds
the scheduler itself, and checks one that is passed in.

To add a schedule: a function beside ``linear``, a row in ``SCHEDULES``, and its name in
``sad.config.schema.SchedulerName``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, assert_never

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from sad.config.schema import DistillConfig, SchedulerName, SchedulerUnit
from sad.errors import UsageError


class Window(NamedTuple):
    """The micro-batches of one optimizer step."""

    epoch: int
    batch_in_epoch: int  # of its first micro-batch
    first_micro_step: int  # the same, counted from the start of the run
    size: int  # micro-batches


@dataclass(frozen=True)
class RunLength:
    """The planned length of a run, and the epoch and window of each of its micro-batches.

    An epoch has ``ceil(num_rows / batch_size)`` micro-batches; ``accumulation_steps`` of them make
    a window. Windows never cross the end of an epoch or of the run: the last one there has
    the micro-batches that are left. A positive ``max_steps`` counts windows and overrides
    ``num_train_epochs``, which may be fractional and is read as the decimal number it is written
    as: 0.1 of 10 micro-batches is 1.

    Raises ``UsageError`` for a length that is not positive.
    """

    num_rows: int
    batch_size: int
    accumulation_steps: int
    num_train_epochs: float
    max_steps: int = -1

    def __post_init__(self) -> None:
        for name in ("num_rows", "batch_size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name} must be at least 1, got {getattr(self, name)}; there is nothing to do"
                )
        epochs = self.num_train_epochs
        if self.max_steps <= 0 and not (math.isfinite(epochs) and epochs > 0):
            raise UsageError(
                f"num_train_epochs must be a finite number > 0, got {epochs}; or give max_steps"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one pass over the rows."""
        return _ceil_div(self.num_rows, self.batch_size)

    @property
    def windows_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return _ceil_div(self.batches_per_epoch, self.accumulation_steps)

    @property
    def micro_batches(self) -> int:
        """Planned micro-batches of the run."""
        if self.max_steps > 0:  # whole epochs, each with a shorter last window, then whole windows
            epochs, windows = divmod(self.max_steps, self.windows_per_epoch)
            return epochs * self.batches_per_epoch + windows * self.accumulation_steps
        return math.ceil(_as_written(self.num_train_epochs) * self.batches_per_epoch)

    @property
    def windows(self) -> int:
        """Planned optimizer steps of the run."""
        epochs, batches = divmod(self.micro_batches, self.batches_per_epoch)
        return epochs * self.windows_per_epoch + _ceil_div(batches, self.accumulation_steps)

    def steps(self, unit: SchedulerUnit) -> int:
        """Planned scheduler steps of the run, for a scheduler that steps once per ``unit``."""
        match unit:
            case "batch":
                return self.micro_batches
            case "optimizer_step":
                return self.windows
            case _:
                assert_never(unit)

    def window(self, micro_step: int, begins: int = 0) -> Window:
        """The window that contains micro-batch ``micro_step``, counted from 0.

        One window is cut short at its beginning: that in whose middle ``begins`` lies, where a run
        was resumed with other windows.
        """
        _require_inside(micro_step, self.micro_batches - 1)
        epoch, batch = divmod(micro_step, self.batches_per_epoch)
        done = batch % self.accumulation_steps
        first = micro_step - done
        # Micro-batches left in the epoch and in the run, from the window's first on.
        left = min(self.batches_per_epoch - (batch - done), self.micro_batches - first)
        size = min(self.accumulation_steps, left)
        late = begins - first if first < begins <= micro_step else 0
        return Window(epoch, batch - done + late, first + late, size - late)

    def windows_before(self, micro_step: int) -> int:
        """The windows that end at or before ``micro_step`` consumed micro-batches."""
        epoch, batch = self.position(micro_step)
        return epoch * self.windows_per_epoch + batch // self.accumulation_steps

    def position(self, micro_step: int) -> tuple[int, int]:
        """Epoch and batch within it, once ``micro_step`` micro-batches have been consumed."""
        _require_inside(micro_step, self.micro_batches)
        return divmod(micro_step, self.batches_per_epoch)


def planned_length(config: DistillConfig, num_rows: int, world_size: int = 1) -> RunLength:
    """The length of a run over ``num_rows`` rows on ``world_size`` processes."""
    return RunLength(
        num_rows=num_rows,
        batch_size=config.rows_per_micro_batch(world_size),
        accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )


def warmup_batches(config: DistillConfig, run_length: RunLength) -> int:
    """The length of the warm-up in micro-batches.

    ``warmup_steps`` counts optimizer steps, or is a fraction of training if it is below 1;
    ``warmup_batches`` counts micro-batches; ``warmup_ratio`` is a fraction. A configuration has at
    most one of them. Fractions round up.
    """
    steps, ratio = config.warmup_steps, config.warmup_ratio
    if 0 < steps < 1:
        steps, ratio = 0, steps
    if ratio:
        return math.ceil(_as_written(ratio) * run_length.micro_batches)
    return config.warmup_batches + int(steps) * run_length.accumulation_steps


class SchedulePoint(NamedTuple):
    """A point of a run after its warm-up."""

    left: float  # steps still to come, as a share of the steps after the warm-up
    left_of_run: float  # steps still to come, as a share of all steps
    decay_ratio: float  # configured length of a final decay, as a share of all steps


def linear(point: SchedulePoint) -> float:
    """``g = x``: a straight line from 1 to 0."""
    return point.left


def cosine(point: SchedulePoint) -> float:
    """``g = (1 - cos(pi x)) / 2``: half a period of a cosine from 1 to 0."""
    return 0.5 * (1.0 - math.cos(math.pi * point.left))


def constant(point: SchedulePoint) -> float:
    """``g = 1``."""
    return 1.0


def wsd(point: SchedulePoint) -> float:
    """``g = 1``, then linear to 0 over the last ``decay_ratio`` of all steps: warm-up, stable,
    decay (MiniCPM, arXiv 2404.06395)."""
    if point.left_of_run >= point.decay_ratio:
        return 1.0
    return point.left_of_run / point.decay_ratio


SCHEDULES: Mapping[SchedulerName, Callable[[SchedulePoint], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "wsd": wsd,
}
"""``lr_scheduler_type`` -> the schedule's shape after the warm-up, g in [0, 1]."""


def lr_factor(
    name: SchedulerName,
    t: int,
    length: int,
    *,
    warmup: float = 0,
    min_lr_ratio: float = 0.0,
    decay_ratio: float = 0.2,
) -> float:
    """The learning rate after ``t`` of ``length`` steps, relative to its peak.

    ``t / warmup`` during the warm-up. After it ``f + (1 - f) g(x)`` with ``f = min_lr_ratio``,
    ``x`` the share of the steps after the warm-up that is still to come, and ``g`` the function
    that ``SCHEDULES`` has under ``name``. All but ``constant`` end at ``f`` and stay there. All
    steps are in one unit, micro-batches or windows; only their ratios matter.

    Raises ``UsageError`` for a name that ``SCHEDULES`` does not have.
    """
    if name not in SCHEDULES:
        raise UsageError(
            f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got {name!r}; choose one "
            "of these, or add its function to SCHEDULES in sad/optim/schedule.py"
        )
    if t < warmup:
        return t / warmup
    steps_left = max(0, length - t)
    # Without steps left the denominator may be 0: the warm-up may be as long as the run.
    left = steps_left / (length - warmup) if steps_left else 0.0
    left_of_run = steps_left / length if steps_left else 0.0
    shape = SCHEDULES[name](SchedulePoint(left, left_of_run, decay_ratio))
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape


def build_scheduler(optimizer: Optimizer, config: DistillConfig, run_length: RunLength) -> LambdaLR:
    """The learning-rate scheduler of ``config``, to be stepped once per ``scheduler_unit``.

    Build the optimizer, then the scheduler, and only then load their states: a scheduler that is
    built later would overwrite the learning rate that was loaded.
    """
    length = run_length.steps(config.scheduler_unit)
    warmup = warmup_batches(config, run_length)
    if config.scheduler_unit == "optimizer_step":
        warmup = warmup / run_length.accumulation_steps

    def factor(t: int) -> float:
        return lr_factor(
            config.lr_scheduler_type,
            t,
            length,
            warmup=warmup,
            min_lr_ratio=config.min_lr_ratio,
            decay_ratio=config.decay_ratio,
        )

    return LambdaLR(optimizer, factor)


def step_scheduler(scheduler: LRScheduler) -> None:
    """Run ``scheduler.step()``, after the optimizer's step, also where that was skipped.

    torch expects an optimizer step before the first scheduler step. With gradient accumulation the
    scheduler rightly goes first, so that warning, and no other, is silenced on the first step.
    """
    if scheduler.last_epoch > 0:
        scheduler.step()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before"
        )
        scheduler.step()


def move_scheduler(scheduler: LambdaLR, steps: int) -> None:
    """Put a scheduler of ``build_scheduler`` where it is after ``steps`` steps."""
    scheduler.last_epoch = steps
    scheduler._step_count = steps + 1
    rates = scheduled_rates(scheduler, steps)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = [*rates]


def scheduled_rates(scheduler: LambdaLR, steps: int) -> list[float]:
    """The learning rate of each group after ``steps`` steps."""
    peaks = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    return [float(peak) * factor(steps) for peak, factor in peaks]


def check_foreign_scheduler(
    scheduler: Any, run_length: RunLength, unit: SchedulerUnit = "batch"
) -> None:
    """Raise ``UsageError`` for a user's scheduler that cannot be stepped as this trainer steps it.

    These are ``ReduceLROnPlateau``, which needs a metric, and a ``OneCycleLR`` or
    ``CosineAnnealingLR`` that ends before the run: the first would raise there, the second climb
    again.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UsageError(
            "the scheduler must be a function of the step, got ReduceLROnPlateau; "
            "use lr_scheduler_type: constant, or wsd"
        )
    needed = run_length.steps(unit)
    lengths = {OneCycleLR: "total_steps", CosineAnnealingLR: "T_max"}
    for kind, attribute in lengths.items():
        if isinstance(scheduler, kind) and getattr(scheduler, attribute) < needed:
            raise UsageError(
                f"{kind.__name__}.{attribute} must be at least {needed}, got "
                f"{getattr(scheduler, attribute)}; it is stepped once per {unit}, to the run's end"
            )


def describe(config: DistillConfig, run_length: RunLength) -> str:
    """The run's length in words: ``12,000 micro-batches = 1,500 windows, warm-up 400 = 50``."""
    warmup = warmup_batches(config, run_length)
    warmup_windows = f"{warmup / run_length.accumulation_steps:,.2f}".removesuffix(".00")
    return (
        f"{run_length.micro_batches:,} micro-batches = {run_length.windows:,} windows, "
        f"warm-up {warmup:,} = {warmup_windows}"
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _as_written(x: float) -> Fraction:
    """The decimal number that a float was written as: 1/10 for 0.1, not its binary value."""
    return Fraction(repr(float(x)))


def _require_inside(micro_step: int, last: int) -> None:
    if not 0 <= micro_step <= last:
        raise ValueError(
            f"micro_step must lie in [0, {last}], got {micro_step}; the run is not longer than that"
        )
