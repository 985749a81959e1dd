"""A run's directory: whose it is, and exports that are whole or absent."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sad.checkpoint.run_directory import RunDirectory
from sad.config.schema import DistillConfig
from sad.errors import OutputError, UsageError

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
def test_a_configuration_alone_may_be_of_a_run_that_is_just_starting(
    tmp_path: Path, state: str | None
) -> None:
    run = RunDirectory(tmp_path)
    run.claim(config_for(tmp_path), report=pytest.fail)
    if state:
        run.write_status(state)
    with pytest.raises(UsageError, match="holds another run"):
        run.claim(config_for(tmp_path), report=pytest.fail)


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
