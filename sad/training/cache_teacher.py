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

import torch
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.run_lock import run_lock
from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.data.tokenizers import fingerprint
from sad.distributed.world import ALONE, World, lost_ranks_explained, use_own_device, whole_world
from sad.environment import StopSignals, library_versions, resolve_device
from sad.errors import UsageError, quoted
from sad.models.load import teacher_dtype
from sad.models.quantization import parameter_count
from sad.optim.schedule import RunLength, planned_length
from sad.teachers.cache.facts import CacheFacts, RunOrder, TeacherFacts
from sad.teachers.cache.files import (
    BASIS,
    CACHE,
    COMPLETE,
    HEAD,
    READER,
    SHARD_BYTES,
    strangers,
)
from sad.teachers.cache.source import TeacherSource, final_states, inputs_of, make_codec
from sad.teachers.frozen import FrozenTeacher
from sad.training.cache_imported import fill_from_files
from sad.training.cache_imported_hidden import fill_from_states
from sad.training.cache_layout import (
    begin_cache,
    cache_writer,
    nothing_to_write,
    require_same_cache,
    require_space,
    rows_to_cache,
    scored_places,
    sections_of,
    warn_of_tail,
    with_shards,
    write_head,
)
from sad.training.cache_served import fill_from_server
from sad.training.cross_tokenizer import require_cached_comparison
from sad.training.evaluate import evaluate_teacher, require_finite_score
from sad.training.inputs import RunInputs, load_inputs


def cache_teacher(
    config: DistillConfig, options: CacheOptions, *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the targets of ``config.teacher`` on the text of ``config`` to ``options.output``; or
    those of a teacher that a server runs, or targets and text from files, if ``options`` say so.
    Hidden states from files are those of ``config.teacher``.

    A cache that is there and unfinished is finished; one of other facts is refused, and one that is
    whole is left alone. Under torchrun the shards are shared out, each process with a teacher of
    its own. Raises ``UsageError``, ``UnfitError``, ``OutputError``, and ``StoppedError`` after a
    signal: the same command then goes on.
    """
    if config.teacher is None and not options.from_elsewhere:
        raise UsageError(
            "teacher must be given to cache its targets, got none; name a model in the file"
        )
    if config.cross_tokenizer is not None:
        require_cached_comparison(config, options)
    if not options.from_elsewhere:  # the file may name the cache that is made now
        config = replace(config, teacher_cache=None)
    use_own_device()
    folder = Path(options.output).expanduser()
    with (
        whole_world(
            resolve_device(config.device).type, timeout_seconds=config.ddp_timeout
        ) as world,
        StopSignals(),
        lost_ranks_explained(world, remedy="the same command goes on, on any number of processes"),
    ):
        fill = _fill
        if options.server is not None:
            fill = fill_from_server
        elif options.import_path is not None:
            fill = fill_from_states if options.kind == "hidden" else fill_from_files
        world.from_main(partial(_claim, folder))
        if not world.main:
            return fill(config, options, folder, world, shard_bytes)
        with run_lock(folder, print):
            files.sweep_directory(folder, except_for=(READER,))  # a student may be writing it
            _forget_another_head(folder)
            return fill(config, options, folder, world, shard_bytes)


def _claim(folder: Path) -> None:
    """Make the folder, or find it empty or a cache. Raises ``UsageError``, ``OutputError``."""
    with files.output_errors(folder):
        others = strangers(folder)
    if others and not (folder / CACHE).exists():
        raise UsageError(
            f"output must be new, or hold a teacher's cache, got {folder}, which holds "
            f"{quoted(others[0], 40)}; choose another --output"
        )
    files.probe_writable(folder)


def _forget_another_head(folder: Path) -> None:
    """Delete what was written before ``cache.json``, which alone says whose it is: a command that
    was killed in between may have had another teacher."""
    if not (folder / CACHE).exists():
        with files.output_errors(folder):
            for name in (HEAD, BASIS):
                (folder / name).unlink(missing_ok=True)


def _fill(
    config: DistillConfig, options: CacheOptions, folder: Path, world: World, shard_bytes: int
) -> Path:
    say = partial(print, flush=True) if world.main else lambda _: None
    # Each process has a whole teacher of its own: none computes together with another.
    inputs = world.main_first(partial(load_inputs, config, say, ALONE))
    teacher = inputs.frozen_teacher
    assert teacher is not None
    length = planned_length(config, len(inputs.train_rows), 1)
    facts = world.main_first(
        partial(_facts, config, options, inputs, teacher, length, folder, shard_bytes)
    )
    sections = sections_of(config, facts, inputs, length)
    per_shard = sections["train"].shards.names()
    world.from_main(partial(require_same_cache, folder, facts))
    outcomes = None if inputs.comparison is None else inputs.comparison.outcomes
    asked = teacher if outcomes is None else TeacherSource(teacher, facts, None, outcomes)
    if nothing_to_write(folder, facts, sections, inputs.device, asked, say, check=options.check):
        return folder
    width = teacher.head().weight.shape[1]
    world.from_main(partial(require_space, folder, facts, sections, width, options.window))
    world.main_first(partial(_begin, config, options, folder, facts, inputs, teacher, say))

    def first_states() -> Iterator[Tensor]:
        rows = sections["train"]
        for shard in range(len(rows.shards)):
            for _, numbers in rows.batches(shard):
                yield final_states(teacher, inputs.train_rows.batch(numbers).to(inputs.device))

    codec = world.main_first(partial(make_codec, facts, folder, teacher.device, first_states))
    source = TeacherSource(teacher, facts, codec, outcomes)
    with cache_writer(
        folder, facts, sections, source, inputs.device, config, world, window=options.window
    ) as writer:
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
    temperatures: tuple[float, ...] = ()
    sparse = options.kind != "hidden" and config.cross_tokenizer != "likelihood"
    if sparse:
        temperatures = options.temperatures or (config.temperature,)
    if sparse and options.kind == "topk":  # evaluations read them at 1
        temperatures = tuple(sorted({1.0, *temperatures}))
    order = None
    if options.window:
        order = RunOrder(config.seed, length.micro_batches, length.batch_size)
    batch_rows = length.batch_size
    subset, count = rows_to_cache(inputs, config, length, options)
    attention = getattr(teacher.model.config, "_attn_implementation", None)
    facts = CacheFacts(
        kind="likelihood" if config.cross_tokenizer == "likelihood" else options.kind,
        codec=options.codec_or_default,
        top_k=options.top_k if sparse else None,
        temperatures=temperatures,
        seed=config.seed,
        train_rows=inputs.train_rows.fingerprint,
        eval_rows=inputs.eval_rows.fingerprint,
        max_length=config.max_length,
        packing=config.packing,
        tokenizer=fingerprint(inputs.tokenizer),
        valid_vocab=inputs.valid_vocab,
        vocab_map=inputs.vocabulary,
        cross_tokenizer=inputs.cross_tokenizer,
        teacher=TeacherFacts(
            config.teacher or "",
            inputs.teacher_fingerprint or {},
            str(teacher_dtype(config)).removeprefix("torch."),
            config.teacher_quantization,
            attention,
        ),
        head=write_head(teacher, folder) if options.kind == "hidden" else None,
        order=order,
        subset=subset if order is None else None,
        batch_rows=batch_rows,
        rows_per_shard=1,
        train_places=count if order is None else length.micro_batches * batch_rows,
        eval_batch_rows=config.per_device_eval_batch_size,
        eval_rows_per_shard=1,
        eval_places=scored_places(config, inputs),
    )
    return with_shards(facts, shard_bytes, teacher.head().weight.shape[1])


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
        "parameters": parameter_count(teacher.model),
        "model_type": teacher.model.config.model_type,
        "scores": scores,
        "scored_rows": scored,
        "window": options.window,
    }
    if facts.vocab_map is not None:
        notes["vocabulary"] = list(inputs.tokenizer_notes)
    if facts.kind == "topk":
        notes["tail"] = share = _mean_tail(config, facts, inputs, teacher)
        warn_of_tail(share, facts, say, "than one of --kind sampled of the same size")
    begin_cache(folder, facts, notes)


def _mean_tail(
    config: DistillConfig, facts: CacheFacts, inputs: RunInputs, teacher: FrozenTeacher
) -> float:
    """Mean mass beyond the K most likely ids at temperature 1, in the first held-out batch."""
    batch = next(iter(inputs.eval_batches(config)))
    outcomes = None if inputs.comparison is None else inputs.comparison.outcomes
    records = TeacherSource(teacher, facts, None, outcomes).records(
        batch, "topk", torch.zeros(int(batch.lengths.sum()), dtype=torch.float64)
    )
    learned = (batch.labels >= 0).cpu()
    if batch.theirs is not None:
        learned &= batch.theirs.boundaries.cpu()
    learned = learned[inputs_of(batch)]
    tail = records["tail"][learned][:, facts.temperatures.index(1.0)]
    return float(tail.mean()) if len(tail) else 0.0
