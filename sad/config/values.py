"""Conversion of plain values to the types of dataclass fields, and constraints on them.

A value may be a text (from the command line; also YAML's ``1e-4``, which PyYAML reads as one), a
Python number, a list for a tuple, or a mapping for a ``dict[str, X]`` or a nested dataclass. A
constraint stands in the field's type, ``Annotated[int, Constraint(...)]``, mostly under a name such
as ``PositiveInt``.
"""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sad.errors import UsageError, quoted

NULL_WORDS = frozenset({"null", "none"})


class Mismatch(Exception):
    """A value cannot be converted to a type: what it must be, and what to do about it."""

    def __init__(self, expectation: str, remedy: str) -> None:
        super().__init__(expectation)
        self.expectation = expectation
        self.remedy = remedy


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Name -> resolved type of each field, in order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


@cache
def section_types(cls: type) -> dict[str, type]:
    """Name -> class of each field that is itself a dataclass, in order."""
    hints = field_types(cls).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and is_dataclass(hint)}


@cache
def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that is not itself a dataclass, nested ones included."""
    leaves: dict[str, Any] = {}
    sections = section_types(cls)
    for name, hint in field_types(cls).items():
        nested = name in sections
        leaves |= leaf_types(hint, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return leaves


def convert(hint: Any, value: Any) -> Any:
    """Convert ``value`` to the type ``hint``; raise ``Mismatch`` where that is impossible."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    origin = get_origin(hint)
    if is_union(hint):
        if types.NoneType in get_args(hint) and _is_null(value):
            return None
        inner = without_none(hint)
        return _one_or_several(inner, value) if is_union(inner) else convert(inner, value)
    if origin is tuple:
        inner = get_args(hint)[0]  # of tuple[X, ...]
        if get_origin(inner) is Literal and _is_null(_sole_item(value)):
            return ()  # `report_to: none`, as in transformers
        if get_origin(inner) is tuple:
            value = _parse_nested_list(value)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(inner, item) for item in items)
    if origin is dict:
        return _mapping(get_args(hint)[1], value)
    if origin is Literal:
        return _choice(get_args(hint), value)
    if is_dataclass(hint) and isinstance(hint, type):
        return _section(hint, value)
    return _SCALARS[hint](value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in NULL_WORDS)


def _sole_item(value: Any) -> Any:
    """The item of a list of one, which is how a command line gives a word; any other value."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _parse_nested_list(value: Any) -> Any:
    """Parse lists of lists as a command line gives them: one word, ``[[0, 0], [-1, -1]]``."""
    word = _sole_item(value)
    if not isinstance(word, str):
        return value
    try:
        return json.loads(word)
    except (ValueError, RecursionError):  # no JSON, an integer of thousands of digits, many levels
        raise Mismatch("be a list of lists", "write it such as [[0, 0], [-1, -1]]") from None


def without_none(hint: Any) -> Any:
    """``X`` of ``X | None``; any other type as it is."""
    if not is_union(hint):
        return hint
    return Union[tuple(arg for arg in get_args(hint) if arg is not types.NoneType)]  # noqa: UP007


def is_union(hint: Any) -> bool:
    """Whether this is ``X | None``, or ``X | tuple[X, ...]``: the unions of a configuration."""
    return get_origin(hint) in (Union, types.UnionType)


def takes_several(hint: Any) -> bool:
    """Whether a list is a value of this type."""
    inner = without_none(hint)
    return any(
        get_origin(arg) is tuple for arg in (get_args(inner) if is_union(inner) else [inner])
    )


def _one_or_several(hint: Any, value: Any) -> Any:
    """Convert to ``X``, or a list to ``tuple[X, ...]``; a list of one on a command line is [X]."""
    one, several = get_args(hint)
    if isinstance(value, str) and value.startswith("["):
        value = _parse_nested_list(value)
    return convert(several if isinstance(value, list | tuple) else one, value)


def takes_mapping(hint: Any) -> bool:
    """Whether a mapping of texts to values is a value of this type, and no section."""
    return get_origin(without_none(hint)) is dict


def _mapping(inner: Any, value: Any) -> dict[str, Any]:
    """Convert a mapping, or one as a command line gives it: one word, ``{"q_proj": 16}``."""
    word = _sole_item(value)
    if isinstance(word, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(word)
    if not isinstance(value, Mapping):
        raise Mismatch("be a mapping", 'write one such as {"name": 8}')
    return {_to_str(key): convert(inner, item) for key, item in value.items()}


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value not in choices:
        raise Mismatch(f"be one of {', '.join(choices)}", "choose one of these")
    return value


def _section(cls: type, value: Any) -> Any:
    if isinstance(value, cls):
        return value
    names = field_types(cls)
    if not isinstance(value, Mapping) or not names.keys() >= value.keys():
        raise Mismatch(f"be a section with keys among {', '.join(names)}", "set one of these keys")
    return cls(**value)


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise Mismatch("be true or false", "write one of the two")
    return value


def _to_float(value: Any) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise Mismatch("be a finite number", "write one such as 0.5 or 1e-4")
    if abs(number) >= 2**63:  # its square has no room in fp32
        raise Mismatch("be a number below 2^63", "write one such as 0.5 or 1e-4")
    return number


def _to_int(value: Any) -> int:
    whole = _whole_number(value)
    if whole is None:
        number = _number(value)
        if number is None or not math.isfinite(number) or not number.is_integer():
            raise Mismatch("be a whole number", "write one such as 8")
        whole = int(number)
    if abs(whole) >= 2**63:
        raise Mismatch("be a whole number below 2^63", "write one such as 8")
    return whole


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise Mismatch("be a text", "write one, in quotes if it looks like a number")
    if not _is_unicode(value):
        raise Mismatch("be Unicode text", "write each character whole, not half a surrogate pair")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole_number(value: Any) -> int | None:
    """The integer that this is or writes: a float has no room for every digit of a large one."""
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        return None
    try:
        return int(value)
    except ValueError:  # no integer, or one of more than 4,300 digits
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | Real):  # a bool is an int to Python
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
}


class ConfigError(UsageError):
    """A value that does not fit; ``key`` is dotted, so that a reader can add file and line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Constraint(NamedTuple):
    """A condition on a field's value, unless that is None."""

    expectation: str
    """What completes "KEY must ..."."""
    holds: Callable[[Any], bool]
    remedy: str = "choose such a value, or leave the key out for its default"


def is_name(text: str) -> bool:
    """Whether this can name a field, a split, a repository: a short line."""
    return len(text.encode()) <= MAX_NAME and not _CONTROL.search(text)


def is_path(text: str) -> bool:
    """Whether a system can be asked for a file of this name: it would raise for any other."""
    parts = text.split("/")
    return (
        text.strip() != ""
        and not _CONTROL.search(text)
        and len(text.encode()) < MAX_PATH
        and all(len(part.encode()) <= MAX_NAME for part in parts)
        and not os.path.expanduser(parts[0]).startswith("~")  # of a user who is not there
    )


MAX_NAME = 255
"""Bytes of the name of a file, as Linux and macOS have it."""
MAX_PATH = 4096
"""Bytes of a path with its final NUL, as Linux has it."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

SMALL = Constraint("be below 2^31", lambda v: v < 2**31, "write a size that a machine can have")

NAME = Constraint(
    f"be a name of at most {MAX_NAME} bytes without control characters", is_name, "check the name"
)
PATH = Constraint(
    f"be a path of at most {MAX_PATH - 1:,} bytes, {MAX_NAME} of each name in it, without control "
    "characters",
    is_path,
    "check the path, and that a user after ~ has a home",
)
NonEmptyStr = Annotated[str, Constraint("not be empty", lambda v: v.strip() != "")]
PositiveInt = Annotated[int, Constraint("be at least 1", lambda v: v >= 1), SMALL]
NonNegativeInt = Annotated[int, Constraint("be at least 0", lambda v: v >= 0), SMALL]
Name = Annotated[NonEmptyStr, NAME]
PositiveBytes = Annotated[int, Constraint("be at least 1", lambda v: v >= 1)]
NonNegativeBytes = Annotated[int, Constraint("be at least 0", lambda v: v >= 0)]
PositiveFloat = Annotated[float, Constraint("be above 0", lambda v: v > 0)]
NonNegativeFloat = Annotated[float, Constraint("be at least 0", lambda v: v >= 0)]
Fraction = Annotated[float, Constraint("lie in [0, 1]", lambda v: 0 <= v <= 1)]
FractionBelowOne = Annotated[float, Constraint("lie in [0, 1)", lambda v: 0 <= v < 1)]


INPUT_PATH = "input path"
"""Marks the type of a key that may name a file or folder to read: in a configuration file a
relative path is looked up in the file's own folder first."""

HOME_PATH = "home path"
"""Marks the type of a key whose leading ``~`` becomes the user's home when it is read."""


@cache
def field_annotations(cls: type) -> dict[str, tuple[Any, ...]]:
    """Name -> what ``Annotated`` adds to its type, for each field of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    types_of = {f.name: without_none(hints[f.name]) for f in fields(cls)}
    return {
        name: get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        for name, hint in types_of.items()
    }


@cache
def input_paths(cls: type, prefix: str = "") -> tuple[str, ...]:
    """Dotted names of the fields that are marked ``INPUT_PATH``, nested ones included."""
    marked = field_annotations(cls).items()
    own = tuple(prefix + name for name, extras in marked if INPUT_PATH in extras)
    sections = section_types(cls).items()
    nested = (input_paths(section, f"{prefix}{name}.") for name, section in sections)
    return own + tuple(key for keys in nested for key in keys)


def convert_and_check(config: Any, prefix: str = "") -> None:
    """Convert every field of a dataclass to its type and check its constraints.

    ``prefix`` is the name of a section with its dot. Raises ``ConfigError``.
    """
    annotations = field_annotations(type(config))
    for name, hint in field_types(type(config)).items():
        key, value = prefix + name, getattr(config, name)
        try:
            value = convert(hint, value)
        except Mismatch as error:
            message = f"{key} must {error.expectation}, got {quoted(value)}; {error.remedy}"
            raise ConfigError(key, message) from None
        if HOME_PATH in annotations[name] and value is not None:
            value = os.path.expanduser(value)
        object.__setattr__(config, name, value)  # the dataclass is frozen
        for extra in annotations[name]:
            if isinstance(extra, Constraint) and value is not None:
                require(key, extra.expectation, value, extra.remedy, holds=extra.holds(value))


def require(key: str, expectation: str, value: object, remedy: str, *, holds: bool) -> None:
    """Raise ``ConfigError``, "KEY must EXPECTATION, got VALUE; REMEDY", unless ``holds``."""
    if not holds:
        raise ConfigError(key, f"{key} must {expectation}, got {quoted(value)}; {remedy}")
