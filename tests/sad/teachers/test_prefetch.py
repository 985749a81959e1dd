"""A teacher that works a batch ahead: the same bits, in another thread, of which none is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import assert_same_bits, everything, make_trainer
from support.tiny import tiny_llama, tiny_run

from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.identity import config_hash
from sad.config.schema import DistillConfig
from sad.config.values import ConfigError
from sad.data.batch import Batch, LossCounts
from sad.distributed.world import World
from sad.errors import StoppedError, UnfitError, UsageError
from sad.losses.capture import Capture
from sad.models.memory_plan import plan
from sad.teachers import prefetch as prefetch_module
from sad.teachers.frozen import FrozenTeacher, TeacherOutput
from sad.teachers.prefetch import WORKER, Prefetch
from sad.training import trainer as trainer_module
from sad.training.inputs import RunInputs, load_inputs
from sad.training.ranks import check_ranks
from sad.training.run import distill
from sad.training.student import StudentWithLoss

MakeConfig = Callable[..., DistillConfig]


def working() -> bool:
    """Whether this is the worker."""
    return threading.current_thread().name.startswith(WORKER)


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(WORKER)]


@pytest.fixture
def prefetch() -> Iterator[Prefetch]:
    with Prefetch() as prefetch:
        yield prefetch
    assert not workers()


@pytest.fixture
def teacher() -> FrozenTeacher:
    return FrozenTeacher(tiny_llama().requires_grad_(False), 512, device=torch.device("cpu"))


def a_batch() -> Batch:
    ids = torch.arange(32).view(2, 16) * 7 % 512
    positions, lengths = torch.arange(16).repeat(2, 1), torch.full((2,), 16)
    return Batch(ids, ids, positions, lengths, LossCounts(32, 30, 2), 1)


def test_another_thread_has_the_same_bits_and_no_gradient(
    prefetch: Prefetch, teacher: FrozenTeacher
) -> None:
    seen = []

    def forward() -> TeacherOutput:
        seen.append(working())
        assert torch.is_grad_enabled(), "as a thread begins: the teacher has to turn it off"
        return teacher.forward(a_batch())

    with torch.enable_grad():
        prefetch.begin(1, forward)
    output = prefetch.take(1)
    assert output is not None and seen == [True]
    (ours,), (theirs,) = output.targets, teacher.forward(a_batch()).targets
    assert torch.equal(ours.hidden, theirs.hidden) and not ours.hidden.requires_grad
    assert prefetch.take(1) is None, "it is taken once"


def test_the_worker_has_as_many_threads(
    prefetch: Prefetch, teacher: FrozenTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[bool, int]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if working() else 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: given.append((working(), n)))
    prefetch.begin(1, lambda: teacher.forward(a_batch()))
    prefetch.wait()
    assert given == [(True, 3)]


def test_what_was_not_begun_is_not_given(prefetch: Prefetch, teacher: FrozenTeacher) -> None:
    assert prefetch.take(1) is None
    prefetch.begin((1, {"kd": 0.7}), lambda: teacher.forward(a_batch()))
    assert prefetch.take((1, {"kd": 0.5})) is None
    prefetch.begin(2, lambda: teacher.forward(a_batch()))
    prefetch.forget()
    assert prefetch.take(2) is None


def test_an_error_comes_to_whoever_takes(prefetch: Prefetch, teacher: FrozenTeacher) -> None:
    def fail() -> TeacherOutput:
        raise UnfitError("the teacher fails")

    prefetch.begin(1, fail)
    prefetch.wait()
    with pytest.raises(UnfitError, match="the teacher fails"):
        prefetch.take(1)
    prefetch.begin(2, lambda: teacher.forward(a_batch()))
    assert prefetch.take(2) is not None, "the worker goes on"


def test_without_a_thread_nothing_is_ahead(
    prefetch: Prefetch, teacher: FrozenTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(prefetch_module.ThreadPoolExecutor, "submit", refuse)
    prefetch.begin(1, lambda: teacher.forward(a_batch()))
    assert prefetch.take(1) is None


# In training


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    keys = tiny_run(folder, tiny_llama(seed=2, attention_dropout=0.1))
    return keys | {
        "device": "cpu",
        "per_device_train_batch_size": 4,
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
        settings["teacher_prefetch"] = 1
        return DistillConfig(**settings | keys)

    return make


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each forward pass of a teacher, whether the worker made it, and whether layers were
    captured."""
    made: list[tuple[bool, bool]] = []
    forward = FrozenTeacher.forward

    def counting(
        self: FrozenTeacher, batch: Batch, capture: Capture | None = None
    ) -> TeacherOutput:
        made.append((working(), capture is not None))
        return forward(self, batch, capture)

    monkeypatch.setattr(FrozenTeacher, "forward", counting)
    return made


def trained(config: DistillConfig, inputs: RunInputs, steps: int | None = None) -> dict[str, Any]:
    trainer = make_trainer(config, inputs)
    with trainer.prefetch:
        for _ in range(steps or trainer.run_length.micro_batches):
            trainer.micro_batch()
    return without_identity(everything(trainer))


def without_identity(state: dict[str, Any]) -> dict[str, Any]:
    state["state"].pop("identity")  # in which the key stands
    return state


INNER: dict[str, Any] = {
    "attention": {"weight": 0.1},
    "relations": {"weight": 0.1},
    "layerwise": {"weight": 0.1},
}


@pytest.mark.parametrize("losses", [{}, INNER], ids=["logits", "inner layers"])
def test_training_keeps_every_bit(
    make_config: MakeConfig, passes: list[tuple[bool, bool]], losses: dict[str, Any]
) -> None:
    ahead = make_config(**losses)
    plain = replace(ahead, teacher_prefetch=0)
    inputs = load_inputs(ahead)
    whole = trained(plain, inputs)
    before = passes.copy()
    passes.clear()
    assert_same_bits(trained(ahead, inputs), whole)
    captured = [capture for _, capture in before]
    assert any(captured) == bool(losses) and not any(by_worker for by_worker, _ in before)
    # As many as before: nothing is run for no micro-batch.
    assert passes == [(i > 0, capture) for i, capture in enumerate(captured)]


def test_a_resumed_run_keeps_every_bit(make_config: MakeConfig) -> None:
    """In the middle of a window, with the key and without it."""
    ahead = make_config()
    plain = replace(ahead, teacher_prefetch=0)
    inputs = load_inputs(ahead)
    whole = trained(plain, inputs)
    assert config_hash(ahead) == config_hash(plain)
    first = make_trainer(ahead, inputs)
    with first.prefetch:
        for _ in range(3):
            first.micro_batch()
        state, tensors = first.capture()  # while the fourth is ahead
        path = save_checkpoint(ahead.output_dir, 3, state, tensors, save_total_limit=2)
    for config in (ahead, plain):
        second = make_trainer(config, inputs)
        with second.prefetch:
            second.restore(load_checkpoint(path), warn=pytest.fail)
            for _ in range(3, second.run_length.micro_batches):
                second.micro_batch()
            assert_same_bits(without_identity(everything(second)), whole)
    with first.prefetch:  # back to where it was, with an answer to another position ahead
        first.micro_batch()
        first.restore(load_checkpoint(path), warn=pytest.fail)
        for _ in range(3, first.run_length.micro_batches):
            first.micro_batch()
        assert_same_bits(without_identity(everything(first)), whole)


def test_the_teacher_works_while_the_student_does(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rests when the student's micro-batch is over."""
    student_runs, met, alive = threading.Event(), [], []
    run_teacher, run_student = FrozenTeacher.forward, StudentWithLoss.forward

    def teaching(self: FrozenTeacher, *args: Any) -> TeacherOutput:
        if working():
            met.append(student_runs.wait(60))
            student_runs.clear()
            alive.append(True)
            time.sleep(0.3)  # longer than the student's part
        try:
            return run_teacher(self, *args)
        finally:
            if working():
                alive.pop()

    def learning(self: StudentWithLoss, *args: Any) -> Any:
        student_runs.set()
        return run_student(self, *args)

    monkeypatch.setattr(FrozenTeacher, "forward", teaching)
    monkeypatch.setattr(StudentWithLoss, "forward", learning)
    monkeypatch.setattr(trainer_module, "moves_setting", lambda: False)
    trainer = make_trainer(make_config())
    with trainer.prefetch:
        for _ in range(3):
            trainer.micro_batch()
            assert not alive
    assert met == [True] * 3 and not workers()


def test_where_the_loss_moves_a_setting_the_teacher_comes_first(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting of oneDNN belongs to the process: the teacher's products would be others."""
    monkeypatch.setattr(trainer_module, "moves_setting", lambda: True)
    trainer = make_trainer(make_config())
    run_student, done = StudentWithLoss.forward, []

    def learning(self: StudentWithLoss, *args: Any) -> Any:
        assert trainer.prefetch._ahead is not None
        done.append(trainer.prefetch._ahead.output.done())
        return run_student(self, *args)

    monkeypatch.setattr(StudentWithLoss, "forward", learning)
    with trainer.prefetch:
        for _ in range(3):
            trainer.micro_batch()
    assert done == [True] * 3


def weights(config: DistillConfig) -> dict[str, Any]:
    return load_file(RunDirectory(config.output_dir).final / "model.safetensors")


def test_a_whole_run_that_is_stopped_ends_with_the_same_bits(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stopped = make_config("plain", teacher_prefetch=0), make_config("stopped")
    metrics = distill(plain).metrics
    forward, calls = FrozenTeacher.forward, []

    def stopping(self: FrozenTeacher, *args: Any) -> TeacherOutput:
        if working():
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenTeacher, "forward", stopping)
        with pytest.raises(StoppedError):
            distill(stopped)
    assert len(calls) == 3 and not workers(), "it must neither go on nor stay"
    result = distill(replace(stopped, resume_from_checkpoint="auto"))
    assert not workers()
    assert result.metrics == metrics
    assert_same_bits(weights(stopped), weights(plain))


def test_an_error_of_the_worker_ends_the_run_as_any_other(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    forward, calls = FrozenTeacher.forward, []

    def failing(self: FrozenTeacher, *args: Any) -> TeacherOutput:
        if working():
            calls.append(1)
            if len(calls) == 3:
                raise UnfitError("the teacher must answer, got nothing; choose another")
        return forward(self, *args)

    monkeypatch.setattr(FrozenTeacher, "forward", failing)
    with pytest.raises(UnfitError, match="the teacher must answer"):
        distill(config)
    assert len(calls) == 3 and not workers()
    status = RunDirectory(config.output_dir).read_status()
    assert (status["state"], status["code"]) == ("failed", 65)


# What it costs, and where it cannot be


def test_the_plan_counts_one_batch_more(make_config: MakeConfig) -> None:
    config = make_config(**INNER)
    here, plain = plan(config), plan(replace(config, teacher_prefetch=0))
    label = "teacher's answer to the next micro-batch"
    states = 4 * 32 * 32 * 4  # rows, tokens, width, fp32
    attention, relations, layerwise = 32 + 16, 32 + 2 * 16, 32  # widths of what is captured
    pairs = {name: len(getattr(config, name).layers or ()) for name in ("attention", "relations")}
    captured = (
        4
        * 32
        * 4
        * (
            pairs["attention"] * attention
            + pairs["relations"] * relations
            + config.layerwise.num_pairs * layerwise
        )
    )
    assert dict(here.items)[label] == states + captured
    assert dict(here.items)["teacher activations"] > 0, "the teacher runs beside the student"
    assert label not in dict(plain.items) and here.total > plain.total + states
    kd = make_config(teacher_device="cpu")
    assert dict(plan(kd).items)[label] == states


def test_what_cannot_be_is_one_line(make_config: MakeConfig) -> None:
    for mode in ("student_aware", "knowledge_augmentation"):
        with pytest.raises(ConfigError, match="teacher_prefetch must be 0 unless routing") as one:
            make_config(routing={"mode": mode})
        assert "\n" not in str(one.value)
    with pytest.raises(ConfigError, match="teacher_prefetch must be 0 or 1, got 2"):
        make_config(teacher_prefetch=2)
    with pytest.raises(UsageError, match="teacher_prefetch must be 0 on several processes"):
        check_ranks(make_config(), World(size=2))


def test_a_baseline_without_a_teacher_has_no_thread(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> ThreadPoolExecutor:
        raise AssertionError("a thread was begun")

    monkeypatch.setattr(prefetch_module, "ThreadPoolExecutor", refuse)
    distill(make_config(kd_weight=0.0, max_steps=1))
