"""Reading documents of text: files, folders of them, `datasets` names, Python's standard library.

A document has a name that says where it stands in its source, never where that source lies on this
machine: ``chapter/one.txt``, ``pages.jsonl:17``. What is held out depends on names alone
(``sad.data.split``), so it is the same on every machine. One document is in memory at a time.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, assert_never

from sad.config.sections import DataConfig
from sad.data.formats import READERS, Document
from sad.data.formats.base import import_extra, require_field, require_text
from sad.environment import quiet_libraries
from sad.errors import UnfitError, UsageError, one_line

STDLIB = "python-stdlib"

SourceKey = Literal["train", "eval"]
"""The key of ``DataConfig`` that names the sources: ``data.train`` or ``data.eval``."""


def read_documents(config: DataConfig, key: SourceKey) -> Iterator[Document]:
    """Every document of the sources under ``config.train`` or ``config.eval``.

    Sources come in the order given, files of a folder sorted by path, records in file order.
    Documents that are empty or white space are left out. Text is UTF-8; in text files a byte order
    mark is dropped and line ends become ``\\n``.

    Raises ``UsageError`` for a source that is not there or cannot be read by what is installed, and
    ``UnfitError`` with file and line for content that is not as its format has it.
    """
    sources: tuple[str, ...] = getattr(config, key)
    if not sources:
        raise UsageError(
            f"data.{key} must name the text to read, got nothing; give files, folders, the name "
            f"of a data set, or {STDLIB}"
        )
    for index, source in enumerate(sources):
        # Two folders may hold files of one name. The first source needs no prefix, so that adding
        # a second does not rename its documents.
        prefix = f"{index}:" if index else ""
        for name, text in _read_source(source, config, key):
            if text and not text.isspace():
                yield Document(prefix + name, text)


# Sources


def _read_source(source: str, config: DataConfig, key: SourceKey) -> Iterator[Document]:
    path = Path(source).expanduser()
    if source == STDLIB:
        yield from _read_stdlib()
    elif path.is_dir():
        files = _files_under(path, tuple(READERS))
        if not files:
            raise UnfitError(
                f"data.{key} must name folders with {', '.join(READERS)} files, got none in "
                f"{source}; name another folder"
            )
        for name in files:
            yield from _read_file(path / name, name, config)
    elif path.exists():
        if path.suffix.lower() not in READERS:
            raise UsageError(
                f"data.{key} must name {', '.join(READERS)} files, got {source}; convert it, or "
                "rename it if it holds plain text"
            )
        yield from _read_file(path, path.name, config)
    elif _looks_like_path(source):
        raise UsageError(
            f"data.{key} must name text that exists, got {source}; no such file or folder"
        )
    else:
        yield from _read_dataset(source, config, key)


def _looks_like_path(source: str) -> bool:
    """Whether this cannot be the name of a data set on the Hub: ``name`` or ``owner/name``."""
    return (
        source.lower().endswith(tuple(READERS))
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
        # Assigned in place: os.walk does not enter the folders removed here.
        subfolders[:] = [name for name in subfolders if not (name.startswith(".") or skip(name))]
        found += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in files
            if name.lower().endswith(suffixes) and not (name.startswith(".") or skip(name))
        ]
    return sorted(found)


def _read_file(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    try:
        yield from READERS[path.suffix.lower()](path, name, config)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnfitError:
    reason = error.strerror or str(error)
    return UnfitError(
        f"{path} must be readable, got '{reason}'; check the file and who may read it"
    )


def _read_dataset(name: str, config: DataConfig, key: SourceKey) -> Iterator[Document]:
    """The records of a data set of the Hugging Face Hub; needs ``datasets``."""
    datasets = import_extra("datasets", f"unless '{name}' is a file or folder that exists")
    match key:
        case "train":
            split_key, split = "dataset_split", config.dataset_split
        case "eval":
            split_key, split = "dataset_eval_split", config.dataset_eval_split
        case _:
            assert_never(key)
    try:
        with quiet_libraries():
            dataset = datasets.load_dataset(name, config.dataset_config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"data.{key} must name a file, a folder or a data set that can be loaded, got "
            f"'{name}' ({one_line(error)}); check the spelling, data.dataset_config and "
            f"data.{split_key}, and the connection"
        ) from error
    field = config.text_field
    require_field(field, dataset.column_names, f"data set {name}")
    for row, record in enumerate(dataset.select_columns([field])):
        text = require_text(record[field], field, f"data set {name}, row {row}")
        yield Document(f"{name}:{row}", text)


def _read_stdlib() -> Iterator[Document]:
    """The standard library's source, without its tests and without what describes this machine."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in _files_under(root, (".py",), skip=_is_no_library_source):
        try:
            text = (root / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            continue  # a few files are in other encodings on purpose
        except OSError as error:
            raise _unreadable(root / name, error) from error
        yield Document(name, text)


def _is_no_library_source(name: str) -> bool:
    return (
        name in ("site-packages", "dist-packages", "__pycache__")
        or name.startswith(("test", "_sysconfigdata", "config-"))
        or name.endswith("_test")
    )
