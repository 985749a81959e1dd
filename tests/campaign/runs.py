"""The runs that are interrupted and damaged, each in a child forked from one warm process.

A child begins with torch and transformers loaded, so that a run of a tiny model takes a second.
What a run has come to is its ``digest``: the bits of its weights, of its exported students and of
everything that a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from support.tiny import save_tiny, tiny_gpt2, tiny_llama, write_texts
from support.tiny_moe import tiny_moe
from tqdm import tqdm

from sad.checkpoint.store import latest_checkpoint, load_checkpoint
from sad.cli import _as_sad_error
from sad.config.schema import DistillConfig
from sad.errors import SadError
from sad.report import page
from sad.training import run as run_module
from sad.training.run import distill

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "accumulation, with a baseline": {"gradient_accumulation_steps": 2, "baseline": True},
    "structural losses, unpacked": {
        "packing": False,
        "feature": {"weight": 0.5},
        "attention": {"weight": 0.5},
        "contrastive": {"weight": 0.1, "queue_size": 16},
    },
    "TAID in bf16 autocast": {"bf16": True, "taid": {"enabled": True}},
    "dropout, bf16 masters": {"student": "dropout", "param_dtype": "bfloat16", "bf16": True},
    "student-aware routing": {"teacher": "experts", "routing": {"mode": "student_aware"}},
    "knowledge augmentation": {"teacher": "experts", "routing": {"mode": "knowledge_augmentation"}},
    "gradient checkpointing, JSD, no EMA": {
        "gradient_checkpointing": True,
        "divergence": "jsd",
        "use_ema": False,
    },
    "text that the student writes": {
        "gradient_accumulation_steps": 3,
        "lmbda": 0.5,
        "max_completion_length": 8,
        "prompt_length": 8,
    },
    "another tokenizer": {"cross_tokenizer": "prefix"},
}
"""The configurations in which a run must resume bit for bit."""

EXPECTED_CODES = {2, 65, 71, 73, 74, 75, 90}
"""Exit codes that a refusal in one line may have, see ``sad.errors``."""

HANGS_AFTER = 120.0  # seconds, of a child that should take a few
HUNG = 124


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: the signal), and what it said of an error."""

    code: int
    message: str = ""


class Workshop:
    """Models and texts for the runs, made once in ``folder``.

    ``replace_in`` sets an attribute of a module.
    """

    def __init__(self, folder: Path, replace_in: Callable[..., None] = setattr) -> None:
        torch.set_num_threads(1)  # forked children cannot use the parent's threads
        # All processes share the usual one, and one that is killed would keep it.
        tqdm.set_lock(RLock())
        # Drawing plots and predicting memory are most of a tiny run's time, and neither is state.
        replace_in(page, "_draw_plots", lambda run_dir: None)
        replace_in(run_module, "predicted_peak", lambda *_: None)
        self.folder = folder
        small = {"num_hidden_layers": 1}
        dropout = {f"{name}_pdrop": 0.1 for name in ("resid", "embd", "attn")}
        self.models = {
            "teacher": save_tiny(folder / "teacher", tiny_llama(seed=1, **small)),
            "student": save_tiny(folder / "student", tiny_llama(seed=2, **small)),
            "experts": save_tiny(folder / "experts", tiny_moe("mixtral", seed=3, **small)),
            "dropout": save_tiny(folder / "dropout", tiny_gpt2(seed=4, n_layer=1, **dropout)),
        }
        self.text = write_texts(folder / "texts", count=8)

    def config(self, name: str, run_dir: Path, **changes: Any) -> DistillConfig:
        """The configuration of that name, a run of a dozen steps in ``run_dir``."""
        keys = CONFIGURATIONS[name] | changes
        models: dict[str, Any] = {
            role: self.models[keys.get(role, role)] for role in ("teacher", "student")
        }
        base: dict[str, Any] = {
            "data": {
                "train": self.text,
                "eval_fraction": 0.3,
                "cache_dir": str(self.folder / "cache"),
            },
            "max_length": 32,
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "max_eval_rows": 2,
            "learning_rate": 1e-3,
            "eval_steps": 4,
            "save_steps": 2,
            "logging_steps": 2,
            "device": "cpu",
            "output_dir": str(run_dir),
        }
        return DistillConfig(**(base | keys | models))


def in_child(
    work: Callable[[], Any],
    log: Path,
    kill_after: float | None = None,
    hangs_after: float = HANGS_AFTER,
) -> Outcome:
    """Do ``work`` in a forked child, killed after some seconds if need be; what it says goes to
    ``log``. One that takes ``hangs_after`` seconds is killed, too, and ends with ``HUNG``."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(in_this_child(work, log))
    code = _wait(pid, hangs_after if kill_after is None else kill_after)
    if code is None:
        code = HUNG if kill_after is None else -signal.SIGKILL
    message = ""
    with suppress(OSError):
        message = log.with_suffix(".error").read_text()
        log.with_suffix(".error").unlink()
    return Outcome(code, message)


def in_this_child(work: Callable[[], Any], log: Path) -> int:
    """The exit code of ``work`` here, in a forked child; what it raised is said beside ``log``."""
    # The parent's handlers and Ctrl-C are not the child's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    # A pool of torch's does not survive a fork: made anew here, before several threads want it.
    torch.set_num_threads(1)
    try:
        work()
        sys.stdout.flush()
        return 0
    except BaseException as error:
        known = _as_sad_error(error) if isinstance(error, Exception) else None
        line = str(known) if known else f"{type(error).__name__}: {error}"
        log.with_suffix(".error").write_text(line)
        return known.exit_code if isinstance(known, SadError) else 1


def _wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child; None for one that is killed because its time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]  # it may just have ended by itself
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def run(config: DistillConfig, log: Path, **how: Any) -> Outcome:
    """A run in a child, which goes on from what it finds."""
    return in_child(lambda: distill(replace(config, resume_from_checkpoint="auto")), log, **how)


def digest(run_dir: Path) -> dict[str, str]:
    """What a finished run has come to, part by part, in hashes."""
    found = {}
    for name in ("best", "final", "baseline/best", "baseline/final"):
        for path in sorted((run_dir / name).glob("*.safetensors")):
            found[f"{name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in (run_dir, run_dir / "baseline"):
        newest = latest_checkpoint(folder, report=lambda _: None)
        if newest is None:
            continue
        where = newest.relative_to(run_dir)
        for path in sorted(newest.glob("*.safetensors")):
            found[f"{where}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        state = {k: v for k, v in load_checkpoint(newest).state.items() if k != "identity"}
        text = json.dumps(state, sort_keys=True)
        found[f"{where}/state"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def is_one_line(message: str) -> bool:
    """Whether an error is what users are promised."""
    return bool(message) and "\n" not in message and len(message) <= 1000
