"""The training loop: resumption to the bit, windows, skipped updates, signals, failing disks."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels import DistillOutput, TeacherHidden
from sad_kernels._torch.gemm import onednn_products
from support.faulty_disk import tree
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import overflowing_llama, save_tiny, tiny_gpt2, tiny_llama, write_texts
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint import store
from sad.checkpoint.parts import Entry, Part
from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.store import latest_checkpoint, load_checkpoint, save_checkpoint
from sad.checkpoint.tensor_files import FileTensors
from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.environment import StopSignals
from sad.errors import CheckpointError, DivergedError, StoppedError, UnfitError, UsageError
from sad.models.load import load_student
from sad.optim.precision import Precision, UpdateResult
from sad.optim.schedule import lr_factor
from sad.report.log import RunLog, read_log
from sad.teachers.frozen import TeacherOutput
from sad.training import state as trainer_state
from sad.training import student as student_module
from sad.training import trainer as trainer_module
from sad.training.inputs import RunInputs, load_inputs
from sad.training.meters import EvalMetrics, ThroughputMeter
from sad.training.rescore import evaluate_run
from sad.training.run import distill
from sad.training.skips import SkipWatch
from sad.training.student import build_student
from sad.training.trainer import Trainer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher, a student with dropout and unequal documents, on disk."""
    folder = tmp_path_factory.mktemp("sources")
    teacher = tiny_llama(seed=1, hidden_size=48, num_hidden_layers=1)
    student = tiny_llama(seed=2, attention_dropout=0.1, tie_word_embeddings=True)
    return {
        "teacher": save_tiny(folder / "teacher", teacher),
        "student": save_tiny(folder / "student", student),
        "data": {"train": write_texts(folder / "texts", count=16), "eval_fraction": 0.2},
    }


@pytest.fixture(scope="module")
def make_config_in(sources: dict[str, Any]) -> Callable[..., DistillConfig]:
    """The reference run: two epochs, windows of 4 with a short last one, an evaluation between."""

    def make(folder: Path, **overrides: Any) -> DistillConfig:
        defaults = {
            "output_dir": str(folder / "run"),
            "max_length": 32,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 28,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-2,
            "warmup_batches": 3,
            "max_eval_rows": 4,
            "logging_steps": 2,
        }
        return DistillConfig(**(sources | defaults | overrides))

    return make


@pytest.fixture
def make_config(
    make_config_in: Callable[..., DistillConfig], tmp_path: Path
) -> Callable[..., DistillConfig]:
    return functools.partial(make_config_in, tmp_path)


# Resumption


def test_a_stop_after_any_micro_batch_changes_no_bit(make_config: Callable[..., Any]) -> None:
    """Generators that were restored too early: https://github.com/huggingface/transformers/pull/46628"""
    config = make_config()
    inputs = load_inputs(config)
    whole = make_trainer(config, inputs)
    total = whole.run_length.micro_batches
    assert total % 4 and total > 8, "the last window should be a short one"
    ends = []
    for _ in range(total):
        whole.micro_batch()
        ends.append(everything(whole))

    for stop in range(1, total):
        first = make_trainer(config, inputs)
        for _ in range(stop):
            first.micro_batch()
        state, tensors = first.capture()
        path = save_checkpoint(config.output_dir, stop, state, tensors, save_total_limit=2)
        second = make_trainer(config, inputs)
        torch.rand(7)  # the generators are restored last: whatever was drawn before is undone
        second.restore(load_checkpoint(path), warn=pytest.fail)
        assert_same_bits(everything(second), ends[stop - 1])
        while second.counters.micro_step < total:
            second.micro_batch()
        assert_same_bits(everything(second), ends[-1])


def test_resuming_holds_one_saved_tensor_at_a_time(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run must not need more memory because it was stopped: what was saved is as large as it."""
    config = make_config()
    inputs = load_inputs(config)
    first = make_trainer(config, inputs)
    for _ in range(6):
        first.micro_batch()
    path = save_checkpoint(config.output_dir, 6, *first.capture(), save_total_limit=2)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    read = FileTensors._read

    def counted(self: FileTensors, offset: int, size: int) -> Any:
        nonlocal most

        class Content(bytearray):  # can be referred to weakly
            def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
                return id(self)

        content = Content(read(self, offset, size))
        alive.add(content)
        most = max(most, sum(map(len, alive)))
        return content

    checkpoint = load_checkpoint(path)
    monkeypatch.setattr(FileTensors, "_read", counted)
    second = make_trainer(config, inputs)
    second.restore(checkpoint, warn=pytest.fail)
    assert_same_bits(everything(second), everything(first))
    largest = max(t.nbytes for group in first.capture()[1].values() for t in group.values())
    assert largest <= most <= 2 * largest, "the one before goes when the next is there"


def test_saving_and_evaluating_leave_training_alone(make_config: Callable[..., Any]) -> None:
    finals = []
    for i, cadence in enumerate(({}, {"eval_steps": 1, "save_steps": 1}, {"eval_steps": 2})):
        config = make_config(output_dir=make_config().output_dir + str(i), **cadence)
        trainer = make_trainer(config)
        with run_log(config, trainer) as log:
            trainer.train(log, StopSignals())
        activations = everything(trainer)
        activations["state"] = {
            k: activations["state"][k] for k in ("scheduler", "rng", "ema", "sums")
        }
        finals.append(activations)
    assert_same_bits(finals[0], finals[1])
    assert_same_bits(finals[0], finals[2])


RUN = """
import os, signal, sys
from sad.config.load import load_config
from sad.training.student import StudentWithLoss
from sad.training.run import distill

forward, scored = StudentWithLoss.forward, 0

def forward_or_die(self, *args, **kwargs):
    global scored
    scored += not self.training
    if not self.training and scored == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)

StudentWithLoss.forward = forward_or_die
distill(load_config(sys.argv[2], sys.argv[3:]))
"""


def start(
    config: DistillConfig, tmp_path: Path, *overrides: str, die_at_scored_batch: int = -1
) -> subprocess.Popen[bytes]:
    """``distill`` in a fresh process, which may be told to kill itself in an evaluation."""
    from sad.config.schema import config_to_yaml

    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    command = [sys.executable, "-c", RUN, str(die_at_scored_batch), str(file), *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def first_progress(process: subprocess.Popen[bytes], config: DistillConfig) -> float:
    """When the process has trained for the first time: its log has grown."""
    log = Path(config.output_dir, "log.jsonl")
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None and not (log.exists() and log.stat().st_size > before):
        time.sleep(0.01)
    return time.perf_counter()


def final_bits(run_dir: str) -> dict[str, Any]:
    path = latest_checkpoint(run_dir, report=pytest.fail)
    assert path is not None
    saved = load_checkpoint(path)
    tensors = {f"{g}/{n}": t for g, group in saved.tensors.items() for n, t in group.items()}
    return tensors | {"state": {k: v for k, v in saved.state.items() if k != "identity"}}


MAY_CHANGE_ON_RESUME = {
    "num_train_epochs": 60,
    "save_steps": 3,
    "eval_steps": 4,
    "max_eval_rows": None,
}


@pytest.fixture(scope="module")
def whole_run(
    make_config_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], float]:
    """The uninterrupted run: its final state, and the seconds it took from its first progress."""
    folder = tmp_path_factory.mktemp("whole")
    config = make_config_in(folder, **MAY_CHANGE_ON_RESUME)
    process = start(config, folder)
    begin = first_progress(process, config)
    assert process.wait() == 0
    return final_bits(config.output_dir), time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigkill_at_ten_random_moments_changes_no_bit(
    make_config: Callable[..., Any], tmp_path: Path, whole_run: tuple[dict[str, Any], float]
) -> None:
    """Mid-window, mid-evaluation, mid-save, mid-start: wherever the draw falls."""
    expected, duration = whole_run
    config, draw, deaths = make_config(**MAY_CHANGE_ON_RESUME), random.Random(0), 0
    while deaths < 10:
        process = start(config, tmp_path, "--resume_from_checkpoint=auto")
        first_progress(process, config)
        time.sleep(draw.uniform(0, duration / 8))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run should outlive ten kills"
        deaths += 1
    assert start(config, tmp_path, "--resume_from_checkpoint=auto").wait() == 0
    assert_same_bits(final_bits(config.output_dir), expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigkill_in_the_middle_of_evaluations_changes_no_bit(
    make_config: Callable[..., Any], tmp_path: Path, whole_run: tuple[dict[str, Any], float]
) -> None:
    """Half of the moments find the EMA's weights swapped in."""
    expected, _ = whole_run
    config = make_config(**MAY_CHANGE_ON_RESUME)
    for scored in (5, 6, 12, 15):
        process = start(
            config, tmp_path, "--resume_from_checkpoint=auto", die_at_scored_batch=scored
        )
        assert process.wait() == -signal.SIGKILL
    assert start(config, tmp_path, "--resume_from_checkpoint=auto").wait() == 0
    assert_same_bits(final_bits(config.output_dir), expected)


def test_sigterm_saves_and_the_same_command_goes_on(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    whole = make_trainer(config)
    with onednn_products():  # as in a whole run
        for _ in range(whole.run_length.micro_batches):
            whole.micro_batch()

    micro_batch = Trainer.micro_batch

    def interrupted(self: Trainer) -> bool:
        closed = micro_batch(self)
        if self.counters.micro_step == 6:  # in the middle of a window
            os.kill(os.getpid(), signal.SIGTERM)
        return closed

    monkeypatch.setattr(Trainer, "micro_batch", interrupted)
    with pytest.raises(StoppedError, match="SIGTERM after micro-batch 6") as stopped:
        distill(config)
    assert stopped.value.exit_code == 75
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["code"]) == ("stopped", 75)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    monkeypatch.undo()
    with pytest.raises(UsageError, match="holds another run"):
        distill(config)
    result = distill(replace(config, resume_from_checkpoint="auto"))
    assert result.final.is_dir() and RunDirectory(result.run_dir).read_status()["code"] == 0
    saved = load_checkpoint(latest_checkpoint(result.run_dir) or pytest.fail("nothing saved"))
    for name, tensor in everything(whole).items():
        group, _, rest = name.partition("/")
        if group in ("model", "optimizer", "ema", "rng"):
            assert torch.equal(saved.tensors[group][rest], tensor), name


class Odometer:
    """A toy with a state of its own: what it has seen of a run."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_a_new_part_costs_one_line(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered, it is saved when a run is stopped and restored when it goes on."""
    config = make_config()
    seen: list[int] = []
    odometers: list[Odometer] = []
    checkpoint_parts, micro_batch = trainer_state.checkpoint_parts, Trainer.micro_batch

    def with_odometer(made: Trainer) -> list[Part]:
        odometers.append(Odometer())
        return [*checkpoint_parts(made), Entry("odometer", odometers[-1])]

    def counted(self: Trainer) -> bool:
        odometers[-1].seen += 1
        seen.append(odometers[-1].seen)
        if len(seen) == 6:  # in the middle of a window
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batch(self)

    monkeypatch.setattr(Trainer, "micro_batch", counted)
    monkeypatch.setattr(trainer_module, "checkpoint_parts", with_odometer)
    with pytest.raises(StoppedError):
        distill(config)
    distill(replace(config, resume_from_checkpoint="auto"))
    assert len(odometers) == 2 and len(seen) > 6
    assert seen == list(range(1, len(seen) + 1))


def forgotten(trainer: Trainer) -> list[str]:
    """Attributes of a trainer that have a state to load and belong to no part."""
    held = {id(held) for part in trainer.parts for held in (part, *vars(part).values())}
    held.add(id(trainer.student))  # its model and its structural losses are parts
    return [
        name
        for name, value in vars(trainer).items()
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
        if id(value) not in held
    ]


def test_whatever_has_a_state_is_a_part(make_config: Callable[..., Any]) -> None:
    """An object that the trainer got without its line would start anew when a run goes on."""
    trainer = make_trainer(make_config())
    assert forgotten(trainer) == []
    trainer.odometer = Odometer()  # pyright: ignore[reportAttributeAccessIssue]
    assert forgotten(trainer) == ["odometer"]


def test_a_best_metric_that_nothing_reports_is_refused(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "metric_for_best", "eval/toy")
    with pytest.raises(UsageError, match="got eval/toy; it reported eval/"):
        distill(make_config(max_steps=1))


STATE_KEYS = [
    "identity",
    "counters",
    "optimizer",
    "scheduler",
    "scaler",
    "curriculum",
    "ema",
    "rng",
    "sums",
    "terms",
    "window_loss",
    "teaching",
    "taid",
    "skipped",
    "accumulation_steps",
    "gradient_accumulator_step_count",
    "window_size",
    "num_items",
]
TENSOR_GROUPS = [
    "model",
    "masters",
    "optimizer",
    "ema",
    "teaching",
    "structure",
    "grads",
    "rng",
]


@pytest.mark.parametrize(
    "keys", [{}, {"use_ema": False, "kd_weight": 0.0, "teacher": None}], ids=["all", "least"]
)
def test_checkpoints_keep_their_layout(make_config: Callable[..., Any], keys: Any) -> None:
    """Names and order of schema 1, whatever a run has: another needs a new schema."""
    config = make_config(**keys)
    trainer = make_trainer(config)
    state, tensors = trainer.capture()
    assert list(state) == STATE_KEYS and list(tensors) == TENSOR_GROUPS
    path = save_checkpoint(config.output_dir, 0, state, tensors, save_total_limit=2)
    assert list(json.loads((path / "state.json").read_text())["state"]) == STATE_KEYS
    files = list(json.loads((path / "manifest.json").read_text())["files"])
    assert files == ["state.json", *(f"{group}.safetensors" for group in TENSOR_GROUPS)]
    assert store.SCHEMA == 1


@pytest.mark.parametrize("key", ["identity", "terms", "num_items"])
def test_a_checkpoint_without_a_key_is_refused_in_one_line(
    make_config: Callable[..., Any], key: str
) -> None:
    config = make_config()
    state, tensors = make_trainer(config).capture()
    del state[key]
    save_checkpoint(config.output_dir, 0, state, tensors, save_total_limit=2)
    with pytest.raises(CheckpointError, match=f"must hold '{key}' in state.json") as refusal:
        distill(replace(config, resume_from_checkpoint="auto"))
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_a_changed_trajectory_is_refused(make_config: Callable[..., Any]) -> None:
    config = make_config(max_steps=1)
    distill(config)
    other = replace(config, learning_rate=0.5, resume_from_checkpoint="auto")
    before = files_of(config)
    with pytest.raises(UsageError, match=r"learning_rate: 0.01 -> 0.5"):
        distill(other)
    assert files_of(config) == before, "a finished run must not look failed for being left alone"
    cadence = replace(config, logging_steps=7, resume_from_checkpoint="auto")
    distill(cadence)
    distill(replace(other, allow_config_change=True))


def files_of(config: DistillConfig) -> dict[str, bytes | None]:
    return tree(Path(config.output_dir))


@pytest.mark.slow
def test_a_resumption_computes_each_hash_once(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_steps=1)
    distill(config)
    verified: list[str] = []
    verify = store._verify_hash

    def counting(path: Path, expected: str) -> None:
        verified.append(path.name)
        verify(path, expected)

    monkeypatch.setattr(store, "_verify_hash", counting)
    monkeypatch.setattr(Trainer, "save", lambda *_, **__: None)  # it would read what is there
    for wanted in ("auto", f"{config.output_dir}/checkpoints/batch-000000004"):
        verified.clear()
        distill(replace(config, resume_from_checkpoint=wanted))
        assert len(verified) == len(set(verified)) > 5


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_misspelt_model_is_called_by_its_key(make_config: Callable[..., Any], role: str) -> None:
    """Its tokenizer is missing as well, but `tokenizer` is no key that anybody has set."""
    with pytest.raises(UsageError, match=rf"^{role} must be .* got absent/{role}"):
        load_inputs(replace(make_config(), **{role: f"absent/{role}"}))


def test_a_run_that_failed_before_it_trained_may_be_repeated(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = make_config(max_steps=1)
    with pytest.raises(UsageError, match=r"^student must be .* got absent/student"):
        distill(replace(config, student="absent/student"))
    assert RunDirectory(config.output_dir).read_status()["code"] == 2
    distill(config)
    with pytest.raises(UsageError, match="holds another run"):
        distill(config)


def test_status_keeps_naming_the_last_good_checkpoint(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(save_steps=1, num_train_epochs=3)
    micro_batch = Trainer.micro_batch

    def failing(self: Trainer) -> bool:
        if self.counters.micro_step == 6:
            raise RuntimeError("broken")
        return micro_batch(self)

    monkeypatch.setattr(Trainer, "micro_batch", failing)
    with pytest.raises(RuntimeError, match="broken"):
        distill(config)
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["code"]) == ("failed", 1)
    newest = latest_checkpoint(config.output_dir)
    assert newest is not None and status["checkpoint"] == newest.name


def test_an_unfit_teacher_is_refused_before_it_is_scored(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of 16 positions, rows of 32: scoring would fail with an IndexError."""
    teacher = save_tiny(tmp_path / "short", tiny_gpt2(n_positions=16))
    with pytest.raises(UnfitError, match="max_length must be at most"):
        distill(make_config(teacher=teacher, packing=False))


@pytest.mark.few(1)
@pytest.mark.parametrize("positions", [32, 70])
def test_samples_stay_within_the_students_positions(
    make_config: Callable[..., Any], tmp_path: Path, positions: int
) -> None:
    """32 are as many as a row has, 70 end between the prompt's 48 and the text's 64 more."""
    student = save_tiny(tmp_path / "short", tiny_gpt2(n_positions=positions))
    config = make_config(student=student, max_steps=1, max_length=min(positions, 64))
    run = RunDirectory(distill(config).run_dir).read_run()
    assert len(run["samples"]) == 2 and all(sample["text"] for sample in run["samples"])


@pytest.mark.slow
def test_a_student_is_scored_again_without_the_one_it_came_from(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "student", tiny_llama(seed=2))
    result = distill(make_config(student=student, max_steps=1))
    shutil.rmtree(student)
    teacher, best = evaluate_run(result.run_dir)
    assert best["nll"] == pytest.approx(result.results[-1]["nll"], rel=1e-12)
    assert teacher == result.results[0]


def test_an_allowed_change_takes_effect(make_config: Callable[..., Any]) -> None:
    config = make_config()
    inputs = load_inputs(config)
    trainer = make_trainer(config, inputs)
    for _ in range(4):
        trainer.micro_batch()
    state, tensors = trainer.capture()
    path = save_checkpoint(config.output_dir, 4, state, tensors, save_total_limit=2)
    other = replace(
        config, learning_rate=1e-3, weight_decay=0.5, ema_decay=0.5, allow_config_change=True
    )
    resumed = make_trainer(other, inputs)
    warnings: list[str] = []
    resumed.restore(load_checkpoint(path), warn=warnings.append)
    resumed.micro_batch()
    lr = other.learning_rate * lr_factor("linear", 5, trainer.run_length.micro_batches, warmup=3)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-12)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert resumed.ema is not None and resumed.ema.decay == 0.5
    assert "learning_rate: 0.01 -> 0.001" in warnings[0]


def test_a_scheduler_of_ones_own_must_reach_the_end(make_config: Callable[..., Any]) -> None:
    def one_cycle(steps: int) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)

    with pytest.raises(UsageError, match=r"OneCycleLR\.total_steps must be at least 4, got 1"):
        distill(make_config(max_steps=1), make_scheduler=one_cycle(1))
    distill(make_config(max_steps=1, resume_from_checkpoint="auto"), make_scheduler=one_cycle(4))


# Windows


def test_100_batches_are_100_scheduler_steps_and_13_updates(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        gradient_accumulation_steps=8, per_device_train_batch_size=1, lr_scheduler_type="cosine"
    )
    inputs = load_inputs(config)
    rows = len(inputs.train_rows)
    assert rows >= 100
    monkeypatch.setattr(type(inputs.train_rows), "__len__", lambda self: 100)
    trainer = make_trainer(replace(config, num_train_epochs=1), inputs)
    used, updates = [], []
    step = Precision.step

    def watched(self: Precision, optimizer: Any, max_grad_norm: float) -> Any:
        used.append(optimizer.param_groups[0]["lr"])
        update = step(self, optimizer, max_grad_norm)
        updates.append(bool(update.ok))
        return update

    monkeypatch.setattr(Precision, "step", watched)
    for _ in range(100):
        trainer.micro_batch()

    assert trainer.scheduler.last_epoch == 100
    assert updates == [True] * 13 == [True] * (100 // 8 + 1)
    assert trainer.counters.global_step == 13
    lasts = [min(8 * j + 7, 99) for j in range(13)]
    factors = [lr_factor("cosine", t, 100, warmup=3) for t in lasts]
    assert used == pytest.approx([config.learning_rate * f for f in factors], rel=1e-12)


@pytest.mark.parametrize("keys", [{}, {"loss_logits": "compact"}], ids=lambda keys: ",".join(keys))
def test_the_loss_gets_its_format_of_logits(
    keys: dict[str, Any], make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**keys)
    inputs, seen = load_inputs(config), []
    student = build_student(config, load_student(config), inputs.valid_vocab, Precision(config))
    loss = student_module.linear_distill_loss

    def watched(*arguments: Any, **how: Any) -> Any:
        seen.append(how["logits"])
        return loss(*arguments, **how)

    monkeypatch.setattr(student_module, "linear_distill_loss", watched)
    batch = inputs.train_rows.batch([0])
    objective = config.objective(kd_weight=0.0)
    student._distill(student.hidden(batch), batch, [], objective, 1, None)
    assert seen == [keys.get("loss_logits", "exact")]


def test_every_split_of_a_batch_gives_the_same_gradient(make_config: Callable[..., Any]) -> None:
    """Unequal lengths, a micro-batch without targets: float64 gradients agree to 1e-12."""
    config = make_config(packing=False, max_length=64)
    inputs = load_inputs(config)
    precision = Precision(config)
    model = load_student(config).double().eval()
    student = build_student(config, model, inputs.valid_vocab, precision)
    student.compute_dtype = torch.float64
    rows = inputs.train_rows.batch(range(8))
    for row, length in enumerate((64, 3, 40, 0, 7, 64, 1, 12)):
        rows.labels[row, length:] = -100
    lengths = (rows.labels != -100).sum(1)
    hidden = torch.randn(8, 64, 48, dtype=torch.float64)
    assert inputs.teacher is not None
    (target,) = inputs.teacher.forward(rows).targets
    assert isinstance(target, TeacherHidden)
    head = replace(target.head, weight=target.head.weight.double())
    window = LossCounts(int(lengths.sum()), 0, 0)

    def gradient(micro_batches: int) -> Tensor:
        model.zero_grad(set_to_none=True)
        for part in torch.arange(8).chunk(micro_batches):
            batch = Batch(
                rows.input_ids[part],
                rows.labels[part],
                rows.position_ids[part],
                lengths[part],
                LossCounts(int(lengths[part].sum()), 0, 0),
                0,
            )
            teacher = TeacherOutput((TeacherHidden(hidden[part], head),))
            student(batch, teacher, config.objective(), window).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient(1)
    for micro_batches in (2, 4, 8):
        error = (gradient(micro_batches) - whole).abs().max() / whole.abs().max()
        assert error < 1e-12


def test_one_micro_batch_or_eight_give_one_gradient(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided by its own targets, a micro-batch with few of them would count as much as others.

    https://github.com/huggingface/trl/pull/6006
    https://github.com/modelscope/ms-swift/pull/6663
    The last window is a short one: https://github.com/Lightning-AI/pytorch-lightning/issues/19987
    """
    shared = {"packing": False, "max_length": 200, "num_train_epochs": 1}
    shared |= {"use_ema": False, "use_curriculum": False}
    gradients: list[Tensor] = []

    def record(self: Precision, optimizer: Any, max_grad_norm: float) -> UpdateResult:
        parts = [p.grad.flatten() for p in self.optimizer_parameters.values() if p.grad is not None]
        gradients.append(torch.cat(parts))
        return UpdateResult(torch.zeros(()), torch.tensor(True), torch.tensor(False))

    monkeypatch.setattr(Precision, "step", record)
    found = []
    for batch_size, accumulation_steps in ((8, 1), (2, 4), (1, 8)):
        config = make_config(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation_steps,
            **shared,
        )
        trainer = make_trainer(config)
        trainer.student.model.double().eval()  # without dropout
        trainer.student.compute_dtype = torch.float64
        while trainer.counters.micro_step < trainer.run_length.micro_batches:
            trainer.micro_batch()
        found.append(torch.stack(gradients))
        gradients.clear()
    assert len(trainer.batches.rows) % 8, "the last window should be a short one"
    assert trainer.batches.rows.num_targets.std() > 40, "equal lengths would hide the fault"
    for split in found[1:]:
        error = (split - found[0]).abs().amax(1) / found[0].abs().amax(1)
        assert (error < 1e-12).all()


def test_evaluation_gives_the_figures_of_training(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, the same numbers, where nothing is smoothed and T is 1: from one window.

    https://github.com/linkedin/Liger-Kernel/pull/888
    https://github.com/axolotl-ai-cloud/axolotl/pull/3271: a thousandfold, in evaluation only.
    """
    config = make_config(packing=False, label_smoothing=0.0, temperature=1.0)
    trainer = make_trainer(config)
    batches = [trainer.batches.batch(i) for i in range(4)]
    monkeypatch.setattr(RunInputs, "eval_batches", lambda self, config: iter(batches))
    with run_log(config, trainer) as log:
        trainer.evaluate(log)
        trainer.student.eval()  # only now: evaluation itself has to do without dropout
        while not trainer.micro_batch():
            pass
        trainer.log_progress(log, ThroughputMeter(0))
    (record,) = (r for r in read_log(config.output_dir) if r["kind"] == "train")
    evaluated = trainer.counters.metrics
    assert record["ce"] == evaluated["eval/nll"]
    assert record["kd"] == evaluated["eval/kl"]
    assert record["accuracy"] == evaluated["eval/accuracy"]
    assert record["agreement"] == evaluated["eval/agreement"]
    assert record["loss"] == pytest.approx(evaluated["eval/loss"], rel=1e-6)  # summed in fp32


def test_a_window_without_targets_updates_nothing(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zero gradient would still apply momentum and weight decay."""
    config = make_config(weight_decay=0.1, gradient_accumulation_steps=1)
    trainer = make_trainer(config)
    trainer.micro_batch()
    before = everything(trainer)
    batch = trainer.batches.rows.batch
    monkeypatch.setattr(
        trainer.batches.rows,
        "batch",
        lambda rows: batch(rows)._replace(labels=torch.full_like(batch(rows).labels, -100)),
    )
    none = trainer.batches.rows.num_targets * 0
    monkeypatch.setattr(trainer.batches.rows, "num_targets", none)
    trainer.micro_batch()
    after = everything(trainer)
    for name in before:
        if name.startswith(("model/", "optimizer/", "ema/")):
            assert torch.equal(before[name], after[name]), name
    assert trainer.counters.global_step == 2 and trainer.scheduler.last_epoch == 2
    assert all(p.grad is None for p in trainer.student.parameters())


def test_rows_come_once_per_epoch_of_a_resumed_run(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permutation drawn anew on resumption: 15 of 20 samples were the wrong ones.

    https://github.com/wyim-pgl/transgenic/issues/59
    """
    config = make_config(per_device_train_batch_size=7)
    inputs, used = load_inputs(config), []
    batch = inputs.train_rows.batch

    def record(rows: Any) -> Batch:
        used.extend(rows)
        return batch(rows)

    monkeypatch.setattr(inputs.train_rows, "batch", record)
    trainer = make_trainer(config, inputs)
    per_epoch, total = trainer.run_length.batches_per_epoch, trainer.run_length.micro_batches
    for stop in (per_epoch // 2, per_epoch + 3, total):  # in both epochs
        while trainer.counters.micro_step < stop:
            trainer.micro_batch()
        state, tensors = trainer.capture()
        path = save_checkpoint(config.output_dir, stop, state, tensors, save_total_limit=2)
        trainer = make_trainer(config, inputs)
        trainer.restore(load_checkpoint(path), warn=pytest.fail)
    every_row = list(range(len(inputs.train_rows)))
    first, second = used[: len(every_row)], used[len(every_row) :]
    assert sorted(first) == sorted(second) == every_row
    assert first != second


# Updates that must not happen


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_a_non_finite_gradient_changes_nothing_and_three_stop_the_run(
    make_config: Callable[..., Any], precision: dict[str, bool]
) -> None:
    config = make_config(logging_steps=1, gradient_accumulation_steps=1, **precision)
    trainer = make_trainer(config)
    for _ in range(3):
        trainer.micro_batch()
    before = everything(trainer)
    weight = next(iter(trainer.student.model.parameters()))
    hook = weight.register_hook(lambda grad: grad * float("nan"))
    if config.fp16:
        trainer.precision.scaler.update(0.5)  # an overflow is no fault while the scale is high
    with run_log(config, trainer) as log, pytest.raises(DivergedError) as diverged:
        trainer.train(log, StopSignals())
    hook.remove()
    after = everything(trainer)
    assert diverged.value.exit_code == 90
    for name in before:
        if name.startswith(("model/", "optimizer/", "ema/")):
            assert torch.equal(before[name], after[name]), name
    assert trainer.scheduler.last_epoch == 6
    assert [r["skipped"] for r in read_log(config.output_dir) if r["kind"] == "train"] == [1, 2, 3]
    assert trainer.ema is not None and trainer.ema.num_updates == 3


def test_three_skips_in_a_row_stop_the_run_before_the_next_log_line(
    make_config: Callable[..., Any],
) -> None:
    config = make_config(logging_steps=1000, gradient_accumulation_steps=2, num_train_epochs=9)
    trainer = make_trainer(config)
    weight = next(iter(trainer.student.model.parameters()))
    weight.register_hook(lambda grad: grad * float("nan"))
    with (
        run_log(config, trainer) as log,
        pytest.raises(DivergedError, match=r"got 3 updates in a row .*\(ce \d.*, kd \d"),
    ):
        trainer.train(log, StopSignals())
    assert trainer.counters.global_step == 3
    (record,) = (r for r in read_log(config.output_dir) if r["kind"] == "train")
    assert (record["global_step"], record["skipped"]) == (3, 3)
    assert latest_checkpoint(config.output_dir) is None


def test_a_learning_rate_that_overflows_stops_the_run(make_config: Callable[..., Any]) -> None:
    """A scheduler of the caller's own: the configuration refuses such a rate."""
    config = make_config(gradient_accumulation_steps=1)
    message = "got 3 updates in a row that were not, by their gradient or learning rate"
    with pytest.raises(DivergedError, match=message):
        distill(
            config,
            make_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1e40 if step >= 2 else 1.0
            ),
        )


def test_skips_that_are_heard_of_late_still_stop_the_run(
    make_config: Callable[..., Any],
) -> None:
    """As on a GPU: the run has taken its last step before the verdict on it is there."""

    class Late:
        done = False

        def record(self) -> None: ...

        def query(self) -> bool:
            return Late.done

        def synchronize(self) -> None:
            Late.done = True

    config = make_config(max_steps=3)
    trainer = make_trainer(config)
    trainer.watch = SkipWatch(
        trainer.device,
        make_event=Late,
        make_buffer=lambda: torch.zeros((), dtype=torch.int64),
    )
    weight = next(iter(trainer.student.model.parameters()))
    weight.register_hook(lambda grad: grad * float("nan"))
    with run_log(config, trainer) as log, pytest.raises(DivergedError, match=r"ce \d"):
        trainer.train(log, StopSignals())
    assert trainer.counters.global_step == 3 and trainer.counters.evaluated_at == -1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_evaluation_that_is_no_number_ends_the_run(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The gradient may be finite and the held-out text have a token that training never met."""
    config = make_config(max_steps=1)
    compute = EvalMetrics.compute

    def no_number(self: EvalMetrics, divergence: str | None, **_: Any) -> dict[str, float]:
        metrics = compute(self, divergence)
        return metrics | {"nll": value} if divergence else metrics

    monkeypatch.setattr(EvalMetrics, "compute", no_number)
    message = f"^eval/nll must be finite, got {value} in the evaluation after micro-batch 4: "
    with pytest.raises(DivergedError, match=message) as diverged:
        distill(config)
    assert "\n" not in str(diverged.value)
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["code"]) == ("failed", 90)
    (record,) = (r for r in read_log(config.output_dir) if r["kind"] == "eval")
    assert record["eval/nll"] == value or record["eval/nll"] != record["eval/nll"]


def test_a_student_that_overflows_in_its_compute_dtype_is_told_so_at_the_start(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "large", overflowing_llama(seed=2))
    config = make_config(student=student, max_steps=1)
    message = (
        r"^LlamaForCausalLM must give finite hidden states, got .* in float16, which its finite"
    )
    with pytest.raises(UnfitError, match=message):
        distill(replace(config, fp16=True))


def test_a_teacher_without_a_finite_score_is_refused_at_the_start(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_steps=1)

    def no_number(*_: Any, **__: Any) -> dict[str, float]:
        return {"eval_teacher/nll": float("nan")}

    monkeypatch.setattr("sad.training.teacher_score.evaluate_teacher", no_number)
    with pytest.raises(UnfitError, match=r"^the teacher must have a finite loss") as refusal:
        distill(config)
    assert refusal.value.exit_code == 65


def test_a_student_whose_later_score_is_no_number_is_refused(
    make_config: Callable[..., Any],
) -> None:
    result = distill(make_config(max_steps=1))
    best = tiny_llama(seed=2, tie_word_embeddings=True)
    with torch.no_grad():
        best.model.norm.weight.fill_(float("nan"))
    best.save_pretrained(result.best)
    facts = json.loads((result.best / "sad.json").read_text())
    (result.best / "sad.json").write_text(json.dumps(facts | {"files": {}}))  # not to be noticed
    with pytest.raises(UnfitError, match=r"^the student must have a finite loss .*, got nan; "):
        evaluate_run(result.run_dir)


def test_a_loss_past_float32_is_shown_as_what_it_is(make_config: Callable[..., Any]) -> None:
    """The mean of a window fits where the sum that the log begins with would not."""
    trainer = make_trainer(make_config(use_ema=False))
    mean = torch.tensor(1e37)
    zero = torch.zeros(())
    out = DistillOutput(mean, *[zero] * 7, lse=torch.zeros(1))._replace(num_tokens=torch.tensor(64))
    trainer.meter.add(out, {}, 64)
    assert trainer.meter.losses({})["loss"] == pytest.approx(1e37, rel=1e-6)


def test_an_infinite_part_without_a_weight_is_no_part_of_the_held_out_loss(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_steps=1, ce_weight=1.0, kd_weight=0.0)
    trainer = make_trainer(config)
    compute = EvalMetrics.compute

    def infinite(self: EvalMetrics, divergence: str | None, **_: Any) -> dict[str, float]:
        return compute(self, divergence) | {"kl": float("inf")}

    monkeypatch.setattr(EvalMetrics, "compute", infinite)
    with run_log(config, trainer) as log:
        trainer.evaluate(log)
    metrics = trainer.counters.metrics
    assert metrics["eval/loss"] == metrics["eval/nll"]


@pytest.mark.few(1)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_the_loss_falls(make_config: Callable[..., Any], precision: dict[str, bool]) -> None:
    config = make_config(num_train_epochs=4, gradient_accumulation_steps=1, **precision)
    trainer = make_trainer(config)
    with run_log(config, trainer) as log:
        trainer.train(log, StopSignals())
    losses = [r["loss"] for r in read_log(config.output_dir) if r["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "off", [{"use_ema": False}, {"use_curriculum": False}, {"label_smoothing": 0.0}]
)
def test_features_can_be_switched_off_alone(
    make_config: Callable[..., Any], off: dict[str, Any]
) -> None:
    result = distill(make_config(max_steps=2, **off))
    prefixes = {name.partition("/")[0] for name in result.metrics}
    assert ("eval_ema" in prefixes) == ("use_ema" not in off)


# Disks


def test_one_failed_save_warns_and_two_end_the_run(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At once: the disk of this test is that of a call. In the background: test_saves.py.
    config = make_config(save_steps=1, num_train_epochs=3, async_save=False)
    trainer = make_trainer(config)
    working = files.OPERATIONS
    monkeypatch.setattr(RunDirectory, "export", lambda *_: None)

    def full(fd: int, data: files.Chunk) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    save = Trainer.save
    saves = []

    def failing(self: Trainer, log: RunLog, *, must: bool = False) -> Path | None:
        saves.append(must)
        files.OPERATIONS = replace(working, write=full) if len(saves) in (2, 4, 5) else working
        return save(self, log, must=must)

    monkeypatch.setattr(Trainer, "save", failing)
    monkeypatch.setattr(files, "OPERATIONS", working)
    with run_log(config, trainer) as log, pytest.raises(CheckpointError) as error:
        trainer.train(log, StopSignals())
    assert error.value.exit_code == 74 and len(saves) == 5
    warnings = [r["message"] for r in read_log(config.output_dir) if r["kind"] == "warning"]
    assert len(warnings) == 2 and all("ENOSPC" in text for text in warnings)
    files.OPERATIONS = working
    kept = latest_checkpoint(config.output_dir, report=pytest.fail)
    assert kept is not None and load_checkpoint(kept).micro_step == 11
