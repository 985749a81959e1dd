"""Records of files that other programs have written: JSON lines, Parquet, Arrow.

A folder is read file by file in the order of their names.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from sad.environment import import_extra, stop_if_requested
from sad.errors import UnfitError, UsageError, one_line

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow")
"""Of files of records."""
ROWS_PER_READ = 64

IMPORTING = "the import"
"""What a stop signal interrupts."""


def files_of(path: str, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """The files at ``path``: itself, or those in the folder with one of the ``endings``. Raises
    ``UsageError`` for none."""
    found = Path(path).expanduser()
    if found.is_file():
        return [found]
    if not found.is_dir():
        raise UsageError(f"import must be a file or a folder, got {path}, which does not exist")
    names = sorted(
        one
        for one in found.rglob("*")
        if one.is_file() and one.name.endswith(endings) and not _is_about(one)
    )
    if not names:
        raise UsageError(
            f"import must hold files that end in {', '.join(endings)}, got none in {path}; name "
            "another folder"
        )
    return names


def _is_about(path: Path) -> bool:
    """Files in which ``datasets`` describes a data set."""
    return path.name in ("dataset_info.json", "state.json", "dataset_dict.json")


def records_of(paths: list[Path]) -> Generator[tuple[dict[str, Any], str], None, None]:
    """Each record, and where it is. Raises ``UnfitError`` for a file that cannot be read as what it
    is named."""
    for path in paths:
        read = {".parquet": _parquet, ".arrow": _arrow}.get(path.suffix, _json)
        for number, record in read(path):
            stop_if_requested(IMPORTING)
            if not isinstance(record, dict):
                raise UnfitError(
                    f"{path}:{number} must be a JSON object, got something else; correct the file"
                )
            yield record, f"{path}:{number}"


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a file; a ``.json`` may also be one list."""
    open_it = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_it(path, "rt", encoding="utf-8") as file:
            if path.suffix == ".json":
                content = json.load(file)
                entries = content if isinstance(content, list) else [content]
                yield from enumerate(entries, 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise UnfitError(
            f"{path}:{number} must be JSON, got '{one_line(error)}'; correct the file"
        ) from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    pyarrow = import_extra("pyarrow", "data", f"to read {path}")
    parquet = import_extra("pyarrow.parquet", "data", f"to read {path}")
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=ROWS_PER_READ)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _wrong(path, "Parquet", error) from error


def _arrow(path: Path) -> Iterator[tuple[int, Any]]:
    """A stream of Arrow's, as ``save_to_disk`` of ``datasets`` writes it."""
    pyarrow = import_extra("pyarrow", "data", f"to read {path}")
    ipc = import_extra("pyarrow.ipc", "data", f"to read {path}")
    try:
        with pyarrow.memory_map(str(path)) as source, ipc.open_stream(source) as stream:
            parts = (
                batch.slice(first, ROWS_PER_READ)
                for batch in stream
                for first in range(0, len(batch), ROWS_PER_READ)
            )
            yield from enumerate((row for part in parts for row in part.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _wrong(path, "Arrow", error) from error


def _wrong(path: Path, kind: str, error: Exception) -> UnfitError:
    return UnfitError(f"{path} must be a valid {kind} file, got '{one_line(error)}'; correct it")
