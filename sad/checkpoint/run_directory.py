"""The directory of a run: its paths, who may write to it, its status and its exported models.

::

    RUN_DIR/  config.yaml  run.json  status.json  log.jsonl  report.html  plots/  best/  final/
      checkpoints/batch-000012345/        (see ``sad.checkpoint``)
      baseline/                           a run directory of its own, with ``baseline: true``
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sad.checkpoint.atomic_files import (
    is_file,
    make_directories,
    output_errors,
    probe_writable,
    publish_directory,
    read_object,
    remove_file,
    sha256,
    temporary,
    write_atomic,
    write_file,
)
from sad.checkpoint.parts import entry
from sad.checkpoint.run_lock import run_lock
from sad.checkpoint.store import (
    SET_ASIDE,
    Checkpoint,
    checkpoints_of,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    sweep_stale,
)
from sad.config.identity import require_same_config
from sad.config.schema import DistillConfig, config_to_yaml
from sad.environment import quiet_libraries, stop_if_requested
from sad.errors import CheckpointError, OutputError, UnfitError, UsageError, with_type
from sad.models.adapters import has_adapters, merged_weights
from sad.models.heads import output_embedding

MARK = ".sad-run"
"""An empty file that a run leaves first: what has the trainer's names here is the trainer's."""

RESERVE = ".sad-reserve"
"""Space kept for the last ``status.json`` on a disk that has filled up."""

RESERVE_BYTES = 64 << 10

RESULTS = ("log.jsonl", "checkpoints", "best", "final")
RECORDS = ("status.json", "run.json")
SIDE_FILES = (*RECORDS, "log.jsonl", "config.yaml", "report.html")

EXPORTING = "exporting the student"
"""What a stop signal interrupts: the resumed run exports it."""


class RunDirectory:
    """Paths of one run, and the files in it that are replaced as a whole."""

    def __init__(self, path: str | Path, *, world_size: int = 1) -> None:
        self.path = Path(path)
        self.world_size = world_size
        self.best = self.path / "best"
        self.final = self.path / "final"
        self.baseline = self.path / "baseline"

    @property
    def baseline_run(self) -> RunDirectory:
        """The directory of the run without a teacher."""
        return RunDirectory(self.baseline, world_size=self.world_size)

    @property
    def used(self) -> bool:
        """Whether it holds results, or in a directory that no run has marked anything of a run's
        name. A run that ended before it trained, in whatever way, has left none."""
        names = {*RESULTS}
        if not is_file(self.path / MARK):
            names |= {*SIDE_FILES, "plots", "baseline"}
        if any(os.path.lexists(self.path / name) for name in names):
            return True
        return self.baseline.exists() and RunDirectory(self.baseline).used

    @contextmanager
    def claimed(
        self, config: DistillConfig, report: Callable[[str], None]
    ) -> Iterator[Checkpoint | None]:
        """``claim`` it as the only process that may, until the end of the block.

        Raises what ``claim`` raises, and ``UsageError`` while another process has the directory.
        """
        parent = self.path.absolute().parent
        if self.path.name == self.baseline.name and is_file(parent / MARK):
            raise UsageError(
                f"output_dir must be a run of its own, got {self.path}, the baseline of the run in "
                f"{parent}; resume that run, or choose another --output_dir"
            )
        self._require_wanted(config.resume_from_checkpoint)  # before the directory is made
        with output_errors(self.path):
            make_directories(self.path)
        with run_lock(self.path, report):
            yield self.claim(config, report)

    def claim(self, config: DistillConfig, report: Callable[[str], None]) -> Checkpoint | None:
        """Claim the directory for this run; return the checkpoint to resume from, if any.

        A new run's configuration is written; that of a resumed one with ``write_config``, once it
        is known that it can go on. Files of ours that cannot be read count as absent; ``report``
        hears of them.

        Raises ``UsageError`` for a directory that holds a run nobody asked to resume or files of
        somebody else, for a checkpoint that is not there or of another configuration,
        ``CheckpointError`` where there are checkpoints and none can be used, and ``OutputError``
        for a directory that cannot be written. A run that is refused here leaves what is there
        alone.
        """
        wanted = config.resume_from_checkpoint
        self._require_wanted(wanted)
        probe_writable(self.path)
        # Ours is what a run has marked, or a run's from before there were marks.
        ours = is_file(self.path / MARK) or bool(latest_checkpoint(self.path, report=_silent))
        if ours:
            sweep_stale(self.path, remove=False)
        checkpoint = self._checkpoint(wanted, report)
        if not ours and self.used:
            raise UsageError(
                f"output_dir must be new or the directory of a run, got {self.path}, which holds "
                "other files of these names; choose another --output_dir"
            )
        if checkpoint is not None:
            require_same_config(entry(checkpoint, "identity"), config, self.world_size)
        if ours:
            sweep_stale(self.path)
        self._make_way(report)
        with output_errors(self.path):
            if not is_file(self.path / MARK):
                write_file(self.path / MARK, [])
            if not is_file(self.path / RESERVE):
                write_file(self.path / RESERVE, [os.urandom(RESERVE_BYTES)])
        if checkpoint is None:
            self.write_config(config)
        return checkpoint

    def _require_wanted(self, wanted: str | None) -> None:
        if self.used and wanted is None:
            raise UsageError(
                f"output_dir must be new, got {self.path}, which holds another run; choose another "
                "--output_dir, or continue that run with --resume_from_checkpoint auto"
            )

    def write_config(self, config: DistillConfig) -> None:
        write_atomic(self.path / "config.yaml", config_to_yaml(config))

    def _checkpoint(self, wanted: str | None, report: Callable[[str], None]) -> Checkpoint | None:
        if wanted is None:
            return None
        if wanted == "auto":
            return self._latest(report)
        path = Path(wanted)
        if not path.is_dir():
            raise UsageError(
                f"resume_from_checkpoint must be 'auto' or a checkpoint's directory, got {wanted}, "
                "which does not exist; look under RUN_DIR/checkpoints"
            )
        return load_checkpoint(path)

    def _latest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest usable checkpoint; None where none was ever published."""
        folder = self.path / "checkpoints"
        with output_errors(folder, CheckpointError):
            checkpoint = load_latest(self.path, report)
            if checkpoint is not None:
                return checkpoint
            if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
                found = "something that is no folder"
            else:
                left = checkpoints_of(self.path)
                aside = list((folder / SET_ASIDE).glob("*")) if folder.is_dir() else []
                found = f"{len(left)} and {len(aside)} set aside" if left or aside else ""
        if not found:
            return None
        raise CheckpointError(
            f"{folder} must hold a checkpoint that can be used, got {found}; restore one, or name "
            "one with --resume_from_checkpoint; to start over, choose another --output_dir"
        )

    def _make_way(self, report: Callable[[str], None]) -> None:
        """Say which files of ours cannot be read; one that is no file at all makes way."""
        for name in (*SIDE_FILES, MARK, RESERVE):
            path = self.path / name
            if os.path.lexists(path) and not is_file(path):
                aside = path.with_name(f"{name}.not-a-file-{secrets.token_hex(4)}")
                with output_errors(path):
                    os.rename(path, aside)
                report(f"warning: {path} must be an ordinary file; it is now {aside.name}")
            elif name in RECORDS and path.exists() and read_object(path) is None:
                report(f"warning: {path} cannot be read and counts as absent")

    def write_status(
        self, state: str, *, code: int = 0, message: str = "", checkpoint: str | None = None
    ) -> None:
        """Say how the run stands. ``state`` is running, finished, stopped or failed.

        ``checkpoint`` names the newest one, "" none; without it the one that was last named stays.
        """
        if checkpoint is None:
            checkpoint = self.read_status().get("checkpoint")
        record = {"state": state, "code": code, "message": message}
        record["checkpoint"] = checkpoint or None
        self._write_record("status.json", record)

    def _write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write a record, and try once more: a full disk must not have the last word."""
        text = json.dumps(record, indent=2) + "\n"
        try:
            write_atomic(self.path / name, text)
        except OutputError:
            with suppress(OSError):
                remove_file(self.path / RESERVE)
            write_atomic(self.path / name, text)

    def read_status(self) -> dict[str, Any]:
        """What ``write_status`` wrote; empty if there is none that can be read."""
        status = read_object(self.path / "status.json") or {}
        named = status.get("checkpoint")
        return status if named is None or isinstance(named, str) else status | {"checkpoint": None}

    def write_run(self, record: dict[str, Any]) -> None:
        self._write_record("run.json", record)

    def read_run(self) -> dict[str, Any]:
        """What ``write_run`` wrote; empty if there is none that can be read."""
        return read_object(self.path / "run.json") or {}

    def export(
        self,
        target: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        valid_vocab: int,
        facts: dict[str, Any],
        dtype: torch.dtype | None = None,
        *,
        merge_adapters: bool = False,
        card: str = "",
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """Export the weights that ``model`` holds right now, or those in ``state``, completely or
        not at all.

        They are rounded to ``dtype``, by default not at all. A student with adapters leaves these
        alone, as they are and in PEFT's form, unless ``merge_adapters``. The model's own generation
        settings are exported as they are, but for ids past ``valid_vocab``: these were never
        trained, so generation is told to suppress them, too. ``facts`` (metric, value, kind of
        weights, position) become ``sad.json``, with the SHA-256 of the files beside it;
        ``card`` the ``README.md``.
        """
        stop_if_requested(EXPORTING)
        tmp = temporary(target)
        width = output_embedding(model).weight.shape[0]
        generation = _generation_settings(model, range(valid_vocab, width))
        dtype = dtype or model.dtype
        alone = has_adapters(model) and not merge_adapters
        rounds = dtype != model.dtype and not alone
        try:
            with (
                quiet_libraries(),
                _rust_disk_errors(),
                _plain_configuration(model),
                merged_weights(model) if merge_adapters else nullcontext(state) as whole,
            ):
                if rounds:
                    whole = _rounded_state(model, whole or model.state_dict(), dtype)
                model.save_pretrained(tmp, state_dict=whole)
                stop_if_requested(EXPORTING)
                tokenizer.save_pretrained(tmp)
            if generation is not None:
                # Not by save_pretrained, which refuses settings that other versions of
                # transformers wrote, such as a temperature without do_sample.
                generation.to_json_file(tmp / "generation_config.json")
            if rounds:
                _declare_dtype(tmp / "config.json", dtype)
            if card:
                (tmp / "README.md").write_text(card, encoding="utf-8")
            facts = facts | {"files": _hashes(tmp)}
            (tmp / "sad.json").write_text(json.dumps(facts, indent=2) + "\n")
            stop_if_requested(EXPORTING)
            publish_directory(tmp, target)
        except OSError as error:
            raise OutputError(
                f"{target} must be writable, got {error}; free space or choose another --output_dir"
            ) from error
        finally:
            shutil.rmtree(tmp, ignore_errors=True)

    def require_exportable(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Write all of an export but the weights, and remove it again.

        Raises ``UnfitError`` for a model or tokenizer that cannot be saved: found out at the first
        export, that would cost a whole training.
        """
        tmp = temporary(self.path / "export")
        try:
            with quiet_libraries(), _rust_disk_errors(), _plain_configuration(model):
                model.config.save_pretrained(tmp)
                tokenizer.save_pretrained(tmp)
        except OSError as error:
            raise OutputError(
                f"{self.path} must be writable, got {error}; free space or choose another "
                "--output_dir"
            ) from error
        except Exception as error:  # a family's own code may raise anything
            raise UnfitError(
                f"student must be a model that can be saved again, got {with_type(error)}; correct "
                "its configuration or its tokenizer"
            ) from error
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def is_whole_export(folder: Path) -> bool:
    """Whether an exported student has the files, and the bytes, that ``sad.json`` names.

    One of an earlier version, which names none, counts as whole.
    """
    facts = read_object(folder / "sad.json")
    if facts is None:
        return False
    hashes = facts.get("files", {})
    return isinstance(hashes, dict) and all(
        name == Path(name).name and is_file(folder / name) and sha256(folder / name) == digest
        for name, digest in hashes.items()
    )


def _hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file that makes an exported student: all but words about it."""
    paths = [p for p in sorted(folder.iterdir()) if is_file(p)]
    return {p.name: sha256(p) for p in paths if p.name not in ("sad.json", "README.md")}


def _generation_settings(model: PreTrainedModel, untrained: range) -> GenerationConfig | None:
    """A copy of the model's generation settings that also suppresses the ids ``untrained``."""
    own = getattr(model, "generation_config", None)
    if own is None or not model.can_generate():
        return None
    settings = copy.deepcopy(own)
    suppressed = {*(settings.suppress_tokens or ()), *untrained}
    settings.suppress_tokens = sorted(suppressed) or None
    settings._from_model_config = False  # else the next save derives them anew, without these ids
    return settings


@contextmanager
def _plain_configuration(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model may cache and has no generation settings that could be refused."""
    use_cache, generation = model.config.use_cache, getattr(model, "generation_config", None)
    model.config.use_cache = True
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        if generation is not None:
            model.generation_config = generation


def _rounded_state(
    model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A model's tensors on the CPU, floats rounded to ``dtype``; tied ones stay one tensor.

    What its family keeps in fp32, such as the biases of a selection of experts, keeps every bit.
    """
    rounded: dict[tuple[int, torch.Size], Tensor] = {}
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}

    def round_once(name: str, tensor: Tensor) -> Tensor:
        stop_if_requested(EXPORTING)
        key = tensor.data_ptr(), tensor.shape
        if key not in rounded:
            keeps = not tensor.dtype.is_floating_point or any(part in name for part in kept)
            rounded[key] = tensor.detach().to("cpu", tensor.dtype if keeps else dtype)
        return rounded[key]

    return {name: round_once(name, tensor) for name, tensor in state.items()}


def _declare_dtype(path: Path, dtype: torch.dtype) -> None:
    """Name ``dtype`` in a ``config.json``: save_pretrained wrote that of the model in memory."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, *(part for part in config.values() if isinstance(part, dict))):
        if section is config or "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _rust_disk_errors() -> Iterator[None]:
    """Turn disk errors of safetensors and tokenizers, which write in Rust, into ``OSError``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def _silent(line: str) -> None:
    pass
