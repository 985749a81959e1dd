"""Checks of plain values that were read from a file: what each must be, before any of it is used.

A check is a function of a value and of where it stands. It returns nothing, and raises
``UnexpectedValueError`` for any other value; the caller turns that into the error of its file.
Checks of containers are built from those of what they hold:

    record({"step": integer(0), "rates": sequence(number(0.0, 1.0))})(value, "counters")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sad.errors import CheckpointError, printable, quoted, shortened

Check = Callable[[Any, str], None]
"""Called with a value and its place, such as ``counters.micro_step``."""

LARGEST = 2**63 - 1
"""The largest count: what a tensor of int64 holds."""

_NESTING = 16
_SHOWN = 60


class UnexpectedValueError(ValueError):
    """A value that is not what its place asks for; the message is ``<where> must ..., got ...``."""

    def __init__(self, where: str, expectation: str, value: object) -> None:
        super().__init__(f"{brief(where)} must {expectation}, got {shown(value)}")


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Turn a value that a check refuses into the error of the checkpoint that holds it."""
    try:
        yield
    except UnexpectedValueError as error:
        raise CheckpointError(
            f"the checkpoint's {error}; resume from another checkpoint, or begin a new run"
        ) from error


def shown(value: object) -> str:
    """A value as an error quotes it: short, on one line, containers by their size alone."""
    if isinstance(value, dict):
        return f"an object of {len(value)} items"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    return quoted(value, _SHOWN)


def brief(text: str) -> str:
    """A text that was read from a file, as an error quotes it without quotation marks."""
    return shortened(printable(text), _SHOWN)


# Single values


def anything(value: Any, where: str) -> None:
    """Any value at all: nobody reads it."""


def string(value: Any, where: str) -> None:
    if type(value) is not str:
        raise UnexpectedValueError(where, "be a string", value)


def boolean(value: Any, where: str) -> None:
    if type(value) is not bool:
        raise UnexpectedValueError(where, "be true or false", value)


def integer(low: int = -LARGEST, high: int = LARGEST) -> Check:
    """An int from ``low`` to ``high``, both included; no bool."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            bounds = f"of at least {low}" if high == LARGEST else f"from {low} to {high}"
            raise UnexpectedValueError(where, f"be an integer {bounds}", value)

    return check


def number(low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> Check:
    """A float, or an int that is one exactly, from ``low`` to ``high``; NaN if not ``finite``."""

    def check(value: Any, where: str) -> None:
        plain = type(value) is float or (type(value) is int and abs(value) <= 2**53)
        inside = plain and low <= value <= high
        if finite and not (inside and math.isfinite(value)):
            bounds = "" if math.isinf(low) else f" from {low:g} to {high:g}"
            raise UnexpectedValueError(where, f"be a finite number{bounds}", value)
        if not (inside or (plain and math.isnan(value))):
            raise UnexpectedValueError(where, "be a number", value)

    return check


def optional(inner: Check) -> Check:
    """None, or what ``inner`` takes."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def one_of(*choices: str) -> Check:
    """One of these strings."""

    def check(value: Any, where: str) -> None:
        string(value, where)
        if value not in choices:
            raise UnexpectedValueError(where, f"be one of {', '.join(choices)}", value)

    return check


def equal(expected: Any) -> Check:
    """A value that equals this one; numbers may be ints or floats."""

    def check(value: Any, where: str) -> None:
        if isinstance(expected, dict) and isinstance(value, dict):
            record({key: equal(item) for key, item in expected.items()})(value, where)
        elif isinstance(expected, (list, tuple)) and isinstance(value, list):
            sequence(*map(equal, expected))(value, where)
        elif isinstance(expected, bool) != isinstance(value, bool) or value != expected:
            raise UnexpectedValueError(where, f"be {shown(expected)}", value)

    return check


def close(expected: float) -> Check:
    """A number that is this one but for rounding: libraries of mathematics differ in a last bit."""

    def check(value: Any, where: str) -> None:
        number()(value, where)
        if not math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-30):
            raise UnexpectedValueError(where, f"be {expected}", value)

    return check


# Containers


def sequence(*items: Check) -> Check:
    """A list with one item for each of these checks."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list or len(value) != len(items):
            raise UnexpectedValueError(where, f"be a list of {len(items)} items", value)
        for i, (inner, item) in enumerate(zip(items, value, strict=True)):
            inner(item, f"{where}[{i}]")

    return check


def every(inner: Check) -> Check:
    """A list of any length, each of whose items is what ``inner`` takes."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list:
            raise UnexpectedValueError(where, "be a list", value)
        sequence(*[inner] * len(value))(value, where)

    return check


def mapping(inner: Check) -> Check:
    """An object with any keys, each of whose values is what ``inner`` takes."""

    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            raise UnexpectedValueError(where, "be an object", value)
        for key, item in value.items():
            inner(item, f"{where}.{key}")

    return check


def record(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with exactly these keys; it may lack those of ``optional``."""
    known = {**fields, **(optional or {})}

    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            raise UnexpectedValueError(where, "be an object", value)
        for key in fields:
            if key not in value:
                raise UnexpectedValueError(where, f"have the key {key!r}", value)
        for key, item in value.items():
            if key not in known:
                raise UnexpectedValueError(where, "have known keys only", key)
            known[key](item, f"{where}.{key}")

    return check


def plain(value: Any, where: str, depth: int = _NESTING) -> None:
    """Anything that JSON holds, if it is not nested more deeply than a reader can follow."""
    if depth == 0:
        raise UnexpectedValueError(where, f"be nested {_NESTING} deep at most", value)
    if type(value) is dict or type(value) is list:
        for item in value.values() if type(value) is dict else value:
            plain(item, where, depth - 1)


def alike(live: Any) -> Check:
    """A value of the same make as ``live``: its type, its keys, its length; numbers are no NaN.

    Where ``live`` is None anything plain may stand that is no container, where it is an empty list
    any list of plain values.
    """
    if isinstance(live, dict):
        return record({key: alike(item) for key, item in live.items()})
    if isinstance(live, (list, tuple)):
        return sequence(*map(alike, live)) if live else every(plain)
    if isinstance(live, bool):
        return boolean
    if isinstance(live, int):
        return integer()
    if isinstance(live, float):
        return number() if math.isfinite(live) else number(finite=False)
    return string if isinstance(live, str) else _single


def _single(value: Any, where: str) -> None:
    if isinstance(value, (dict, list)):
        raise UnexpectedValueError(where, "be a single value", value)
