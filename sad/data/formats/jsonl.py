"""JSON Lines, ``.jsonl`` and compressed ``.jsonl.gz``: one record, a JSON object, per line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sad.config.sections import DataConfig
from sad.data.formats.base import Document, document_of, type_name
from sad.errors import UnfitError


def read(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """The document of each line that is not blank."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as lines:
            yield from read_lines(lines, path, name, config)
    except (EOFError, zlib.error) as error:
        raise UnfitError(
            f"{path} must be a whole gzip file, got '{error}'; write it again"
        ) from error


def read_lines(
    lines: Iterable[bytes], path: Path, name: str, config: DataConfig
) -> Iterator[Document]:
    """The document of each of these lines that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            record = parse(line, where, "write one object on each line")
            if not isinstance(record, dict):
                raise UnfitError(
                    f"{where} must be a JSON object, got {type_name(record)}; write one object on "
                    "each line"
                )
            yield document_of_json(record, config, f"{name}:{number}", where)


def parse(content: bytes, where: str, remedy: str) -> Any:
    """The value of JSON in UTF-8; raise ``UnfitError`` with ``remedy`` for anything else."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UnfitError(
            f"{where} must be UTF-8, got byte {byte:#04x}; convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnfitError(f"{where} must be valid JSON, got '{error}'; {remedy}") from error


def document_of_json(record: dict[str, Any], config: DataConfig, name: str, where: str) -> Document:
    """``document_of`` for a record of JSON, which can hold what is not Unicode."""
    document = document_of(record, config, name, where)
    # JSON can escape half of a surrogate pair, which no tokenizer can encode.
    content = document.text
    if document.conversation is not None:
        document.conversation.to_json()  # refuses what is nested too deeply
        content = json.dumps(document.conversation, ensure_ascii=False)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        field = next((key for key in record if record[key] == content), "messages")
        raise UnfitError(
            f"{where} must be Unicode text, got half of a surrogate pair in field '{field}'; write "
            "the character itself, or both halves"
        ) from error
    return document
