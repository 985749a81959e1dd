"""What every import into a teacher's cache has in common: rows of its own, and how it is written.

A row is one whole document. The rows are spooled beside the cache, and become part of it when all
of the files have been read and found right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sad.checkpoint import atomic_files as files
from sad.config.schema import DistillConfig
from sad.data.rows import PackedRows
from sad.data.token_rows import TokenRowsWriter
from sad.data.tokenizers import fingerprint, special_ids
from sad.distributed.world import ALONE, World
from sad.environment import memory_now
from sad.errors import UnfitError, UsageError
from sad.optim.schedule import planned_length
from sad.teachers.cache.facts import CacheFacts
from sad.teachers.cache.files import CACHE, COMPLETE, ROWS, SPOOL, Section, read_facts
from sad.teachers.cache.source import Source
from sad.teachers.cache.writer import SectionRows
from sad.teachers.foreign.base import Context
from sad.teachers.foreign.checks import SAMPLES, require_same_ids
from sad.teachers.foreign.imported import require_both, section_of
from sad.training.cache_layout import (
    begin_cache,
    cache_writer,
    require_same_cache,
    require_space,
    sections_of,
    with_shards,
)
from sad.training.inputs import RunInputs, eval_row_numbers

BATCH_ROWS = 32


def require_import_keys(config: DistillConfig, world: World) -> None:
    """Raise ``UsageError`` for keys that do not go with an import, and for several processes."""
    if world.size > 1:
        raise UsageError(
            f"an import must be done by one process, got {world.size}; start it without torchrun"
        )
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


def is_whole(folder: Path, fingerprints: Mapping[str, str], of: str = "files") -> bool:
    """Whether the import that the folder holds has been finished.

    Raises ``UsageError`` if it has other ``fingerprints``: those ``of`` the files, and what else
    decides its records.
    """
    before = read_facts(folder)
    if before is not None and before[0].teacher.fingerprint != fingerprints:
        raise UsageError(
            f"output must be new, or a cache of the same {of}, got {folder}, which holds targets "
            f"of {before[0].teacher.name}; choose another --output"
        )
    return before is not None and (folder / COMPLETE).exists()


@contextmanager
def spool_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside of ``folder``, while it is needed."""
    path = folder / SPOOL
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    with files.output_errors(path):
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class ImportedRows:
    """Documents on their way into rows, those of training and the held-out ones apart."""

    def __init__(self, config: DistillConfig, context: Context, spool: Path) -> None:
        self.folder = spool / ROWS
        self._config = config
        self._context = context
        self._special = frozenset(special_ids(context.tokenizer))
        self._samples: list[list[int]] = []
        self._writers: dict[Section, TokenRowsWriter] = {}
        sections: tuple[Section, ...] = ("train", "eval")
        for section in sections:
            part = self.folder / section
            part.mkdir(parents=True)
            self._writers[section] = TokenRowsWriter(part, context.vocab, config.max_length)

    def check(self, tokens: list[int], where: str) -> None:
        """Raise ``UnfitError`` for a document of ids that the tokenizer has not, or of too many."""
        vocab, longest = self._context.vocab, self._config.max_length
        strange = next((token for token in tokens if not 0 <= token < vocab), None)
        if strange is not None:
            raise UnfitError(
                f"{where} must hold ids of the tokenizer, below {vocab:,}, got {strange}; name the "
                "teacher's tokenizer"
            )
        if len(tokens) - 1 > longest:
            raise UnfitError(
                f"{where} must have at most max_length + 1 = {longest + 1:,} tokens, got "
                f"{len(tokens):,}: cut, it would see less than its teacher did; raise max_length"
            )

    def add(self, tokens: list[int], learned: list[bool] | None = None) -> Section | None:
        """Make a document that was checked the next row of its section, which is returned; None if
        nothing of it is ``learned``."""
        if len(self._samples) < SAMPLES:
            self._samples.append(tokens)
        on = np.array(learned or [True] * len(tokens))
        if not on[1:].any():
            return None
        section = section_of(tokens, self._config.data.eval_fraction)
        end = tokens[-1] if tokens[-1] in self._special else None
        self._writers[section].add(
            np.array(tokens), on, self._target_bytes(tokens, on), end_token=end
        )
        return section

    def require_both(self, path: object) -> None:
        """Raise ``UnfitError`` unless there are rows of both sections."""
        require_both({section: len(rows) for section, rows in self._writers.items()}, path)

    def finish(self, path: object) -> tuple[PackedRows, PackedRows]:
        """The rows of both sections; ``UnfitError`` unless their ids are those of the tokenizer."""
        require_same_ids(self._samples, self._context.tokenizer, path)
        return self._writers["train"].finish(), self._writers["eval"].finish()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()

    def _target_bytes(self, tokens: list[int], learned: np.ndarray) -> int:
        """UTF-8 bytes of the targets' text, about: a character may be cut at the first of them."""
        targets = [token for token, on in zip(tokens[1:], learned[1:], strict=True) if on]
        text: Any = self._context.tokenizer.decode(
            targets, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode())


def import_inputs(
    context: Context, rows: tuple[PackedRows, PackedRows], device: torch.device
) -> RunInputs:
    """The inputs of a run over imported rows, without a teacher."""
    train_rows, eval_rows = rows
    return RunInputs(
        tokenizer=context.tokenizer,
        valid_vocab=context.vocab,
        train_rows=train_rows,
        eval_rows=eval_rows,
        teacher=None,
        eval_teacher=None,
        device=device,
        rss_before=memory_now()["rss_bytes"],
    )


def import_facts(
    config: DistillConfig, inputs: RunInputs, shard_bytes: int, **of_targets: Any
) -> CacheFacts:
    """The facts of a cache of imported rows; ``of_targets`` are those that depend on its kind."""
    facts = CacheFacts(
        seed=config.seed,
        train_rows=inputs.train_rows.fingerprint,
        eval_rows=inputs.eval_rows.fingerprint,
        max_length=config.max_length,
        packing=False,
        tokenizer=fingerprint(inputs.tokenizer),
        valid_vocab=inputs.valid_vocab,
        order=None,
        subset=None,
        vocab_map=None,
        cross_tokenizer=None,
        batch_rows=BATCH_ROWS,
        rows_per_shard=1,
        train_places=len(inputs.train_rows),
        eval_batch_rows=BATCH_ROWS,
        eval_rows_per_shard=1,
        eval_places=len(eval_row_numbers(inputs.eval_rows, config.max_eval_rows)),
        **of_targets,
    )
    return with_shards(facts, shard_bytes, 0 if facts.head is None else facts.head.width)


def imported_sections(
    config: DistillConfig, facts: CacheFacts, inputs: RunInputs
) -> dict[Section, SectionRows]:
    """The rows of both sections, by the number of a batch."""
    return sections_of(config, facts, inputs, planned_length(config, len(inputs.train_rows), 1))


def write_import(
    config: DistillConfig,
    folder: Path,
    facts: CacheFacts,
    inputs: RunInputs,
    rows_folder: Path,
    notes: Callable[[], Mapping[str, Any]],
    source_of: Callable[[Section], Source],
) -> None:
    """Write the cache of these ``facts``: its rows, which lie in ``rows_folder``, and ``notes``,
    both unless they are there, then the records that the source of each section makes."""
    say = partial(print, flush=True)
    require_same_cache(folder, facts)
    sections = imported_sections(config, facts, inputs)
    require_space(folder, facts, sections, 0 if facts.head is None else facts.head.width)
    if not ((folder / CACHE).exists() and (folder / ROWS).exists()):
        files.publish_directory(rows_folder, folder / ROWS)
    if not (folder / CACHE).exists():
        begin_cache(folder, facts, notes())
    order: tuple[Section, ...] = ("eval", "train")
    for section in order:
        source = source_of(section)
        part: dict[Section, SectionRows] = {section: sections[section]}
        with cache_writer(folder, facts, part, source, inputs.device, config, ALONE) as writer:
            writer.write_section(section)
            writer.finish()
    train, held_out = len(inputs.train_rows), len(inputs.eval_rows)
    say(f"{folder} is whole: {train:,} documents, {held_out:,} held out")
