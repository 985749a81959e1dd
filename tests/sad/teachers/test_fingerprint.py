"""A teacher's files are told from others, and read again only when they have changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.runs import everything, make_trainer
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import UsageError
from sad.teachers import fingerprint
from sad.teachers.fingerprint import fingerprint_files, fingerprint_model
from sad.training.inputs import load_inputs
from sad.training.trainer import Trainer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed; files count as settled at once."""
    names: list[str] = []
    hashed = fingerprint._hashed

    def noted(path: Path) -> Any:
        names.append(path.name)
        return hashed(path)

    monkeypatch.setattr(fingerprint, "_hashed", noted)
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -1)
    return names


def files_in(folder: Path) -> list[Path]:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 1000)
    return [folder / "a", folder / "b"]


def test_a_file_is_read_again_only_once_it_has_changed(tmp_path: Path, reads: list[str]) -> None:
    files, memory = files_in(tmp_path / "files"), tmp_path / "cache" / "hashes.json"
    first = fingerprint_files(files, memory)
    assert fingerprint_files(files, memory) == first and reads == ["a", "b"]
    assert first[files[0]].startswith("1000 ") and len(first[files[0]].split()[1]) == 32

    before = files[0].stat()
    files[0].write_bytes(b"c" * 1000)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p would leave it
    changed = fingerprint_files(files, memory)
    assert reads == ["a", "b", "a"]
    assert changed[files[0]] != first[files[0]] and changed[files[1]] == first[files[1]]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    memory = tmp_path / "hashes.json"
    fingerprint_files(files_in(tmp_path / "files"), memory)
    assert not memory.exists()


def test_what_is_gone_is_forgotten(tmp_path: Path, reads: list[str]) -> None:
    memory = tmp_path / "hashes.json"
    fingerprint_files(files_in(tmp_path / "old"), memory)
    shutil.rmtree(tmp_path / "old")
    files = files_in(tmp_path / "new")
    fingerprint_files(files, memory)
    assert sorted(json.loads(memory.read_text())) == sorted(map(str, files))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"%s": 1}',
        '{"%s": [1, 2, 3]}',
        '{"%s": ["a", null, 2, 3]}',
        "[" * 100_000,
        b"\xff",
    ],
    ids=range(7),
)
def test_a_damaged_memory_counts_as_absent(
    tmp_path: Path, reads: list[str], content: str | bytes
) -> None:
    files, memory = files_in(tmp_path / "files"), tmp_path / "hashes.json"
    text = content if isinstance(content, bytes) else content.replace("%s", str(files[0])).encode()
    memory.write_bytes(text)
    assert len(fingerprint_files(files, memory)) == 2
    assert len(json.loads(memory.read_text())) == 2


def test_a_memory_that_cannot_be_written_costs_only_time(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    files, memory = files_in(tmp_path / "files"), tmp_path / "cache" / "hashes.json"
    assert len(fingerprint_files(files, memory)) == 2
    memory = tmp_path / "hashes.json"
    memory.mkdir()
    assert len(fingerprint_files(files, memory)) == 2


def test_a_model_is_told_by_what_decides_its_outputs(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", tiny_llama(num_hidden_layers=1))
    (tmp_path / "model" / "training_args.bin").write_text("no weights")
    found = fingerprint_model(str(tmp_path / "model"), commit=None, memory=tmp_path / "x.json")
    assert sorted(found) == ["config.json", "model.safetensors"]
    assert fingerprint_model("a/b", commit="1f", memory=tmp_path / "x.json") == {"commit": "1f"}


# Runs


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=save_tiny(tmp_path / "student", tiny_llama(seed=2, num_hidden_layers=1)),
        teacher=save_tiny(tmp_path / "teacher", tiny_llama(seed=1, num_hidden_layers=1)),
        data={"train": write_texts(tmp_path / "texts", count=8), "eval_fraction": 0.2},  # pyright: ignore
        output_dir=str(tmp_path / "run"),
        max_length=64,
    )


def checkpoint_of(config: DistillConfig, forget: tuple[str, ...] = ()) -> Checkpoint:
    trainer = make_trainer(config)
    trainer.micro_batch()
    state, tensors = trainer.capture()
    identity = {k: v for k, v in state["identity"].items() if k not in forget}
    state |= {"identity": identity}
    return load_checkpoint(
        save_checkpoint(config.output_dir, 1, state, tensors, save_total_limit=2)
    )


def restored(config: DistillConfig, checkpoint: Checkpoint, warn: Callable[[str], Any]) -> Trainer:
    trainer = make_trainer(config)
    trainer.restore(checkpoint, warn)
    return trainer


def test_a_teacher_replaced_under_its_path_is_refused(config: DistillConfig) -> None:
    """It resumed without a word, and other weights taught the rest of the run."""
    checkpoint = checkpoint_of(config)
    restored(config, checkpoint, pytest.fail)
    save_tiny(Path(config.teacher or ""), tiny_llama(seed=7, num_hidden_layers=1))
    trainer = make_trainer(config)
    before = everything(trainer)["state"]
    with pytest.raises(
        UsageError, match=r"got the teacher's model\.safetensors: \d+ \w+.* -> "
    ) as e:
        trainer.restore(checkpoint, pytest.fail)
    assert "\n" not in str(e.value)
    assert everything(trainer)["state"] == before
    said: list[str] = []
    restored(replace(config, allow_config_change=True), checkpoint, said.append)
    assert len(said) == 1 and "the teacher's model.safetensors" in said[0]


def test_a_checkpoint_that_does_not_tell_its_teacher_goes_on_with_a_line(
    config: DistillConfig,
) -> None:
    newer = ("teacher", "train_rows_content", "eval_rows_content")
    checkpoint = checkpoint_of(config, forget=newer)
    said: list[str] = []
    trainer = restored(config, checkpoint, said.append)
    assert trainer.counters.micro_step == 1
    assert len(said) == 1 and said[0].endswith(": not compared")


def test_other_rows_of_the_same_text_are_refused(config: DistillConfig) -> None:
    checkpoint = checkpoint_of(config)
    inputs = load_inputs(config)
    inputs.train_rows.content = "0" * 32
    with pytest.raises(UsageError, match=r"got content of train_rows: \w{12} -> 0{12};"):
        make_trainer(config, inputs).restore(checkpoint, pytest.fail)
