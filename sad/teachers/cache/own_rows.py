"""The rows that come with a cache: those of an import, whose text is in no other place.

CACHE/rows/train, CACHE/rows/eval    as ``sad.data.rows`` keeps packed rows
"""

from __future__ import annotations

from pathlib import Path

from sad.config.schema import DistillConfig
from sad.data.rows import PackedRows
from sad.errors import UnfitError, UsageError, one_line
from sad.teachers.cache.files import ROWS

FOLDERS = ("train", "eval")


def rows_of_cache(config: DistillConfig) -> tuple[PackedRows, PackedRows] | None:
    """Training and held-out rows of the run's cache; None if it has none of its own.

    Raises ``UsageError`` for a run that names text as well, and ``UnfitError`` for rows that are
    damaged.
    """
    if config.teacher_cache is None:
        return None
    folder = Path(config.teacher_cache).expanduser() / ROWS
    if not folder.is_dir():
        return None
    for key, given in (("train", config.data.train), ("eval", config.data.eval)):
        if given:
            raise UsageError(
                f"data.{key} must be left out with an imported teacher_cache, got "
                f"{', '.join(given)}; the text's tokens lie in {folder}"
            )
    return open_rows(folder)


def open_rows(folder: Path) -> tuple[PackedRows, PackedRows]:
    """The rows in ``folder``; ``UnfitError`` if they are damaged."""
    try:
        train, held_out = (PackedRows(folder / name) for name in FOLDERS)
    except (OSError, ValueError, KeyError) as error:
        raise UnfitError(
            f"{folder} must hold the rows of an import as they were written, got "
            f"'{one_line(error)}'; import them again"
        ) from error
    return train, held_out
