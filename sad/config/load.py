"""Reading a ``DistillConfig`` from a recipe or a YAML or JSON file, and command-line overrides.

Precedence: defaults < file < command line. Every error names the key and where its value came from,
file and line. A key of another library is answered with its translation, a misspelt one with the
nearest.

No library for command lines (tyro, jsonargparse) is used. tyro was tried: it refuses
``--use_ema false`` and ``--eval_steps null``, which our files and users write, misreads lists of
pairs such as ``--layerwise.layers "[[0, 0], [-1, -1]]"``, and takes 0.9 s to import. It would
replace ``read_overrides`` alone: lines in files and foreign keys need the rest in any case.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sad.config.help import about_unknown_key
from sad.config.schema import ConfigError, DistillConfig
from sad.config.values import input_paths, leaf_types, takes_mapping, takes_several
from sad.errors import UsageError
from sad.recipes import recipe_names, recipe_path


@dataclass(frozen=True)
class Setting:
    """A value given for a key, and where: ``recipe.yaml:12`` or ``command line``."""

    value: Any
    where: str


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a bundled recipe or a file, apply ``--key value`` overrides, convert and check.

    ``source`` is a recipe's name (see ``sad.recipes``) or the path of a YAML or JSON file.
    ``overrides`` are command-line words: ``--key value``, ``--key.sub value``, ``--key=value``, for
    lists ``--key a b``, for switches also the bare ``--key``. A relative path in the file, under
    one of the keys that name models or text, means the file's folder if it exists there, else the
    current directory.

    Raises ``UsageError`` naming key, file and line.
    """
    path = find_config(source)
    settings = _resolve_paths(path, read_file(path)) | read_overrides(overrides)
    return _build(settings, path)


def find_config(source: str | Path) -> Path:
    """The path of a recipe's or a configuration file; raises ``UsageError`` if there is none."""
    if source in recipe_names():
        return recipe_path(str(source))
    path = Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(str(source), recipe_names(), 1)
        remedy = f"did you mean {near[0]!r}?" if near else "check the path"
        raise UsageError(
            f"configuration must be a file or one of the recipes {', '.join(recipe_names())}, "
            f"got {str(source)!r}; {remedy}"
        )
    if path.suffix not in FILE_READERS:
        raise UsageError(
            f"configuration must end in {', '.join(FILE_READERS)}, got {str(path)!r}; rename it"
        )
    return path


def read_file(path: Path) -> dict[str, Setting]:
    """Read a file's settings under dotted keys; values are not checked yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} must be readable as UTF-8 text, got {error}; check the file"
        ) from None
    return FILE_READERS[path.suffix](path, text)


def read_overrides(words: Sequence[str]) -> dict[str, Setting]:
    """Read ``--key value`` words as settings, unchecked; the last of two equal keys wins."""
    settings: dict[str, Setting] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(
                f"overrides must be --key value pairs, got {word!r}; write for example "
                "--learning_rate 1e-4"
            )
        key, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        # A value never starts with two dashes; -1 is one.
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        settings[key] = Setting(_from_words(key, values), "command line")
    return settings


def _from_words(key: str, values: list[str]) -> Any:
    if len(values) == 1:
        return values[0]
    hint = leaf_types(DistillConfig).get(key)
    if hint is None or takes_several(hint):
        return values
    if not values and hint is bool:
        return True
    if not values:
        raise UsageError(f"{key} must have a value, got none; write --{key} VALUE (command line)")
    raise UsageError(
        f"{key} must have one value, got {len(values)}: {' '.join(values)}; put a value with "
        "spaces in quotes (command line)"
    )


def _read_json(path: Path, text: str) -> dict[str, Setting]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise _duplicate(key, str(path))
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} must be JSON, got {error.msg}; see line {error.lineno} ({path}:{error.lineno})"
        ) from None
    if not isinstance(content, dict):
        raise _no_mapping(path, type(content).__name__)
    return _flat_settings(content, "", str(path))


def _flat_settings(content: dict[str, Any], prefix: str, where: str) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name, value in content.items():
        key = prefix + name
        nested = isinstance(value, dict) and key not in _mappings()
        inner = _flat_settings(value, f"{key}.", where) if nested else {key: Setting(value, where)}
        settings |= inner
    return settings


def _read_yaml(path: Path, text: str) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            _walk_yaml(loader, root, "", path, settings)
        elif root is not None:
            raise _no_mapping(path, root.tag.rpartition(":")[2])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(
            f"{path} must be YAML, got {error.problem}; see that line ({path}:{line})"
        ) from None
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise UsageError(f"{path} must be YAML, got {problem}; check the file") from None
    return settings


FILE_READERS: Mapping[str, Callable[[Path, str], dict[str, Setting]]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
}
"""Suffix of a configuration file -> reader of its text."""


def _walk_yaml(
    loader: yaml.SafeLoader,
    mapping: yaml.MappingNode,
    prefix: str,
    path: Path,
    settings: dict[str, Setting],
) -> None:
    # Nodes, not loaded values: they know their lines, and a key given twice is seen.
    for name, value in mapping.value:
        key, where = f"{prefix}{name.value}", f"{path}:{name.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode) and key in _mappings():
            _require_unique(value, key, path)
        elif isinstance(value, yaml.MappingNode):
            _walk_yaml(loader, value, f"{key}.", path, settings)
            continue
        if key in settings:
            raise _duplicate(key, where)
        settings[key] = Setting(loader.construct_object(value, deep=True), where)


def _require_unique(mapping: yaml.MappingNode, key: str, path: Path) -> None:
    names: set[str] = set()
    for name, _ in mapping.value:
        if name.value in names:
            raise _duplicate(f"{key}: {name.value}", f"{path}:{name.start_mark.line + 1}")
        names.add(name.value)


def _mappings() -> set[str]:
    """The keys whose value is a mapping, and which are no sections."""
    return {key for key, hint in leaf_types(DistillConfig).items() if takes_mapping(hint)}


def _duplicate(key: str, where: str) -> UsageError:
    return UsageError(f"{key} must be given once, got it twice; remove one ({where})")


def _no_mapping(path: Path, kind: str) -> UsageError:
    return UsageError(
        f"{path} must hold 'key: value' pairs, got a {kind}; see `sad distill --help`"
    )


def _resolve_paths(path: Path, settings: dict[str, Setting]) -> dict[str, Setting]:
    """Make relative paths in a file's settings absolute where they exist beside the file."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict) and "path" in value:  # an entry of data.train with its weight
            return value | {"path": resolve(value["path"])}
        candidate = path.parent / value if isinstance(value, str) and value else None
        return os.path.abspath(candidate) if candidate and candidate.exists() else value

    paths = input_paths(DistillConfig)
    return {
        key: Setting(resolve(setting.value), setting.where) if key in paths else setting
        for key, setting in settings.items()
    }


def _build(settings: dict[str, Setting], path: Path) -> DistillConfig:
    known = leaf_types(DistillConfig)
    # Unknown keys come before wrong values: a misspelt key may be the reason for one.
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if key in known:
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = setting.value
        elif not _empty_section(key, setting):
            raise UsageError(f"{about_unknown_key(key)} ({setting.where})")
    if "student" not in nested and nested.get("student_init") != "layers":
        raise UsageError(
            f"student must be given, got no such key; add it to the file or write --student NAME "
            f"({path})"
        )
    try:
        return DistillConfig(**nested)
    except ConfigError as error:  # a default that contradicts a given key has no place of its own
        where = settings[error.key].where if error.key in settings else str(path)
        raise ConfigError(error.key, f"{error} ({where})") from None


def _empty_section(key: str, setting: Setting) -> bool:
    """Whether this is a section without keys, such as a bare ``data:`` in YAML."""
    return setting.value is None and key in {
        k.rpartition(".")[0] for k in leaf_types(DistillConfig)
    }
