"""Whether a cache is one of a run's own teacher, text and objective; what differs is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sad_kernels._divergence_table import DIVERGENCES

from sad.config.cache_options import ImportFormat
from sad.config.schema import DistillConfig
from sad.errors import UnfitError, printable, shortened
from sad.teachers.cache.facts import CacheFacts, CrossFacts, RunOrder
from sad.teachers.fingerprint import known_fingerprints

FROM_FINAL_STATES = frozenset({"feature", "contrastive"})
"""Structural losses that need no more of a teacher than its final hidden states."""

ELSEWHERE = frozenset({"served", *get_args(ImportFormat)})
"""What stands for the dtype of teachers whose files were never seen."""

MAKE_AGAIN = "make the cache again with this file"


@dataclass(frozen=True)
class RunFacts:
    """What a run knows of itself that its teacher's cache must agree with."""

    train_rows: str
    """Fingerprint of the packed rows."""
    eval_rows: str
    eval_places: int
    """Held-out rows that an evaluation scores."""
    tokenizer: str
    valid_vocab: int
    order: RunOrder
    num_rows: int
    """Training rows."""
    vocab_map: str | None
    """Hash of the map that the run names in ``vocab_map``; None for a run that names none."""
    cross_tokenizer: CrossFacts | None
    """How the run compares its student with a teacher that has another tokenizer."""


def require_own_cache(
    facts: CacheFacts,
    notes: Mapping[str, Any],
    config: DistillConfig,
    run: RunFacts,
    folder: Path,
    memory: Path,
) -> None:
    """Raise ``UnfitError`` unless a run may train from this cache: with the reason, the cache's
    value and the run's. ``memory`` is where hashes of files are remembered."""

    def same(what: str, cached: object, ours: object, remedy: str = MAKE_AGAIN) -> None:
        if cached != ours:
            raise UnfitError(
                f"teacher_cache must be made for this run's {what}, got {_shown(cached)} in "
                f"{folder} and {_shown(ours)} in the run; {remedy}"
            )

    same("max_length", facts.max_length, config.max_length, "set it, or " + MAKE_AGAIN)
    same("packing", facts.packing, config.packing, "set it, or " + MAKE_AGAIN)
    same("tokenizer (fingerprint)", facts.tokenizer, run.tokenizer)
    same("vocabulary", facts.valid_vocab, run.valid_vocab)
    theirs, ours = facts.cross_tokenizer, run.cross_tokenizer
    if theirs is None or ours is None:
        cached, mode = ("none" if one is None else one.mode for one in (theirs, ours))
        same("cross_tokenizer", cached, mode, "set it, or " + MAKE_AGAIN)
    else:
        same("cross_tokenizer", theirs.mode, ours.mode, "set it, or " + MAKE_AGAIN)
        same("teacher's tokenizer (fingerprint)", theirs.tokenizer, ours.tokenizer)
    if run.vocab_map is not None:
        cached = None if facts.vocab_map is None else facts.vocab_map.hash
        same("vocab_map (hash)", cached, run.vocab_map, f"{MAKE_AGAIN}, or leave vocab_map out")
    same("training text (fingerprint of its rows)", facts.train_rows, run.train_rows)
    same("held-out text (fingerprint of its rows)", facts.eval_rows, run.eval_rows)
    if theirs is not None and ours is not None:
        remedy = f"set closed_outcomes and outcome_threshold, or {MAKE_AGAIN}"
        same("outcomes (hash of their tables)", theirs.outcomes, ours.outcomes, remedy)
    if facts.kind != "likelihood" and run.eval_places > facts.eval_places:
        raise UnfitError(
            f"teacher_cache must hold the held-out rows that are scored, got {facts.eval_places} "
            f"in {folder} and {run.eval_places} in the run; lower max_eval_rows, or {MAKE_AGAIN}"
        )
    _require_teacher(facts, config, same, memory)
    _require_objective(facts, config, folder)
    if facts.subset is not None:
        same("number of training rows", facts.subset.of, run.num_rows)
    if facts.order is None:
        rows = run.num_rows if facts.subset is None else facts.subset.rows
        same("number of rows", facts.train_places, rows)
    places = run.order.micro_batches * run.order.rows_per_micro_batch
    if facts.subset is not None and (
        facts.subset.seed != run.order.seed or min(places, facts.subset.of) > facts.subset.rows
    ):
        raise UnfitError(
            f"teacher_cache must hold the rows that the run reads, got in {folder} the "
            f"{facts.subset.rows} that runs of seed {facts.subset.seed} read first, and {places} "
            f"of seed {run.order.seed} in the run; make the cache again with this file, or of all "
            "rows: --all_rows"
        )
    if facts.order is not None:
        _require_window(notes, facts, config, run, folder)
        for name, what in (
            ("seed", "seed"),
            ("micro_batches", "length in micro-batches"),
            ("rows_per_micro_batch", "rows per micro-batch"),
        ):
            same(what, getattr(facts.order, name), getattr(run.order, name))
        same("number of rows", facts.train_places, places)


def _require_teacher(
    facts: CacheFacts,
    config: DistillConfig,
    same: Callable[..., None],
    memory: Path,
) -> None:
    """If the run names its teacher, the cache must be its. Its weights are not read for that."""
    theirs = facts.teacher.fingerprint
    if config.teacher is None or facts.teacher.dtype in ELSEWHERE:
        return
    ours = known_fingerprints(config.teacher, memory)
    if ours is None:
        return
    for name in sorted(theirs.keys() | ours.keys()):
        cached, found = theirs.get(name, "none"), ours.get(name, "none")
        if " " not in found:  # the size alone is known
            cached = cached.partition(" ")[0]
        remedy = f"{MAKE_AGAIN}, or leave teacher out"
        same(f"teacher ({name} of {config.teacher})", cached, found, remedy)


def _require_objective(facts: CacheFacts, config: DistillConfig, folder: Path) -> None:
    """Sparse targets serve the divergences that they can, at their own temperatures."""
    kind = facts.kind
    if kind == "likelihood":  # which has no temperature
        return

    def refuse(key: str, expectation: str, value: object, remedy: str) -> None:
        raise UnfitError(
            f"{key} must {expectation} with {kind} targets, got {value} and {folder}; {remedy}"
        )

    hidden = "or cache hidden states, which serve it: --kind hidden"
    for name in config.structural_weights:
        if kind != "hidden":
            refuse(f"{name}.weight", "be 0", config.structural_weights[name], f"set it, {hidden}")
        if name not in FROM_FINAL_STATES:
            remedy = "its layers are needed: set it to 0, or leave teacher_cache out"
            refuse(f"{name}.weight", "be 0", config.structural_weights[name], remedy)
    if kind == "hidden":
        if facts.vocab_map is not None:
            require_answers(config, facts.vocab_map.missing, facts.vocab_map.masked)
        return
    if config.taid.enabled:
        refuse("taid.enabled", "be false", True, f"leave it out, {hidden}")
    if kind == "sampled" and config.kd_weight and config.divergence != "forward_kl":
        remedy = f"they are unbiased for that one alone; take --kind topk, {hidden}"
        refuse("divergence", "be forward_kl", config.divergence, remedy)
    if config.kd_weight and config.temperature not in facts.temperatures:
        known = ", ".join(f"{t:g}" for t in facts.temperatures)
        remedy = f"set it, or make the cache again with --temperatures {config.temperature:g}"
        refuse("temperature", f"be {known}", f"{config.temperature:g}", remedy)


def _require_window(
    notes: Mapping[str, Any],
    facts: CacheFacts,
    config: DistillConfig,
    run: RunFacts,
    folder: Path,
) -> None:
    """Between two checkpoints the student reads on while the teacher may delete nothing: a window
    must hold all of that, wherever it begins in a shard, or both wait for one another."""
    window, order = notes.get("window"), run.order
    if not isinstance(window, int) or window < 1:
        return
    batches = math.ceil(run.num_rows / order.rows_per_micro_batch)
    if config.save_steps is not None:
        batches = min(batches, config.save_steps * config.gradient_accumulation_steps)
    batches += config.gradient_accumulation_steps  # the window of micro-batches after it
    needed = math.ceil(batches * order.rows_per_micro_batch / facts.rows_per_shard) + 1
    needed = min(needed, math.ceil(facts.train_places / facts.rows_per_shard))
    if window < needed:
        raise UnfitError(
            f"teacher_cache must keep the {needed} shards that may be read between two "
            f"checkpoints, got a window of {window} in {folder}; lower save_steps, or make the "
            f"cache with --window {needed}"
        )


def require_answers(config: DistillConfig, missing: int, masked: int) -> None:
    """Raise ``UnfitError`` for an objective that a teacher cannot serve which lacks ``missing`` of
    the student's ids, and has no answer for ``masked`` of the targets."""
    if missing and config.kd_weight and DIVERGENCES[config.divergence].needs_full_support:
        raise UnfitError(
            f"divergence must be finite where the teacher has no probability, got "
            f"{config.divergence} and {missing} ids that the teacher lacks; take forward_kl or jsd"
        )
    for name, weight in config.structural_weights.items():
        if masked:
            raise UnfitError(
                f"{name}.weight must be 0 where the teacher cannot read all of the text, got "
                f"{weight:g} and {masked:,} targets behind a token that it lacks; set it to 0, or "
                "leave such documents out"
            )


def _shown(value: object) -> str:
    return shortened(printable(str(value)), 40)
