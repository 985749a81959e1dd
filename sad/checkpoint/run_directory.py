"""The directory of a run: its paths, who may write to it, its status and its exported models.

::

    RUN_DIR/  config.yaml  run.json  status.json  log.jsonl  report.html  plots/  best/  final/
      checkpoints/batch-000012345/        (see ``sad.checkpoint``)
      baseline/                           a run directory of its own, with ``baseline: true``
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sad.checkpoint.atomic_files import (
    TEMPORARY,
    probe_writable,
    publish_directory,
    write_atomic,
)
from sad.checkpoint.parts import entry
from sad.checkpoint.store import Checkpoint, load_checkpoint, load_latest, sweep_stale
from sad.config.identity import require_same_config
from sad.config.schema import DistillConfig, config_to_yaml
from sad.environment import quiet_libraries, stop_if_requested
from sad.errors import OutputError, UnfitError, UsageError, one_line
from sad.models.adapters import has_adapters, merged_weights
from sad.models.heads import output_embedding

EXPORTING = "exporting the student"
"""What a stop signal interrupts: the resumed run exports it."""


class RunDirectory:
    """Paths of one run, and the files in it that are replaced as a whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.best = self.path / "best"
        self.final = self.path / "final"
        self.baseline = self.path / "baseline"

    @property
    def used(self) -> bool:
        """Whether it holds results. A run that ended before it trained, in whatever way, has left
        none."""
        results = ("log.jsonl", "checkpoints", "best", "final")
        if any((self.path / name).exists() for name in results):
            return True
        return self.baseline.exists() and RunDirectory(self.baseline).used

    def claim(self, config: DistillConfig, report: Callable[[str], None]) -> Checkpoint | None:
        """Claim the directory for this run; return the checkpoint to resume from, if any.

        A new run's configuration is written; that of a resumed one with ``write_config``, once it
        is known that it can go on.

        Raises ``UsageError`` for a directory that holds a run nobody asked to resume, for a
        checkpoint that is not there or of another configuration, and ``OutputError`` for a
        directory that cannot be written. A run that is refused here leaves what is there alone.
        """
        wanted = config.resume_from_checkpoint
        if self.used and wanted is None:
            raise UsageError(
                f"output_dir must be new, got {self.path}, which holds another run; choose another "
                "--output_dir, or continue that run with --resume_from_checkpoint auto"
            )
        probe_writable(self.path)
        sweep_stale(self.path)
        checkpoint = self._checkpoint(wanted, report)
        if checkpoint is not None:
            require_same_config(entry(checkpoint, "identity"), config)
        else:
            self.write_config(config)
        return checkpoint

    def write_config(self, config: DistillConfig) -> None:
        write_atomic(self.path / "config.yaml", config_to_yaml(config))

    def _checkpoint(self, wanted: str | None, report: Callable[[str], None]) -> Checkpoint | None:
        if wanted is None:
            return None
        if wanted == "auto":
            return load_latest(self.path, report=report)
        path = Path(wanted)
        if not path.is_dir():
            raise UsageError(
                f"resume_from_checkpoint must be 'auto' or a checkpoint's directory, got {wanted}, "
                "which does not exist; look under RUN_DIR/checkpoints"
            )
        return load_checkpoint(path)

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
        write_atomic(self.path / "status.json", json.dumps(record, indent=2) + "\n")

    def read_status(self) -> dict[str, Any]:
        return _read_json(self.path / "status.json")

    def write_run(self, record: dict[str, Any]) -> None:
        write_atomic(self.path / "run.json", json.dumps(record, indent=2) + "\n")

    def read_run(self) -> dict[str, Any]:
        return _read_json(self.path / "run.json")

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
    ) -> None:
        """Export the weights that ``model`` holds right now, completely or not at all.

        They are rounded to ``dtype``, by default not at all. A student with adapters leaves these
        alone, as they are and in PEFT's form, unless ``merge_adapters``. The model's own generation
        settings are exported as they are, but for ids past ``valid_vocab``: these were never
        trained, so generation is told to suppress them, too. ``facts`` (metric, value, kind of
        weights, position) become ``sad.json``, ``card`` the ``README.md``.
        """
        stop_if_requested(EXPORTING)
        tmp = target.parent / f".tmp-{target.name}"
        shutil.rmtree(tmp, ignore_errors=True)
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
                merged_weights(model) if merge_adapters else nullcontext() as merged,
            ):
                state = merged
                if rounds:
                    state = _rounded_state(model, merged or model.state_dict(), dtype)
                model.save_pretrained(tmp, state_dict=state)
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
        tmp = self.path / f"{TEMPORARY}export"
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
                f"student must be a model that can be saved again, got {type(error).__name__}: "
                f"{one_line(error)}; correct its configuration or its tokenizer"
            ) from error
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
