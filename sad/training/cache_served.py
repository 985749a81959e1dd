"""``sad cache-teacher --server URL``: the targets of a teacher that a server runs.

The server is asked once, while the cache is written, and takes no part in training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig, ce_only
from sad.data.batch import Batch
from sad.data.tokenizers import fingerprint
from sad.distributed.world import ALONE, World
from sad.environment import library_versions
from sad.errors import UnfitError, UsageError
from sad.optim.schedule import planned_length
from sad.teachers.cache.facts import CacheFacts, TeacherFacts
from sad.teachers.cache.files import CACHE, read_facts
from sad.teachers.cache.served import (
    ServedLikelihood,
    ServedSource,
    require_same_answers,
    require_same_likelihood,
)
from sad.teachers.cache.server import TeacherServer, card_hash
from sad.teachers.cache.writer import SectionRows
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
)
from sad.training.cross_tokenizer import read_by_teacher
from sad.training.inputs import RunInputs, load_inputs

Served = ServedSource | ServedLikelihood

BATCH_ROWS = 32
"""Rows whose segments are asked for at a time, at least: the server must not run dry."""


def fill_from_server(
    config: DistillConfig, options: CacheOptions, folder: Path, world: World, shard_bytes: int
) -> Path:
    """As ``cache_teacher``, by asking ``options.server``. The text's tokenizer is the student's.

    Raises ``UsageError`` also for a server that cannot be reached or refuses the question, and
    ``UnfitError`` for one whose answers cannot be right, or that is not the one that was asked
    before.
    """
    say = partial(print, flush=True) if world.main else lambda _: None
    require_temperature_1(config, "--server")
    server = build_server(config, options)
    card = world.main_first(server.card)
    say(f"asking {server.url} for the targets of {card['id']}")
    inputs = world.main_first(partial(load_inputs, without_teacher(config), say, ALONE))
    _require_fit(inputs, options, card)
    facts = _facts(config, options, inputs, card, shard_bytes)
    sections = sections_of(config, facts, inputs, planned_length(config, len(inputs.train_rows), 1))
    world.from_main(partial(require_same_cache, folder, facts))
    source = ServedSource(server, facts) if facts.top_k else ServedLikelihood(server)
    if nothing_to_write(folder, facts, sections, inputs.device, source, say, check=options.check):
        return folder
    world.from_main(partial(require_space, folder, facts, sections))
    world.main_first(partial(_begin, folder, facts, source, sections["train"], say))
    with cache_writer(folder, facts, sections, source, inputs.device, config, world) as writer:
        writer.write_section("eval")
        writer.write_section("train")
        _require_same_server(folder, source, sections["train"])
        if world.from_main(writer.finish):
            count = len(sections["train"].shards)
            say(f"{folder} is whole: {count} shards of {facts.kind} targets")
    return folder


def build_server(config: DistillConfig, options: CacheOptions) -> TeacherServer:
    """The client of the server that the options name. Raises ``UsageError`` without its key."""
    assert options.server is not None
    key = ""
    if options.server_key_env is not None:
        key = os.environ.get(options.server_key_env, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise UsageError(
                "server_key_env must name an environment variable that holds the server's key, "
                f"got {options.server_key_env}, which holds none; export it"
            )
    return TeacherServer(
        options.server,
        options.server_kind,
        key=key,
        model=options.server_model,
        patience=config.teacher_wait,
    )


def without_teacher(config: DistillConfig) -> DistillConfig:
    """The same text, tokenizer and rows, for a run that loads no teacher."""
    changes: dict[str, Any] = ce_only() | {
        "teacher": None,
        "teacher_tokenizer": config.cross_tokenizer
        and (config.teacher_tokenizer or config.teacher),
        "teacher_cache": None,
        "student_init": "pretrained",
        "student_layers": None,
        "metric_for_best_model": None,
    }
    return replace(config, **changes)


def require_temperature_1(config: DistillConfig, source: str) -> None:
    """Raise ``UsageError`` for a temperature that targets from elsewhere cannot be read at."""
    likelihood = config.cross_tokenizer == "likelihood"  # which has none
    if config.kd_weight and config.temperature != 1 and not likelihood:
        raise UsageError(
            f"temperature must be 1 with {source}, got {config.temperature:g}; the normaliser of "
            "another temperature is not known: write temperature: 1"
        )


def _require_fit(inputs: RunInputs, options: CacheOptions, card: dict[str, Any]) -> None:
    """Refuse what the server cannot answer."""
    likelihood = inputs.cross_tokenizer is not None
    if options.top_k > inputs.valid_vocab and not likelihood:
        raise UsageError(
            f"top_k must be at most {inputs.valid_vocab:,}, the ids of the tokenizer, got "
            f"{options.top_k}; lower --top_k"
        )
    limit = card.get("max_model_len")
    read = (read_by_teacher(rows) for rows in (inputs.train_rows, inputs.eval_rows))
    longest = max(rows.longest_segment for rows in read) + 2
    if isinstance(limit, int) and longest > limit:
        raise UnfitError(
            f"the server must take {longest:,} tokens (a row, the token after it and one more), "
            f"got a max_model_len of {limit:,} for {card['id']}; lower max_length, or start the "
            f"server with --max-model-len {longest}"
        )


def _facts(
    config: DistillConfig,
    options: CacheOptions,
    inputs: RunInputs,
    card: dict[str, Any],
    shard_bytes: int,
) -> CacheFacts:
    length = planned_length(config, len(inputs.train_rows), 1)
    subset, count = rows_to_cache(inputs, config, length, options)
    likelihood = inputs.cross_tokenizer is not None
    facts = CacheFacts(
        kind="likelihood" if likelihood else "topk",
        codec=None,
        top_k=None if likelihood else options.top_k,
        temperatures=() if likelihood else (1.0,),
        seed=config.seed,
        train_rows=inputs.train_rows.fingerprint,
        eval_rows=inputs.eval_rows.fingerprint,
        max_length=config.max_length,
        packing=config.packing,
        tokenizer=fingerprint(inputs.tokenizer),
        valid_vocab=inputs.valid_vocab,
        teacher=TeacherFacts(card["id"], {"served": card_hash(card)}, "served"),
        head=None,
        order=None,
        subset=subset,
        vocab_map=None,
        cross_tokenizer=inputs.cross_tokenizer,
        batch_rows=max(config.per_device_train_batch_size, BATCH_ROWS),
        rows_per_shard=1,
        train_places=count,
        eval_batch_rows=max(config.per_device_eval_batch_size, BATCH_ROWS),
        eval_rows_per_shard=1,
        eval_places=scored_places(config, inputs),
    )
    return with_shards(facts, shard_bytes)


def _begin(folder: Path, facts: CacheFacts, source: Served, rows: SectionRows, say: Any) -> None:
    """Write ``cache.json`` with the server's first answers, or compare them with those in it."""
    if (folder / CACHE).exists():
        return _require_same_server(folder, source, rows)
    probes = source.probes(_first_batches(rows))
    notes: dict[str, Any] = {"versions": library_versions(), "probes": probes}
    if facts.kind == "topk":
        notes["tail"] = tail = sum(probe["tail"] for probe in probes) / max(len(probes), 1)
        warn_of_tail(tail, facts, say)
    begin_cache(folder, facts, notes)


def _require_same_server(folder: Path, source: Served, rows: SectionRows) -> None:
    found = read_facts(folder)
    assert found is not None
    sparse = isinstance(source, ServedSource)
    require_same = require_same_answers if sparse else require_same_likelihood
    require_same(found[1]["probes"], source.probes(_first_batches(rows)), folder)


def _first_batches(rows: SectionRows) -> Iterator[Batch]:
    for shard in range(len(rows.shards)):
        for _, numbers in rows.batches(shard):
            for number in numbers:
                yield rows.rows.batch([number])
