"""File formats that text is read from: suffix of a file's name -> reader.

To add a format: a module here with a function ``read`` of the type ``Reader``, and its row in
``READERS``. A reader of records hands each to ``document_of`` of ``sad.data.formats.base``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sad.config.sections import DataConfig
from sad.data.formats import json_file, jsonl, parquet, txt
from sad.data.formats.base import Document

__all__ = ["READERS", "Document", "Reader", "reader_of"]

Reader = Callable[[Path, str, DataConfig], Iterator[Document]]
"""File, its name within the source, configuration -> its documents, in file order.

It raises ``OSError`` for a file that cannot be read, ``UnfitError`` with file and line for content
that is not as the format has it, and ``UsageError`` for a library that is not installed.
"""

READERS: Mapping[str, Reader] = {
    ".txt": txt.read,
    ".jsonl": jsonl.read,
    ".jsonl.gz": jsonl.read,
    ".json": json_file.read,
    ".parquet": parquet.read,
}

assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in READERS), (
    "a suffix begins with a dot and is in lower case, as names are compared"
)


def reader_of(name: str) -> Reader | None:
    """The reader of a file by its name, or None: the longest suffix counts."""
    suffixes = [suffix for suffix in READERS if name.lower().endswith(suffix)]
    return READERS[max(suffixes, key=len)] if suffixes else None
