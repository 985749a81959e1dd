"""What a run with ``cross_tokenizer`` reads: aligned rows, and how it compares on them."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.data.alignment import AlignedRows, Side, align_documents
from sad.data.outcomes import run_outcomes
from sad.data.rows import PackedRows, cache_directory
from sad.data.split import split_documents
from sad.data.tokenizers import fingerprint
from sad.distributed.world import World
from sad.errors import UsageError
from sad.losses.cross_tokenizer import CrossTokenizerLoss
from sad.losses.prefix_inside import InsideTeacherTokens
from sad.teachers.cache.facts import CrossFacts


def require_one_process(world: World) -> None:
    """Raise ``UsageError`` on several processes."""
    if world.size > 1:
        raise UsageError(
            f"cross_tokenizer must be left out on several processes, got WORLD_SIZE={world.size}; "
            "run one process, or choose a teacher with the student's tokenizer"
        )


def require_cached_comparison(config: DistillConfig, options: CacheOptions) -> None:
    """Raise ``UsageError`` for targets of a teacher with another tokenizer that are not cached."""
    kind, remedy = options.kind, "let `sad distill` run the teacher"
    temperatures = options.temperatures or (config.temperature,)
    if options.import_path is not None:
        raise UsageError(
            f"cross_tokenizer must be left out with --import, got {config.cross_tokenizer}; files "
            "hold targets for the student's own ids: name a teacher, or --server"
        )
    if config.cross_tokenizer == "likelihood":
        if kind == "hidden" or options.temperatures is not None:
            name = "kind" if kind == "hidden" else "temperatures"
            raise UsageError(
                f"{name} must be left out with cross_tokenizer likelihood, got --{name}; the "
                "likelihood of the text is all that is kept"
            )
        return
    if config.likelihood_weight:
        raise UsageError(
            f"likelihood_weight must be 0 to cache targets, got {config.likelihood_weight:g}; a "
            f"cache holds outcomes or likelihoods, not both: leave it out, or {remedy}"
        )
    if config.prefix_inside:
        raise UsageError(
            "prefix_inside must be false to cache targets, got true; it needs the teacher's logits "
            f"inside its tokens: leave it out, or {remedy}"
        )
    if options.server is not None:
        raise UsageError(
            "cross_tokenizer must be likelihood with --server, got prefix; it gives a few of the "
            "teacher's ids, and outcomes need them all: name a teacher that runs here"
        )
    if kind == "hidden":
        raise UsageError(
            "kind must be sampled or topk with cross_tokenizer, got hidden; outcomes are kept at "
            "the student's positions: write --kind sampled"
        )
    if kind == "topk" and set(temperatures) != {1.0}:
        given = ", ".join(f"{t:g}" for t in temperatures)
        raise UsageError(
            f"temperatures must be 1 with --kind topk and cross_tokenizer, got {given}; sums of "
            "probabilities cannot be taken to another temperature: write --kind sampled"
        )


def load_comparison(
    config: DistillConfig,
    ours: PreTrainedTokenizerFast,
    theirs: PreTrainedTokenizerFast,
    device: torch.device,
) -> tuple[AlignedRows, AlignedRows, CrossTokenizerLoss, tuple[str, ...]]:
    """Training rows and held-out rows of both tokenizers, the loss on them, and notes for the
    header. Raises like ``split_documents`` and ``align_documents``."""
    train_rows, eval_rows = (
        align_documents(
            documents,
            ours,
            theirs,
            max_length=config.max_length,
            packing=config.packing,
            cache_dir=cache_directory(config.data.cache_dir),
            config=config.data,
        )
        for documents in split_documents(config.data, run_dir=config.output_dir)
    )
    sides = (Side.of(ours, config.data, "student"), Side.of(theirs, config.data, "teacher"))
    threshold = config.outcome_threshold if config.closed_outcomes else None
    tables = run_outcomes(*sides, train_rows, threshold)
    inside = None
    if config.prefix_inside:
        inside = InsideTeacherTokens(sides[0].bytes, sides[1].bytes, tables)
    loss = CrossTokenizerLoss(
        tables,
        device,
        likelihood=config.cross_tokenizer == "likelihood",
        inside=inside,
        likelihood_weight=config.likelihood_weight,
        chunk_bytes=config.chunk_bytes,
        impl=config.impl,
    )
    boundaries = train_rows.num_boundaries
    notes = (
        f"the teacher has another tokenizer: {len(sides[1].bytes):,} ids; "
        f"{train_rows.theirs.num_tokens:,} tokens of the training text, which both end at "
        f"{boundaries / max(int(train_rows.num_targets.sum()), 1):.1%} of the student's targets",
        *(f"outcomes: {note}" for note in tables.notes),
    )
    return train_rows, eval_rows, loss, notes


def cross_facts(theirs: PreTrainedTokenizerFast, loss: CrossTokenizerLoss) -> CrossFacts:
    """What a cache of the teacher's targets depends on beside its rows."""
    if loss.likelihood:
        return CrossFacts(fingerprint(theirs), None, None)
    return CrossFacts(fingerprint(theirs), loss.tables.hash, loss.tables.count)


def read_by_teacher(rows: PackedRows) -> PackedRows:
    """The rows in the tokens that the teacher reads."""
    return rows.theirs if isinstance(rows, AlignedRows) else rows
