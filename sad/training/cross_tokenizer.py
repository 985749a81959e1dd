"""What a run with ``cross_tokenizer`` reads: aligned rows, and how it compares on them."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DistillConfig
from sad.data.alignment import AlignedRows, Side, align_documents
from sad.data.outcomes import run_outcomes
from sad.data.rows import PackedRows, cache_directory
from sad.data.split import split_documents
from sad.distributed.world import World
from sad.errors import UsageError
from sad.losses.cross_tokenizer import CrossTokenizerLoss
from sad.losses.prefix_inside import InsideTeacherTokens


def require_one_process(world: World) -> None:
    """Raise ``UsageError`` on several processes."""
    if world.size > 1:
        raise UsageError(
            f"cross_tokenizer must be left out on several processes, got WORLD_SIZE={world.size}; "
            "run one process, or choose a teacher with the student's tokenizer"
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


def read_by_teacher(rows: PackedRows) -> PackedRows:
    """The rows in the tokens that the teacher reads."""
    return rows.theirs if isinstance(rows, AlignedRows) else rows
