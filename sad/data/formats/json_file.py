"""JSON, ``.json``: a list of records, one record, or JSON Lines under that name.

The file is read whole. One that does not fit into memory is for ``.jsonl``, read line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sad.config.sections import DataConfig
from sad.data.formats.base import Document, holds_document, no_known_field, type_name
from sad.data.formats.jsonl import document_of_json, parse, read_lines
from sad.errors import UnfitError


class NoRecordsError(UnfitError):
    """JSON of another kind, such as a configuration: nothing that was meant as text."""


def read(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """The document of each record. Raises ``NoRecordsError`` before the first if there are none."""
    content = path.read_bytes()
    first_line, _, rest = content.lstrip().partition(b"\n")
    if rest.strip() and _is_object(first_line):
        yield from read_lines(content.splitlines(), path, name, config)
        return
    records = parse(content, str(path), "write a list of objects, or one object on each line")
    if isinstance(records, dict):
        records = [records]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise NoRecordsError(
            f"{path} must hold a list of JSON objects, got {type_name(records)}; write one object "
            "for each document"
        )
    if records and not holds_document(records[0], config):
        raise NoRecordsError(str(no_known_field(records[0], f"{path}, record 0")))
    for number, record in enumerate(records):
        yield document_of_json(record, config, f"{name}:{number}", f"{path}, record {number}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
