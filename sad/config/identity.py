"""Comparison of a run and its resumption by the keys that decide the trajectory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from sad.config.schema import DistillConfig, config_to_dict
from sad.config.sections import MAY_CHANGE_ON_RESUME
from sad.config.values import leaf_types, section_types
from sad.errors import UsageError
from sad.expected import (
    brief,
    checkpoint_errors,
    integer,
    mapping,
    optional,
    plain,
    record,
    shown,
    string,
)

_ADD_SPECIAL = "data.add_special_tokens"


_IDENTITY = record(
    {
        "config": plain,
        "train_rows": string,
        "eval_rows": string,
        "tokenizer": string,
        "world_size": integer(1),
        "versions": mapping(string),
    },
    optional={
        "teacher": optional(mapping(string)),
        "train_rows_content": string,
        "eval_rows_content": string,
    },
)
"""What a checkpoint says of its run; those from before the last three keys lack them."""

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys that give a position its meaning: of a saved configuration they are not only compared."""

_ROWS = (SIZES[0], "global_batch_size")
"""Keys that say how many rows a micro-batch has."""


def _require_identity(saved: Any) -> None:
    """Raise ``CheckpointError`` for an identity that no run has written."""
    with checkpoint_errors():
        _IDENTITY(saved, "identity")
        mapping(plain)(saved["config"], "identity.config")
        sizes = {key: saved["config"][key] for key in SIZES if key in saved["config"]}
        mapping(integer(1))(sizes, "identity.config")
        optional(integer(1))(saved["config"].get(_ROWS[1]), f"identity.config.{_ROWS[1]}")


def require_same_config(old: dict[str, Any], config: DistillConfig, world_size: int = 1) -> None:
    """Raise ``UsageError`` if ``config``, on ``world_size`` processes, differs from the one in
    ``old`` in a key that decides the trajectory, unless ``allow_config_change``.

    ``old`` is the run's fingerprint in a checkpoint. Neither text nor models are needed, so this
    check comes before anything is loaded or written.
    """
    _require_identity(old)
    _refuse(_config_changes(old, config, world_size), config)


def require_same_run(
    old: dict[str, Any], new: dict[str, Any], config: DistillConfig, warn: Callable[[str], None]
) -> bool:
    """Raise ``UsageError`` unless the fingerprints agree; return whether changes were allowed.

    ``old`` is the fingerprint in the checkpoint, ``new`` that of the present run. Configuration
    keys that decide the trajectory, packed rows, tokenizer and the weights of the teacher must be
    equal, unless ``allow_config_change``. Versions of libraries may differ, with a warning, and so
    may what the checkpoint is too old to tell.
    """
    # Runs from before the key packed texts without the BOS that many tokenizers put before them.
    hint = ""
    if _ADD_SPECIAL not in flatten(old["config"]) and config.data.add_special_tokens:
        hint = f" (if the tokenizer adds a BOS, --{_ADD_SPECIAL} false restores it)"
    changes = _config_changes(old, config, new["world_size"]) + [
        f"{key}: {brief(old[key][:12])} -> {new[key][:12]}{hint if key == 'train_rows' else ''}"
        for key in ("train_rows", "eval_rows", "tokenizer")
        if old[key] != new[key]
    ]
    changes += _changed_content(old, new)
    _refuse(changes, config)
    if changes:
        warn(f"resuming with changes: {'; '.join(changes)}")
    if old["versions"] != new["versions"]:
        differing = [k for k, v in new["versions"].items() if old["versions"].get(k) != v]
        warn(f"the run began with other versions of {', '.join(differing)}: not bit for bit")
    untold = [words for key, words in _CONTENT.items() if key in new and key not in old]
    if untold:
        warn(f"the run began before checkpoints told {' and '.join(untold)}: not compared")
    return bool(changes)


_CONTENT = {
    "teacher": "a teacher's weights from others of that name",
    "train_rows_content": "packed rows from others of the same text",
}
"""Entries that older checkpoints lack, and what they tell."""


def _changed_content(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Files of the teacher, and packed rows, that are not those the run began with."""
    changes = []
    before, now = old.get("teacher"), new.get("teacher")
    if before is not None and now is not None and before != now:
        names = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
        name, more = names[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
        values = [brief(files.get(name, "absent")) for files in (before, now)]
        changes.append(f"the teacher's {brief(name)}: {values[0]} -> {values[1]}{more}")
    for side in ("train_rows", "eval_rows"):
        was, is_now = old.get(f"{side}_content"), new.get(f"{side}_content")
        # Rows of another text are named by what they were made from.
        if was is not None and was != is_now and old[side] == new[side]:
            changes.append(f"content of {side}: {brief(was[:12])} -> {(is_now or '')[:12]}")
    return changes


def _config_changes(old: dict[str, Any], config: DistillConfig, world_size: int) -> list[str]:
    return [
        f"{key}: {shown(before)} -> {shown(after)}"
        for key, before, after in run_changes(old, config, world_size)
    ]


def run_changes(
    old: dict[str, Any], config: DistillConfig, world_size: int = 1
) -> list[tuple[str, Any, Any]]:
    """``trajectory_changes`` from a run, of which ``old`` is the fingerprint, to one on
    ``world_size`` processes.

    However many processes share them, and whichever key says so, it is the rows of a micro-batch
    that count: their change goes by the name ``SIZES[0]``.
    """
    changes = trajectory_changes(old["config"], config)
    others = [change for change in changes if change[0] not in _ROWS]
    place = next((i for i, change in enumerate(changes) if change[0] in _ROWS), len(others))
    before, now = saved_rows(old), config.rows_per_micro_batch(world_size)
    rows = [] if before == now else [(SIZES[0], before, now)]
    return [*others[:place], *rows, *others[place:]]


def saved_rows(identity: dict[str, Any]) -> int:
    """Rows of a micro-batch in the run of a fingerprint, over all of its processes."""
    saved = _trajectory_defaults() | flatten(identity["config"])
    together = saved["global_batch_size"]
    if together is not None:
        return together // saved[SIZES[1]]
    return saved[SIZES[0]] * identity["world_size"]


def _refuse(changes: list[str], config: DistillConfig) -> None:
    if changes and not config.allow_config_change:
        raise UsageError(
            f"a resumed run must keep what decides its course, got {'; '.join(changes)}; restore "
            "these, or pass --allow_config_change true"
        )


def config_hash(config: DistillConfig) -> str:
    """SHA-256 of the keys that decide the trajectory: equal for a run and its resumption."""
    # Sorted, so that the order of fields in the source does not matter.
    return hashlib.sha256(json.dumps(_trajectory(config), sort_keys=True).encode()).hexdigest()


def trajectory_changes(old: dict[str, Any], new: DistillConfig) -> list[tuple[str, Any, Any]]:
    """Differences in keys that decide the trajectory: (dotted key, old value, new value).

    ``old`` is a ``config_to_dict`` of an earlier configuration. A key that it lacks counts as
    having its default: that is how the run behaved before the key existed.
    """
    before = _trajectory_defaults() | flatten(old)
    # Two keys that once were otherwise. Whether they change anything shows in the fingerprints of
    # the rows, which are compared as well.
    if before["data.text_field"] == "text" and new.data.text_field is None:
        before["data.text_field"] = None  # the former default
    if _ADD_SPECIAL not in flatten(old):
        before[_ADD_SPECIAL] = new.data.add_special_tokens  # none were added then
    return [
        (key, before[key], value)
        for key, value in _trajectory(new).items()
        if key not in before or not _same(before[key], value)
    ]


def _same(before: Any, after: Any) -> bool:
    """Whether two values are equal; in mappings the order counts: the first that fits is taken."""
    if isinstance(before, dict) and isinstance(after, dict):
        return list(before.items()) == list(after.items())
    return before == after


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"data": {"train": x}}`` as ``{"data.train": x}``; a key's own mapping stays whole."""
    flat: dict[str, Any] = {}
    leaves = leaf_types(DistillConfig)
    for name, value in nested.items():
        key = prefix + name
        section = isinstance(value, dict) and key not in leaves
        flat |= flatten(value, f"{key}.") if section else {key: value}
    return flat


def _trajectory(config: DistillConfig) -> dict[str, Any]:
    free = set(_keys_that_may_change(DistillConfig))
    return {k: v for k, v in flatten(config_to_dict(config)).items() if k not in free}


def _keys_that_may_change(cls: type, prefix: str = "") -> Iterator[str]:
    sections = section_types(cls)
    for f in fields(cls):
        if f.name in sections:
            yield from _keys_that_may_change(sections[f.name], f"{prefix}{f.name}.")
        elif f.metadata == MAY_CHANGE_ON_RESUME:
            yield prefix + f.name


def _trajectory_defaults() -> dict[str, Any]:
    # The two names have no default that a run can have; any will do to build the others.
    defaults = _trajectory(DistillConfig(student="-", teacher="-"))
    return {key: value for key, value in defaults.items() if key not in ("student", "teacher")}
