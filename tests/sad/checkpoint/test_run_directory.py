"""A run's directory: whose it is, and exports that are whole or absent."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty_disk import tree
from support.tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sad.checkpoint import atomic_files as files
from sad.checkpoint.run_directory import RunDirectory, is_whole_export
from sad.checkpoint.run_lock import LOCK
from sad.checkpoint.store import Checkpoint, save_checkpoint, set_aside
from sad.config.schema import DistillConfig, config_to_dict
from sad.errors import CheckpointError, OutputError, UsageError
from sad.report.log import read_log

TOKENIZER = tiny_tokenizer()


def config_for(run_dir: Path) -> DistillConfig:
    return DistillConfig(student="-", kd_weight=0.0, output_dir=str(run_dir))


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints", "best", "final", "baseline"])
def test_a_directory_with_results_belongs_to_another_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    RunDirectory(tmp_path).write_status("failed", code=2)
    with pytest.raises(UsageError, match="holds another run"):
        RunDirectory(tmp_path).claim(config_for(tmp_path), report=pytest.fail)


@pytest.mark.parametrize("state", [None, "running", "stopped", "finished"])
def test_a_run_that_left_no_results_may_be_begun_again(tmp_path: Path, state: str | None) -> None:
    """Two Ctrl-C while models are loaded; a run that is just starting is known by its lock."""
    run = RunDirectory(tmp_path)
    run.claim(config_for(tmp_path), report=pytest.fail)
    if state:
        run.write_status(state)
    assert run.claim(config_for(tmp_path), report=pytest.fail) is None


def test_files_of_other_kinds_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert RunDirectory(tmp_path).claim(config_for(tmp_path), report=pytest.fail) is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Exports


def model(seed: int) -> PreTrainedModel:
    """Weights of 11 KB, half of what the tokenizer takes."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(
        seed=seed, hidden_size=4, intermediate_size=8, tie_word_embeddings=True, **heads
    )


def export(run: RunDirectory, seed: int) -> None:
    run.export(run.best, model(seed), TOKENIZER, 512, {"metric": "eval/nll"})


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails as on a full disk, in whatever language the writer is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "cut"), [(100, "config"), (2000, "weights"), (15_000, "tokenizer")]
)
def test_a_full_disk_leaves_the_earlier_export_alone(tmp_path: Path, size: int, cut: str) -> None:
    """The configuration is written by Python, the weights and the tokenizer are written by Rust."""
    run = RunDirectory(tmp_path)
    export(run, seed=1)
    with files_of_at_most(size), pytest.raises(OutputError, match="best must be writable"):
        export(run, seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["best"], cut
    saved = AutoModelForCausalLM.from_pretrained(run.best)
    for ours, theirs in zip(model(seed=1).parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Whose files these are


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder but the lock, which comes and goes."""
    return {name: data for name, data in tree(folder).items() if name != LOCK}


def save(run_dir: Path, micro_step: int) -> Path:
    identity = {
        "config": config_to_dict(config_for(run_dir)),
        "versions": {},
        "train_rows": "a",
        "eval_rows": "b",
        "tokenizer": "c",
        "world_size": 1,
        "teacher": None,
    }
    return save_checkpoint(run_dir, micro_step, {"identity": identity}, {}, save_total_limit=9)


def claim(run_dir: Path, **keys: Any) -> Checkpoint | None:
    return RunDirectory(run_dir).claim(replace(config_for(run_dir), **keys), report=print)


FOREIGN = [
    ".tmp-thesis",
    ".tmp-best-12",
    "data.replaced",
    ".replaced-old",
    ".tmp-x-0123456789ABCDEF",
]


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    """Start-up removed every .tmp-* and renamed every *.replaced: with output_dir '.', theirs."""
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    before = contents(tmp_path)
    claim(tmp_path)
    ours = {".sad-run", ".sad-reserve", "config.yaml"}
    assert contents(tmp_path).keys() - ours == before.keys()
    claim(tmp_path, resume_from_checkpoint="auto")  # marked by now
    assert {name: contents(tmp_path)[name] for name in before} == before


def test_names_of_ours_count_only_where_a_run_has_been(tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-best-0123456789abcdef"
    leftover.mkdir()
    claim(tmp_path)
    assert leftover.is_dir()  # not marked then: it might have been anybody's
    claim(tmp_path, resume_from_checkpoint="auto")
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "status.json", "plots"])
@pytest.mark.parametrize("wanted", [None, "auto"])
def test_a_file_of_somebody_else_is_not_written_over(
    tmp_path: Path, name: str, wanted: str | None
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="output_dir must be new"):
        claim(tmp_path, resume_from_checkpoint=wanted)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_run_from_before_there_were_marks_is_known_by_its_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (tmp_path / "config.yaml").write_text("old")
    checkpoint = claim(tmp_path, resume_from_checkpoint="auto")
    assert checkpoint is not None and checkpoint.path == path
    assert (tmp_path / ".sad-run").read_bytes() == b""


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old name of a temporary file could be foretold."""
    precious = tmp_path / "precious"
    precious.write_text("x")
    monkeypatch.setattr("sad.checkpoint.atomic_files.secrets.token_hex", lambda _: "0" * 16)
    (tmp_path / f".tmp-status.json-{'0' * 16}").symlink_to(precious)
    with pytest.raises(OutputError, match="EEXIST"):
        RunDirectory(tmp_path).write_status("running")
    assert precious.read_text() == "x"


def test_a_baseline_belongs_to_its_run(tmp_path: Path) -> None:
    claim(tmp_path)
    baseline = RunDirectory(tmp_path / "baseline")
    config = config_for(baseline.path)
    with (
        pytest.raises(UsageError, match="the baseline of the run"),
        baseline.claimed(config, report=print),
    ):
        pytest.fail("not refused")
    assert not baseline.path.exists()


def test_a_run_that_is_going_on_is_not_joined(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with (
        run.claimed(config_for(tmp_path), report=pytest.fail),
        pytest.raises(UsageError, match=f"process {os.getpid()} on"),
        run.claimed(
            replace(config_for(tmp_path), resume_from_checkpoint="auto"), report=pytest.fail
        ),
    ):
        pytest.fail("not refused")
    assert not (tmp_path / LOCK).exists()


# Where auto goes on


@pytest.mark.parametrize("left", ["damaged", "file", "link", "set aside"])
def test_auto_does_not_start_over_beside_what_it_cannot_use(tmp_path: Path, left: str) -> None:
    claim(tmp_path)
    path = save(tmp_path, 3)
    if left == "damaged":
        (path / "state.json").write_bytes(b"{}")
    elif left == "set aside":
        set_aside([path])
    else:
        shutil.move(path.parent, tmp_path / "moved")
        if left == "file":
            path.parent.write_text("x")
        else:
            path.parent.symlink_to(tmp_path / "moved")
    (tmp_path / ".tmp-best-0123456789abcdef").write_text("half")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="must hold a checkpoint that can be used"):
        claim(tmp_path, resume_from_checkpoint="auto")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder", [False, True])
def test_auto_starts_where_nothing_was_ever_published(tmp_path: Path, folder: bool) -> None:
    claim(tmp_path)
    if folder:
        (tmp_path / "checkpoints").mkdir()
    assert claim(tmp_path, resume_from_checkpoint="auto") is None


# Side files


def spoil(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(b'{"state": "fin\xe9')
    elif how == "a list":
        path.write_text("[1]")
    elif how == "deep":
        path.write_text("[" * 100_000)
    elif how == "odd types":
        path.write_text('{"state": [], "checkpoint": {}, "results": 7, "code": "x"}')
    elif how == "folder":
        path.mkdir()
        (path / "f").write_text("x")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to(path.parent / "elsewhere")


SPOILT = ["empty", "flipped", "a list", "deep", "odd types", "folder", "pipe", "link", "deleted"]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize(
    "name", ["status.json", "run.json", "config.yaml", "log.jsonl", ".sad-run", ".sad-reserve"]
)
def test_spoilt_side_files_keep_no_run_from_going_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    run = RunDirectory(tmp_path)
    claim(tmp_path)
    path = save(tmp_path, 3)
    run.write_status("stopped", checkpoint=path.name)
    run.write_run({"results": []})
    spoil(tmp_path / name, how)
    checkpoint = claim(tmp_path, resume_from_checkpoint="auto")
    assert checkpoint is not None and checkpoint.path == path
    said = capsys.readouterr().out
    unread = how not in ("deleted", "odd types")
    if how in ("folder", "pipe", "link") or (unread and name in ("status.json", "run.json")):
        assert said.count("warning") == 1 and name in said
    run.write_status("running")
    run.write_run(run.read_run() | {"header": []})
    run.write_config(config_for(tmp_path))
    assert run.read_status()["state"] == "running"
    assert not (tmp_path / "elsewhere").exists()
    assert read_log(tmp_path) == []


def test_the_last_status_fits_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(tmp_path)
    run, reserve = RunDirectory(tmp_path), tmp_path / ".sad-reserve"
    assert reserve.stat().st_size >= 4096

    def full(fd: int, data: files.Chunk) -> int:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data)

    monkeypatch.setattr(files, "OPERATIONS", files.FileOperations(write=full))
    run.write_status("failed", code=74, message="no space")
    assert run.read_status()["code"] == 74
    monkeypatch.undo()
    claim(tmp_path, resume_from_checkpoint="auto")
    assert reserve.exists()  # kept anew


# Exports that were damaged


@pytest.mark.parametrize("how", ["flipped", "deleted", "folder", "link", "pipe", "no facts"])
def test_a_damaged_export_is_noticed(tmp_path: Path, how: str) -> None:
    run = RunDirectory(tmp_path)
    run.export(run.best, model(1), TOKENIZER, 512, {"metric": "eval/nll"})
    (run.best / "notes.txt").write_text("a user's own")
    (run.best / "README.md").write_text("a better card")
    assert is_whole_export(run.best)
    weights = run.best / "model.safetensors"
    if how == "flipped":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "no facts":
        (run.best / "sad.json").write_text("{")
    else:
        spoil(weights, how)
    assert not is_whole_export(run.best)
