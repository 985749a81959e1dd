"""Checks that every part of a configuration shares: types, ranges, and how a complaint reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sad.errors import UsageError
from sad.fields import Mismatch, convert, field_types


class ConfigError(UsageError):
    """A value that does not fit; ``key`` is dotted, so that a reader can add file and line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Range(NamedTuple):
    expectation: str
    holds: Callable[[Any], bool]


POSITIVE_INT = Range("be at least 1", lambda v: v >= 1)
NOT_NEGATIVE = Range("be at least 0", lambda v: v >= 0)
POSITIVE = Range("be above 0", lambda v: v > 0)
FRACTION = Range("lie in [0, 1]", lambda v: 0 <= v <= 1)
BELOW_ONE = Range("lie in [0, 1)", lambda v: 0 <= v < 1)
NOT_EMPTY = Range("not be empty", lambda v: v.strip() != "")


def convert_and_check(config: Any, ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Convert every field of a dataclass to its type, and hold each to its range, if it has one.

    ``prefix`` is the name of a section with its dot. Raises ``ConfigError``.
    """
    for name, hint in field_types(type(config)).items():
        key, value = prefix + name, getattr(config, name)
        try:
            value = convert(hint, value)
        except Mismatch as error:
            message = f"{key} must {error.expectation}, got {value!r}; {error.remedy}"
            raise ConfigError(key, message) from None
        object.__setattr__(config, name, value)
        if name in ranges and value is not None:
            remedy = "choose such a value, or leave the key out for its default"
            require(key, ranges[name].expectation, value, remedy, holds=ranges[name].holds(value))


def require(key: str, expectation: str, value: object, remedy: str, *, holds: bool) -> None:
    if not holds:
        raise ConfigError(key, f"{key} must {expectation}, got {value!r}; {remedy}")
