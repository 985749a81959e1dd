"""A stop signal outside of a micro-batch: answered between two steps, and nothing is lost.

The signal is sent from within the work that it interrupts, so that every test finds the same
moment. What counts is that the work does not go on, and that the next start ends as if nothing had
happened.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.faulty_disk import tree
from support.tiny import tiny_llama, tiny_run

from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.store import load_checkpoint, load_latest
from sad.config.schema import DistillConfig
from sad.data import packing, split
from sad.environment import StopSignals, stop_if_requested
from sad.errors import StoppedError
from sad.report.log import read_log
from sad.teachers.frozen import FrozenTeacher
from sad.training import run as run_module
from sad.training.run import distill
from sad.training.student import StudentWithLoss
from sad.training.trainer import Trainer

MakeConfig = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return tiny_run(folder, tiny_llama(seed=2, attention_dropout=0.1)) | {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "max_eval_rows": 4,
        "eval_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> MakeConfig:
    def make(name: str = "run", **keys: Any) -> DistillConfig:
        data = sources["data"] | {"cache_dir": str(tmp_path / "cache")}
        settings: dict[str, Any] = sources | {"output_dir": str(tmp_path / name), "data": data}
        return DistillConfig(**settings | keys)

    return make


def send_after(
    monkeypatch: pytest.MonkeyPatch,
    holder: Any,
    name: str,
    when: Callable[[Any], bool] = lambda self: True,
) -> list[int]:
    """Send SIGTERM once, in the first call of ``holder.name`` for which ``when`` holds.

    Returns a list that grows by one with every such call.
    """
    calls: list[int] = []
    function = getattr(holder, name)

    def sending(self: Any, *args: Any, **options: Any) -> Any:
        if when(self):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return function(self, *args, **options)

    monkeypatch.setattr(holder, name, sending)
    return calls


def test_without_a_signal_nothing_is_raised() -> None:
    stop_if_requested("anything")
    with StopSignals() as signals:
        stop_if_requested("anything")
        signals.requested = "SIGTERM"
        with pytest.raises(StoppedError, match="counting must be finished, got SIGTERM"):
            stop_if_requested("counting")
        with StopSignals():
            stop_if_requested("anything")
        with pytest.raises(StoppedError):
            stop_if_requested("anything")
    stop_if_requested("anything")


BEFORE_TRAINING = {
    "reading": (split._TextDigest, "add", "reading the text"),
    "packing": (packing.TokenStream, "add", "packing the text"),
    "scoring": (FrozenTeacher, "forward", "scoring the teacher"),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("phase", BEFORE_TRAINING)
def test_before_training_the_same_command_begins_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    config = make_config(max_steps=1)
    holder, name, doing = BEFORE_TRAINING[phase]
    with monkeypatch.context() as patch:
        calls = send_after(patch, holder, name)
        with pytest.raises(StoppedError, match=f"{doing} must be finished, got SIGTERM") as stopped:
            distill(config)
    assert len(calls) == 1, "it must not go on after the signal"
    assert stopped.value.exit_code == 75 and "\n" not in str(stopped.value)
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["code"], status["checkpoint"]) == ("stopped", 75, None)
    left = [path.name for path in (tmp_path / "cache").glob(".tmp-*")]
    assert left == [], "unfinished rows must go"
    if phase == "packing":  # either command will do
        config = replace(config, resume_from_checkpoint="auto")
    distill(config)
    assert RunDirectory(config.output_dir).read_status()["state"] == "finished"


def test_a_hash_of_packed_rows_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_bytes(bytes(100))
    monkeypatch.setattr(packing, "_HASH_BYTES", 10)
    whole = packing._file_digest(tmp_path / "tokens")
    assert len(whole) == 32
    with StopSignals() as signals:
        signals.requested = "SIGINT"
        with pytest.raises(StoppedError):
            packing._file_digest(tmp_path / "tokens")


def facts(config: DistillConfig) -> dict[str, Any]:
    """What a run leaves behind: every bit of its state and of its students, and its evaluations."""
    checkpoint = load_latest(config.output_dir, report=pytest.fail)
    assert checkpoint is not None
    saved = load_checkpoint(checkpoint.path)
    found: dict[str, Any] = {
        f"{group}/{name}": tensor.tolist()
        for group, named in saved.tensors.items()
        for name, tensor in named.items()
    }
    run = Path(config.output_dir)
    students = {name: tree(run / name) for name in ("best", "final")}
    for files in students.values():
        files.pop("README.md")  # names the run's directory
    evaluations = [
        {key: value for key, value in record.items() if key not in ("time", "attempt")}
        for record in read_log(config.output_dir)
        if record["kind"] == "eval"
    ]
    state = {key: value for key, value in saved.state.items() if key != "identity"}
    return found | students | {"evaluations": evaluations, "state": state}


@pytest.fixture
def expected(make_config: MakeConfig) -> dict[str, Any]:
    config = make_config("whole")
    distill(config)
    return facts(config)


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_is_done_by_the_resumed_run(
    make_config: MakeConfig, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time in another: the first, one in the middle, the last; half under averaged weights."""
    config = make_config()
    forward, sent = StudentWithLoss.forward, []
    for scored in (1, 10, 12):
        calls: list[int] = []

        def sending(
            self: StudentWithLoss, *args: Any, calls: Any = calls, at: int = scored, **options: Any
        ) -> Any:
            if not self.training:
                calls.append(1)
                if len(calls) == at:
                    os.kill(os.getpid(), signal.SIGTERM)
            return forward(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(StudentWithLoss, "forward", sending)
            with pytest.raises(StoppedError, match="the state is saved in"):
                distill(replace(config, resume_from_checkpoint="auto"))
        assert len(calls) <= scored + 1, "the batch in hand is scored under both weights, no other"
        sent.append(RunDirectory(config.output_dir).read_status()["checkpoint"])
    assert sent == sorted(set(sent)) and len(sent) == 3
    distill(replace(config, resume_from_checkpoint="auto"))
    assert facts(config) == expected


@pytest.mark.slow
@pytest.mark.parametrize("target", ["best", "final"])
def test_an_export_that_is_stopped_is_made_by_the_resumed_run(
    make_config: MakeConfig,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    """``best/`` keeps the student that it had, and the best value is still that of this one."""
    config = make_config()
    run = Path(config.output_dir)
    export, exports = RunDirectory.export, []

    def sending(self: RunDirectory, to: Path, model: Any, *args: Any, **options: Any) -> None:
        exports.append(to.name)
        if to.name == target and exports.count(target) == (2 if target == "best" else 1):
            exported = type(model).save_pretrained

            def save(this: Any, *words: Any, **keys: Any) -> None:
                exported(this, *words, **keys)
                os.kill(os.getpid(), signal.SIGTERM)

            with monkeypatch.context() as inner:
                inner.setattr(type(model), "save_pretrained", save)
                export(self, to, model, *args, **options)
        else:
            export(self, to, model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "export", sending)
        with pytest.raises(StoppedError) as stopped:
            distill(config)
    assert stopped.value.exit_code == 75
    assert not list(run.glob(".tmp-*")) and not (run / "final").exists()
    newest = load_latest(run, report=pytest.fail)
    assert newest is not None
    if target == "best":
        assert exports == ["best", "best"]
        counters = newest.state["counters"]
        assert counters["best_micro_step"] == 2 and counters["micro_step"] == 4
    distill(replace(config, resume_from_checkpoint="auto"))
    assert facts(config) == expected


def test_the_state_is_as_if_the_evaluation_had_not_begun(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_steps=1)
    trainers: list[Trainer] = []
    evaluate = Trainer.evaluate

    def stopped_late(self: Trainer, log: Any) -> None:
        trainers.append(self)
        evaluate(self, log)
        raise StoppedError("in the export of the best student")

    monkeypatch.setattr(Trainer, "evaluate", stopped_late)
    with pytest.raises(StoppedError, match="the state is saved in"):
        distill(config)
    counters = trainers[0].counters
    assert counters.evaluated_at == -1 and counters.metrics == {}
    assert counters.best_micro_step == -1 and counters.micro_step == 2


# Two signals


def die_of_two_signals(config: DistillConfig, holder: Any, name: str) -> int:
    """Fork a process that presses Ctrl-C twice in ``holder.name``; return its exit code."""

    def interrupted(*args: Any, **options: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with warnings.catch_warnings():  # of a fork beside threads: the child starts no work of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        setattr(holder, name, interrupted)
        try:
            distill(config)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize(
    "baseline",
    [
        pytest.param(False, id="alone"),
        pytest.param(True, id="baseline", marks=pytest.mark.slow),
    ],
)
def test_two_signals_while_loading_leave_no_directory_that_is_refused(
    make_config: MakeConfig, baseline: bool
) -> None:
    config = make_config(max_steps=1, baseline=baseline, eval_steps=None)
    name = "load_student" if baseline else "load_inputs"
    assert die_of_two_signals(config, run_module, name) == 128 + signal.SIGINT
    assert (Path(config.output_dir) / "config.yaml").exists()
    assert Path(config.output_dir, "baseline").exists() == baseline
    distill(config)
    assert RunDirectory(config.output_dir).read_status()["state"] == "finished"
