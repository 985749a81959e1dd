"""File formats that text is read from: suffix of a file's name -> reader.

To add a format: a module here with a function ``read`` of the type ``Reader``, and its row in
``READERS``. A reader of records takes the field that holds the text from ``config.text_field`` and
checks each with ``require_field`` and ``require_text`` of ``sad.data.formats.base``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sad.config.sections import DataConfig
from sad.data.formats import jsonl, parquet, txt
from sad.data.formats.base import Document

__all__ = ["READERS", "Document", "Reader"]

Reader = Callable[[Path, str, DataConfig], Iterator[Document]]
"""File, its name within the source, configuration -> its documents, in file order.

It raises ``OSError`` for a file that cannot be read, ``UnfitError`` with file and line for content
that is not as the format has it, and ``UsageError`` for a library that is not installed.
"""

READERS: Mapping[str, Reader] = {
    ".txt": txt.read,
    ".jsonl": jsonl.read,
    ".parquet": parquet.read,
}

assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in READERS), (
    "a suffix begins with a dot and is in lower case, as names are compared"
)
