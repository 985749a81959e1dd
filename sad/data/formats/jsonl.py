"""JSON Lines, ``.jsonl``: one object per line, its text in the field ``data.text_field``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sad.config.sections import DataConfig
from sad.data.formats.base import Document, require_field, require_text, type_name
from sad.errors import UnfitError


def read(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """The text of each line that is not blank."""
    field = config.text_field
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Document(f"{name}:{number}", _text_of(line, field, f"{path}, line {number}"))


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UnfitError(
            f"{where} must be UTF-8, got byte {byte:#04x}; convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnfitError(
            f"{where} must be valid JSON, got '{error}'; write one object on each line"
        ) from error
    if not isinstance(record, dict):
        raise UnfitError(
            f"{where} must be a JSON object, got {type_name(record)}; write one object on each line"
        )
    require_field(field, record, where)
    text = require_text(record[field], field, where)
    # JSON can escape half of a surrogate pair, which no tokenizer can encode.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(
            f"{where} must be Unicode text, got half of a surrogate pair in field '{field}'; write "
            "the character itself, or both halves"
        ) from error
    return text
