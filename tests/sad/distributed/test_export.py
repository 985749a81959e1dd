"""``sad export``: the folder that a run writes, from its checkpoints of either schema."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.runs import assert_same_bits, everything, make_trainer
from support.shards import save_shards
from support.tiny import tiny_llama, tiny_run
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sad.checkpoint.run_directory import is_whole_export
from sad.checkpoint.store import latest_checkpoint, load_checkpoint
from sad.cli import main
from sad.config.schema import DistillConfig
from sad.distributed.export import export_checkpoint
from sad.distributed.shards import load_shards
from sad.distributed.world import World, whole_world
from sad.errors import CheckpointError, OutputError, UsageError
from sad.training.run import distill
from sad.training.trainer import Trainer


def configured(folder: Path, **keys: Any) -> DistillConfig:
    cadence: dict[str, Any] = {"max_steps": 2, "eval_steps": 1, "save_steps": 1}
    fixed = {"learning_rate": 1e-2, "ema_decay": 0.5, "max_eval_rows": 2}
    student: Any = tiny_llama(seed=2)
    student.generation_config.repetition_penalty = 1.25  # no export may lose it
    return DistillConfig(**(tiny_run(folder, student) | cadence | fixed | keys))


def newest(run_dir: Path | str) -> Path:
    found = latest_checkpoint(run_dir, report=pytest.fail)
    assert found is not None
    return found


def resharded(path: Path, run_dir: Path) -> Path:
    """The same checkpoint, as two ranks would have written it in the same run's directory."""
    checkpoint = load_checkpoint(path)

    def split(world: World, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.ndim:
            return tensor
        placements = [Replicate(), Shard(0)]
        return distribute_tensor(tensor, world.mesh, placements, src_data_rank=None)

    def on_rank() -> Path:
        with whole_world("cpu", timeout_seconds=60) as world:
            tensors = {
                group: {n: t if group == "rng" else split(world, t) for n, t in named.items()}
                for group, named in checkpoint.tensors.items()
            }
            step = checkpoint.micro_step
            return save_shards(run_dir, step, checkpoint.state, tensors, world, save_total_limit=9)

    return run_ranks(2, on_rank)[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A run, and beside its last checkpoint of one process the same of two."""
    config = configured(tmp_path_factory.mktemp("finished"))
    distill(config)
    return config


def assert_same_folder(found: Path, expected: Path) -> None:
    """All files but words about the student and its record, byte for byte."""
    names = {path.name for path in expected.iterdir()} - {"README.md", "sad.json"}
    assert {path.name for path in found.iterdir()} == names | {"sad.json"}
    assert "model.safetensors" in names or "adapter_model.safetensors" in names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert is_whole_export(found)


@pytest.mark.few(1)
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_the_folder_that_the_run_wrote(
    finished: DistillConfig, tmp_path: Path, ranks: int
) -> None:
    run_dir = shutil.copytree(finished.output_dir, tmp_path / "run")
    path = newest(run_dir)
    if ranks == 2:
        path = resharded(path, run_dir)
        assert load_checkpoint(path).ranks == 2
    out = tmp_path / "new" / "student"
    exported = export_checkpoint(path, out)
    assert (exported.folder, exported.weights, exported.note) == (out, "ema", "")
    assert_same_folder(out, run_dir / "final")
    facts = json.loads((out / "sad.json").read_text())
    del facts["files"]
    assert facts == {
        "checkpoint": "batch-000000002",
        "weights": "ema",
        "micro_step": 2,
        "micro_batch_rows": 2,
    }
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def test_raw_weights_are_those_that_are_trained(finished: DistillConfig, tmp_path: Path) -> None:
    path = newest(finished.output_dir)
    export_checkpoint(path, tmp_path / "raw", weights="raw")
    found, saved = load_file(tmp_path / "raw" / "model.safetensors"), load_checkpoint(path).tensors
    averaged = 0
    for name, tensor in saved["model"].items():
        assert torch.equal(found[name], tensor), name
        averaged += int(not torch.equal(tensor, saved["ema"][name]))
    assert averaged > 5, "the average must be another"


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(
            {"param_dtype": "bfloat16", "bf16": True, "master_weights": True}, id="masters"
        ),
        pytest.param(
            {"use_ema": False, "save_dtype": "bfloat16"}, id="rounded", marks=pytest.mark.slow
        ),
        pytest.param(
            {"metric_for_best_model": "eval/nll", "student_init": "random"},
            id="raw compared",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_whatever_a_run_trains_is_exported_as_it_does(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = configured(tmp_path, **keys)
    result = distill(config)
    export_checkpoint(newest(result.run_dir), tmp_path / "out")
    assert_same_folder(tmp_path / "out", result.final)


@pytest.mark.parametrize("merge", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_are_exported_as_the_run_does(tmp_path: Path, merge: bool) -> None:
    pytest.importorskip("peft")
    section = {"r": 4, "target_modules": "all-linear"}
    config = configured(tmp_path, peft=section, merge_adapters=merge)
    result = distill(config)
    path = newest(result.run_dir)
    export_checkpoint(path, tmp_path / "out")
    assert_same_folder(tmp_path / "out", result.final)

    weights = tmp_path / "student" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="weights under its adapters that the run began with"):
        export_checkpoint(path, tmp_path / "other")


def test_a_run_without_a_best_student_is_exported_with_a_note(tmp_path: Path) -> None:
    config = configured(tmp_path, eval_steps=None)
    with pytest.MonkeyPatch.context() as patch:
        micro_batch = Trainer.micro_batch

        def stopping(self: Trainer) -> bool:
            if self.counters.micro_step == 1:
                raise RuntimeError("stopped")
            return micro_batch(self)

        patch.setattr(Trainer, "micro_batch", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            distill(config)
    assert not Path(config.output_dir, "best").exists()
    path = newest(config.output_dir)
    exported = export_checkpoint(path, tmp_path / "out")
    assert "generation stops at the tokens" in exported.note
    found, saved = load_file(tmp_path / "out" / "model.safetensors"), load_checkpoint(path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in saved["ema"].items())


def test_an_earlier_export_is_replaced_and_nothing_else(
    finished: DistillConfig, tmp_path: Path
) -> None:
    path, out = newest(finished.output_dir), tmp_path / "out"
    out.mkdir()  # an empty folder is nobody's
    export_checkpoint(path, out, weights="raw")
    before = (out / "model.safetensors").read_bytes()
    export_checkpoint(path, out)
    assert (out / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def somebody_elses(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")


def with_a_note(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def changed(out: Path) -> None:
    (out / "config.json").write_text("{}")


def a_link(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("exported", "change"),
    [
        (False, somebody_elses),
        (False, lambda out: out.write_text("mine")),
        (True, with_a_note),
        (True, changed),
        (True, a_link),
    ],
)
def test_what_is_not_ours_is_left_alone(
    finished: DistillConfig, tmp_path: Path, exported: bool, change: Callable[[Path], Any]
) -> None:
    path, out = newest(finished.output_dir), tmp_path / "out"
    if exported:
        export_checkpoint(path, out)
    change(out)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="OUT must be new or a folder that `sad export` wrote"):
        export_checkpoint(path, out, weights="raw")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["best", "final"])
def test_the_runs_own_exports_are_not_replaced(
    finished: DistillConfig, tmp_path: Path, name: str
) -> None:
    run_dir = shutil.copytree(finished.output_dir, tmp_path / "run")
    (run_dir / name / "README.md").unlink()  # then all that is there is named in sad.json
    with pytest.raises(UsageError, match="OUT must be new"):
        export_checkpoint(newest(run_dir), run_dir / name)
    assert is_whole_export(run_dir / name)


# Refusals on the command line: one line, the exit code of the cause


def refused(capsys: Any, *words: str) -> tuple[int, str]:
    code = main(["export", *words])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("sad: error: "), lines
    return code, lines[1]


def test_the_command_says_what_it_wrote(
    finished: DistillConfig, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(newest(finished.output_dir)), str(out), "--weights", "raw"]) == 0
    assert capsys.readouterr().out == f"student  {out} (raw weights)\n"


def test_a_checkpoint_that_is_not_there(
    finished: DistillConfig, tmp_path: Path, capsys: Any
) -> None:
    out = str(tmp_path / "out")
    code, line = refused(capsys, str(tmp_path / "none"), out)
    assert code == UsageError.exit_code and "which does not exist; look under RUN_DIR" in line
    alone = shutil.copytree(newest(finished.output_dir), tmp_path / "a" / "b" / "batch-000000002")
    code, line = refused(capsys, str(alone), out)
    assert code == UsageError.exit_code and "CHECKPOINT must lie in its run's directory" in line
    assert main(["export", "x" * 5000, out]) == UsageError.exit_code
    assert "CHECKPOINT must be a path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint(finished: DistillConfig, tmp_path: Path, capsys: Any) -> None:
    run_dir = shutil.copytree(finished.output_dir, tmp_path / "run")
    file = newest(run_dir) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    code, line = refused(capsys, str(newest_name(run_dir)), str(tmp_path / "out"))
    assert code == CheckpointError.exit_code and "ema.safetensors must have SHA-256" in line
    assert not (tmp_path / "out").exists()


def newest_name(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("batch-*"))


def test_no_average_and_another_student(
    finished: DistillConfig, tmp_path: Path, capsys: Any
) -> None:
    run_dir = shutil.copytree(finished.output_dir, tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    out = str(tmp_path / "out")
    (run_dir / "config.yaml").write_text(config + "\nstudent_init: random\n")
    code, line = refused(capsys, str(newest(run_dir)), out)  # a key twice
    assert code == UsageError.exit_code and "config.yaml" in line
    changed = config.replace("param_dtype: float32", "param_dtype: bfloat16")
    assert changed != config
    (run_dir / "config.yaml").write_text(changed)
    code, line = refused(capsys, str(newest(run_dir)), out)
    assert code == UsageError.exit_code and "config.yaml must describe the student" in line

    plain = distill(configured(tmp_path / "plain", use_ema=False, max_steps=1))
    capsys.readouterr()
    code, line = refused(capsys, str(newest(plain.run_dir)), out, "--weights", "ema")
    assert code == UsageError.exit_code and "checkpoint without an average" in line
    code, line = refused_argument(capsys, str(newest(plain.run_dir)), out, "--weights", "both")
    assert code == UsageError.exit_code and "invalid choice: 'both'" in line


def refused_argument(capsys: Any, *words: str) -> tuple[int, str]:
    """A refusal before the command says that it begins."""
    code = main(["export", *words])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_a_place_that_cannot_be_written(
    finished: DistillConfig, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    code, line = refused(capsys, str(newest(finished.output_dir)), str(tmp_path / "file" / "out"))
    assert code == OutputError.exit_code and "must be writable" in line


def test_the_runs_own_file_cannot_allow_code(
    finished: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = shutil.copytree(finished.output_dir, tmp_path / "run")
    file = run_dir / "config.yaml"
    key = "trust_remote_code_student: "
    file.write_text(file.read_text().replace(f"{key}false", f"{key}true"))
    seen: list[bool] = []

    def trusted(config: DistillConfig, *_: Any) -> Any:
        seen.append(config.trust_remote_code_student)
        raise UsageError("seen")

    monkeypatch.setattr("sad.distributed.export.build_student_model", trusted)
    for trust in (False, True):
        with pytest.raises(UsageError, match="seen"):
            export_checkpoint(newest(run_dir), tmp_path / "out", trust_remote_code_student=trust)
    assert seen == [False, True]


# One process resumes what two have saved


def test_one_process_goes_on_from_two(finished: DistillConfig, tmp_path: Path) -> None:
    """Everything but the generators of the ranks, which are left as they were."""
    config = replace(finished, output_dir=str(tmp_path / "run"))
    first = make_trainer(config)
    first.micro_batch()
    state, tensors = first.capture()
    one = save_shards(tmp_path, 1, state, tensors, World(), save_total_limit=2)
    two = resharded(one, tmp_path / "two")
    second = make_trainer(config)
    second.restore(load_checkpoint(two), warn=pytest.fail)
    found, goal = everything(second), everything(first)
    for part in (found, goal):
        del part["state"]["rng"]
        for name in [name for name in part if name.startswith("rng/")]:
            del part[name]
    assert_same_bits(found, goal)


def test_two_ranks_read_what_one_process_saved(finished: DistillConfig) -> None:
    path = newest(finished.output_dir)
    saved = load_checkpoint(path)

    def on_rank() -> None:
        with whole_world("cpu", timeout_seconds=60) as world:
            found = load_shards(path, world)
            assert found.ranks == 1 and found.state == saved.state
            for group, named in saved.tensors.items():
                assert all(torch.equal(found.tensors[group][n], t) for n, t in named.items())

    run_ranks(2, on_rank)
