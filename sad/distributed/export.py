"""``sad export``: a student as a Hugging Face folder, from a checkpoint of any number of processes.

One process does it, without the run's text and teacher. What the folder holds beside weights
(architecture, generation settings, tokenizer) comes from the run's ``best/`` if there is one that
is whole, and else from the student that the run began with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from sad.checkpoint.atomic_files import is_file, output_errors, probe_writable, read_object
from sad.checkpoint.parts import entry, tensor_group
from sad.checkpoint.run_directory import RunDirectory, is_whole_export
from sad.checkpoint.state import (
    check_tensors,
    form_of,
    frozen_digest,
    load_tensors,
    model_tensors,
    trained_tensors,
)
from sad.checkpoint.store import Checkpoint, load_checkpoint
from sad.config.identity import trajectory_changes
from sad.config.load import load_config
from sad.config.schema import DistillConfig
from sad.data.chat import set_chat_template
from sad.data.tokenizers import load_tokenizer, valid_vocab
from sad.environment import quiet_libraries
from sad.errors import CheckpointError, UsageError, shortened
from sad.expected import anything, checkpoint_errors, mapping, plain, shown
from sad.models.load import build_student_model, export_dtype, load_student

Weights = Literal["ema", "raw"]

_MADE_HERE = "checkpoint"
"""The key by which ``sad.json`` tells a folder of ours, which may be replaced."""

_SHAPING = ("student", "student_init", "student_layers", "param_dtype", "master_weights", "peft.")
"""Keys, or their beginnings, that decide which tensors a student has."""


class Exported(NamedTuple):
    """What was written, and a line about whatever is not as in the run's own exports."""

    folder: Path
    weights: Weights
    note: str = ""


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: Weights | None = None,
    trust_remote_code_student: bool = False,
    trust_remote_code_teacher: bool = False,
) -> Exported:
    """Write the student of a checkpoint to the folder ``out``, completely or not at all.

    The checkpoint lies in its run's directory; of its configuration, ``trust_remote_code_*`` do not
    count. ``weights`` are the average (``ema``) or those that are trained (``raw``), by default the
    ones whose score the run compares. They are rounded and adapters are merged as in the run's own
    exports. A folder that an earlier call wrote is replaced.

    Raises ``UsageError`` for an ``out`` that is anything else, a checkpoint that is not there or
    outside of a run, and an average that the run does not have; ``CheckpointError`` for one that
    cannot be used, ``OutputError`` where ``out`` cannot be written, and whatever loading the
    student and its tokenizer raises.
    """
    out, path = Path(out), Path(checkpoint)
    _require_replaceable(out)
    run = _run_of(path)
    config = _configuration(run, trust_remote_code_student, trust_remote_code_teacher)
    loaded = load_checkpoint(path)
    _require_same_student(loaded, config)
    chosen = weights or _compared(config)
    if chosen == "ema" and not tensor_group(loaded, "ema"):
        raise UsageError(
            f"--weights must be raw for a checkpoint without an average, got ema for {path}; leave "
            "it out, or export from a run with use_ema"
        )
    with output_errors(out):
        probe_writable(out.absolute().parent)
    has_best = is_whole_export(run.best)
    source = _with_best(config, run.best) if has_best else config
    model, tokenizer = _model(source, loaded), _tokenizer(source)
    if not has_best:
        set_chat_template(tokenizer, config.data)
    _load_weights(model, loaded, chosen)
    run.export(
        out.absolute(),
        model,
        tokenizer,
        valid_vocab(tokenizer),
        {
            _MADE_HERE: path.absolute().name,
            "weights": chosen,
            "micro_step": loaded.micro_step,
            "micro_batch_rows": config.per_device_train_batch_size,
        },
        export_dtype(source),
        merge_adapters=config.merge_adapters,
    )
    note = (
        f"{run.best} is not there or not whole: generation stops at the tokens at which the "
        "student stopped before it was trained"
    )
    return Exported(out, chosen, "" if has_best else note)


def _require_replaceable(out: Path) -> None:
    """Refuse a path where there is anything that this command has not written."""
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink():
        names = {path.name for path in out.iterdir()}
        facts = read_object(out / "sad.json") or {}
        known = {*facts.get("files", ()), "sad.json"} if is_whole_export(out) else set()
        if not names or (_MADE_HERE in facts and names <= known):
            return
    raise UsageError(
        f"OUT must be new or a folder that `sad export` wrote, got {out}, which holds something "
        "else; name another folder"
    )


def _run_of(path: Path) -> RunDirectory:
    """The run that a checkpoint belongs to, set aside or not."""
    if not path.is_dir():
        raise UsageError(
            f"CHECKPOINT must be the directory of a checkpoint, got {path}, "
            f"{'a file' if path.exists() else 'which does not exist'}; look under "
            "RUN_DIR/checkpoints"
        )
    for parent in list(path.absolute().parents)[1:3]:
        if is_file(parent / "config.yaml"):
            return RunDirectory(parent)
    raise UsageError(
        f"CHECKPOINT must lie in its run's directory, RUN_DIR/checkpoints/batch-..., got {path} "
        "without a config.yaml above it; copy it there"
    )


def _configuration(run: RunDirectory, trust_student: bool, trust_teacher: bool) -> DistillConfig:
    return replace(
        load_config(run.path / "config.yaml"),
        output_dir=str(run.path),  # it may have been moved
        device="cpu",
        gradient_checkpointing=False,
        attn_implementation=None,  # no exported file names it
        trust_remote_code_student=trust_student,
        trust_remote_code_teacher=trust_teacher,
    )


def _require_same_student(checkpoint: Checkpoint, config: DistillConfig) -> None:
    """Refuse a configuration under which the checkpoint's student is another model."""
    identity = entry(checkpoint, "identity", mapping(anything))
    with checkpoint_errors():
        mapping(plain)(identity.get("config"), "identity.config")
    for key, before, after in trajectory_changes(identity["config"], config):
        if key.startswith(_SHAPING):
            raise UsageError(
                f"config.yaml must describe the student of {checkpoint.path.name}, got {key}: "
                f"{shown(before)} in the checkpoint and {shown(after)} in the file; restore it"
            )


def _compared(config: DistillConfig) -> Weights:
    """The weights whose score decides which student is the best one."""
    if not config.use_ema:
        return "raw"
    metric = config.metric_for_best_model
    return "ema" if metric is None or metric.startswith("eval_ema/") else "raw"


def _with_best(config: DistillConfig, best: Path) -> DistillConfig:
    """The configuration with the run's own export as tokenizer and, if it is one, as student."""
    config = replace(config, tokenizer=str(best))
    if config.peft.enabled:  # the weights under adapters are those of the student
        return config
    whole: dict[str, Any] = {"student_init": "pretrained", "student_layers": None}
    return replace(config, student=str(best), **whole)


def _tokenizer(config: DistillConfig) -> PreTrainedTokenizerFast:
    of_layers = config.student_init == "layers"
    trust = config.trust_remote_code_teacher if of_layers else config.trust_remote_code_student
    return load_tokenizer(config.tokenizer or config.student, trust)


def _model(config: DistillConfig, checkpoint: Checkpoint) -> PreTrainedModel:
    """The student's architecture, with the weights that checkpoints leave out."""
    if config.peft.enabled:
        model = load_student(config)
        saved = entry(checkpoint, "frozen")
        if saved != frozen_digest(model):
            raise CheckpointError(
                f"the student {config.student} must have the weights under its adapters that the "
                f"run began with, got others; give {checkpoint.path.name} back the model it had"
            )
        return model
    model = build_student_model(config)
    if config.student_init == "pretrained":
        _take_generation_settings(model, config.student)
    return model


def _take_generation_settings(model: PreTrainedModel, name: str) -> None:
    """Those that came with a model, as loading it does; it may have come without."""
    try:
        with quiet_libraries():
            model.generation_config = GenerationConfig.from_pretrained(name)
    except (OSError, ValueError):
        pass


@torch.no_grad()
def _load_weights(model: PreTrainedModel, checkpoint: Checkpoint, weights: Weights) -> None:
    """Copy the saved weights into ``model``; averaged ones are rounded to its dtype."""
    live = trained_tensors(model) if "frozen" in checkpoint.state else model_tensors(model)
    load_tensors(live, tensor_group(checkpoint, "model"), "model")
    if weights == "raw":
        return
    average = tensor_group(checkpoint, "ema")
    averaged = {name: tensor for name, tensor in live.items() if name in average}
    check_tensors(_as_saved(averaged, average), average, "average")
    for name, tensor in averaged.items():
        tensor.copy_(average[name])


def _as_saved(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Placeholders with the shapes of ``live`` and the dtypes of ``saved``."""
    return {
        name: torch.empty(tensor.shape, dtype=form_of(saved, name).dtype, device="meta")
        for name, tensor in live.items()
    }


def describe(exported: Exported) -> str:
    """A line for whoever waits."""
    kind = "averaged" if exported.weights == "ema" else "raw"
    return f"student  {shortened(str(exported.folder), 200)} ({kind} weights)"
