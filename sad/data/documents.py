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
from sad.data.formats import READERS, Document, reader_of
from sad.data.formats.base import columns_to_read, document_of, record_of_row
from sad.data.formats.json_file import NoRecordsError
from sad.data.stdlib import functions_of
from sad.environment import import_extra, quiet_libraries
from sad.errors import UnfitError, UsageError, one_line, printable, quoted

STDLIB = "python-stdlib"
STDLIB_FUNCTIONS = "python-stdlib-functions"

SourceKey = Literal["train", "eval"]
"""The key of ``DataConfig`` that names the sources: ``data.train`` or ``data.eval``."""

Report = Callable[[str], None]
"""What takes a line for the user."""


def read_documents(
    config: DataConfig,
    key: SourceKey,
    report: Report = lambda _: None,
    *,
    run_dir: str | None = None,
) -> Iterator[Document]:
    """The documents of ``read_sources``."""
    return (document for _, document in read_sources(config, key, report, run_dir=run_dir))


def read_sources(
    config: DataConfig,
    key: SourceKey,
    report: Report = lambda _: None,
    *,
    run_dir: str | None = None,
) -> Iterator[tuple[int, Document]]:
    """Every document of the sources under ``config.train`` or ``config.eval``, after the number of
    its source.

    Sources come in the order given, files of a folder sorted by path, records in file order.
    Documents that are empty or white space are left out. Text is UTF-8; in text files a byte order
    mark is dropped and line ends become ``\\n``. ``report`` is told which files of a folder are
    not read. A folder may contain ``run_dir``, the run's own directory, which is no text of it:
    what the run writes would be read by the same run when it is resumed.

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
        for document in _read_source(source, config, key, report, run_dir):
            if not document.is_empty:
                yield index, document._replace(name=prefix + document.name)


# Sources


def _read_source(
    source: str, config: DataConfig, key: SourceKey, report: Report, run_dir: str | None
) -> Iterator[Document]:
    path = Path(os.path.expanduser(source))
    if source == STDLIB:
        yield from _read_stdlib()
    elif source == STDLIB_FUNCTIONS:
        for document in _read_stdlib():
            yield from functions_of(document)
    elif path.is_dir():
        yield from _read_folder(path, config, key, report, run_dir)
    elif path.exists():
        if not path.is_file():
            raise UsageError(
                f"data.{key} must name files and folders, got a pipe or a device, "
                f"{quoted(source)}; write its text into a file"
            )
        if reader_of(path.name) is None:
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


def _read_folder(
    folder: Path, config: DataConfig, key: SourceKey, report: Report, run_dir: str | None
) -> Iterator[Document]:
    left_out: list[str] = []
    readable = False
    if run_dir is not None:
        if os.path.realpath(folder) == os.path.realpath(run_dir):
            raise UsageError(
                f"data.{key} must be another folder than output_dir, got {quoted(str(folder))}, in "
                "which the run writes; choose another output_dir"
            )
        if _is_within(run_dir, folder):
            left_out.append("the run's own directory")
    for name in _files_under(folder, but=run_dir):
        if reader_of(name) is None or _is_pipe(folder / name):
            left_out.append(name)
            continue
        try:
            yield from _read_file(folder / name, name, config)
            readable = True
        except NoRecordsError:  # a configuration, say, that lies beside the text
            left_out.append(name)
    if not readable:
        raise UnfitError(
            f"data.{key} must name folders with {', '.join(READERS)} files of text, got "
            f"{_some(left_out) if left_out else 'none'} in {folder}; name another folder"
        )
    if left_out:
        report(f"data.{key}: not read in {folder}: {_some(left_out)}")


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return printable(", ".join(names[:5])) + more


def _is_pipe(path: Path) -> bool:
    """Whether reading this would wait for a writer, or never end: a pipe, a socket, a device."""
    return path.exists() and not path.is_file()


def _is_within(inner: str, outer: Path) -> bool:
    """Whether a path lies below a folder."""
    return Path(os.path.realpath(outer)) in Path(os.path.realpath(inner)).parents


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
    folder: Path,
    suffixes: tuple[str, ...] = ("",),
    skip: Callable[[str], bool] = lambda _: False,
    *,
    but: str | None = None,
) -> list[str]:
    """Sorted paths relative to ``folder``, with ``/``. Hidden and skipped names are passed over,
    and so is the folder ``but``."""

    def fail(error: OSError) -> None:
        raise _unreadable(folder, error) from error

    def enters(parent: str, name: str) -> bool:
        if name.startswith(".") or skip(name):
            return False
        return left_out is None or os.path.realpath(os.path.join(parent, name)) != left_out

    left_out = None if but is None else os.path.realpath(but)
    found: list[str] = []
    for parent, subfolders, files in os.walk(folder, onerror=fail):
        # Assigned in place: os.walk does not enter the folders removed here.
        subfolders[:] = [name for name in subfolders if enters(parent, name)]
        found += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in files
            if name.lower().endswith(suffixes) and not (name.startswith(".") or skip(name))
        ]
    return sorted(found)


def _read_file(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    try:
        reader = reader_of(path.name)
        assert reader is not None, path
        yield from reader(path, name, config)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnfitError:
    reason = error.strerror or one_line(error)
    return UnfitError(
        f"{path} must be readable, got '{reason}'; check the file and who may read it"
    )


def _read_dataset(name: str, config: DataConfig, key: SourceKey) -> Iterator[Document]:
    """The records of a data set of the Hugging Face Hub; needs ``datasets``."""
    datasets = import_extra("datasets", "data", f"unless '{name}' is a file or folder that exists")
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
    columns = columns_to_read(dataset.column_names, config, f"data set {name}")
    for row, record in enumerate(dataset.select_columns(columns)):
        where = f"data set {name}, row {row}"
        yield document_of(record_of_row(record), config, f"{name}:{row}", where)


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
