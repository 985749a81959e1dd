"""Lengths in one unit, schedules that reach their horizon, and no warning on the way."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any, get_args

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from sad.config.schema import DistillConfig, SchedulerName
from sad.errors import UsageError
from sad.optim import schedule
from sad.optim.schedule import (
    RunLength,
    SchedulePoint,
    build_scheduler,
    check_foreign_scheduler,
    describe,
    lr_factor,
    step_scheduler,
    warmup_batches,
)

NAMES = get_args(SchedulerName)


def config(**keys) -> DistillConfig:
    return DistillConfig(student="s", teacher="t", learning_rate=1.0, **keys)


def run_length(batches: int, accumulation_steps: int, epochs: float = 1.0, max_steps: int = -1):
    return RunLength(batches, 1, accumulation_steps, epochs, max_steps)


def optimizer(**keys) -> AdamW:
    """Over a matrix and a vector, in two groups as the trainer's."""
    matrix, vector = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    return AdamW([{"params": [matrix]}, {"params": [vector]}], lr=1.0, **keys)


# --- Horizon ------------------------------------------------------------------------------------


def simulate(run: RunLength) -> list[list[tuple[int, int]]]:
    """The run's windows as lists of (epoch, batch), found by walking through it."""
    per_epoch = -(-run.num_rows // run.batch_size)
    if run.max_steps > 0:
        total = math.inf
    else:
        total = math.ceil(round(run.num_train_epochs * per_epoch, 9))
    done: list[list[tuple[int, int]]] = []
    window: list[tuple[int, int]] = []
    epoch = consumed = 0
    while True:
        for batch in range(per_epoch):
            window.append((epoch, batch))
            consumed += 1
            last = batch == per_epoch - 1 or consumed == total
            if len(window) == run.accumulation_steps or last:
                done.append(window)
                window = []
            if consumed == total or len(done) == run.max_steps:
                return done
        epoch += 1


HORIZONS = [
    RunLength(rows, batch_size, accumulation, epochs, max_steps)
    for rows, batch_size in ((1, 1), (1, 4), (7, 2), (100, 1), (64, 8))
    for accumulation in (1, 3, 8, 200)
    for epochs, max_steps in ((1, -1), (2.5, -1), (0.1, -1), (3, -1), (1, 1), (1, 13), (1, 40))
]


@pytest.mark.parametrize("run", HORIZONS, ids=str)
def test_windows_are_those_of_a_walk_through_the_run(run: RunLength) -> None:
    windows = simulate(run)
    assert run.windows == len(windows)
    assert run.micro_batches == sum(map(len, windows))
    micro_step = 0
    for window in windows:
        first = micro_step
        for position in window:
            assert run.position(micro_step) == position
            assert run.window(micro_step) == (*window[0], first, len(window))
            micro_step += 1


def test_100_batches_by_8_are_13_windows() -> None:
    run = run_length(100, 8)
    assert (run.batches_per_epoch, run.micro_batches, run.windows) == (100, 100, 13)
    assert run.window(96).size == run.window(99).size == 4


def test_fractions_of_epochs_are_read_as_decimals() -> None:
    """0.1 is a little more than a tenth in binary: rounded up it would be one batch too many."""
    for tenths in range(1, 31):
        assert run_length(10, 1, epochs=tenths / 10).micro_batches == tenths
    assert run_length(10, 1, epochs=0.11).micro_batches == 2


def test_positions_outside_of_the_run_are_refused() -> None:
    run = run_length(10, 4)
    assert run.position(10) == (1, 0)
    for bad in (-1, 11):
        with pytest.raises(ValueError, match="micro_step must"):
            run.position(bad)
    with pytest.raises(ValueError, match="micro_step must"):
        run.window(10)


@pytest.mark.parametrize(
    "lengths",
    [
        (0, 1, 1, 1.0, -1),
        (1, 0, 1, 1.0, -1),
        (1, 1, 0, 1.0, -1),
        (1, 1, 1, 0.0, -1),
        (1, 1, 1, math.nan, -1),
        (1, 1, 1, math.inf, 0),
    ],
)
def test_empty_runs_are_refused(lengths: tuple[int, int, int, float, int]) -> None:
    with pytest.raises(UsageError, match="must be"):
        RunLength(*lengths)


# --- Warm-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "batches"),
    [
        ({}, 0),
        ({"warmup_steps": 3}, 24),
        ({"warmup_steps": 0.25}, 25),
        ({"warmup_batches": 5}, 5),
        ({"warmup_ratio": 0.07}, 7),  # 0.07 * 100 is 7.000000000000001 in binary
        ({"warmup_ratio": 0.071}, 8),
        ({"warmup_ratio": 1.0}, 100),
    ],
    ids=str,
)
def test_warmup_is_held_in_micro_batches(keys: dict[str, float], batches: int) -> None:
    assert warmup_batches(config(**keys), run_length(100, 8)) == batches


@pytest.mark.parametrize("other", ["warmup_batches", "warmup_ratio"])
def test_two_warmups_are_an_error(other: str) -> None:
    with pytest.raises(UsageError, match="warm-up"):
        config(warmup_steps=2, **{other: 1})


def test_the_header_names_both_units() -> None:
    run = RunLength(96_000, 8, 8, 1.0)
    assert describe(config(warmup_steps=50), run) == (
        "12,000 micro-batches = 1,500 windows, warm-up 400 = 50"
    )
    assert describe(config(warmup_batches=3), run_length(10, 8)) == (
        "10 micro-batches = 2 windows, warm-up 3 = 0.38"
    )


# --- The factor ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),  # after 0, 10, 20, 60, 95, 100 and 150 steps
    [
        ("linear", [0, 0.5, 1, 0.5, 0.0625, 0, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0.5 - 0.5 * math.cos(math.pi / 16), 0, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("wsd", [0, 0.5, 1, 1, 0.25, 0, 0]),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_hand_computed_factors(name: SchedulerName, values: list[float], floor: float) -> None:
    for t, value in zip((0, 10, 20, 60, 95, 100, 150), values, strict=True):
        ours = lr_factor(name, t, 100, warmup=20, min_lr_ratio=floor)
        floored = value if t < 20 else floor + (1 - floor) * value
        assert ours == pytest.approx(floored, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_warmup_longer_than_the_run_only_climbs(name: SchedulerName) -> None:
    factors = [lr_factor(name, t, 10, warmup=40) for t in range(11)]
    assert factors == [t / 40 for t in range(11)]


def test_the_configuration_offers_the_schedules_that_there_are() -> None:
    assert NAMES == tuple(schedule.SCHEDULES)


def test_a_schedule_is_a_function_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(point: SchedulePoint) -> float:
        return point.left**2

    name: Any = "squared"
    with pytest.raises(UsageError, match=r"must be one of linear, cosine, .*, got 'squared'"):
        lr_factor(name, 60, 100, warmup=20)
    monkeypatch.setitem(schedule.SCHEDULES, name, squared)  # pyright: ignore[reportArgumentType]
    assert lr_factor(name, 10, 100, warmup=20) == 0.5
    assert lr_factor(name, 60, 100, warmup=20) == 0.25
    assert lr_factor(name, 100, 100, warmup=20, min_lr_ratio=0.1) == 0.1


def test_wsd_without_decay_stays_up() -> None:
    assert lr_factor("wsd", 100, 100, decay_ratio=0.0) == 1.0


# --- The scheduler ------------------------------------------------------------------------------


def used_rates(
    scheduler: LRScheduler, run: RunLength, unit: str = "batch", skipped: tuple[int, ...] = ()
) -> list[float]:
    """Train without gradients; the learning rate that each window's update used."""
    used = []
    for micro_step in range(run.micro_batches):
        window = run.window(micro_step)
        closes = micro_step == window.first_micro_step + window.size - 1
        if closes:
            used.append(scheduler.optimizer.param_groups[-1]["lr"])
            if len(used) - 1 not in skipped:
                scheduler.optimizer.step()
        if closes or unit == "batch":
            step_scheduler(scheduler)
    return used


@pytest.mark.parametrize("skipped", [(), (0,), (0, 1, 7)], ids=str)
@pytest.mark.parametrize("accumulation_steps", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_100_batches_are_100_scheduler_steps(
    name: SchedulerName, accumulation_steps: int, skipped: tuple[int, ...]
) -> None:
    """https://github.com/huggingface/accelerate/issues/963. Warnings are errors in this suite."""
    run = run_length(100, accumulation_steps)
    scheduler = build_scheduler(optimizer(), config(lr_scheduler_type=name, warmup_batches=10), run)
    used = used_rates(scheduler, run, skipped=skipped)
    assert scheduler.last_epoch == 100
    assert len(used) == run.windows
    for j, rate in enumerate(used):
        last = min((j + 1) * accumulation_steps, 100) - 1
        assert rate == lr_factor(name, last, 100, warmup=10)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_step_unit_has_its_own_horizon(name: SchedulerName) -> None:
    run = run_length(100, 8)
    keys = config(lr_scheduler_type=name, warmup_steps=2, scheduler_unit="optimizer_step")
    scheduler = build_scheduler(optimizer(), keys, run)
    used = used_rates(scheduler, run, unit="optimizer_step")
    assert scheduler.last_epoch == 13
    assert used == [lr_factor(name, k, 13, warmup=2) for k in range(13)]


@pytest.mark.parametrize("name", NAMES)
def test_both_units_agree_at_window_boundaries(name: SchedulerName) -> None:
    for k in range(101):
        per_window = lr_factor(name, k, 100, warmup=7, min_lr_ratio=0.1)
        assert lr_factor(name, 8 * k, 800, warmup=56, min_lr_ratio=0.1) == per_window


def test_the_warning_that_is_silenced_exists_and_no_other_is() -> None:
    run = run_length(8, 8)
    plain = build_scheduler(optimizer(), config(), run)
    with pytest.warns(UserWarning, match="Detected call of"):
        plain.step()

    def talkative(t: int) -> float:
        if t > 0:  # not when the scheduler is built
            warnings.warn("something else", UserWarning, stacklevel=2)
        return 1.0

    scheduler = LambdaLR(optimizer(), talkative)
    with pytest.warns(UserWarning, match="something else"):
        step_scheduler(scheduler)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [1, 3, 8, 50])
def test_resumed_rates_are_equal(name: SchedulerName, stop: int) -> None:
    """Optimizer, then scheduler; load optimizer, then scheduler; the state goes through JSON."""
    run, keys = run_length(100, 8), config(lr_scheduler_type=name, warmup_steps=2)
    whole = build_scheduler(optimizer(), keys, run)
    for _ in range(stop):
        step_scheduler(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["lr_lambdas"] == [None, None]

    resumed = build_scheduler(optimizer(), keys, run)
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    resumed.load_state_dict(state)
    for _ in range(100 - stop):
        rates = [[group["lr"] for group in s.optimizer.param_groups] for s in (whole, resumed)]
        assert rates[0] == rates[1]
        step_scheduler(whole)
        step_scheduler(resumed)
    assert resumed.last_epoch == 100


@pytest.mark.parametrize(
    ("unit", "fits", "short"), [("batch", 100, 99), ("optimizer_step", 13, 12)]
)
def test_foreign_schedulers_must_last_for_the_run(unit, fits: int, short: int) -> None:
    run = run_length(100, 8)
    sgd = SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    for build in (
        lambda n: OneCycleLR(sgd, max_lr=1.0, total_steps=n),
        lambda n: CosineAnnealingLR(sgd, T_max=n),
    ):
        check_foreign_scheduler(build(fits), run, unit)
        with pytest.raises(UsageError, match=f"at least {fits}, got {short}"):
            check_foreign_scheduler(build(short), run, unit)


def test_a_scheduler_that_waits_for_a_metric_is_refused() -> None:
    with pytest.raises(UsageError, match="ReduceLROnPlateau"):
        check_foreign_scheduler(ReduceLROnPlateau(optimizer()), run_length(100, 8))
