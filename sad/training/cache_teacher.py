"""``sad cache-teacher``: run the teacher once over a recipe's text and keep its targets.

    sad cache-teacher FILE.yaml --output DIR
    sad distill FILE.yaml --teacher_cache DIR

The same file serves both: what it says of text, tokenizer, rows and objective decides what is
cached, and a run whose file says otherwise is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sad.checkpoint import atomic_files as files
from sad.checkpoint.run_lock import run_lock
from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.data.rows import PackedRows, cache_directory
from sad.data.tokenizers import fingerprint
from sad.distributed.world import ALONE, World, use_own_device, whole_world
from sad.environment import StopSignals, library_versions, resolve_device
from sad.errors import OutputError, UsageError
from sad.models.load import teacher_dtype
from sad.optim.schedule import RunLength, planned_length
from sad.teachers.cache.facts import CacheFacts, HeadFacts, RunOrder, TeacherFacts
from sad.teachers.cache.files import (
    CACHE,
    COMPLETE,
    HEAD,
    SHARD_BYTES,
    Section,
    read_facts,
    shards_of,
    write_tensors,
)
from sad.teachers.cache.source import TeacherSource, inputs_of, make_codec, position_bytes
from sad.teachers.cache.verify import Checked, compare_with_teacher
from sad.teachers.cache.writer import CacheWriter, SectionRows
from sad.teachers.fingerprint import HASHES, fingerprint_file
from sad.teachers.frozen import FrozenTeacher
from sad.training.batches import TrainBatches
from sad.training.evaluate import evaluate_teacher, require_finite_score
from sad.training.inputs import RunInputs, eval_row_numbers, load_inputs

TAIL_SHARE = 0.05
"""Mass beyond the K most likely ids above which top-k targets are worth a warning."""


def cache_teacher(
    config: DistillConfig, options: CacheOptions, *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the targets of ``config.teacher`` on the text of ``config`` to ``options.output``.

    A cache that is there and unfinished is finished; one of other facts is refused, and one that is
    whole is left alone. Under torchrun the shards are shared out, each process with a teacher of
    its own. Raises ``UsageError``, ``UnfitError``, ``OutputError``, and ``StoppedError`` after a
    signal: the same command then goes on.
    """
    if not config.loads_teacher:
        raise UsageError(
            "teacher must be given, and teacher_cache left out, to cache a teacher's targets, got "
            f"teacher={config.teacher} and teacher_cache={config.teacher_cache}; correct the file"
        )
    use_own_device()
    folder = Path(options.output).expanduser()
    with (
        whole_world(
            resolve_device(config.device).type, timeout_seconds=config.ddp_timeout
        ) as world,
        StopSignals(),
    ):
        world.from_main(lambda: files.probe_writable(folder))
        if not world.main:
            return _fill(config, options, folder, world, shard_bytes)
        with run_lock(folder, print):
            files.sweep_directory(folder)
            return _fill(config, options, folder, world, shard_bytes)


def _fill(
    config: DistillConfig, options: CacheOptions, folder: Path, world: World, shard_bytes: int
) -> Path:
    say = partial(print, flush=True) if world.main else lambda _: None
    # Each process has a whole teacher of its own; nothing is exchanged from here on.
    inputs = world.main_first(partial(load_inputs, config, say, ALONE))
    teacher = inputs.frozen_teacher
    assert teacher is not None
    length = planned_length(config, len(inputs.train_rows), 1)
    facts = world.main_first(
        partial(_facts, config, options, inputs, teacher, length, folder, shard_bytes)
    )
    sections = _sections(config, facts, inputs, length)
    per_shard = sections["train"].shards.names()
    world.from_main(partial(_require_same_cache, folder, facts))
    if options.check:
        found = compare_with_teacher(folder, facts, sections, inputs.device, teacher)
        say(f"{folder} holds the targets of {facts.teacher.name}: {_checked(found)}")
        return folder
    if (folder / COMPLETE).exists():
        say(f"{folder} is whole: nothing to do")
        return folder
    world.from_main(partial(_require_space, folder, facts, sections, options, teacher))
    world.main_first(partial(_begin, config, options, folder, facts, inputs, teacher, say))

    def first_batches() -> Iterator[Batch]:
        rows = sections["train"]
        for shard in range(len(rows.shards)):
            for _, numbers in rows.batches(shard):
                yield inputs.train_rows.batch(numbers).to(inputs.device)

    codec = world.main_first(partial(make_codec, facts, folder, teacher, first_batches))
    mine = sum(
        rows.positions(number)
        for section, rows in sections.items()
        for number in range(world.rank, len(rows.shards), world.size)
        if not (options.window and section == "train")
        and not (folder / rows.shards.name(number)).exists()
    )
    with tqdm(
        total=mine, unit=" positions", unit_scale=True, disable=not world.main or None, leave=False
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        writer = CacheWriter(
            folder,
            facts,
            sections,
            TeacherSource(teacher, facts, codec),
            inputs.device,
            memory=cache_directory(config.data.cache_dir) / HASHES,
            rank=world.rank,
            ranks=world.size,
            advance=advance,
        )
        if options.window:
            writer.write_window(
                options.window, config.teacher_wait, wait_for_reader=options.wait_for_reader
            )
        else:
            writer.write_all()
    done = (folder / COMPLETE).exists()
    if options.window:
        say(f"{folder}: the student needs no more")
    elif done:
        say(f"{folder} is whole: {len(per_shard)} shards of {facts.kind} targets")
    return folder


def _facts(
    config: DistillConfig,
    options: CacheOptions,
    inputs: RunInputs,
    teacher: FrozenTeacher,
    length: RunLength,
    folder: Path,
    shard_bytes: int,
) -> CacheFacts:
    """The facts of the cache that is asked for."""
    head = teacher.head()
    temperatures: tuple[float, ...] = ()
    if options.kind != "hidden":
        temperatures = options.temperatures or (config.temperature,)
    if options.kind == "topk":  # evaluations read them at 1
        temperatures = tuple(sorted({1.0, *temperatures}))
    order = None
    if options.window:
        order = RunOrder(config.seed, length.micro_batches, length.batch_size)
    batch_rows = length.batch_size
    attention = getattr(teacher.model.config, "_attn_implementation", None)
    facts = CacheFacts(
        kind=options.kind,
        codec=options.codec_or_default,
        top_k=None if options.kind == "hidden" else options.top_k,
        temperatures=temperatures,
        seed=config.seed,
        train_rows=inputs.train_rows.fingerprint,
        eval_rows=inputs.eval_rows.fingerprint,
        max_length=config.max_length,
        packing=config.packing,
        tokenizer=fingerprint(inputs.tokenizer),
        valid_vocab=inputs.valid_vocab,
        vocab_map=inputs.vocabulary,
        teacher=TeacherFacts(
            config.teacher or "",
            inputs.teacher_fingerprint or {},
            str(teacher_dtype(config)).removeprefix("torch."),
            attention=attention,
        ),
        head=_head_facts(teacher, folder) if options.kind == "hidden" else None,
        order=order,
        batch_rows=batch_rows,
        rows_per_shard=1,
        train_places=len(inputs.train_rows) if order is None else length.micro_batches * batch_rows,
        eval_batch_rows=config.per_device_eval_batch_size,
        eval_rows_per_shard=1,
        eval_places=len(eval_row_numbers(inputs.eval_rows, config.max_eval_rows)),
    )
    width = head.weight.shape[1]

    def rows(kind: Any, batch: int) -> int:
        per_batch = position_bytes(facts, kind, width) * config.max_length * batch
        return max(shard_bytes // per_batch, 1) * batch

    return replace(
        facts,
        rows_per_shard=rows(facts.kind, facts.batch_rows),
        eval_rows_per_shard=rows(facts.eval_kind, facts.eval_batch_rows),
    )


def _head_facts(teacher: FrozenTeacher, folder: Path) -> HeadFacts:
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


def _sections(
    config: DistillConfig, facts: CacheFacts, inputs: RunInputs, length: RunLength
) -> dict[Section, SectionRows]:
    """The rows of both sections, by the number of a batch."""
    scored = eval_row_numbers(inputs.eval_rows, config.max_eval_rows)

    def part(rows: PackedRows, of: np.ndarray, size: int) -> Any:
        return lambda batch: of[batch * size : (batch + 1) * size]

    numbers = part(inputs.train_rows, np.arange(len(inputs.train_rows)), facts.batch_rows)
    if facts.order is not None:
        batches = TrainBatches(config, inputs.train_rows, length, inputs.device)
        numbers = batches.row_numbers
    return {
        "eval": SectionRows(
            shards_of(facts, "eval"),
            inputs.eval_rows,
            part(inputs.eval_rows, scored, facts.eval_batch_rows),
        ),
        "train": SectionRows(shards_of(facts, "train"), inputs.train_rows, numbers),
    }


def _require_same_cache(folder: Path, facts: CacheFacts) -> None:
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


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require_space(
    folder: Path,
    facts: CacheFacts,
    sections: dict[Section, SectionRows],
    options: CacheOptions,
    teacher: FrozenTeacher,
) -> None:
    """Say how large the cache becomes; raise ``OutputError`` if there is no room for it."""
    width = teacher.head().weight.shape[1]
    needed = there = positions = 0
    for section, rows in sections.items():
        each = position_bytes(facts, rows.shards.kind, width)
        count = int(rows.rows.lengths.sum()) if section == "train" else _positions(rows)
        if section == "train" and options.window:
            count = min(facts.rows_per_shard * options.window * facts.max_length, count)
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


def _begin(
    config: DistillConfig,
    options: CacheOptions,
    folder: Path,
    facts: CacheFacts,
    inputs: RunInputs,
    teacher: FrozenTeacher,
    say: Any,
) -> None:
    """Write ``cache.json``, if it is not there: facts, and how the teacher scores."""
    if (folder / CACHE).exists():
        return
    scored = inputs.scored(config)["rows"]
    say(f"scoring the teacher on {scored:,} held-out rows")
    begun = time.monotonic()
    scores = evaluate_teacher(teacher, inputs.eval_batches(config, "scoring the teacher"))
    require_finite_score(scores, "eval_teacher", "the teacher")
    seconds = (time.monotonic() - begun) / max(scored, 1)
    rows = facts.train_places
    say(f"{rows:,} rows take about {rows * seconds / 60:,.0f} minutes, and the targets' selection")
    notes = {
        "versions": library_versions(),
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "model_type": teacher.model.config.model_type,
        "scores": scores,
        "scored_rows": scored,
        "window": options.window,
    }
    if facts.vocab_map is not None:
        notes["vocabulary"] = list(inputs.tokenizer_notes)
    if facts.kind == "topk":
        notes["tail"] = share = _mean_tail(config, facts, inputs, teacher)
        if share > TAIL_SHARE:
            say(
                f"warning: {100 * share:.0f} % of the teacher's mass lies beyond its "
                f"{facts.top_k} most likely ids: a student of these targets learns less than one "
                "of --kind sampled of the same size"
            )
    files.write_atomic(folder / CACHE, facts.to_json(notes))


def _mean_tail(
    config: DistillConfig, facts: CacheFacts, inputs: RunInputs, teacher: FrozenTeacher
) -> float:
    """Mean mass beyond the K most likely ids at temperature 1, in the first held-out batch."""
    batch = next(iter(inputs.eval_batches(config)))
    records = TeacherSource(teacher, facts).records(
        batch, "topk", torch.zeros(int(batch.lengths.sum()), dtype=torch.float64)
    )
    learned = (batch.labels >= 0).cpu()[inputs_of(batch)]
    tail = records["tail"][learned][:, facts.temperatures.index(1.0)]
    return float(tail.mean()) if len(tail) else 0.0


def _checked(found: Checked) -> str:
    if found.error is not None:
        return f"hidden states of {found.batches} batches err by {found.error:.2g}, relative"
    share = 100 * (found.agreement or 0.0)
    return f"{share:.1f} % of the ids of {found.batches} batches are the same"
