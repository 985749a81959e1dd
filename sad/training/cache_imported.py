"""``sad cache-teacher --import PATH``: targets, and the tokens they belong to, from files.

The cache gets rows of its own, which a run reads in place of the text that ``data`` names: whole
documents, one to a row. Hidden states are ``sad.training.cache_imported_hidden``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from sad.config.cache_options import CacheOptions, ImportFormat
from sad.config.schema import DistillConfig
from sad.data.chat import set_chat_template
from sad.data.rows import PackedRows, cache_directory
from sad.data.tokenizers import load_tokenizer, valid_vocab
from sad.distributed.world import World
from sad.environment import library_versions, resolve_device
from sad.teachers.cache.facts import TeacherFacts
from sad.teachers.fingerprint import HASHES, fingerprint_files
from sad.teachers.foreign.base import Context
from sad.teachers.foreign.checks import ShiftTest
from sad.teachers.foreign.formats import READERS, format_of
from sad.teachers.foreign.imported import ImportedSource, Spool
from sad.teachers.foreign.records import files_of, records_of
from sad.training.cache_layout import warn_of_tail
from sad.training.cache_served import require_temperature_1
from sad.training.imported_rows import (
    ImportedRows,
    import_facts,
    import_inputs,
    is_whole,
    require_import_keys,
    spool_folder,
    write_import,
)

NO_TAIL: frozenset[ImportFormat] = frozenset({"axolotl"})
"""Formats whose probabilities sum to 1 over the K ids: they are kept as weights without a tail."""


def fill_from_files(
    config: DistillConfig, options: CacheOptions, folder: Path, world: World, shard_bytes: int
) -> Path:
    """As ``cache_teacher``, from the files at ``options.import_path``; by one process.

    Raises ``UsageError`` also for keys that do not go with an import, and ``UnfitError`` for files
    that hold no such targets, documents longer than ``max_length``, targets that are not those of
    the next token, and tokens that are not the tokenizer's.
    """
    assert options.import_path is not None
    require_import_keys(config, world)
    require_temperature_1(config, "--import")
    paths = files_of(options.import_path)
    hashes = fingerprint_files(paths, cache_directory(config.data.cache_dir) / HASHES)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    theirs = {str(path.relative_to(root)): found for path, found in hashes.items()}
    if is_whole(folder, theirs):
        print(f"{folder} is whole: nothing to do", flush=True)
        return folder
    tokenizer = load_tokenizer(config.tokenizer or config.student, config.trust_remote_code_student)
    set_chat_template(tokenizer, config.data)
    context = Context(tokenizer, valid_vocab(tokenizer), root)
    print(f"reading {len(paths):,} files of {options.import_path}", flush=True)
    with spool_folder(folder) as spool:
        reading = _Reading(config, options, context, spool)
        with closing(reading), closing(records_of(paths)) as records:
            for record, where in records:
                reading.add(record, where)
            _write(config, options, folder, reading, theirs, shard_bytes)
    return folder


def _write(
    config: DistillConfig,
    options: CacheOptions,
    folder: Path,
    reading: _Reading,
    fingerprints: dict[str, str],
    shard_bytes: int,
) -> None:
    """Write what was read into the cache."""
    assert options.import_path is not None
    say = partial(print, flush=True)
    inputs = import_inputs(
        reading.context, reading.finish(options.import_path), resolve_device("cpu")
    )
    spool, name = reading.spool, reading.format
    assert spool is not None and name is not None
    facts = import_facts(
        config,
        inputs,
        shard_bytes,
        kind="sampled" if name in NO_TAIL else "topk",
        codec=None,
        top_k=spool.top_k,
        temperatures=(1.0,),
        teacher=TeacherFacts(options.import_path, fingerprints, name),
        head=None,
    )

    def notes() -> Mapping[str, Any]:
        tail = spool.tail / max(spool.targets, 1)
        if name in NO_TAIL:
            say(
                f"warning: targets of {name} sum to 1 over {spool.top_k} ids: what the teacher "
                "gave to others is lost, and students of them are biased towards the most likely "
                "ids"
            )
        warn_of_tail(tail, facts, say)
        return {
            "versions": library_versions(),
            "tail": tail,
            "format": name,
            "next_token_among_ids": reading.shares,
        }

    rows = reading.rows.folder
    write_import(config, folder, facts, inputs, rows, notes, partial(ImportedSource, spool, facts))


class _Reading:
    """Reads documents into rows and a spool."""

    def __init__(
        self, config: DistillConfig, options: CacheOptions, context: Context, folder: Path
    ) -> None:
        self.format: ImportFormat | None = options.import_format
        self.spool: Spool | None = None
        self.context = context
        self.rows = ImportedRows(config, context, folder)
        self.shares: list[float] = []
        self._top_k = options.top_k
        self._folder = folder
        self._shift = ShiftTest()

    def add(self, record: dict, where: str) -> None:
        """Read a record, check it, and put it where it belongs."""
        if self.format is None:
            self.format = format_of(record, where)
        document = READERS[self.format](record, self.context, where)
        self.rows.check(document.tokens, where)
        self._shift.add(document)
        section = self.rows.add(document.tokens, document.learned)
        if section is None:
            return
        if self.spool is None:
            top_k = min(self._top_k, document.targets.ids.shape[1])
            self.spool = Spool(self._folder, top_k, self.context.vocab)
        self.spool.add(section, document.targets)

    def finish(self, path: str) -> tuple[PackedRows, PackedRows]:
        """Check what can be said of all documents together; return the rows of both sections."""
        self.rows.require_both(path)
        self.shares = self._shift.require_right(path)
        return self.rows.finish(path)

    def close(self) -> None:
        """Close all files."""
        self.rows.close()
        if self.spool is not None:
            self.spool.close()
