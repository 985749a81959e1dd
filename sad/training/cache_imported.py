"""``sad cache-teacher --import PATH``: targets, and the tokens they belong to, from files.

The cache gets rows of its own, which a run reads in place of the text that ``data`` names: whole
documents, one to a row.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sad.checkpoint import atomic_files as files
from sad.config.cache_options import CacheOptions, ImportFormat
from sad.config.schema import DistillConfig
from sad.data.chat import set_chat_template
from sad.data.rows import PackedRows, cache_directory
from sad.data.token_rows import TokenRowsWriter
from sad.data.tokenizers import fingerprint, load_tokenizer, special_ids, valid_vocab
from sad.distributed.world import ALONE, World
from sad.environment import library_versions, memory_now, resolve_device
from sad.errors import UnfitError, UsageError
from sad.optim.schedule import planned_length
from sad.teachers.cache.facts import CacheFacts, TeacherFacts
from sad.teachers.cache.files import CACHE, COMPLETE, ROWS, SPOOL, Section, read_facts
from sad.teachers.cache.writer import SectionRows
from sad.teachers.fingerprint import HASHES, fingerprint_files
from sad.teachers.foreign.base import Context, ForeignDocument
from sad.teachers.foreign.checks import SAMPLES, ShiftTest, require_same_ids
from sad.teachers.foreign.formats import READERS, format_of
from sad.teachers.foreign.imported import ImportedSource, Spool, require_both, section_of
from sad.teachers.foreign.records import files_of, records_of
from sad.training.cache_layout import (
    begin_cache,
    cache_writer,
    require_same_cache,
    require_space,
    sections_of,
    warn_of_tail,
    with_shards,
)
from sad.training.cache_served import require_temperature_1
from sad.training.inputs import RunInputs, eval_row_numbers

BATCH_ROWS = 32

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
    _require_keys(config, world)
    say = partial(print, flush=True)
    paths = files_of(options.import_path)
    memory = cache_directory(config.data.cache_dir) / HASHES
    hashes = fingerprint_files(paths, memory)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    theirs = {str(path.relative_to(root)): found for path, found in hashes.items()}
    before = read_facts(folder)
    if before is not None and before[0].teacher.fingerprint != theirs:
        raise UsageError(
            f"output must be new, or a cache of the same files, got {folder}, which holds targets "
            f"of {before[0].teacher.name}; choose another --output"
        )
    if before is not None and (folder / COMPLETE).exists():
        say(f"{folder} is whole: nothing to do")
        return folder
    tokenizer = load_tokenizer(config.tokenizer or config.student, config.trust_remote_code_student)
    set_chat_template(tokenizer, config.data)
    context = Context(tokenizer, valid_vocab(tokenizer), root)
    say(f"reading {len(paths):,} files of {options.import_path}")
    with _spool_folder(folder) as spool_folder:
        reading = _Reading(config, options, context, spool_folder)
        with closing(reading), closing(records_of(paths)) as records:
            for record, where in records:
                reading.add(record, where)
            _write(config, options, folder, reading, theirs, shard_bytes)
    return folder


@contextmanager
def _spool_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside of ``folder``, while it is needed."""
    path = folder / SPOOL
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    with files.output_errors(path):
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


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
    train_rows, eval_rows = reading.finish(options.import_path)
    spool, name, context = reading.spool, reading.format, reading.context
    assert spool is not None and name is not None
    inputs = RunInputs(
        tokenizer=context.tokenizer,
        valid_vocab=context.vocab,
        train_rows=train_rows,
        eval_rows=eval_rows,
        teacher=None,
        eval_teacher=None,
        device=resolve_device("cpu"),
        rss_before=memory_now()["rss_bytes"],
    )
    teacher = TeacherFacts(options.import_path, fingerprints, name)
    facts = _facts(config, inputs, teacher, spool.top_k, name, shard_bytes)
    require_same_cache(folder, facts)
    sections = sections_of(config, facts, inputs, planned_length(config, len(train_rows), 1))
    require_space(folder, facts, sections)
    if not ((folder / CACHE).exists() and (folder / ROWS).exists()):
        files.publish_directory(reading.rows_folder, folder / ROWS)
    if not (folder / CACHE).exists():
        tail = spool.tail / max(spool.targets, 1)
        if name in NO_TAIL:
            say(
                f"warning: targets of {name} sum to 1 over {spool.top_k} ids: what the teacher "
                "gave to others is lost, and students of them are biased towards the most likely "
                "ids"
            )
        warn_of_tail(tail, facts, say)
        notes = {
            "versions": library_versions(),
            "tail": tail,
            "format": name,
            "next_token_among_ids": reading.shares,
        }
        begin_cache(folder, facts, notes)
    order: tuple[Section, ...] = ("eval", "train")
    for section in order:
        source = ImportedSource(spool, section, facts)
        part: dict[Section, SectionRows] = {section: sections[section]}
        with cache_writer(folder, facts, part, source, inputs.device, config, ALONE) as writer:
            writer.write_section(section)
            writer.finish()
    say(f"{folder} is whole: {len(train_rows):,} documents, {len(eval_rows):,} held out")


class _Reading:
    """Reads documents into rows and a spool."""

    def __init__(
        self, config: DistillConfig, options: CacheOptions, context: Context, folder: Path
    ) -> None:
        self.format: ImportFormat | None = options.import_format
        self.spool: Spool | None = None
        self.context = context
        self.shares: list[float] = []
        self._config = config
        self._top_k = options.top_k
        self._folder = folder
        self._special = frozenset(special_ids(context.tokenizer))
        self._shift = ShiftTest()
        self._samples: list[list[int]] = []
        self._writers: dict[Section, TokenRowsWriter] = {}
        sections: tuple[Section, ...] = ("train", "eval")
        for section in sections:
            part = self.rows_folder / section
            part.mkdir(parents=True)
            self._writers[section] = TokenRowsWriter(part, context.vocab, config.max_length)

    def add(self, record: dict, where: str) -> None:
        """Read a record, check it, and put it where it belongs."""
        if self.format is None:
            self.format = format_of(record, where)
        document = READERS[self.format](record, self.context, where)
        tokens = document.tokens
        self._check(document, where)
        self._shift.add(document)
        if len(self._samples) < SAMPLES:
            self._samples.append(tokens)
        learned = np.array(document.learned or [True] * len(tokens))
        if not learned[1:].any():
            return
        if self.spool is None:
            top_k = min(self._top_k, document.targets.ids.shape[1])
            self.spool = Spool(self._folder, top_k, self.context.vocab)
        section = section_of(tokens, self._config.data.eval_fraction)
        end = tokens[-1] if tokens[-1] in self._special else None
        self._writers[section].add(
            np.array(tokens), learned, self._target_bytes(tokens, learned), end_token=end
        )
        self.spool.add(section, document.targets)

    @property
    def rows_folder(self) -> Path:
        return self._folder / ROWS

    def finish(self, path: str) -> tuple[PackedRows, PackedRows]:
        """Check what can be said of all documents together; return the rows of both sections."""
        require_both({section: len(rows) for section, rows in self._writers.items()}, path)
        self.shares = self._shift.require_right(path)
        require_same_ids(self._samples, self.context.tokenizer, path)
        return self._writers["train"].finish(), self._writers["eval"].finish()

    def close(self) -> None:
        """Close all files."""
        for one in (*self._writers.values(), self.spool):
            if one is not None:
                one.close()

    def _check(self, document: ForeignDocument, where: str) -> None:
        tokens, vocab = document.tokens, self.context.vocab
        if not 0 <= min(tokens) <= max(tokens) < vocab:
            raise UnfitError(
                f"{where} must hold ids of the tokenizer, below {vocab:,}, got "
                f"{max(tokens, key=abs)}; name the teacher's tokenizer"
            )
        longest = self._config.max_length
        if len(tokens) - 1 > longest:
            raise UnfitError(
                f"{where} must have at most max_length + 1 = {longest + 1:,} tokens, got "
                f"{len(tokens):,}: cut, it would see less than its teacher did; raise max_length"
            )

    def _target_bytes(self, tokens: list[int], learned: np.ndarray) -> int:
        """UTF-8 bytes of the targets' text, about: a character may be cut at the first of them."""
        targets = [token for token, on in zip(tokens[1:], learned[1:], strict=True) if on]
        text: Any = self.context.tokenizer.decode(
            targets, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode())


def _require_keys(config: DistillConfig, world: World) -> None:
    """Refuse keys that do not go with an import."""
    if world.size > 1:
        raise UsageError(
            f"an import must be done by one process, got {world.size}; start it without torchrun"
        )
    require_temperature_1(config, "--import")
    for key, given in (("train", config.data.train), ("eval", config.data.eval)):
        if given:
            raise UsageError(
                f"data.{key} must be left out with --import, got {', '.join(given)}; rows come "
                "with the cache"
            )
    if config.packing:
        raise UsageError(
            "packing must be false with --import, got true; a row is one whole document: write "
            "packing: false"
        )


def _facts(
    config: DistillConfig,
    inputs: RunInputs,
    teacher: TeacherFacts,
    top_k: int,
    name: ImportFormat,
    shard_bytes: int,
) -> CacheFacts:
    facts = CacheFacts(
        kind="sampled" if name in NO_TAIL else "topk",
        codec=None,
        top_k=top_k,
        temperatures=(1.0,),
        seed=config.seed,
        train_rows=inputs.train_rows.fingerprint,
        eval_rows=inputs.eval_rows.fingerprint,
        max_length=config.max_length,
        packing=False,
        tokenizer=fingerprint(inputs.tokenizer),
        valid_vocab=inputs.valid_vocab,
        teacher=teacher,
        head=None,
        order=None,
        subset=None,
        vocab_map=None,
        batch_rows=BATCH_ROWS,
        rows_per_shard=1,
        train_places=len(inputs.train_rows),
        eval_batch_rows=BATCH_ROWS,
        eval_rows_per_shard=1,
        eval_places=len(eval_row_numbers(inputs.eval_rows, config.max_eval_rows)),
    )
    return with_shards(facts, shard_bytes)
