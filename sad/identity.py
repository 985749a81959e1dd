"""What makes a resumed run the same run, and the refusal of one that would take another course."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sad.config import DistillConfig, trajectory_changes
from sad.errors import UsageError


def require_same_config(old: dict[str, Any], config: DistillConfig) -> None:
    """Refuse another configuration than the one in the checkpoint's identity ``old``.

    It needs neither text nor models, so it can be asked before anything is loaded or written.
    """
    _refuse(_config_changes(old, config), config)


def require_same_run(
    old: dict[str, Any], new: dict[str, Any], config: DistillConfig, warn: Callable[[str], None]
) -> bool:
    """Refuse to resume what would not be the same run; return whether changes were allowed.

    Configuration keys that decide the trajectory, the packed rows and the tokenizer must be equal;
    versions of libraries may differ, with a warning.
    """
    changes = _config_changes(old, config) + [
        f"{key}: {old[key][:12]} -> {new[key][:12]}"
        for key in ("train_rows", "eval_rows", "tokenizer")
        if old[key] != new[key]
    ]
    _refuse(changes, config)
    if changes:
        warn(f"resuming with changes: {'; '.join(changes)}")
    if old["versions"] != new["versions"]:
        differing = [k for k, v in new["versions"].items() if old["versions"].get(k) != v]
        warn(f"the run began with other versions of {', '.join(differing)}: not bit for bit")
    return bool(changes)


def _config_changes(old: dict[str, Any], config: DistillConfig) -> list[str]:
    return [
        f"{key}: {before!r} -> {after!r}"
        for key, before, after in trajectory_changes(old["config"], config)
    ]


def _refuse(changes: list[str], config: DistillConfig) -> None:
    if changes and not config.allow_config_change:
        raise UsageError(
            f"a resumed run must keep what decides its course, got {'; '.join(changes)}; restore "
            "these, or pass --allow_config_change true"
        )
