"""Plain text, ``.txt``: one document per file, or several between separators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sad.config.sections import DataConfig
from sad.data.formats.base import Document
from sad.errors import UnfitError

CHUNK_CHARS = 1 << 24
"""Characters of a file with separators that are read at a time."""


def read(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """The file as one document, or its pieces between ``config.document_separator``."""
    separator = config.document_separator
    try:
        with path.open(encoding="utf-8-sig") as file:
            if separator is None:
                yield Document(name, file.read())
            else:
                for index, text in enumerate(_split(file, separator)):
                    yield Document(f"{name}:{index}", text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        line = _first_undecodable_line(path)
        raise UnfitError(
            f"{path} must be UTF-8 text, got byte {byte:#04x} in line {line}; convert it to UTF-8"
        ) from error


def _split(file: TextIO, separator: str) -> Iterator[str]:
    """``file.read().split(separator)`` with one document, never the whole file, in memory."""
    rest = ""
    while chunk := file.read(CHUNK_CHARS):
        *complete, rest = (rest + chunk).split(separator)
        yield from complete
    yield rest


def _first_undecodable_line(path: Path) -> int:
    # A decoder that reads in chunks knows neither the line nor the position in the file.
    with path.open("rb") as lines:
        return next(number for number, line in enumerate(lines, 1) if not _decodable(line))


def _decodable(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
