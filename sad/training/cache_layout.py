"""What every way to fill a teacher's cache has in common: shards, their rows, room on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sad.checkpoint import atomic_files as files
from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.data.rows import cache_directory
from sad.distributed.world import World
from sad.errors import OutputError, UsageError, printable, shortened
from sad.optim.schedule import RunLength
from sad.teachers.cache.facts import CacheFacts, HeadFacts, Subset
from sad.teachers.cache.files import (
    CACHE,
    COMPLETE,
    HEAD,
    Section,
    read_facts,
    shards_of,
    write_tensors,
)
from sad.teachers.cache.source import Source, position_bytes
from sad.teachers.cache.verify import Checked, compare_with_teacher
from sad.teachers.cache.writer import CacheWriter, SectionRows, say_alive
from sad.teachers.fingerprint import HASHES, fingerprint_file
from sad.teachers.frozen import FrozenTeacher
from sad.training.batches import TrainBatches
from sad.training.inputs import RunInputs, eval_row_numbers

TAIL_SHARE = 0.05
"""Mass beyond the K most likely ids above which top-k targets are worth a warning."""


def with_shards(facts: CacheFacts, shard_bytes: int, width: int = 0) -> CacheFacts:
    """The facts with as many rows to a shard as ``shard_bytes`` hold, in whole batches; ``width``
    is that of hidden states."""

    def rows(kind: Any, batch: int) -> int:
        per_batch = position_bytes(facts, kind, width) * facts.max_length * batch
        return max(shard_bytes // per_batch, 1) * batch

    return replace(
        facts,
        rows_per_shard=rows(facts.kind, facts.batch_rows),
        eval_rows_per_shard=rows(facts.eval_kind, facts.eval_batch_rows),
    )


def scored_places(config: DistillConfig, inputs: RunInputs) -> int:
    """Held-out rows that a cache holds: those that a run scores, if it can score by the cache."""
    if config.cross_tokenizer == "likelihood":
        return 0
    return len(eval_row_numbers(inputs.eval_rows, config.max_eval_rows))


def rows_to_cache(
    inputs: RunInputs, config: DistillConfig, length: RunLength, options: CacheOptions
) -> tuple[Subset | None, int]:
    """Which training rows a cache holds, None for all of them, and how many: without ``all_rows``
    those that the configured run reads."""
    count = len(inputs.train_rows)
    read = length.micro_batches * length.batch_size
    if read >= count or options.all_rows:
        return None, count
    return Subset(config.seed, read, count), read


def begin_cache(folder: Path, facts: CacheFacts, notes: Mapping[str, Any]) -> None:
    """Write ``cache.json``, and a sign of life first: whoever sees a cache sees that it grows."""
    say_alive(folder)
    files.write_atomic(folder / CACHE, facts.to_json(notes))


def write_head(teacher: FrozenTeacher, folder: Path) -> HeadFacts:
    """Write the teacher's head, if it is not there, and say what it is."""
    head, path = teacher.head(), folder / HEAD
    if not path.exists():
        tensors = {"weight": head.weight.detach().cpu().contiguous()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach().cpu().contiguous()
        write_tensors(path, tensors)
    return HeadFacts(
        fingerprint_file(path), head.weight.shape[1], float(head.logit_scale), head.softcap
    )


def sections_of(
    config: DistillConfig, facts: CacheFacts, inputs: RunInputs, length: RunLength
) -> dict[Section, SectionRows]:
    """The rows of both sections, by the number of a batch."""
    scored = eval_row_numbers(inputs.eval_rows, config.max_eval_rows)[: facts.eval_places]

    def part(of: np.ndarray, size: int) -> Any:
        return lambda batch: of[batch * size : (batch + 1) * size]

    chosen = np.arange(facts.train_places) if facts.subset is None else facts.subset.numbers()
    numbers = part(chosen, facts.batch_rows)
    if facts.order is not None:
        batches = TrainBatches(config, inputs.train_rows, length, inputs.device)
        numbers = batches.row_numbers
    return {
        "eval": SectionRows(
            shards_of(facts, "eval"),
            inputs.eval_rows,
            part(scored, facts.eval_batch_rows),
        ),
        "train": SectionRows(shards_of(facts, "train"), inputs.train_rows, numbers),
    }


@contextmanager
def cache_writer(
    folder: Path,
    facts: CacheFacts,
    sections: dict[Section, SectionRows],
    source: Source,
    device: torch.device,
    config: DistillConfig,
    world: World,
    *,
    window: int = 0,
) -> Iterator[CacheWriter]:
    """The writer of this process's shards, with a bar on a terminal while it is used."""
    mine = sum(
        rows.positions(number)
        for section, rows in sections.items()
        for number in range(world.rank, len(rows.shards), world.size)
        if not (window and section == "train") and not (folder / rows.shards.name(number)).exists()
    )
    with tqdm(
        total=mine, unit=" positions", unit_scale=True, disable=not world.main or None, leave=False
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield CacheWriter(
            folder,
            facts,
            sections,
            source,
            device,
            memory=cache_directory(config.data.cache_dir) / HASHES,
            world=world,
            advance=advance,
        )


def require_same_cache(folder: Path, facts: CacheFacts) -> None:
    """Raise ``UsageError`` if another cache lies in the folder."""
    found = read_facts(folder)
    if found is None or found[0].plan == facts.plan:
        return
    theirs, ours = vars(found[0]), vars(facts)
    name = next(name for name in ours if theirs[name] != ours[name])
    raise UsageError(
        f"output must be new, or a cache of the same teacher and text, got {folder} with {name} "
        f"{_shown(theirs[name])} where {_shown(ours[name])} is asked for; choose another --output"
    )


def require_space(
    folder: Path,
    facts: CacheFacts,
    sections: dict[Section, SectionRows],
    width: int = 0,
    window: int = 0,
) -> None:
    """Say how large the cache becomes; raise ``OutputError`` if there is no room for it.

    ``width`` is that of hidden states, ``window`` the shards that are kept at a time; 0: all.
    """
    needed = there = positions = 0
    for section, rows in sections.items():
        each = position_bytes(facts, rows.shards.kind, width)
        count = _positions(rows)
        if section == "train" and window:
            count = min(facts.rows_per_shard * window * facts.max_length, count)
        positions += count
        needed += count * each
        there += sum(
            (folder / name).stat().st_size
            for name in rows.shards.names()
            if (folder / name).exists()
        )
    free = files.free_bytes(folder)
    each = position_bytes(facts, facts.kind, width)
    print(
        f"{positions:,} positions of {each} bytes: {needed / 2**30:,.2f} GiB in {folder}"
        + ("" if free is None else f", where {free / 2**30:,.1f} GiB are free"),
        flush=True,
    )
    if free is not None and free + there < needed:
        raise OutputError(
            f"output must have room for {needed / 2**30:,.2f} GiB of targets, got "
            f"{free / 2**30:,.2f} GiB free for {folder}; free space, choose another --output, or "
            "lower --top_k"
        )


def _positions(rows: SectionRows) -> int:
    return sum(rows.positions(shard) for shard in range(len(rows.shards)))


def _shown(value: object) -> str:
    return shortened(printable(str(value)), 60)


def warn_of_tail(share: float, facts: CacheFacts, say: Any, than: str = "") -> None:
    """Say so if much of the mass, a ``share``, lies beyond the K ids that are kept."""
    if share > TAIL_SHARE:
        less = f"a student of these targets learns less {than}" if than else "raise --top_k"
        say(
            f"warning: {100 * share:.0f} % of the teacher's mass lies beyond its {facts.top_k} "
            f"most likely ids: {less}"
        )


def nothing_to_write(
    folder: Path,
    facts: CacheFacts,
    sections: dict[Section, SectionRows],
    device: torch.device,
    teacher: FrozenTeacher | Source,
    say: Callable[[str], None],
    *,
    check: bool,
) -> bool:
    """Whether the command ends here: with ``check``, once some batches were compared with the
    teacher, and for a cache that is whole."""
    if check:
        found = compare_with_teacher(folder, facts, sections, device, teacher)
        say(f"{folder} holds the targets of {facts.teacher.name}: {describe_check(found)}")
        return True
    if (folder / COMPLETE).exists():
        say(f"{folder} is whole: nothing to do")
        return True
    return False


def describe_check(found: Checked) -> str:
    """What a comparison with the teacher has found, in words."""
    if found.error is not None:
        return f"hidden states of {found.batches} batches err by {found.error:.2g}, relative"
    share = 100 * (found.agreement or 0.0)
    return f"{share:.1f} % of the {found.compared} of {found.batches} batches are the same"
