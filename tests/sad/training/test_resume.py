"""Resuming with other sizes, precision, averages or length: exactly, or refused in one line."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty_disk import tree
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.store import Checkpoint, load_checkpoint, load_latest, save_checkpoint
from sad.config.schema import DistillConfig, ce_only
from sad.environment import StopSignals
from sad.errors import StoppedError, UsageError
from sad.optim.precision import Precision
from sad.optim.schedule import lr_factor
from sad.report.log import read_log
from sad.training.inputs import RunInputs, load_inputs
from sad.training.resume import plan_resumption
from sad.training.run import distill
from sad.training.trainer import Trainer

Make = Callable[..., DistillConfig]

ROWS = 4
WINDOW = 4 * ROWS
"""Rows of a window in the run that is resumed."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "teacher": save_tiny(folder / "teacher", tiny_llama(seed=1, num_hidden_layers=1)),
        "student": save_tiny(folder / "student", tiny_llama(seed=2, num_hidden_layers=1)),
        "data": {"train": write_texts(folder / "texts", count=12), "eval_fraction": 0.2},
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> Make:
    def make(**overrides: Any) -> DistillConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_length": 64,
            "num_train_epochs": 2,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "max_eval_rows": 4,
            "logging_steps": 1,
        }
        return DistillConfig(**(sources | defaults | overrides))

    return make


@pytest.fixture
def inputs(make_config: Make) -> RunInputs:
    """The same for all sizes: rows neither of a whole number of windows nor of micro-batches."""
    found = load_inputs(make_config())
    rows = len(found.train_rows)
    assert rows > 3 * WINDOW and rows % WINDOW > ROWS and rows % ROWS
    return found


def stopped(config: DistillConfig, inputs: RunInputs, micro_step: int) -> Checkpoint:
    """The checkpoint of a run after so many micro-batches."""
    trainer = make_trainer(config, inputs)
    while trainer.counters.micro_step < micro_step:
        trainer.micro_batch()
    return saved(trainer)


def saved(trainer: Trainer) -> Checkpoint:
    state, tensors = trainer.capture()
    directory, step = trainer.config.output_dir, trainer.counters.micro_step
    return load_checkpoint(save_checkpoint(directory, step, state, tensors, save_total_limit=9))


def resumed(config: DistillConfig, inputs: RunInputs, checkpoint: Checkpoint) -> Trainer:
    trainer = make_trainer(replace(config, allow_config_change=True), inputs)
    trainer.restore(checkpoint, warn=lambda _: None)
    return trainer


def windows_to_the_end(trainer: Trainer) -> list[list[int]]:
    """Train to the end; the numbers of the rows in each window, in order."""
    windows, rows = [], []
    while trainer.counters.micro_step < trainer.run_length.micro_batches:
        rows += trainer.batches.row_numbers(trainer.counters.micro_step).tolist()
        if trainer.micro_batch():
            windows.append(rows)
            rows = []
    assert not rows
    return windows


def flat(windows: list[list[int]]) -> list[int]:
    return [row for window in windows for row in window]


def refusal(config: DistillConfig, inputs: RunInputs, checkpoint: Checkpoint) -> str:
    trainer = make_trainer(replace(config, allow_config_change=True), inputs)
    before = everything(trainer)
    with pytest.raises(UsageError) as error:
        trainer.restore(checkpoint, warn=lambda _: None)
    assert_same_bits(everything(trainer), before)
    message = str(error.value)
    assert "\n" not in message and " must " in message and ", got " in message and "; " in message
    return message


# Sizes


@pytest.mark.parametrize(
    "sizes",
    [(8, 2), (16, 1), (2, 8), pytest.param((1, 16), marks=pytest.mark.slow)],
    ids=str,
)
def test_another_split_of_windows_goes_on_with_the_same_rows_to_the_same_end(
    make_config: Make, inputs: RunInputs, sizes: tuple[int, int]
) -> None:
    whole = make_trainer(make_config(), inputs)
    per_epoch = whole.run_length.windows_per_epoch
    stops = (2, per_epoch, per_epoch + 1)
    every: list[list[int]] = []
    checkpoints = []
    while whole.counters.micro_step < whole.run_length.micro_batches:
        every += [] if whole.accumulator.pending else [[]]
        every[-1] += whole.batches.row_numbers(whole.counters.micro_step).tolist()
        if whole.micro_batch() and len(every) in stops:
            checkpoints.append(saved(whole))
    batch, steps = sizes
    other = make_config(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    for closed, checkpoint in zip(stops, checkpoints, strict=True):
        trainer = resumed(other, inputs, checkpoint)
        assert trainer.counters.global_step == closed
        assert windows_to_the_end(trainer) == every[closed:]
        assert trainer.counters.global_step == whole.counters.global_step == len(every)
        assert trainer.counters.tokens == whole.counters.tokens
        assert trainer.scheduler.last_epoch == trainer.run_length.micro_batches
        assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_a_resumption_with_other_sizes_trains_as_the_run_would_have(
    make_config: Make, inputs: RunInputs
) -> None:
    """Where the learning rate is constant, weights differ by the rounding of sums alone."""
    config = make_config(lr_scheduler_type="constant", adam_epsilon=1e-3)
    other = replace(config, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    whole = make_trainer(config, inputs)
    windows_to_the_end(whole)
    trainer = resumed(other, inputs, stopped(config, inputs, 8))
    windows_to_the_end(trainer)
    for ours, theirs in zip(
        trainer.student.model.parameters(), whole.student.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert trainer.ema is not None and whole.ema is not None
    assert trainer.ema.num_updates == whole.ema.num_updates


def test_inside_a_window_sizes_must_stay(make_config: Make, inputs: RunInputs) -> None:
    config = make_config()
    checkpoint = stopped(config, inputs, 6)
    message = refusal(
        replace(config, per_device_train_batch_size=8, gradient_accumulation_steps=2),
        inputs,
        checkpoint,
    )
    assert "after 2 of its 4 micro-batches; resume with per_device_train_batch_size: 4" in message
    other = replace(config, gradient_accumulation_steps=2)
    assert "the length of a window must stay" in refusal(other, inputs, checkpoint)


def test_rows_that_are_no_whole_number_of_micro_batches_are_refused(
    make_config: Make, inputs: RunInputs
) -> None:
    config = make_config()
    message = refusal(
        replace(config, per_device_train_batch_size=3), inputs, stopped(config, inputs, 4)
    )
    assert "consumed of its epoch, got 3 and 16 rows; choose a divisor" in message
    epoch = make_trainer(config, inputs).run_length.batches_per_epoch
    at_an_epochs_end = stopped(config, inputs, epoch)
    trainer = resumed(replace(config, per_device_train_batch_size=3), inputs, at_an_epochs_end)
    rows = flat(windows_to_the_end(trainer))
    assert sorted(rows) == list(range(len(inputs.train_rows)))


def test_other_windows_begin_where_the_checkpoint_is(make_config: Make, inputs: RunInputs) -> None:
    """Windows of 3 after one of 4: the first has 2, and a stop in it changes no bit."""
    config = make_config()
    checkpoint = stopped(config, inputs, 4)
    other = replace(config, gradient_accumulation_steps=3)
    whole = resumed(other, inputs, checkpoint)
    first = resumed(other, inputs, checkpoint)
    windows = windows_to_the_end(whole)
    assert [len(window) // ROWS for window in windows[:3]] == [2, 3, 3]
    assert len(flat(windows)) == 2 * len(inputs.train_rows) - WINDOW
    assert whole.counters.global_step == whole.run_length.windows

    first.micro_batch()
    assert first.accumulator.pending
    second = make_trainer(other, inputs)
    second.restore(saved(first), warn=pytest.fail)
    assert windows_to_the_end(second)
    assert_same_bits(
        {k: v for k, v in everything(second).items() if k != "state"},
        {k: v for k, v in everything(whole).items() if k != "state"},
    )


@pytest.mark.parametrize("unit", ["batch", "optimizer_step"])
def test_another_unit_of_the_scheduler(make_config: Make, inputs: RunInputs, unit: Any) -> None:
    old: Any = {"batch": "optimizer_step", "optimizer_step": "batch"}[unit]
    config = make_config(scheduler_unit=old, lr_scheduler_type="cosine", warmup_steps=1)
    trainer = resumed(replace(config, scheduler_unit=unit), inputs, stopped(config, inputs, 8))
    length = trainer.run_length.steps(unit)
    steps, warmup = (8, 4) if unit == "batch" else (2, 1)
    factor = lr_factor("cosine", steps, length, warmup=warmup)
    assert trainer.scheduler.last_epoch == steps
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3 * factor
    windows_to_the_end(trainer)
    assert trainer.scheduler.last_epoch == length
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_a_scheduler_of_ones_own_cannot_be_moved(make_config: Make, inputs: RunInputs) -> None:
    config = make_config()
    checkpoint = stopped(config, inputs, 4)
    other = replace(
        config,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        allow_config_change=True,
    )
    built = make_trainer(other, inputs)
    trainer = Trainer(
        other,
        built.student,
        inputs,
        Precision(other, inputs.device),
        built.run_dir,
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
    )
    with pytest.raises(UsageError, match="must have taken 2 steps where the run goes on, got 4"):
        trainer.restore(checkpoint, warn=lambda _: None)


# Length


def test_a_longer_run_takes_every_row_once_an_epoch(make_config: Make, inputs: RunInputs) -> None:
    """The shorter one ends in the middle of what is a window of the longer one."""
    epoch = make_trainer(make_config(), inputs).run_length.batches_per_epoch
    config = make_config(num_train_epochs=6 / epoch)
    short = make_trainer(config, inputs)
    assert short.run_length.micro_batches % 4
    done = flat(windows_to_the_end(short))
    trainer = resumed(replace(config, num_train_epochs=1), inputs, saved(short))
    left = windows_to_the_end(trainer)
    assert sorted(done + flat(left)) == list(range(len(inputs.train_rows)))
    assert [len(window) // ROWS for window in left[:2]] == [2, 4]
    assert trainer.counters.global_step == trainer.run_length.windows
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused(
    make_config: Make, inputs: RunInputs
) -> None:
    config = make_config()
    message = refusal(replace(config, max_steps=1), inputs, stopped(config, inputs, 8))
    assert "got 4 micro-batches planned and 8 consumed; raise num_train_epochs or max" in message
    shorter = resumed(replace(config, max_steps=2), inputs, stopped(config, inputs, 8))
    assert windows_to_the_end(shorter) == []


def test_a_baseline_is_as_long_as_the_student(make_config: Make) -> None:
    config = make_config(max_steps=1, baseline=True)
    distill(config)
    longer = replace(config, max_steps=2, resume_from_checkpoint="auto", allow_config_change=True)
    distill(longer)
    for folder in (config.output_dir, f"{config.output_dir}/baseline"):
        latest = load_latest(folder, report=pytest.fail)
        assert latest is not None and latest.micro_step == 8


def test_where_the_best_student_stood_is_true_after_a_change_of_sizes(
    make_config: Make, inputs: RunInputs
) -> None:
    """A run that counts anew leaves the export alone, which says of how many rows it counts."""
    config = make_config(learning_rate=0.0)
    trainer = make_trainer(config, inputs)
    with run_log(config, trainer) as log:
        for _ in range(8):
            trainer.micro_batch()
        trainer.evaluate(log)
    other = replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    again = resumed(other, inputs, saved(trainer))
    with run_log(other, again) as log:
        again.train(log, StopSignals())  # at no learning rate there is no better student
    best = json.loads((again.run_dir.best / "sad.json").read_text())
    assert (best["micro_step"], best["micro_batch_rows"]) == (8, ROWS)
    assert again.counters.best_micro_step * 2 == 8 * ROWS
    assert "8 micro-batches of 4 rows" in (again.run_dir.best / "README.md").read_text()


# Precision and averages

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "masters": {"param_dtype": "bfloat16"},
    "pure": {"param_dtype": "bfloat16", "master_weights": False},
}


@pytest.mark.few(7)
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(PRECISIONS, 2)), ids="->".join)
def test_another_precision_goes_on_from_the_same_weights(
    make_config: Make, inputs: RunInputs, old: str, new: str
) -> None:
    config = make_config(**PRECISIONS[old])
    first = make_trainer(config, inputs)
    while not first.micro_batch():
        pass
    exact = {name: p.detach().clone() for name, p in first.precision.optimizer_parameters.items()}
    trainer = resumed(make_config(**PRECISIONS[new]), inputs, saved(first))
    for name, parameter in trainer.precision.optimizer_parameters.items():
        assert torch.equal(parameter, exact[name].to(parameter.dtype)), name
        state = trainer.optimizer.state[parameter]
        assert state["exp_avg"].dtype == parameter.dtype and float(state["step"]) == 1
    for name, parameter in trainer.student.model.named_parameters():
        assert torch.equal(parameter, exact[name].to(parameter.dtype)), name
    while not trainer.micro_batch():
        pass
    assert trainer.ema is not None and trainer.ema.num_updates in (1, 2)  # fp16 may overflow once


def test_precision_must_stay_inside_a_window(make_config: Make, inputs: RunInputs) -> None:
    """Its gradients are scaled, and kept in a dtype."""
    checkpoint = stopped(make_config(), inputs, 6)
    message = refusal(make_config(fp16=True), inputs, checkpoint)
    assert "the precision of gradients must stay" in message and "with fp16: False" in message


def test_another_optimizer_is_refused(make_config: Make, inputs: RunInputs) -> None:
    """Before it is built: the library may be missing where the run is resumed."""
    checkpoint = stopped(make_config(), inputs, 4)
    other = make_config(optim="adamw_8bit", allow_config_change=True)
    message = "optim must stay when a run is resumed, got 'adamw_torch_fused' -> 'adamw_8bit'"
    with pytest.raises(UsageError, match=message):
        plan_resumption(checkpoint, other, inputs.train_rows)


def test_an_average_that_is_switched_on_starts_at_the_resumed_weights(
    make_config: Make, inputs: RunInputs
) -> None:
    config = make_config(use_ema=False)
    checkpoint = stopped(config, inputs, 8)
    trainer = resumed(replace(config, use_ema=True), inputs, checkpoint)
    assert trainer.ema is not None and trainer.ema.num_updates == 0
    weights = dict(trainer.student.model.named_parameters())
    initial = dict(make_trainer(config, inputs).student.model.named_parameters())
    for name, shadow in trainer.ema.tensors().items():
        assert torch.equal(shadow, weights[name]) and not torch.equal(shadow, initial[name])


def test_an_average_can_be_switched_off(make_config: Make, inputs: RunInputs) -> None:
    config = make_config()
    trainer = resumed(replace(config, use_ema=False), inputs, stopped(config, inputs, 8))
    assert trainer.ema is None and trainer.metric_for_best == "eval/nll"
    assert windows_to_the_end(trainer)


def test_the_best_value_of_another_metric_is_forgotten(
    make_config: Make, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sad.training.trainer.is_whole_export", lambda _: True)
    config = make_config()
    trainer = make_trainer(config, inputs)
    trainer.counters.best_value, trainer.counters.best_metric = 1e-6, "eval_ema/nll"
    checkpoint = saved(trainer)
    raw = resumed(replace(config, use_ema=False), inputs, checkpoint)
    assert raw.counters.best_value == 1e-6
    other = resumed(replace(config, metric_for_best_model="eval/kl"), inputs, checkpoint)
    assert other.counters.best_value == float("inf")


# Checkpoints of the old numbering


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_checkpoints_that_count_other_micro_batches_are_set_aside(
    make_config: Make, inputs: RunInputs
) -> None:
    config = make_config(save_steps=1, async_save=False)
    folder = f"{config.output_dir}/checkpoints"
    stopped(config, inputs, 4)
    checkpoint = stopped(config, inputs, 8)
    other = replace(config, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer = resumed(other, inputs, checkpoint)
    # Until there is a new one, `auto` finds the one that was resumed from.
    assert names(folder) == ["batch-000000008", "set-aside"]
    assert names(f"{folder}/set-aside") == ["batch-000000004"]
    again = resumed(other, inputs, load_latest(config.output_dir) or pytest.fail("none"))
    assert again.counters.micro_step == trainer.counters.micro_step == 4

    with run_log(other, trainer) as log:
        while not trainer.micro_batch():
            pass
        trainer.save(log)
        assert names(folder) == ["batch-000000006", "set-aside"]
        assert names(f"{folder}/set-aside") == ["batch-000000004", "batch-000000008"]
        for _ in range(3):
            while not trainer.micro_batch():
                pass
            trainer.save(log)
    assert len(names(f"{folder}/set-aside")) == 2, "save_total_limit must not look there"
    assert len(names(folder)) == 2 + 1
    # Back to the old sizes from one of them: now the others count other micro-batches.
    aside = load_checkpoint(f"{folder}/set-aside/batch-000000004")
    assert resumed(config, inputs, aside).counters.micro_step == 4
    assert names(folder) == ["set-aside"]


def test_going_back_sets_the_abandoned_ones_aside(make_config: Make, inputs: RunInputs) -> None:
    """``auto`` went on from the newest, which a rollback had meant to leave."""
    config = make_config()
    first = stopped(config, inputs, 4)
    for step in (8, 12):
        stopped(config, inputs, step)
    trainer = resumed(config, inputs, first)
    folder = f"{config.output_dir}/checkpoints"
    assert names(folder) == ["batch-000000004", "set-aside"]
    assert names(f"{folder}/set-aside") == ["batch-000000008", "batch-000000012"]
    trainer.micro_batch()
    saved(trainer)
    latest = load_latest(config.output_dir, report=pytest.fail)
    assert latest is not None and latest.micro_step == 5


def test_other_windows_alone_set_nothing_aside(make_config: Make, inputs: RunInputs) -> None:
    config = make_config()
    stopped(config, inputs, 4)
    resumed(replace(config, gradient_accumulation_steps=8), inputs, stopped(config, inputs, 8))
    assert names(f"{config.output_dir}/checkpoints") == ["batch-000000004", "batch-000000008"]


def test_the_command_with_other_sizes_goes_on_and_says_so(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(save_steps=1)
    micro_batch = Trainer.micro_batch

    def interrupted(self: Trainer) -> bool:
        closed = micro_batch(self)
        if self.counters.micro_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return closed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "micro_batch", interrupted)
        with pytest.raises(StoppedError):
            distill(config)
    other = replace(
        config,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        resume_from_checkpoint="auto",
    )
    with pytest.raises(UsageError, match="per_device_train_batch_size: 4 -> 8"):
        distill(other)
    result = distill(replace(other, allow_config_change=True))
    assert RunDirectory(result.run_dir).read_status()["state"] == "finished"
    records = read_log(result.run_dir)
    start = [r for r in records if r["kind"] == "start"][-1]
    lines = dict(start["header"])["resumed"].splitlines()
    assert lines[1:] == [
        "4 micro-batches of 8 rows are done, which were 8 of 4",
        "the learning rate of a window may differ from what it would have been, by a fraction of "
        "what it changes in a window",
    ]
    assert start["resumed_from"] == 4
    # One axis for the log: positions of the first attempt are halved.
    positions = [r["micro_step"] for r in records if r["kind"] == "train"]
    assert positions == sorted(set(positions)) and positions[:4] == [2, 4, 6, 8]
    distill(replace(other, max_steps=-1))  # finished: the same command changes nothing


def test_a_resumption_that_is_refused_leaves_the_run_alone(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is read: the run, finished here, does not look failed or reconfigured."""
    config = make_config(max_steps=2)
    distill(config)
    other = replace(
        config,
        per_device_train_batch_size=3,
        resume_from_checkpoint="auto",
        allow_config_change=True,
    )
    before = tree(Path(config.output_dir))
    monkeypatch.setattr("sad.training.teacher_score.evaluate_teacher", pytest.fail)
    with pytest.raises(UsageError, match="must divide the rows that a resumed run has consumed"):
        distill(other)
    assert tree(Path(config.output_dir)) == before


@pytest.mark.slow
def test_a_baseline_that_is_refused_leaves_the_run_alone(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the student could go on: the baseline stands at another place."""
    config = make_config(max_steps=1)
    distill(config)
    baseline = replace(config, **ce_only(), max_steps=2, output_dir=f"{config.output_dir}-other")
    shutil.move(distill(baseline).run_dir, f"{config.output_dir}/baseline")
    again = replace(config, baseline=True, resume_from_checkpoint="auto", allow_config_change=True)
    RunDirectory(f"{config.output_dir}/baseline").write_status("stopped")
    before = tree(Path(config.output_dir))
    monkeypatch.setattr("sad.training.teacher_score.evaluate_teacher", pytest.fail)
    with pytest.raises(UsageError, match="must not end before its checkpoint"):
        distill(again)
    assert tree(Path(config.output_dir)) == before


def test_signals_and_sizes(make_config: Make, inputs: RunInputs) -> None:
    """A whole training loop after a renumbering: log, evaluation and saves at their positions."""
    config = make_config()
    other = replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    trainer = resumed(other, inputs, stopped(config, inputs, 8))
    with run_log(other, trainer) as log:
        trainer.train(log, StopSignals())
    assert trainer.counters.evaluated_at == trainer.run_length.micro_batches
    latest = load_latest(config.output_dir, report=pytest.fail)
    assert latest is not None and latest.micro_step == trainer.run_length.micro_batches
