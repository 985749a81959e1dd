"""What readers of text share: the document, checks of a record's fields, optional libraries."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from sad.errors import UnfitError, UsageError, one_line


class Document(NamedTuple):
    """One text with its name; the model attends within a document, never across two."""

    name: str
    text: str


def require_field(field: str, fields: Iterable[str], where: str) -> None:
    """Raise ``UnfitError`` that lists ``fields`` unless ``field`` is among them."""
    names = list(fields)
    if field not in names:
        listed = ", ".join(f"'{name}'" for name in names) or "no field"
        raise UnfitError(
            f"{where} must have the field '{field}', got {listed}; set data.text_field to the "
            "field that holds the text"
        )


def require_text(value: Any, field: str, where: str) -> str:
    """``value``, the content of a record's ``field``; raise ``UnfitError`` unless it is a text."""
    if not isinstance(value, str):
        raise UnfitError(
            f"{where} must hold text in field '{field}', got {type_name(value)}; remove the "
            "record, or set data.text_field to the field that holds the text"
        )
    return value


def type_name(value: object) -> str:
    """The type of a record's value as an error message names it: ``null``, ``int``, ``list``."""
    return "null" if value is None else type(value).__name__


def import_extra(module: str, purpose: str) -> ModuleType:
    """Import a library of the extra ``data``; ``UsageError`` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"{package} must be installed {purpose}, got '{one_line(error)}'; run: "
            "python -m pip install 'student-aware-distillation[data]'"
        ) from error
