"""Reading a ``DistillConfig`` from a recipe or a YAML or JSON file, and command-line overrides.

Precedence: defaults < file < command line. Every error names the key and where its value came from,
file and line. A key of another library is answered with its translation, a misspelt one with the
nearest. Whatever a file holds, it gives a configuration or one ``UsageError`` of at most
``MAX_MESSAGE`` characters, within a second.

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
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from sad.config.help import about_unknown_key
from sad.config.schema import ConfigError, DistillConfig
from sad.config.values import input_paths, leaf_types, takes_mapping, takes_several
from sad.errors import UsageError, one_line, printable, quoted, shortened
from sad.recipes import recipe_names, recipe_path

MAX_BYTES = 128 * 1024
"""Size of a configuration file at most: reading a larger one would take seconds."""
MAX_LEVELS = 20
"""Levels of nesting in a configuration file at most."""
MAX_VALUES = 5_000
"""Keys and values in a YAML file at most, which PyYAML reads in a quarter of a second."""
MAX_NUMBER = 5000
"""Characters of a number in a YAML file at most: PyYAML reads one in time quadratic in them."""
MAX_MESSAGE = 300
"""Characters of an error's message at most."""


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
    try:
        path = find_config(source)
        settings = _resolve_paths(path, read_file(path)) | read_overrides(overrides)
        return _build(settings, path)
    except UsageError as error:
        error.args = (shortened(printable(str(error)), MAX_MESSAGE),)
        raise


def find_config(source: str | Path) -> Path:
    """The path of a recipe's or a configuration file; raises ``UsageError`` if there is none."""
    if source in recipe_names():
        return recipe_path(str(source))
    path = Path(source)
    if not os.path.isfile(path):  # unlike Path.is_file it raises for no name, however odd
        near = difflib.get_close_matches(str(source), recipe_names(), 1)
        remedy = f"did you mean {near[0]!r}?" if near else "check the path"
        raise UsageError(
            f"configuration must be a file or one of the recipes {', '.join(recipe_names())}, "
            f"got {quoted(str(source))}; {remedy}"
        )
    if path.suffix not in FILE_READERS:
        raise UsageError(
            f"configuration must end in {', '.join(FILE_READERS)}, got {quoted(str(path))}; rename "
            "it"
        )
    return path


def read_file(path: Path) -> dict[str, Setting]:
    """Read a file's settings under dotted keys; values are not checked yet."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{_shown(path)} must be readable as UTF-8 text, got {one_line(error)}; check the file"
        ) from None
    if len(content) > MAX_BYTES:
        raise UsageError(
            f"{_shown(path)} must be a configuration of at most {MAX_BYTES:,} bytes, got more; "
            "name folders of text in place of their files, and data.chat_template_path"
        )
    # Universal newlines, as for any text file.
    return FILE_READERS[path.suffix](path, text.replace("\r\n", "\n").replace("\r", "\n"))


def _shown(path: Path) -> str:
    return shortened(str(path), 120)


def read_overrides(words: Sequence[str]) -> dict[str, Setting]:
    """Read ``--key value`` words as settings, unchecked; the last of two equal keys wins."""
    settings: dict[str, Setting] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(
                f"overrides must be --key value pairs, got {quoted(word)}; write for example "
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
    words = shortened(" ".join(values), 80)
    raise UsageError(
        f"{key} must have one value, got {len(values)}: {words}; put a value with spaces in quotes "
        "(command line)"
    )


def _read_json(path: Path, text: str) -> dict[str, Setting]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise _duplicate(key, where)
            content[key] = value
        return content

    where = _shown(path)
    try:
        content = json.loads(text, object_pairs_hook=unique)
        if not isinstance(content, dict):
            raise _no_mapping(path, type(content).__name__)
        return _flat_settings(content, "", where)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where} must be JSON, got {error.msg}; see line {error.lineno} "
            f"({where}:{error.lineno})"
        ) from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise UsageError(
            f"{where} must hold numbers, got one of thousands of digits; shorten it"
        ) from None
    except RecursionError:
        raise UsageError(
            f"{where} must hold few levels of nesting, got hundreds; see `sad distill --help`"
        ) from None


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
    where = _shown(path)
    try:
        loader = _YamlLoader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            _walk_yaml(loader, root, "", where, settings)
        elif root is not None:
            raise _no_mapping(path, root.tag.rpartition(":")[2])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _no_yaml(where, error.problem or error.context or "an error", line) from None
    except UsageError:
        raise
    except Exception as error:  # a reader's own, or Python's: PyYAML lets any of them through
        raise UsageError(
            f"{where} must be YAML, got {shortened(one_line(error), 80)}; check the file"
        ) from None
    return settings


def _no_yaml(where: str, problem: str, line: int) -> UsageError:
    return UsageError(
        f"{where} must be YAML, got {shortened(problem, 80)}; see that line ({where}:{line})"
    )


class _YamlLoader(yaml.SafeLoader):
    """YAML without aliases, of few levels, in which a date is a text: no key takes a date.

    Aliases that name each other stand for more values than memory holds, or for a value within
    itself.
    """

    _levels = 0
    _values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._levels += 1
        self._values += 1
        for problem, is_so in (
            ("an alias, which stands for no value here", isinstance(event, yaml.AliasEvent)),
            (f"more than {MAX_LEVELS} levels of nesting", self._levels > MAX_LEVELS),
            (f"more than {MAX_VALUES:,} values", self._values > MAX_VALUES),
        ):
            if is_so:
                raise ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
    file: str,
    settings: dict[str, Setting],
) -> None:
    # Nodes, not loaded values: they know their lines, and a key given twice is seen.
    for name, value in mapping.value:
        where = f"{file}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            raise UsageError(f"a key must be a text, got a {name.id}; write KEY: VALUE ({where})")
        key = prefix + name.value
        if isinstance(value, yaml.MappingNode) and key in _mappings():
            _require_unique(value, key, file)
        elif isinstance(value, yaml.MappingNode):
            _walk_yaml(loader, value, f"{key}.", file, settings)
            continue
        if key in settings:
            raise _duplicate(key, where)
        settings[key] = Setting(_yaml_value(loader, value, file), where)


def _yaml_value(loader: yaml.SafeLoader, node: yaml.Node, file: str) -> Any:
    try:
        _require_short_numbers(node)
        return loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError:
        raise
    except Exception:  # `!!int x`, `0x_`, thousands of digits: whatever Python raises for them
        kind = node.tag.rpartition(":")[2]
        line = node.start_mark.line + 1
        raise _no_yaml(file, f"a value that is no {shortened(kind, 30)}", line) from None


def _require_short_numbers(node: yaml.Node) -> None:
    if isinstance(node, yaml.CollectionNode):
        for inner in node.value:
            for item in inner if isinstance(inner, tuple) else (inner,):
                _require_short_numbers(item)
    elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER:
        raise ValueError(node.tag)


def _require_unique(mapping: yaml.MappingNode, key: str, file: str) -> None:
    names: set[str] = set()
    for name, _ in mapping.value:
        where = f"{file}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            raise UsageError(f"a key must be a text, got a {name.id}; write KEY: VALUE ({where})")
        if name.value in names:
            raise _duplicate(f"{key}: {name.value}", where)
        names.add(name.value)


@cache
def _mappings() -> set[str]:
    """The keys whose value is a mapping, and which are no sections."""
    return {key for key, hint in leaf_types(DistillConfig).items() if takes_mapping(hint)}


def _duplicate(key: str, where: str) -> UsageError:
    return UsageError(
        f"{shortened(key, 80)} must be given once, got it twice; remove one ({where})"
    )


def _no_mapping(path: Path, kind: str) -> UsageError:
    return UsageError(
        f"{_shown(path)} must hold 'key: value' pairs, got a {shortened(kind, 30)}; see "
        "`sad distill --help`"
    )


def _resolve_paths(path: Path, settings: dict[str, Setting]) -> dict[str, Setting]:
    """Make relative paths in a file's settings absolute where they exist beside the file."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict) and "path" in value:  # an entry of data.train with its weight
            return value | {"path": beside(value["path"])}
        return beside(value)

    def beside(value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        candidate = path.parent / value
        return os.path.abspath(candidate) if os.path.exists(candidate) else value

    def resolve_all(value: Any) -> Any:
        return [resolve(item) for item in value] if isinstance(value, list) else resolve(value)

    paths = input_paths(DistillConfig)
    return {
        key: Setting(resolve_all(setting.value), setting.where) if key in paths else setting
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
            f"({_shown(path)})"
        )
    try:
        return DistillConfig(**nested)
    except ConfigError as error:  # a default that contradicts a given key has no place of its own
        where = settings[error.key].where if error.key in settings else _shown(path)
        raise ConfigError(error.key, f"{error} ({where})") from None


def _empty_section(key: str, setting: Setting) -> bool:
    """Whether this is a section without keys, such as a bare ``data:`` in YAML."""
    return setting.value is None and key in {
        k.rpartition(".")[0] for k in leaf_types(DistillConfig)
    }
