"""A run's directory: claimed once, resumed only on request, and honest about how the run ended.

::

    RUN_DIR/  config.yaml  run.json  status.json  log.jsonl  report.html  plots/  best/  final/
      checkpoints/batch-000012345/        (see ``sad.checkpoint``)
      baseline/                           a run directory of its own, with ``baseline: true``
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sad.checkpoint import latest_checkpoint, sweep_stale
from sad.config import DistillConfig, config_to_yaml
from sad.errors import OutputError, UsageError
from sad.files import probe_writable, publish_directory, write_atomic
from sad.heads import output_embedding
from sad.models import quiet_transformers


class RunDirectory:
    """Paths of one run, and the few files that are written whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.best = self.path / "best"
        self.final = self.path / "final"
        self.baseline = self.path / "baseline"

    @property
    def used(self) -> bool:
        return any(
            (self.path / name).exists() for name in ("config.yaml", "log.jsonl", "checkpoints")
        )

    def claim(self, config: DistillConfig, report: Callable[[str], None]) -> Path | None:
        """Make the directory this run's own; return the checkpoint to resume from, if any.

        Raises ``UsageError`` for a directory that holds a run nobody asked to resume, or a
        checkpoint that is not there, and ``OutputError`` for one that cannot be written.
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
        write_atomic(self.path / "config.yaml", config_to_yaml(config))
        return checkpoint

    def _checkpoint(self, wanted: str | None, report: Callable[[str], None]) -> Path | None:
        if wanted is None:
            return None
        if wanted == "auto":
            return latest_checkpoint(self.path, report=report)
        path = Path(wanted)
        if not path.is_dir():
            raise UsageError(
                f"resume_from_checkpoint must be 'auto' or a checkpoint's directory, got {wanted}, "
                "which does not exist; look under RUN_DIR/checkpoints"
            )
        return path

    def write_status(self, state: str, *, code: int = 0, message: str = "", **facts: Any) -> None:
        """Say how the run stands. ``state`` is running, finished, stopped or failed."""
        record = {"state": state, "code": code, "message": message} | facts
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
    ) -> None:
        """Publish the weights that ``model`` holds right now, whole or not at all.

        Ids past ``valid_vocab`` were never trained, so generation is told to suppress them.
        ``facts`` (metric, value, kind of weights, position) become ``sad.json``.
        """
        tmp = target.parent / f".tmp-{target.name}"
        shutil.rmtree(tmp, ignore_errors=True)
        width = output_embedding(model).weight.shape[0]
        suppressed = list(range(valid_vocab, width)) or None
        generation = model.generation_config
        before = (model.config.use_cache, generation.suppress_tokens)
        model.config.use_cache, generation.suppress_tokens = True, suppressed
        try:
            with quiet_transformers():
                model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            (tmp / "sad.json").write_text(json.dumps(facts, indent=2) + "\n")
            publish_directory(tmp, target)
        except OSError as error:
            raise OutputError(
                f"{target} must be writable, got {error}; free space or choose another --output_dir"
            ) from error
        finally:
            model.config.use_cache, generation.suppress_tokens = before
            shutil.rmtree(tmp, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
