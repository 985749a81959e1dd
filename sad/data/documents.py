"""Text in, documents out: files, folders of them, `datasets` names, the standard library's source.

A document has a name that says where it stands in its source, never where that source lies on this
machine: ``chapter/one.txt``, ``pages.jsonl:17``. What is held out depends on names alone
(``sad.data.split``), so it is the same on every machine. One document is in memory at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TextIO

from sad.config.schema import DataConfig
from sad.environment import quiet_libraries
from sad.errors import UnfitError, UsageError, one_line

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".jsonl", ".parquet")

_CHUNK_CHARS = 1 << 24
_RECORDS_PER_READ = 1024

Side = Literal["train", "eval"]
"""Which key of ``DataConfig`` names the sources."""


class Document(NamedTuple):
    """One text; nothing in it ever sees another."""

    name: str
    text: str


def read_documents(config: DataConfig, side: Side) -> Iterator[Document]:
    """Every document of the sources under ``config.train`` or ``config.eval``.

    Sources come in the order given, files of a folder sorted by path, records in file order.
    Documents that are empty or white space are left out. Text is UTF-8; in text files a byte order
    mark is dropped and line ends become ``\\n``.

    Raises ``UsageError`` for a source that is not there or cannot be read by what is installed, and
    ``UnfitError`` with file and line for content that is not as it must be.
    """
    sources: tuple[str, ...] = getattr(config, side)
    if not sources:
        raise UsageError(
            f"data.{side} must name the text to read, got nothing; give files, folders, the name "
            f"of a data set, or {STDLIB}"
        )
    for index, source in enumerate(sources):
        # Two folders may hold files of one name. The first source needs no mark, so that adding a
        # second does not rename its documents.
        mark = f"{index}:" if index else ""
        for name, text in _read_source(source, config, side):
            if text and not text.isspace():
                yield Document(mark + name, text)


# Sources


def _read_source(source: str, config: DataConfig, side: Side) -> Iterator[Document]:
    path = Path(source).expanduser()
    if source == STDLIB:
        yield from _read_stdlib()
    elif path.is_dir():
        files = _files_under(path, SUFFIXES)
        if not files:
            raise UnfitError(
                f"data.{side} must name folders with {', '.join(SUFFIXES)} files, got none in "
                f"{source}; name another folder"
            )
        for name in files:
            yield from _read_file(path / name, name, config)
    elif path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"data.{side} must name {', '.join(SUFFIXES)} files, got {source}; convert it, or "
                "rename it if it holds plain text"
            )
        yield from _read_file(path, path.name, config)
    elif _looks_like_path(source):
        raise UsageError(
            f"data.{side} must name text that exists, got {source}; no such file or folder"
        )
    else:
        yield from _read_dataset(source, config, side)


def _looks_like_path(source: str) -> bool:
    """Whether this cannot be the name of a data set on the Hub: ``name`` or ``owner/name``."""
    return (
        source.lower().endswith(SUFFIXES)
        or source.startswith((".", "~", os.sep))
        or source.endswith("/")
        or source.count("/") > 1
        or "\\" in source
    )


def _files_under(
    folder: Path, suffixes: tuple[str, ...], skip: Callable[[str], bool] = lambda _: False
) -> list[str]:
    """Sorted paths relative to ``folder``, with ``/``. Hidden and skipped names are passed over."""

    def fail(error: OSError) -> None:
        raise _unreadable(folder, error) from error

    found: list[str] = []
    for parent, subfolders, files in os.walk(folder, onerror=fail):
        subfolders[:] = [name for name in subfolders if not (name.startswith(".") or skip(name))]
        found += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in files
            if name.lower().endswith(suffixes) and not (name.startswith(".") or skip(name))
        ]
    return sorted(found)


def _read_file(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    try:
        match path.suffix.lower():
            case ".txt":
                yield from _read_txt(path, name, config.document_separator)
            case ".jsonl":
                yield from _read_jsonl(path, name, config.text_field)
            case _:
                yield from _read_parquet(path, name, config.text_field)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnfitError:
    reason = error.strerror or str(error)
    return UnfitError(
        f"{path} must be readable, got '{reason}'; check the file and who may read it"
    )


# Formats


def _read_txt(path: Path, name: str, separator: str | None) -> Iterator[Document]:
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
    """``file.read().split(separator)``, holding a document in memory but never the whole file."""
    rest = ""
    while chunk := file.read(_CHUNK_CHARS):
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


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
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
            f"{where} must be a JSON object, got {_kind(record)}; write one object on each line"
        )
    _require_field(field, record, where)
    text = _require_text(record[field], field, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(
            f"{where} must be Unicode text, got half of a surrogate pair in field '{field}'; write "
            "the character itself, or both halves"
        ) from error
    return text


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    pyarrow = _import_extra("pyarrow", f"to read {path}")
    parquet = _import_extra("pyarrow.parquet", f"to read {path}")
    try:
        with parquet.ParquetFile(path) as file:
            _require_field(field, file.schema_arrow.names, str(path))
            values = (
                value.as_py()
                for batch in file.iter_batches(batch_size=_RECORDS_PER_READ, columns=[field])
                for value in batch.column(0)
            )
            for row, value in enumerate(values):
                yield Document(f"{name}:{row}", _require_text(value, field, f"{path}, row {row}"))
    except pyarrow.ArrowException as error:
        raise UnfitError(
            f"{path} must be a valid Parquet file, got '{one_line(error)}'; write it again"
        ) from error


def _read_dataset(name: str, config: DataConfig, side: Side) -> Iterator[Document]:
    datasets = _import_extra("datasets", f"unless '{name}' is a file or folder that exists")
    key = "dataset_split" if side == "train" else "dataset_eval_split"
    try:
        with quiet_libraries():
            dataset = datasets.load_dataset(name, config.dataset_config, split=getattr(config, key))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"data.{side} must name a file, a folder or a data set that can be loaded, got "
            f"'{name}' ({one_line(error)}); check the spelling, data.dataset_config and "
            f"data.{key}, and the connection"
        ) from error
    field = config.text_field
    _require_field(field, dataset.column_names, f"data set {name}")
    for row, record in enumerate(dataset.select_columns([field])):
        text = _require_text(record[field], field, f"data set {name}, row {row}")
        yield Document(f"{name}:{row}", text)


def _read_stdlib() -> Iterator[Document]:
    """The standard library's source, without its tests and without what describes this machine."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in _files_under(root, (".py",), skip=_not_library_source):
        try:
            text = (root / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            continue  # a few files are in other encodings on purpose
        except OSError as error:
            raise _unreadable(root / name, error) from error
        yield Document(name, text)


def _not_library_source(name: str) -> bool:
    return (
        name in ("site-packages", "dist-packages", "__pycache__")
        or name.startswith(("test", "_sysconfigdata", "config-"))
        or name.endswith("_test")
    )


# Checks on records


def _require_field(field: str, fields: Iterable[str], where: str) -> None:
    names = list(fields)
    if field not in names:
        listed = ", ".join(f"'{name}'" for name in names) or "no field"
        raise UnfitError(
            f"{where} must have the field '{field}', got {listed}; set data.text_field to the "
            "field that holds the text"
        )


def _require_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UnfitError(
            f"{where} must hold text in field '{field}', got {_kind(value)}; remove the record, or "
            "set data.text_field to the field that holds the text"
        )
    return value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _import_extra(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"{package} must be installed {purpose}, got '{one_line(error)}'; run: "
            "python -m pip install 'student-aware-distillation[data]'"
        ) from error
