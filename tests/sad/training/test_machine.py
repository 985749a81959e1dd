"""What a machine lacks is refused before anything is loaded, and a person sees a run at work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels import _dispatch
from support.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_run

from sad.checkpoint.run_directory import RunDirectory
from sad.cli import main
from sad.config.schema import DistillConfig, config_to_yaml
from sad.errors import StoppedError, UnfitError, UsageError
from sad.models.preflight import known_positions, require_known_positions
from sad.report.log import read_log
from sad.training import run
from sad.training.inputs import load_inputs
from sad.training.run import distill
from sad.training.trainer import Trainer

Make = Callable[..., DistillConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    def make(**keys: Any) -> DistillConfig:
        defaults: dict[str, Any] = {"max_steps": 2, "max_eval_rows": 2} | tiny_run(tmp_path)
        return DistillConfig(**(defaults | keys))

    return make


# Refused before anything is loaded


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"device": "cuda:7"}, "device must be one that this machine has, got cuda:7"),
    ({"teacher_device": "cuda:7"}, "teacher_device must be one that this machine has, got cuda:7"),
    ({"impl": "triton", "device": "cpu"}, "impl must be auto or torch on this machine, got triton"),
    ({"report_to": ["wandb"]}, "report_to must name installed packages, got 'wandb'"),
]


@pytest.mark.parametrize(("keys", "line"), REFUSED, ids=str)
def test_what_is_not_here_is_refused_before_anything_is_loaded_or_written(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(run, "load_inputs", lambda *_: pytest.fail("loaded before the refusal"))
    config = make_config(**keys)
    with pytest.raises(UsageError, match=line.replace("(", r"\(")) as caught:
        distill(config)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_cannot_meet_say_so_in_one_line_and_there_is_no_run(
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rank: str,
) -> None:
    """A launcher that announces several processes, and not where they meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    config = make_config()
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(config))
    capsys.readouterr()  # of the models that were saved
    assert main(["distill", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if rank == "0" else 0)
    for line in lines:
        assert line.startswith("sad: error: 2 processes (WORLD_SIZE) must find one another, got")
    assert not Path(config.output_dir).exists()
    with pytest.raises(UsageError, match="must find one another"):  # from Python, too
        distill(config)


def test_a_rank_that_no_such_run_has_is_refused_at_once(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {"WORLD_SIZE": "2", "RANK": "2", **place}.items():
        monkeypatch.setenv(name, value)
    config = make_config(ddp_timeout=1)  # within which nobody is met
    with pytest.raises(UsageError, match="RANK must be less than WORLD_SIZE, 2, got 2"):
        distill(config)
    assert not Path(config.output_dir).exists()


def test_one_process_of_a_launcher_is_a_run(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    distill(make_config(max_steps=1))


# Positions


def test_a_teacher_that_never_learned_a_rows_positions_is_refused(
    make_config: Make, tmp_path: Path
) -> None:
    """Computed positions go on for ever: it would run, and teach what it makes of them."""
    short = tiny_llama(seed=1, max_position_embeddings=16)
    config = make_config(teacher=save_tiny(tmp_path / "short", short))
    with pytest.raises(UnfitError) as caught:
        distill(config)
    assert str(caught.value) == (
        "max_length must be at most the 16 positions that the teacher knows "
        "(max_position_embeddings), got a document of 32 in a row; lower it to 16, or choose "
        "another teacher"
    )
    assert load_inputs(replace(config, max_length=16)).teacher is not None


def test_positions_count_within_documents(make_config: Make, tmp_path: Path) -> None:
    """A row may be longer than what the teacher knows if no document in it is."""
    folder = tmp_path / "short texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text("The quick brown fox jumps.")
    short = tiny_llama(seed=1, max_position_embeddings=16)
    config = make_config(
        teacher=save_tiny(tmp_path / "short", short),
        data={"train": str(folder), "eval_fraction": 0.3},
        max_length=64,
    )
    assert 0 < load_inputs(config).train_rows.longest_segment <= 16


def test_scaled_rotary_embeddings_know_more_positions() -> None:
    config = tiny_llama(max_position_embeddings=16).config
    assert known_positions(config) == 16
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    assert known_positions(config) == 64
    require_known_positions(config, 64)
    with pytest.raises(UnfitError, match="the 64 positions"):
        require_known_positions(config, 65)
    config.rope_parameters |= {"original_max_position_embeddings": 4}
    assert known_positions(config) == 16
    assert known_positions(tiny_gpt2(n_positions=8).config) == 8


def test_a_student_that_learns_new_positions_is_told_so(make_config: Make, tmp_path: Path) -> None:
    short = tiny_llama(max_position_embeddings=16)
    result = distill(make_config(student=save_tiny(tmp_path / "short", short), max_steps=1))
    (warning,) = (r["message"] for r in read_log(result.run_dir) if r["kind"] == "warning")
    assert warning.startswith("rows hold documents of 32 positions, and the student knows 16")


# What a person sees


def test_the_first_line_comes_before_the_libraries(make_config: Make, tmp_path: Path) -> None:
    """Within 5 seconds, whatever importing and loading take."""
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(make_config(max_steps=1)))
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'numpy'):\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Block())\n"
        "from sad.cli import main\n"
        f"sys.exit(main(['distill', {str(file)!r}]))\n"
    )
    begin = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert time.perf_counter() - begin < 5
    assert ended.returncode == 130
    config = make_config()
    assert (
        ended.stdout == f"sad distill: {config.student} from {config.teacher} -> {tmp_path}/run\n"
    )


@pytest.mark.slow
def test_every_wait_has_its_line_and_every_phase_its_number(
    make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(baseline=True, feature={"weight": 0.1})
    result = distill(config)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    expected = [
        f"loading the teacher {config.teacher}",
        "reading text",
        "trying every loss on one row",
        "scoring the teacher on 2 held-out rows",
        f"loading the student {config.student}",
        f"run 1 of 2: student, CE only -> {config.output_dir}/baseline",
        f"loading the student {config.student}",
        f"run 2 of 2: student, distilled -> {config.output_dir}",
    ]
    assert [line for line in shown if line in expected] == expected
    names = [row["name"] for row in RunDirectory(result.run_dir).read_run()["results"]]
    assert names == ["teacher", "student, CE only (EMA)", "student, distilled (EMA)"]
    scored = RunDirectory(result.run_dir).read_run()["scored"]
    assert scored["rows"] == 2 and 0 < scored["targets"] <= 64


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """SIGTERM in the micro-batch ``call``, counted over both phases of a run."""
    micro_batch, calls = Trainer.micro_batch, []

    def interrupted(self: Trainer) -> bool:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batch(self)

    monkeypatch.setattr(Trainer, "micro_batch", interrupted)


@pytest.mark.parametrize(
    ("call", "checkpoint"),
    [
        pytest.param(1, "baseline/checkpoints/batch-000000001", id="baseline"),
        pytest.param(3, "batch-000000001", id="student", marks=pytest.mark.slow),
    ],
)
def test_the_status_names_the_checkpoint_of_the_phase_that_was_stopped(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, call: int, checkpoint: str
) -> None:
    config = make_config(baseline=True)
    stop_at(monkeypatch, call)
    with pytest.raises(StoppedError):
        distill(config)
    run_dir = RunDirectory(config.output_dir)
    status = run_dir.read_status()
    assert (status["state"], status["code"], status["checkpoint"]) == ("stopped", 75, checkpoint)
    parent = run_dir.path if "/" in checkpoint else run_dir.path / "checkpoints"
    assert json.loads((parent / checkpoint / "manifest.json").read_text())
    baseline = RunDirectory(run_dir.baseline).read_status()["state"]
    assert baseline == ("stopped" if call == 1 else "finished")

    monkeypatch.undo()
    distill(replace(config, resume_from_checkpoint="auto"))
    status = run_dir.read_status()
    assert (status["state"], status["checkpoint"]) == ("finished", "batch-000000002")


def test_the_device_of_a_model_is_named_by_its_own_key() -> None:
    from sad.environment import resolve_device

    assert resolve_device("cpu", "teacher_device") == torch.device("cpu")
    with pytest.raises(UsageError, match="teacher_device must be one that this"):
        resolve_device("abacus", "teacher_device")
